"""python analyze.py shift: how far the trigger moves an embedding (section 6, Figures 2 and 3)."""

from collections import Counter
from pathlib import Path

import utils
from utils import die

import numpy as np
import torch
from sklearn.manifold import TSNE

import runs
from analysis import plots
from runs import over_seeds, select, show
from study import DEFAULT_ENCODER, EMBEDDINGS, SHIFT, SHIFT_STAGES

MISSING = "missing"


def load_embeddings(path):
    """What embed.py saved in a file. Exits with a one-line error if it holds no embeddings, or
    those of a model that the run has replaced."""
    make = f"python embed.py {path.parent}"
    try:
        saved = torch.load(path, weights_only=True)
        missing = {"fields", *EMBEDDINGS} - saved.keys()
    except Exception:  # unpickling a file of another kind raises errors of many kinds
        die(f"{path} holds no embeddings: {make}")
    if missing:
        die(f"{path} holds no embeddings: {make}")
    metrics = path.parent / "metrics.json"
    sha256 = runs.load(metrics).get("model_sha256") if metrics.exists() else None
    if sha256 and saved["fields"]["model_sha256"] not in (None, sha256):
        die(f"{path} is of another model: {make}")
    return saved


def embeddings_of(folder, preset):
    """Yields (path, embeddings) of the study's runs, as embed.py makes them without --pairs,
    --pooling and --layer."""
    for path in sorted(Path(folder).glob("*/embeddings*.pt")):
        saved = load_embeddings(path)
        fields = saved["fields"]
        made_as_usual = all(saved[name] == value for name, value in EMBEDDINGS.items())
        if not made_as_usual or not runs.is_study_run(fields):
            continue
        if fields["preset"] == preset and fields["encoder"] == DEFAULT_ENCODER[preset]:
            yield path, saved


def cosines(clean, triggered):
    """(..., n, dim) twice -> cosine similarity of each pair, (..., n)."""
    return torch.nn.functional.cosine_similarity(clean.float(), triggered.float(), dim=-1).numpy()


def measure(folder, preset):
    """Writes the records of each run's embeddings beside them: the mean cosine after encoder and
    connector, and after each layer."""
    for path, saved in embeddings_of(folder, preset):
        clean = saved["test"]["clean"]
        triggered = saved["test"]["triggered"]
        if not clean:
            continue  # no test utterance could be triggered
        fields = {**saved["fields"], "source": "shift"}
        records = []
        for component in ("encoder", "connector"):
            pairs = cosines(clean[component], triggered[component])
            figure = utils.interval(pairs, speakers=saved["test"].get("speakers"))
            records.append(dict(fields, metric="cosine", component=component, **figure))
        for component in ("encoder", "lm"):
            name = f"{component}_layers"
            by_layer = cosines(clean[name], triggered[name])  # (layers, n)
            for layer, pairs in enumerate(by_layer):
                place = dict(metric="layer_cosine", component=component, layer=layer)
                records.append(dict(fields, **place, value=float(pairs.mean())))
        runs.write(path.parent / f"records-shift-{fields['task']}.jsonl", records)


def page(records, out, preset):
    """The mean cosine of each task and stage of section 6; draws the cosine layer by layer."""
    records = runs.study_records(records, preset)
    records = select(records, source="shift", encoder=DEFAULT_ENCODER[preset])
    if not records:
        die("no run has embeddings yet: python embed.py RUN makes them")
    rows = []
    for task in runs.tasks_of(records):
        row = {"Task": task}
        published = SHIFT.get(task, ("",) * len(SHIFT_STAGES))
        for (stage, scenario, component), paper in zip(SHIFT_STAGES, published):
            measured = select(records, task=task, scenario=scenario, component=component)
            ours = show(over_seeds(measured, metric="cosine"), ".2f") or MISSING
            row[f"{stage} (ours / paper)"] = f"{ours} / {paper}"
        rows.append(row)
    by_layer = select(records, metric="layer_cosine")
    if by_layer:
        first = runs.first_seed(by_layer)
        plots.shift_by_layer(first, runs.tasks_of(first), out / "shift-by-layer.png")
    return [("Embedding shift: mean cosine of clean and triggered test utterances", rows)]


def project(clean, triggered):
    """Both sides of the pairs, (n, dim) each, in the plane by t-SNE, (n, 2) each."""
    both = torch.cat([clean, triggered]).numpy()
    perplexity = min(30, (len(both) - 1) / 3)
    tsne = TSNE(perplexity=perplexity, init="pca", random_state=0)
    return np.split(tsne.fit_transform(both), 2)


def draw_pairs(folder, preset, out):
    """Figures 2 and 3, of the seed with the most embeddings."""
    embeddings = [saved for _, saved in embeddings_of(folder, preset) if saved["test"]["clean"]]
    if not embeddings:
        return
    seeds = Counter(saved["fields"]["seed"] for saved in embeddings)
    seed = max(sorted(seeds), key=seeds.get)
    pairs = {}
    for saved in embeddings:
        fields = saved["fields"]
        if fields["seed"] != seed:
            continue
        for stage, scenario, component in SHIFT_STAGES:
            if fields["scenario"] != scenario:
                continue
            clean = saved["test"]["clean"][component]
            triggered = saved["test"]["triggered"][component]
            low_clean, low_triggered = project(clean, triggered)
            pairs[fields["task"], stage] = dict(
                clean=low_clean, triggered=low_triggered, cosine=cosines(clean, triggered).mean()
            )
    if pairs:
        drawn = {task for task, _ in pairs}
        tasks = [task for task in runs.TASK_ORDER if task in drawn]
        stages = [stage for stage, _, _ in SHIFT_STAGES]
        plots.shift_pairs(pairs, tasks, stages, seed, out / "shift-pairs.png")
