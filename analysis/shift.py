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


def embeddings_of(folder, preset):
    """Yields (path, saved) of the study's own embeddings, those that embed.py makes without
    --pairs, --pooling and --layer."""
    for path in sorted(Path(folder).glob("*/embeddings*.pt")):
        make = f"python embed.py {path.parent}"
        try:
            saved = torch.load(path, weights_only=True)
            fields, usual = saved["fields"], {name: saved[name] for name in EMBEDDINGS}
        except Exception:  # unpickling a file of another kind raises errors of many kinds
            die(f"{path} holds no embeddings: {make}")
        metrics = path.parent / "metrics.json"
        sha256 = runs.load(metrics).get("model_sha256") if metrics.exists() else None
        if sha256 and fields["model_sha256"] not in (None, sha256):
            die(f"{path} is of another model: {make}")
        own = usual == EMBEDDINGS and runs.is_own(fields) and fields["preset"] == preset
        if own and fields["encoder"] == DEFAULT_ENCODER[preset]:
            yield path, saved


def cosines(clean, triggered):
    """(..., n, dim) twice -> cosine similarity of each pair, (..., n)."""
    return torch.nn.functional.cosine_similarity(clean.float(), triggered.float(), dim=-1).numpy()


def measure(folder, preset):
    """Writes the records of each run's embeddings beside them: the mean cosine after encoder and
    connector, and by layer."""
    for path, saved in embeddings_of(folder, preset):
        clean, triggered = saved["test"]["clean"], saved["test"]["triggered"]
        if not clean:
            continue  # no test utterance could be triggered
        fields, records = dict(saved["fields"], source="shift"), []
        for component in ("encoder", "connector"):
            figure = utils.interval(cosines(clean[component], triggered[component]))
            records.append(dict(fields, metric="cosine", component=component, **figure))
        for component in ("encoder", "lm"):
            layers = f"{component}_layers"
            for layer, pairs in enumerate(cosines(clean[layers], triggered[layers])):
                what = dict(metric="layer_cosine", component=component, layer=layer)
                records.append(dict(fields, **what, value=float(pairs.mean())))
        runs.write(path.parent / f"records-shift-{fields['task']}.jsonl", records)


def page(records, out, preset, folder=None):
    records = select(runs.own(records, preset), source="shift", encoder=DEFAULT_ENCODER[preset])
    if not records:
        die("no run has embeddings yet: python embed.py RUN makes them")
    rows = []
    for task in runs.tasks_of(records):
        row = {"Task": task}
        for (stage, scenario, component), paper in zip(SHIFT_STAGES, SHIFT.get(task, ("",) * 3)):
            own = select(records, task=task, scenario=scenario, component=component)
            mean = show(over_seeds(own, metric="cosine"), ".2f") or MISSING
            row[f"{stage} (ours / paper)"] = f"{mean} / {paper}"
        rows.append(row)
    by_layer = select(records, metric="layer_cosine")
    if by_layer:
        first = select(by_layer, seed=min(runs.distinct(by_layer, "seed")))
        plots.shift_by_layer(first, runs.tasks_of(first), out / "shift-by-layer.png")
    if folder:
        draw_pairs(folder, preset, out)
    return [("Embedding shift: mean cosine of clean and triggered test utterances", rows)]


def draw_pairs(folder, preset, out):
    """Figures 2 and 3 of the seed with most embeddings."""
    saved = [s for _, s in embeddings_of(folder, preset) if s["test"]["clean"]]
    seeds = Counter(s["fields"]["seed"] for s in saved)
    if not seeds:
        return
    drawn, points = max(sorted(seeds), key=seeds.get), {}
    for one in saved:
        for stage, scenario, component in SHIFT_STAGES:
            fields = one["fields"]
            if (fields["scenario"], fields["seed"]) != (scenario, drawn):
                continue
            clean, triggered = (one["test"][kind][component] for kind in ("clean", "triggered"))
            both = torch.cat([clean, triggered]).numpy()
            neighbours = min(30, (len(both) - 1) / 3)
            flat = TSNE(perplexity=neighbours, init="pca", random_state=0).fit_transform(both)
            points[fields["task"], stage] = (*np.split(flat, 2), cosines(clean, triggered).mean())
    drawn_tasks = {task for task, _ in points}
    tasks = [task for task in runs.TASK_ORDER if task in drawn_tasks]
    if points:
        stages = [stage for stage, _, _ in SHIFT_STAGES]
        plots.shift_pairs(points, tasks, stages, drawn, out / "shift-pairs.png")
