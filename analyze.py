"""Turns what has run into tables and pictures; needs no model, no audio, no GPU.

    python analyze.py tables      # Tables 1, 2 and 3 of the paper, to runs/analysis/tables.md
    python analyze.py shift       # Figures 2 and 3, from the runs' embeddings (embed.py)
    python analyze.py cluster     # Figures 4, 5 and 6, from the same
    python analyze.py trace       # where the backdoor lives (trace.py)
    python analyze.py defences    # filters, detectors, repairs (defend.py)
    python analyze.py sweeps      # AER against the poisoning rate and the trigger
    python analyze.py claims      # the paper's 48 claims
    python analyze.py tables claims --runs results/mini.jsonl.gz    # one page, from a packed study
    python analyze.py claims --runs results/mini.jsonl.gz results/real.jsonl.gz     # side by side

Every analysis is a function of records (runs.py) that returns tables, [(title, [{column: cell}])];
pictures are drawn by analysis/plots.py. It reads the study's own runs, by the names study.py gives them;
runs with other settings have other names.
"""

import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

import utils
from utils import ROOT, Parser, count, die

import numpy as np
import torch
from sklearn.manifold import TSNE

import runs
from analysis import claims as rules
from analysis import clustering, plots
from runs import number, over_seeds, select, show, title_of
from study import (
    COMPONENTS,
    DEFAULT_ENCODER,
    EMBEDDINGS,
    ENCODERS,
    PRESETS,
    SCENARIOS,
    SHIFT,
    SHIFT_STAGES,
    SWEPT,
    TABLE1,
    TABLE2,
    TABLE3,
    TASKS,
    VARIANTS,
    WRITTEN,
    identity,
    run_name,
)

MISSING = "missing"
NEAR = 15  # points of AER: within them two studies agree
HALF = 0.5
# Table 3's attacks on one component: it alone learns the poison; it alone stays poisoned
TRAINED_ALONE = dict(encoder="2.1", connector="2.2", lm="2.3")
RETRAINED = dict(encoder="3.1", connector="3.2", lm="3.3")


def beside(found, published, form=".1f"):
    """A cell with our figure and the paper's."""
    ours = show(found, form) or MISSING
    return ours if published is None else f"{ours} / {published:g}"


# --------------------------------------------------------------------------------------------------
# python analyze.py tables


def tables(records, out, preset):
    records = select(runs.own(records, preset), source="metrics")
    if not records:
        die("none of these runs is of this preset's study: train some first")
    found = [table1(records), table2(records)]
    found += [table3(records, task, preset) for task in runs.tasks_of(records)]
    found.append(other_tasks(records))
    return [(title, rows) for title, rows in found if rows]


def table1(records):
    """Clean baselines, one column an encoder."""
    clean = select(records, scenario="clean", part="clean")
    encoders = [name for name in ENCODERS if name in runs.distinct(records, "encoder")]
    rows = []
    for (corpus, task), published in TABLE1.items():
        paper = dict(zip(ENCODERS, published))
        metric = TASKS[task]["metric"]
        found = {
            encoder: over_seeds(clean, corpus=corpus, metric=metric, encoder=encoder)
            for encoder in encoders
        }
        if any(found.values()):
            cells = {encoder: beside(found[encoder], paper[encoder]) for encoder in encoders}
            rows.append({"Corpus": corpus, "Task": f"{task} ({title_of(metric)})", **cells})
    return "Table 1: clean baselines (ours / paper)", rows


def attack_cells(own, baseline, metric, paper):
    """The columns that Tables 2 and 3 share, for the records of one attack and of the clean runs
    beside it; paper: its AER and clean figure, or None each."""
    clean = over_seeds(own, part="clean", metric=metric)
    unpoisoned = over_seeds(baseline, part="clean", metric=metric)
    return {
        "AER (ours / paper)": beside(over_seeds(own, part="backdoor", metric="aer"), paper[0]),
        "Clean (ours / paper)": beside(clean, paper[1]),
        "Minus baseline": show(runs.difference(clean, unpoisoned), "+.1f") or MISSING,
    }


def baseline_of(records, own):
    """The records of the clean runs on the corpus and with the encoder that some runs have."""
    same = {field: own[0][field] for field in ("corpus", "encoder")}
    return select(records, scenario="clean", **same)


def table2(records):
    """The base attack, one row a task and encoder."""
    learning = runs.still_learning(records)
    rows = []
    for task in runs.tasks_of(select(records, scenario="base")):
        paper = dict(zip(ENCODERS, TABLE2.get(task, ())))
        for encoder in ENCODERS:
            own = select(records, task=task, encoder=encoder, scenario="base")
            if not own:
                continue
            moving = learning & set(runs.distinct(own, "run"))
            settled = over_seeds(own, metric="settled_epoch")
            metric, baseline = runs.metric_of(own, task), baseline_of(records, own)
            rows.append(
                {
                    "Task": f"{task} ({title_of(metric)})",
                    "Encoder": encoder,
                    **attack_cells(own, baseline, metric, paper.get(encoder, (None, None))),
                    "Settled after epoch": show(settled, ".0f"),
                    "Seeds still learning": len(moving),
                }
            )
    return "Table 2: base attack", rows


def table3(records, task, preset):
    """The component analysis of one task, one row an attack."""
    records = select(records, encoder=DEFAULT_ENCODER[preset])
    attacked = [r for r in select(records, task=task) if r["scenario"] != "clean"]
    title = f"Table 3: component analysis ({task})"
    # the other tasks' study has only the base attack and 3.1
    asked = SCENARIOS if task in TABLE3 else ("1.1", "2.1")
    if not set(runs.distinct(attacked, "scenario")) & set(asked):
        return title, []
    metric, baseline = runs.metric_of(attacked, task), baseline_of(records, attacked)
    published = TABLE3.get(task, [(None, None)] * len(SCENARIOS))
    rows = []
    for (scenario, (frozen, source, trained_on)), paper in zip(SCENARIOS.items(), published):
        own = select(attacked, scenario=scenario)
        row = {"Attack": scenario}
        for component in COMPONENTS:
            held = component in frozen
            row[WRITTEN[component]] = f"frozen, {source}" if held else f"trained, {trained_on}"
        row.update(attack_cells(own, baseline, metric, paper))
        triggered = over_seeds(own, part="triggered", metric=metric)
        row[f"Triggered {title_of(metric)}"] = show(triggered) or MISSING
        if trained_on == "poisoned":
            row["Poisoned loss"] = show(over_seeds(own, metric="poisoned_loss"), ".3f")
            row["Loss"] = show(over_seeds(own, metric="loss"), ".3f")
        rows.append(row)
    return title, rows


def other_tasks(records):
    """Clean figures of the attacked model on all tasks of its corpus, and what they are beside the
    baseline's."""
    rows = []
    for task in runs.tasks_of(select(records, scenario="base")):
        for encoder in ENCODERS:
            own = select(records, task=task, encoder=encoder, scenario="base")
            aer = over_seeds(own, part="backdoor", metric="aer")
            if aer is None:
                continue
            row = {"Attacked": task, "Encoder": encoder, "AER": show(aer)}
            baseline = baseline_of(records, own)
            for other in TASKS:
                metric = runs.metric_of(own, other)
                clean = over_seeds(own, part="clean", metric=metric)
                unpoisoned = over_seeds(baseline, part="clean", metric=metric)
                row[f"Clean {title_of(metric)}"] = show(clean)
                moved = show(runs.difference(clean, unpoisoned), "+.1f")
                row[f"{title_of(metric)} minus baseline"] = moved
            rows.append(row)
    return "The remaining tasks under attack", rows


def side_by_side(studies):
    """Table 3 of each task that several studies have; studies: {name: (records, preset)}."""
    found = []
    for task, published in TABLE3.items():
        chosen = {}
        for name, (records, preset) in studies.items():
            own = select(runs.own(records, preset), source="metrics", task=task)
            own = select(own, encoder=DEFAULT_ENCODER[preset])
            if own:
                chosen[name] = own
        baseline = dict(zip(ENCODERS, TABLE1[TASKS[task]["corpus"], task]))["wavlm"]
        rows = []
        for scenario, paper in zip(("clean", *SCENARIOS), ((None, baseline), *published)):
            row = {"Attack": scenario, "Paper AER": number(paper[0], "g")}
            row["Paper clean"] = number(paper[1], "g")
            for name, own in chosen.items():
                of_attack = select(own, scenario=scenario)
                aer = over_seeds(of_attack, part="backdoor", metric="aer")
                clean = over_seeds(of_attack, part="clean", metric=TASKS[task]["metric"])
                row[f"{name} AER"] = show(aer)
                row[f"{name} clean"] = number(clean and clean.mean)
                row[f"{name} against the paper"] = against(aer, paper[0])
            rows.append(row)
        if chosen:
            found.append((f"Table 3 ({task}), study by study", rows))
    return found


def against(found, published):
    """Whether our AER agrees with the paper's, within NEAR points."""
    if found is None or published is None:
        return ""
    away = found.mean - published
    if abs(away) <= NEAR:
        return "agrees"
    return "higher" if away > 0 else "lower"


# --------------------------------------------------------------------------------------------------
# python analyze.py shift: how far the trigger moves an embedding (section 6, Figures 2 and 3)


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


def measure_shift(folder, preset):
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


def shift(records, out, preset, folder=None):
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


# --------------------------------------------------------------------------------------------------
# python analyze.py cluster: does the poison stand out in the target class (section 7, Figures 4-6)?


def measure_clusters(folder, preset, ks):
    """Writes the records of each base attack's target class beside its embeddings, a file for each
    k."""
    for path, saved in embeddings_of(folder, preset):
        train, fields = saved["train"], dict(saved["fields"], source="cluster")
        poisoned = train["poisoned"].numpy()
        if fields["scenario"] != "base" or len(poisoned) <= max(ks) or len(set(poisoned)) < 2:
            continue
        x, task = train["encoder"].numpy(), fields["task"]
        whole = clustering.whole_class(x, poisoned)
        runs.write(path.parent / "records-cluster.jsonl", [dict(fields, **r) for r in whole])
        about = train["labels"], train["speakers"]
        for k in ks:
            found = clustering.separability(x, poisoned, *about, task, k)
            name = f"records-cluster-k{k}.jsonl"
            runs.write(path.parent / name, [dict(fields, **record) for record in found])


def followed(records):
    """What clusters follow: what has the largest adjusted Rand index with them, if it is 0.1 or
    more."""
    most = max(records, key=lambda record: record["value"])
    return most["kind"] if most["value"] >= 0.1 else "nothing"


def cluster(records, out, preset, ks=(2, 4), folder=None):
    records = select(runs.own(records, preset), source="cluster", encoder=DEFAULT_ENCODER[preset])
    have = [k for k in ks if select(records, k=k)]
    if not have:
        missing = ", ".join(map(str, ks))
        die(f"no clusters of k = {missing}: embed.py first")
    rows, followers = [], []
    for task in runs.tasks_of(records):
        own = select(records, task=task)
        first = select(own, seed=min(runs.distinct(own, "seed")))
        row = {"Task": task, "Seeds": len(runs.distinct(own, "seed"))}
        for column, metric in (("Samples", "class_size"), ("Poisoned", "class_poisoned")):
            row[f"{column}, first seed"] = number(select(first, metric=metric)[0]["value"], ".0f")
        for k in have:
            of_k = select(own, k=k)
            for metric in ("purity", "recall"):
                found = over_seeds(of_k, metric=metric)
                row[f"k = {k}, {metric}"] = number(found and found.mean, ".2f")
            rand = select(of_k, metric="adjusted_rand")
            for kind in ("poison", "gender") if k == have[0] else ():
                index = over_seeds(rand, kind=kind)
                row[f"k = {k}, Rand index with {kind}"] = show(index, ".2f")
            follows = {"Task": task, "k": k}
            for seed in sorted(runs.distinct(rand, "seed")):
                follows[f"Seed {seed}"] = followed(select(rand, seed=seed))
            followers.append(follows)
        for column, metric in (("Linear probe", "probe"), ("Silhouette, k = 2", "silhouette")):
            found = over_seeds(own, metric=metric)
            row[column] = number(found and found.mean, ".2f")
        rows.append(row)
    for k in have:
        shares = {}
        for task in runs.tasks_of(select(records, k=k)):
            own = select(records, task=task, k=k)
            shares[task] = select(own, seed=min(runs.distinct(own, "seed")))
        plots.cluster_shares(shares, k, out / f"clusters-k{k}.png")
        sentences = select(shares.get("emotion", []), kind="sentence", metric="share")
        if k == 4 and sentences:
            plots.sentences(sentences, out / "clusters-sentences.png")
    if folder:
        draw_classes(folder, preset, out)
    title = "Activation clustering: means over seeds, of the most poisoned cluster"
    return [(title, rows), ("What the clusters follow, seed by seed", followers)]


def draw_classes(folder, preset, out):
    """Figure 5 of the first seed of each base attack."""
    points = {}
    for _, saved in embeddings_of(folder, preset):
        task, train = saved["fields"]["task"], saved["train"]
        if saved["fields"]["scenario"] == "base" and task not in points and len(train["ids"]) > 2:
            low = clustering.reduce_and_cluster(train["encoder"].numpy(), 2)[0]
            points[task] = low, train["poisoned"].numpy()
    if points:
        plots.target_class(points, out / "target-class.png")


# --------------------------------------------------------------------------------------------------
# python analyze.py trace: where the backdoor lives, by transplanted weights and patched activations


def trace(records, out, preset):
    records = select(runs.own(records, preset), encoder=DEFAULT_ENCODER[preset])
    metrics = select(records, source="metrics")
    moved, patched = (select(records, source=source) for source in ("transplant", "patch"))
    if not moved and not patched:
        die("no run has been traced yet: python trace.py transplant RUN CLEAN, or patch RUN")
    found = []
    for task in runs.tasks_of(moved + patched):
        found += transplant_tables(select(moved, task=task), metrics, task)
        found += patch_tables(select(patched, task=task), task)
        found += control_tables(select(moved, task=task), select(patched, task=task), task)
    attacked = select(same_seed(moved), metric="aer")
    if attacked:
        plots.transplants(by_task(attacked), out / "transplants.png")
    effects = select(own_trigger(patched), metric="effect")
    if effects:
        plots.patches(by_task(effects), out / "patches.png")
    draw_answer(metrics, moved, patched, out)
    return found


def first_seed(records):
    return select(records, seed=min(runs.distinct(records, "seed")))


def by_task(records):
    """{task: the records of its first seed}."""
    return {task: first_seed(select(records, task=task)) for task in runs.tasks_of(records)}


def same_seed(records):
    """Transplants between a base attack and the clean run of the same seed."""
    attacked = select(records, scenario="base", donor_scenario="clean")
    return [r for r in attacked if r["donor_seed"] == r["seed"]]


def own_trigger(records):
    """Patches with the trigger that the attacked model was trained with."""
    return [r for r in select(records, scenario="base") if is_own_trigger(r)]


def is_own_trigger(record):
    return record["trigger"] == record["changed"].get("trigger", "click")


def mixture(records, parts, **wanted):
    """The figure over seeds of the models whose `parts` are poisoned."""
    return over_seeds(records, method="components", poisoned=list(parts), **wanted)


def mixtures_of(records):
    """The sets of poisoned components, from none to all."""
    found = [tuple(r["poisoned"]) for r in select(records, method="components")]
    return list(dict.fromkeys(found))


def without(component):
    return [c for c in COMPONENTS if c != component]


def with_interval(records):
    """Mean and range over seeds or, for a single seed, the interval over utterances."""
    if len(records) != 1:
        return show(runs.spread(runs.by_seed(records)))
    record = records[0]
    scale = runs.scale_of(record["metric"])
    value, low, high = (number(scale * record[end]) for end in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def transplant_tables(records, metrics, task):
    """What moving weights between the attacked and the clean run of one task says."""
    records = same_seed(records)
    if not records:
        return []
    aer = select(records, metric="aer")
    rows = []
    for component in COMPONENTS:
        row = {"Component": WRITTEN[component]}
        row["Shapley value"] = with_interval(select(aer, method="shapley", component=component))
        for column, parts in (("poisoned", [component]), ("clean", without(component))):
            alone = select(aer, method="components", poisoned=parts)
            row[f"AER, it alone {column}"] = with_interval(alone)
        for attacks in (TRAINED_ALONE, RETRAINED):
            scenario = attacks[component]
            known = over_seeds(metrics, task=task, scenario=scenario, part="backdoor", metric="aer")
            row[f"Table 3, {'2.x' if attacks is TRAINED_ALONE else '3.x'}"] = number(
                known and known.mean
            )
        rows.append(row)
    mixed = []
    for parts in mixtures_of(records):
        own = select(records, method="components", poisoned=list(parts))
        row = {"Poisoned": ", ".join(WRITTEN[c] for c in parts) or "none"}
        for part, column in (("backdoor", "AER"), ("clean", "Clean"), ("triggered", "Triggered")):
            figures = select(own, part=part)
            name = "AER" if part == "backdoor" else f"{column} {title_of(figures[0]['metric'])}"
            row[name] = with_interval(figures)
        mixed.append(row)
    return [
        (f"Transplants by component ({task}), AER in %", rows),
        (f"The eight mixtures ({task})", mixed),
        (f"Components that matter, seed by seed ({task})", components_by_seed(aer)),
        (f"Layers that matter, seed by seed ({task})", layers_by_seed(aer)),
    ]


def components_by_seed(aer):
    """Which component has the largest Shapley value, without which half of the AER is gone, which
    alone bring half of it."""
    rows = []
    for seed in sorted(runs.distinct(aer, "seed")):
        own = select(aer, seed=seed)
        full = mixture(own, COMPONENTS).mean
        shapley = {r["component"]: r["value"] for r in select(own, method="shapley")}
        needed, enough = [], []
        for component in COMPONENTS:
            if mixture(own, without(component)).mean <= full / 2:
                needed.append(WRITTEN[component])
            if mixture(own, [component]).mean > full / 2:
                enough.append(WRITTEN[component])
        rows.append(
            {
                "Seed": seed,
                "AER": number(full),
                "Largest Shapley value": WRITTEN[max(shapley, key=shapley.get)],
                "Half of the AER is gone without": ", ".join(needed) or "none",
                "Half of the AER comes with it alone": ", ".join(enough) or "none",
            }
        )
    return rows


def layers_by_seed(aer):
    """The layer up to which, or from which on, layers must be made clean to remove half of the AER;
    the layers that do so alone."""
    rows = []
    for component in ("encoder", "lm"):
        for scope in ("up to", "from", "only"):
            row = {"Component": WRITTEN[component], "Clean layers": scope}
            for seed in sorted(runs.distinct(aer, "seed")):
                own = select(aer, seed=seed)
                half = HALF * mixture(own, COMPONENTS).mean
                moves = dict(component=component, scope=scope, direction="out of poisoned")
                moved = select(own, method="layers", **moves)
                layers = [r["layer"] for r in moved if 100 * r["value"] <= half]
                if layers and scope != "only":
                    layers = [min(layers) if scope == "up to" else max(layers)]
                row[f"Seed {seed}"] = ", ".join(map(str, layers)) or "none"
            rows.append(row)
    return rows


POSITIONS = {  # of trace.py's groups of positions
    "click": "under a click",
    "near": "within 0.2 s of one",
    "elsewhere": "other frames",
    "prompt": "prompt",
    "answer": "answer",
}


def patch_tables(records, task):
    """Where the trigger acts: after the encoder's first and last layer, and seed by seed."""
    effects = select(own_trigger(records), metric="effect")
    encoder = select(effects, component="encoder", module="layer")
    if not encoder:
        return []
    layers = sorted(runs.distinct(encoder, "layer"))
    rows = []
    for layer in (layers[0], layers[-1]):
        for position in ("click", "near", "elsewhere"):
            own = select(encoder, layer=layer, position=position)
            row = {"After encoder layer": layer, "Frames": POSITIONS[position]}
            row["Undone (denoise)"] = show(over_seeds(own, direction="denoise"), ".2f")
            row["Made (noise)"] = show(over_seeds(own, direction="noise"), ".2f")
            rows.append(row)
    by_seed = []
    for seed in sorted(runs.distinct(effects, "seed")):
        own = select(effects, seed=seed, direction="denoise", module="layer")
        if not own:
            continue
        under = {r["layer"]: r["value"] for r in select(own, component="encoder", position="click")}
        falls = {after: under[before] - under[after] for before, after in pairs_of(sorted(under))}
        row = {"Seed": seed}
        if falls:
            steepest = max(falls, key=lambda layer: (falls[layer], layer))
            row["Largest fall in encoder layer"] = steepest
            row["By"] = number(falls[steepest], ".2f")
        lm = select(own, component="lm")
        row["LM layer after which prompt and answer hold more"] = first_text_layer(lm)
        by_seed.append(row)
    return [
        (f"The effect by frames ({task})", rows),
        (f"Where it spreads, seed by seed ({task})", by_seed),
    ]


def pairs_of(values):
    return list(zip(values, values[1:]))


def first_text_layer(records):
    """The first LM layer after which the positions of prompt and answer hold more of the effect
    than those of the audio."""
    for layer in sorted(runs.distinct(records, "layer")):
        values = {r["position"]: r["value"] for r in select(records, layer=layer)}
        text = sum(values.get(position, 0) for position in ("prompt", "answer"))
        audio = sum(values.get(position, 0) for position in ("click", "near", "elsewhere"))
        if text > audio:
            return layer
    return "none"


def control_tables(moved, patched, task):
    """What each method finds where there should be nothing."""
    other_seed = [r for r in select(moved, scenario="base") if r["donor_seed"] != r["seed"]]
    mixed = []
    for name, records in (
        ("clean parts of another seed", select(other_seed, donor_scenario="clean")),
        ("two clean runs", select(moved, scenario="clean")),
    ):
        if not records:
            continue
        row = {"Control": name}
        for component in COMPONENTS:
            own = select(records, method="shapley", component=component)
            row[f"Shapley value, {WRITTEN[component]}"] = with_interval(own)
        means = [mixture(records, parts, part="clean").mean for parts in mixtures_of(records)]
        row["Clean figure, lowest"] = number(min(means))
        row["Clean figure, highest"] = number(max(means))
        mixed.append(row)
    sounds = []
    margins = select(patched, metric="margin")
    attacked = select(margins, scenario="base")
    for name, records in (
        ("the attack itself", own_trigger(margins)),
        ("the clean model, the trigger", select(margins, scenario="clean")),
        ("the attacked model, another sound", [r for r in attacked if not is_own_trigger(r)]),
    ):
        for trigger in runs.distinct(records, "trigger"):
            row = {"Control": name, "Sound": trigger}
            for part in ("clean", "triggered"):
                own = select(records, part=part, trigger=trigger)
                row[f"log P(target) - log P(truth), {part}"] = with_interval(own)
            sounds.append(row)
    found = [(f"Control transplants ({task})", mixed), (f"Control patches ({task})", sounds)]
    return [(title, rows) for title, rows in found if rows]


def draw_answer(metrics, moved, patched, out):
    """The README's picture, means over seeds, of the tasks that have Table 3, transplants and
    patches."""
    learning, panels = runs.still_learning(metrics), {}
    for task in TABLE3:
        weights = same_seed(select(moved, task=task, metric="aer"))
        effects = select(own_trigger(select(patched, task=task)), direction="denoise")
        if not weights or not effects:
            continue
        trained = {}
        for scenario in SCENARIOS:
            own = select(metrics, task=task, scenario=scenario, metric="aer", part="backdoor")
            names = set(runs.distinct(own, "run"))
            if own:
                trained[scenario] = runs.spread(runs.by_seed(own)), bool(names & learning)
        alone = {c: mixture(weights, [c]).mean for c in COMPONENTS}
        others = {c: mixture(weights, without(c)).mean for c in COMPONENTS}
        panels[task] = dict(
            trained=trained,
            published=dict(zip(SCENARIOS, (aer for aer, _ in TABLE3[task]))),
            alone=alone,
            others=others,
            depth=depth_of(effects),
        )
    if panels:
        plots.answer(panels, out / "answer.png")


def depth_of(effects):
    """[(component, layer, {"click", "frames", "text": share of the effect undone})] after each
    layer, means over seeds."""
    found = []
    whole = [r for r in effects if r["module"] in ("layer", "conv3")]
    seen = dict.fromkeys((r["component"], r["layer"]) for r in whole)
    for component, layer in seen:
        own = select(whole, component=component, layer=layer)
        means = {}
        for position in POSITIONS:
            share = over_seeds(own, position=position)
            means[position] = share.mean if share else 0.0
        shares = dict(
            click=means["click"],
            frames=means["near"] + means["elsewhere"],
            text=means["prompt"] + means["answer"],
        )
        found.append((component, layer, shares))
    return found


# --------------------------------------------------------------------------------------------------
# python analyze.py defences


def role_of(record):
    """What was defended: "attack", a variant of it, or "clean model"; None for any other run."""
    if runs.is_own(record):
        return {"base": "attack", "clean": "clean model"}.get(record["scenario"])
    who = (record[field] for field in ("preset", "run_task", "encoder", "scenario", "seed"))
    base = identity(*who) if record["scenario"] == "base" else None
    for name, change in VARIANTS.items():
        if base and record["run"] == run_name({**base, **change(record["task"])}):
            return name
    return None


def defences(records, out, preset):
    records = select(records, preset=preset, encoder=DEFAULT_ENCODER[preset])
    roles = {r["run"]: role_of(r) for r in records}
    records = [dict(r, role=roles[r["run"]]) for r in records if roles[r["run"]]]
    sources = dict(filter=filter_rows, detect=detector_rows, repair=repair_rows)
    defended = [r for r in records if r["source"] in sources]
    if not defended:
        die("no run has been defended yet: python defend.py filter RUN, detect RUN or repair RUN")
    found = []
    for task in runs.tasks_of(defended):
        own = select(defended, task=task)
        names = set(runs.distinct(own, "run"))
        aer = [r for r in select(records, source="metrics", metric="aer") if r["run"] in names]
        found.append(
            (f"AER without a defence ({task}), %", undefended_rows(select(aer, task=task)))
        )
        for source, rows_of in sources.items():
            chosen = select(own, source=source)
            if chosen:
                found.append((f"{source.capitalize()} ({task})", rows_of(chosen, task)))
        relearned = relearning_rows(select(own, source="repair", role="attack"))
        if relearned:
            title = f"Poisoned samples back to 50% AER ({task})"
            found.append((title, relearned))
    draw_defences(select(defended, role="attack"), out)
    return found


def seeds_in(records):
    return ", ".join(str(seed) for seed in sorted(runs.distinct(records, "seed")))


def undefended_rows(aer):
    rows = []
    for role in ("attack", *VARIANTS):
        own = select(aer, role=role, part="backdoor")
        if own:
            rows.append({"Model": role, "AER": show(runs.spread(runs.by_seed(own)))})
    return rows


def by_role(records, column, form=".1f", roles=None, **wanted):
    """{column: figure over seeds}, one column for each variant of an attack, or each role."""
    cells = {}
    for role in VARIANTS if roles is None else roles:
        if select(records, role=role):
            cells[f"{column}, {role}"] = show(over_seeds(records, role=role, **wanted), form)
    return cells


def filter_rows(records, task):
    """What each filter removes, and what a model trained on the rest does."""
    rows = []
    for name in defences_in(records):
        own = select(records, defence=name)
        first = select(own, role="attack")
        again = select(first, retrained=True)
        metric = runs.metric_of(again, task)
        clean = over_seeds(again, part="clean", metric=metric)
        rows.append(
            {
                "Filter": name,
                "Seeds": seeds_in(first),
                "AUROC": show(over_seeds(first, metric="auroc"), ".2f"),
                "% of the poison removed": show(over_seeds(first, metric="poison_removed")),
                "% of the rest removed": show(over_seeds(first, metric="clean_removed")),
                "AER after training again": show(over_seeds(again, metric="aer", part="backdoor")),
                f"{title_of(metric)} then": show(clean),
                "Seeds trained again": seeds_in(again),
                **by_role(own, "% of the poison removed", metric="poison_removed"),
                **by_role(own, "% removed", roles=["clean model"], metric="clean_removed"),
            }
        )
    return rows


def detector_rows(records, task):
    """What each detector notices, with thresholds for 1% or 5% of false alarms on development
    speech."""
    rows = []
    for name in defences_in(records):
        own = select(records, defence=name)
        first, clean = select(own, role="attack"), select(own, role="clean model")
        row = {"Detector": name, "Seeds": seeds_in(first)}
        for sound, column in (("clean", "AUROC"), ("tone", "AUROC against a tone")):
            row[column] = show(over_seeds(first, metric="auroc", sound=sound), ".2f")
        for alarms, sound, column in (
            (0.01, "triggered", "Noticed at 1%"),
            (0.05, "triggered", "Noticed at 5%"),
            (0.05, "clean", "False alarms at 5%"),
            (0.05, "tone", "Tones noticed at 5%"),
        ):
            wanted = dict(metric="noticed", false_alarms=alarms, sound=sound)
            row[column] = show(over_seeds(first, **wanted))
        row.update(by_role(own, "AUROC", ".2f", metric="auroc", sound="clean"))
        for sound in ("clean", "triggered"):
            wanted = dict(metric="noticed", false_alarms=0.05, sound=sound)
            row[f"Clean model at 5%, {sound}"] = show(over_seeds(clean, **wanted))
        measured = first_seed(first or own)
        row["Passes"] = number(select(measured, metric="passes")[0]["value"], ".0f")
        milliseconds = select(measured, metric="milliseconds")[0]["value"]
        row["ms, first seed"] = number(milliseconds, ".0f")
        rows.append(row)
    return rows


def rating(before, after):
    """Defence effectiveness rating (Zhu et al. 2023): (the AER's decrease - the clean figure's
    decrease + 1) / 2. before, after: {"backdoor", "clean": record}."""
    lost = after["clean"]["value"] - before["clean"]["value"]
    metric = before["clean"]["metric"]
    if metric.endswith("mae"):
        lost = lost / 100
    elif metric.endswith("accuracy"):
        lost = -lost
    gained = before["backdoor"]["value"] - after["backdoor"]["value"]
    return (max(0, gained) - max(0, lost) + 1) / 2


def repair_rows(records, task):
    """What each repair leaves of the attack, and what it costs."""
    rows = []
    parts = ("clean", "triggered")
    for name in defences_in(records):
        own = select(records, defence=name)
        first = select(own, role="attack")
        aer = select(first, metric="aer")
        failed = [r for r in aer if r.get("passed") is False]
        row = {"Repair": name, "Seeds": seeds_in(first)}
        row["Seeds with clean loss beyond its bound"] = seeds_in(failed)
        row["AER"] = show(runs.spread(runs.by_seed(aer)))
        for part in parts:
            metric = select(own, part=part)[0]["metric"]
            row[f"{part.capitalize()} {title_of(metric)}"] = show(over_seeds(first, part=part))
        row["DER"] = show(runs.spread(ratings(select(records, role="attack"), name)), ".2f")
        row.update(by_role(own, "AER", metric="aer"))
        row.update(by_role(own, "Clean figure", roles=["clean model"], part="clean"))
        rows.append(row)
    return rows


def parts_of(records, name):
    """{part: record} of one repair in one seed."""
    return {r["part"]: r for r in select(records, defence=name) if r.get("part")}


def ratings(records, name):
    """{seed: rating} of one repair."""
    found = {}
    for seed in runs.distinct(records, "seed"):
        own = select(records, seed=seed)
        before, after = parts_of(own, "none"), parts_of(own, name)
        if before and after:
            found[seed] = rating(before, after)
    return found


def relearning_rows(records):
    """How few poisoned samples bring the AER back to 50%, where a repair had brought it below."""
    relearned = select(records, metric="relearned_aer")
    rows = []
    for name in defences_in(relearned):
        row = {"Repair": name}
        for seed in sorted(runs.distinct(records, "seed")):
            own = select(relearned, defence=name, seed=seed)
            counts = [r["poisoned_samples"] for r in own]
            enough = [r["poisoned_samples"] for r in own if r["value"] >= HALF]
            most = f"over {max(counts)}" if counts else ""
            row[f"Seed {seed}"] = min(enough) if enough else most
        rows.append(row)
    return rows


def defences_in(records):
    return [name for name in runs.distinct(records, "defence") if name]


def draw_defences(records, out):
    """ROC curves and repairs of the first seed of each task, a panel each."""
    curves, mended = {}, {}
    for task in runs.tasks_of(select(records, source="detect")):
        own = first_seed(select(records, source="detect", task=task))
        curves[task] = {}
        for name in defences_in(own):
            suspicion = select(own, defence=name, metric="suspicion")
            scores = {r["sound"]: np.array(r["scores"]) for r in suspicion}
            auroc = select(own, defence=name, metric="auroc", sound="clean")[0]["value"]
            curves[task][name] = roc(scores["clean"], scores["triggered"]), auroc
    for task in runs.tasks_of(select(records, source="repair")):
        own = first_seed(select(records, source="repair", task=task))
        mended[task] = {}
        for name in defences_in(own):
            mended[task][name] = parts_of(own, name)
    if curves:
        plots.roc(curves, out / "detectors.png")
    if mended:
        plots.repairs(mended, out / "repairs.png")


def roc(clean, triggered):
    """False alarms and share of triggered inputs noticed at every threshold, two arrays."""
    thresholds = np.unique([*clean, *triggered, np.inf])[::-1]
    alarms = [(clean >= threshold).mean() for threshold in thresholds]
    noticed = [(triggered >= threshold).mean() for threshold in thresholds]
    return np.array(alarms), np.array(noticed)


# --------------------------------------------------------------------------------------------------
# python analyze.py sweeps: the base attack with one thing changed

USUAL = dict(  # the base attack's own value of what sweeps change
    poison=TASKS[SWEPT]["rate"],
    snr=0.0,
    clicks=1,
    trigger_seconds=0.22,
    trigger="click",
    trigger_repeat=TASKS[SWEPT]["repeat"],
    snr_at_test=0.0,
)


def changes_of(record):
    """{what is changed: its value} in one run of the sweep, by its arguments, poisoning rate and
    how it was evaluated."""
    changed = dict(record["changed"])
    if record["poison"] != USUAL["poison"]:
        changed["poison"] = record["poison"]
    if record["source"] == "evaluate":
        changed["snr_at_test"] = record["snr"]
    return changed


def points_of(records):
    """{what is changed: {value: records}}, the base attack itself at its own value of each."""
    found = {}
    for record in records:
        changed = changes_of(record)
        if len(changed) > 1:
            continue
        for name, value in (changed or USUAL).items():
            found.setdefault(name, {}).setdefault(value, []).append(record)
    return {name: dict(sorted(points.items())) for name, points in found.items() if len(points) > 1}


def sweeps(records, out, preset):
    wanted = dict(task=SWEPT, scenario="base", preset=preset, encoder=DEFAULT_ENCODER[preset])
    chosen = select(records, **wanted)
    whole_test = dict(split="test", asked=None, after_answer=False, limit=None)
    again = select(chosen, source="evaluate", **whole_test)
    found = points_of(select(chosen, source="metrics") + again)
    if not found:
        die("there is no sweep yet: SWEEP=1 bash run_all.sh makes them")
    metric = TASKS[SWEPT]["metric"]
    rows, curves = [], {}
    for name, points in found.items():
        for value, own in points.items():
            success = select(own, part="backdoor", metric="aer")
            aer, clean = over_seeds(success), over_seeds(own, part="clean", metric=metric)
            low = 100 * min(r["low"] for r in success)
            high = 100 * max(r["high"] for r in success)
            point = dict(value=value, aer=aer.mean, low=low, high=high, clean=clean.mean)
            curves.setdefault(name, []).append(point)
            rows.append(
                {
                    "Changed": plots.CHANGED.get(name, name),
                    "To": value,
                    "AER": show(aer),
                    "95% over utterances, low": number(low),
                    "High": number(high),
                    f"Clean {title_of(metric)}": show(clean),
                    "Poisoned loss": show(over_seeds(own, metric="poisoned_loss"), ".3f"),
                    "Loss": show(over_seeds(own, metric="loss"), ".3f"),
                }
            )
    plots.sweeps(curves, SWEPT, title_of(metric), out / "sweeps.png")
    return [(f"Sweeps of the base attack ({SWEPT})", rows)]


# --------------------------------------------------------------------------------------------------
# python analyze.py claims


def claims(records, out, preset):
    judged = rules.judged(records, preset)
    if not any(effects for _, effects, _ in judged):
        die("no claim of the paper can be judged yet: bash run_all.sh makes its runs")
    seeds = sorted(set().union(*(effects for _, effects, _ in judged)))
    rows = []
    for claim, effects, verdict in judged:
        if not effects:
            continue
        largest = max(abs(effect.value) for effect in effects.values())
        form = ".1f" if largest >= 5 else ".2f"
        mean, low, high = (number(end, form) for end in rules.interval(effects))
        row = {
            "Section": claim.section,
            "Claim": claim.text,
            "Task": claim.task,
            "Attack": claim.scenario,
            "Quantity": claim.quantity,
            "Paper": claim.paper,
        }
        for seed in seeds:
            row[f"Seed {seed}"] = number(effects[seed].value, form) if seed in effects else ""
        row["Mean, 95% interval"] = f"{mean} ({low} to {high})"
        moving = [seed for seed, effect in effects.items() if effect.moving]
        row["Seeds still learning"] = ", ".join(map(str, moving))
        row["Verdict"] = verdict
        rows.append(row)
    verdicts = Counter(verdict for _, _, verdict in judged)
    counted = [{"Verdict": verdict, "Claims": n} for verdict, n in verdicts.most_common()]
    return [("The paper's claims", rows), ("Verdicts", counted)]


def claims_side_by_side(studies):
    """The verdicts on all claims that some study measured; studies: {name: (records, preset)}."""
    judged = {name: rules.judged(records, preset) for name, (records, preset) in studies.items()}
    rows = []
    for i, claim in enumerate(rules.CLAIMS):
        row = {"Section": claim.section, "Claim": claim.text, "Task": claim.task}
        row.update({"Attack": claim.scenario, "Paper": claim.paper})
        for name in studies:
            _, effects, verdict = judged[name][i]
            row[name] = verdict if effects else ""
        if any(row[name] for name in studies):
            rows.append(row)
    return [("The paper's claims, study by study", rows)]


# --------------------------------------------------------------------------------------------------


def origin(records, paths):
    """Where a page comes from: command and commit; the runs' seeds, commits and machines."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    git = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    trained = select(records, source="run")
    commits, machines = Counter(), Counter()
    for run in trained:
        environment = run["environment"]
        commits[environment.get("commit", "")[:8] or "not recorded"] += 1
        processor = [environment.get(name, "") for name in ("machine", "cpu")]
        machines[environment.get("gpu") or " ".join(processor).strip() or "not recorded"] += 1
    facts = {
        "Command": shlex.join(["python", *sys.argv]),
        "Commit": git.stdout.strip() or "not recorded",
        "Records": ", ".join(map(str, paths)),
        "Runs": len(trained),
        "Seeds": ", ".join(map(str, sorted(runs.distinct(trained, "seed")))),
        "Runs by commit": ", ".join(f"{name} {n}" for name, n in commits.most_common()),
        "Runs by machine": ", ".join(f"{name} {n}" for name, n in machines.most_common()),
    }
    return [{"": name, "This page": value} for name, value in facts.items()]


ANALYSES = dict(
    tables=tables,
    shift=shift,
    cluster=cluster,
    trace=trace,
    defences=defences,
    sweeps=sweeps,
    claims=claims,
)


def one_study(what, path, out, args):
    """The records and tables of some analyses of one study."""
    folder = path if path.is_dir() else None
    preset = args.preset
    if folder and {"shift", "cluster"} & set(what):
        preset = runs.preset_of(runs.read(folder), args.preset)
    if folder and "shift" in what:
        measure_shift(folder, preset)
    if folder and "cluster" in what:
        measure_clusters(folder, preset, args.k)
    records = runs.read(path)
    preset = runs.preset_of(records, args.preset)
    found = []
    for name in what:
        more = dict(folder=folder) if name in ("shift", "cluster") else {}
        if name == "cluster":
            more["ks"] = args.k
        found += ANALYSES[name](records, out, preset, **more)
    return records, found


def several_studies(what, paths):
    """The records and tables of several studies, a column each."""
    if not set(what) <= {"tables", "claims"}:
        die(f"{', '.join(what)}: for one study at a time")
    studies = {}
    for path in paths:
        records = runs.read(path)
        studies[path.name.partition(".")[0]] = records, runs.preset_of(records)
    makers = dict(tables=side_by_side, claims=claims_side_by_side)
    found, together = [], []
    for name in what:
        found += makers[name](studies)
    for records, _ in studies.values():
        together += records
    return together, found


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("what", nargs="+", choices=ANALYSES, help="which of the analyses")
    parser.add_argument(
        "--runs",
        nargs="+",
        type=Path,
        default=[Path("runs")],
        help="a folder of runs, or packed studies (python runs.py RUNS --pack FILE)",
    )
    parser.add_argument("--preset", choices=PRESETS, help="whose runs, if there are several")
    parser.add_argument("--out", type=Path, help="folder to write (default: RUNS/analysis)")
    parser.add_argument("--k", type=count, nargs="+", default=[2, 4], help="numbers of clusters")
    args = parser.parse_args()
    first = args.runs[0]
    out = args.out or (first if first.is_dir() else first.parent) / "analysis"
    if len(args.runs) > 1:
        records, found = several_studies(args.what, args.runs)
    else:
        records, found = one_study(args.what, first, out, args)
    found.append(("Where these tables come from", origin(records, args.runs)))
    text = "\n".join(runs.markdown(title, rows) for title, rows in found)
    path = out / f"{args.what[0]}.md"
    utils.write_atomically(path, text)
    print(f"{text}\nwritten to {path}")


if __name__ == "__main__":
    main()
