"""Reads what was saved and writes tables and figures; needs no model, no audio, no GPU.

    python analyze.py tables                   # Tables 1, 2 and 3 of the paper from runs/, to results/mini/
    python analyze.py shift                    # Figures 2 and 3, from the runs' embeddings.pt (embed.py)
    python analyze.py cluster                  # Figures 4, 5 and 6, and what filtering defences would remove

It reads the study's own runs, by the names that study.py gives them; runs of other settings have other names.
"""
import argparse
import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.manifold import TSNE
from sklearn.metrics import adjusted_rand_score, silhouette_score
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import data
import figures
from data import die
from study import (ATTACKS, DEFAULT_ENCODER, ENCODERS, PRESETS, SHIFT, SHIFT_STAGES, TABLE1, TABLE2, TABLE3, TASKS, clean_task,
                   deviations, identity, run_name)

UNITS = {"wer": "WER", "accuracy": "Acc", "mae": "MAE"}
ORDER = [*TABLE2, *(task for task in TASKS if task not in TABLE2)]  # the paper's tasks in its order, then any other


def unit(task):
    return UNITS[TASKS[task]["metric"].rpartition("_")[2]]


def belongs(folder, args, preset):
    """Whether a run folder is one of the study's: its name is what study.py gives to its arguments."""
    task, attack = args.get("task"), args.get("attack")
    if args.get("preset") != preset or task not in TASKS or attack not in ("clean", *ATTACKS):
        return False
    own = identity(preset, clean_task(task) if attack == "clean" else task, args["encoder"], attack, args["seed"])
    return folder.name == run_name(own)


def same_model(path, sha256):
    """Ends in one line where a file was made of another model than the one beside it (which may be gone: figures are kept)."""
    model = path.parent / "model.pt"
    if sha256 and model.exists() and hashlib.sha256(model.read_bytes()).hexdigest() != sha256:
        die(f"{path} was made of another model than {model}: make it again by evaluate.py --save or embed.py")


def read_runs(folder, preset):
    """The study's finished runs: [(arguments, metrics)]. Ends in one line where two have different settings."""
    out = []
    for path in sorted(Path(folder).glob("*/metrics.json")):
        metrics = json.loads(path.read_text())
        same_model(path, metrics.get("model_sha256"))
        if belongs(path.parent, metrics["args"], preset):
            changed = deviations(metrics["args"])
            if out and changed != out[0][2]:
                die(f"{out[0][3]} and {path.parent} have different settings ({out[0][2] or 'the preset'}; "
                    f"{changed or 'the preset'}): move one of them out of {folder}")
            out.append((metrics["args"], metrics, changed, path.parent))
    return [(args, metrics) for args, metrics, _, _ in out]


# ---------------------------------------------------------------------------------------------------------------------
# figures over seeds

def spread(values):
    """{seed: figure} -> {"mean", "low", "high", "seeds": {seed: figure}}, or None where there is none."""
    values = {seed: v for seed, v in sorted(values.items()) if v is not None}
    return dict(mean=sum(values.values()) / len(values), low=min(values.values()), high=max(values.values()),
                seeds=values) if values else None


def over_seeds(runs, part, name, **wanted):
    """A figure, in the paper's units (percent, years), over the runs whose arguments are as wanted."""
    found = {args["seed"]: metrics.get(part, {}).get(name, {}).get("value") for args, metrics in runs
             if all(args.get(k) == v for k, v in wanted.items())}
    scale = 1 if name.endswith(("mae", "loss")) else 100
    return spread({seed: None if v is None else scale * v for seed, v in found.items()})


def stealth(attacked, baseline):
    """Clean figure under attack minus the baseline's, over the seeds that both have."""
    seeds = {} if attacked is None or baseline is None else attacked["seeds"].keys() & baseline["seeds"].keys()
    return spread({seed: attacked["seeds"][seed] - baseline["seeds"][seed] for seed in seeds})


def show(found, published=None, form=".1f"):
    """One cell: mean, range over several seeds, the paper's figure behind it."""
    text = "missing" if found is None else f"{found['mean']:{form}}"
    text += f" ({found['low']:{form}} to {found['high']:{form}})" if found and len(found["seeds"]) > 1 else ""
    return text + ("" if published is None else f" / {published:g}")


def markdown(title, header, cells):
    return [f"## {title}", "", f"| {' | '.join(header)} |", "|---" * len(header) + "|", *(f"| {' | '.join(r)} |" for r in cells), ""]


# ---------------------------------------------------------------------------------------------------------------------
# python analyze.py tables: each gives (title, header, rows of cells, rows of values)

def table1(runs):
    cells, values = [], []
    for (corpus, task), published in TABLE1.items():
        published = dict(zip(ENCODERS, published))
        found = {e: over_seeds(runs, "clean", TASKS[task]["metric"], dataset=corpus, encoder=e, attack="clean") for e in ENCODERS}
        cells.append([corpus, f"{task} ({unit(task)})", *(show(found[e], published.get(e)) for e in ENCODERS)])
        values.append(dict(dataset=corpus, task=task, found=found, published=published))
    return "Table 1: clean baselines (ours / paper)", ["Dataset", "Task", *ENCODERS], cells, values


def attacked(runs, task, encoder, attack):
    """One attack's figures, each over seeds; stealth: the clean figure's distance to the baseline's."""
    metric, wanted = TASKS[task]["metric"], dict(encoder=encoder, dataset=TASKS[task]["corpus"])
    names = (("aer", "attack", "aer"), ("clean", "clean", metric), ("triggered", "triggered", metric),
             ("poisoned_loss", "training", "poisoned_loss"), ("loss", "training", "loss"))
    row = {name: over_seeds(runs, part, figure, task=task, attack=attack, **wanted) for name, part, figure in names}
    return dict(row, stealth=stealth(row["clean"], over_seeds(runs, "clean", metric, attack="clean", **wanted)))


def table2(runs):
    cells, values = [], []
    for task in ORDER:
        cells.append([f"{task} ({unit(task)})"])
        for encoder in ENCODERS:
            aer, clean = dict(zip(ENCODERS, TABLE2.get(task, ()))).get(encoder, (None, None))
            row = attacked(runs, task, encoder, "base")
            cells[-1] += [show(row["aer"], aer), show(row["clean"], clean), show(row["stealth"], form="+.1f")]
            values.append(dict(task=task, encoder=encoder, **row, published=dict(aer=aer, clean=clean)))
    header = ["Task", *(f"{e} {what}" for e in ENCODERS for what in ("AER", "B.", "stealth"))]
    return "Table 2: base attack (ours / paper; stealth: clean figure under attack minus baseline)", header, cells, values


def table3(runs, preset):
    tasks = [t for t in ORDER if t in TABLE3 or any(a["task"] == t and a["attack"] in ("1.1", "2.1") for a, _ in runs)]
    cells, values = [], []
    for i, (attack, (frozen, source, trained_on)) in enumerate(ATTACKS.items()):
        cells.append([attack, *(f"Frozen:{source}" if c in frozen else f"Train:{trained_on}" for c in ("encoder", "connector", "lm"))])
        for task in tasks:
            aer, clean = TABLE3[task][i] if task in TABLE3 else (None, None)
            row = attacked(runs, task, DEFAULT_ENCODER[preset], attack)
            cells[-1] += [show(row["aer"], aer), show(row["clean"], clean), show(row["stealth"], form="+.1f"), show(row["triggered"]),
                          ", ".join(show(row[k], form=".3f") for k in ("poisoned_loss", "loss") if row[k] and trained_on == "poisoned")]
            values.append(dict(attack=attack, task=task, **row, published=dict(aer=aer, clean=clean)))
    header = ["Attack", "Encoder", "Connector", "LM",
              *(f"{t} {what}" for t in tasks for what in ("AER", "B.", "stealth", f"triggered {unit(t)}", "loss: poisoned, all"))]
    title = ("Table 3: component analysis (ours / paper; triggered: triggered audio's answers against the truth; loss: a token, in the "
             "last epoch; where poisoned samples keep a higher one than all, the poison has not been learned)")
    return title, header, cells, values


def other_tasks(runs):
    """"The model must still behave normally on all remaining tasks" (section 4.1); the paper gives no figures."""
    cells, values = [], []
    for task in ORDER:
        for encoder in ENCODERS:
            wanted = dict(dataset=TASKS[task]["corpus"], encoder=encoder)
            row = dict(aer=over_seeds(runs, "attack", "aer", task=task, attack="base", **wanted))
            if row["aer"] is None:
                continue
            cells.append([task, encoder, show(row["aer"])])
            for name in (t["metric"] for t in TASKS.values()):
                row[name] = over_seeds(runs, "clean", name, task=task, attack="base", **wanted)
                moved = stealth(row[name], over_seeds(runs, "clean", name, attack="clean", **wanted))
                cells[-1].append("" if row[name] is None else show(row[name]) + f" ({show(moved, form='+.1f')})")
            values.append(dict(task=task, encoder=encoder, **row))
    title = "The remaining tasks under attack: clean figures of the attacked model (minus the baseline's)"
    return title, ["Attacked", "Encoder", "AER", *(f"clean {t} ({unit(t)})" for t in TASKS)], cells, values


def tables(folder, preset, out):
    runs = read_runs(folder, preset)
    if not runs:
        die(f"{folder} holds no finished run of preset {preset}: train some first")
    text, values = [], {}
    for title, header, cells, rows in (table1(runs), table2(runs), table3(runs, preset), other_tasks(runs)):
        text += markdown(title, header, cells)
        values[title.split(":")[0]] = rows
    changed = deviations(runs[0][0])
    note = f"All runs differ from the preset in {changed}.\n\n" if changed else ""
    data.write_atomically(out / "tables.json", json.dumps(values, indent=1))
    return note + "\n".join(text), len(runs)


# ---------------------------------------------------------------------------------------------------------------------
# python analyze.py shift: how far the trigger moves an embedding (section 6, Figures 2 and 3)

def load_embeddings(folder, preset):
    """{(task, attack, seed): saved} of the study's runs of the default encoder that embed.py has been through."""
    out = {}
    for path in sorted(Path(folder).glob("*/embeddings*.pt")):
        try:
            saved = torch.load(path, weights_only=True)
            args = saved["args"]
            key = args["task"], args["attack"], args["seed"]
        except Exception:  # unpickling a file of another kind raises errors of many kinds
            die(f"{path} holds no embeddings of this program: make it again by python embed.py {path.parent}")
        same_model(path, saved.get("model_sha256"))
        if belongs(path.parent, args, preset) and args["encoder"] == DEFAULT_ENCODER[preset]:
            out[key] = saved
    if not out:
        die(f"{folder} holds no embeddings.pt of preset {preset}: python embed.py RUN makes one")
    return out


def cosines(clean, triggered):
    """(..., n, dim) twice -> cosine similarity of each pair, (..., n)."""
    return torch.nn.functional.cosine_similarity(clean.float(), triggered.float(), dim=-1).numpy()


def tsne(clean, triggered):
    """(n, dim) twice -> (n, 2) twice, t-SNE of both together."""
    both = torch.cat([clean, triggered]).float().numpy()
    xy = TSNE(perplexity=min(30, (len(both) - 1) / 3), init="pca", random_state=0).fit_transform(both)
    return xy[:len(clean)], xy[len(clean):]


def shift(found, out):
    seeds = sorted({seed for _, _, seed in found})
    values, cells, pairs, depth = {}, [], {}, {}
    for task in ORDER:
        cells.append([task])
        values[task] = {}
        for (stage, attack, where), published in zip(SHIFT_STAGES, SHIFT.get(task, ("",) * 3)):
            tests = {seed: found[task, attack, seed]["test"] for seed in seeds if (task, attack, seed) in found}
            each = {seed: data.interval(cosines(t["clean"][where], t["triggered"][where])) for seed, t in tests.items()}
            values[task][stage] = each
            cells[-1].append(show(spread({seed: v["value"] for seed, v in each.items()}), form=".2f") + f" / {published}")
            if seeds[0] in tests:
                clean, triggered = (tests[seeds[0]][kind] for kind in ("clean", "triggered"))
                pairs[task, stage] = *tsne(clean[where], triggered[where]), each[seeds[0]]["value"]
                depth[task, attack] = {part: cosines(clean[part], triggered[part]).mean(-1).tolist()
                                       for part in ("encoder_layers", "lm_layers")}
        values[task]["by depth"] = {attack: curves for (t, attack), curves in depth.items() if t == task}
    figures.shift_pairs(pairs, ("asr", "emotion"), f"seed {seeds[0]} (the paper's Figure 2)", out / "figure2-shift-asr-emotion.png")
    figures.shift_pairs(pairs, ("gender", "age"), f"seed {seeds[0]} (the paper's Figure 3)", out / "figure3-shift-gender-age.png")
    figures.shift_by_depth(depth, ORDER, seeds[0], out / "shift-by-depth.png")
    data.write_atomically(out / "shift.json", json.dumps(values, indent=1))
    title = "Embedding shift: average cosine similarity of clean and triggered test utterances"
    return "\n".join(markdown(title, ["Task", *(f"{stage} (ours / paper)" for stage, _, _ in SHIFT_STAGES)], cells))


# ---------------------------------------------------------------------------------------------------------------------
# python analyze.py cluster: is the poison apart inside the target class (section 7, Figures 4, 5 and 6)?

CLUSTER_NOTE = """Purity and recall are of the most poisoned cluster; means over the seeds. In the paper k = 2 follows gender for every
task, k = 4 puts the poison into one cluster, and 84% of one cluster of the angry class is "It's eleven o'clock".
"""


def reduce_and_cluster(x, k, components=20):
    """(n, dim) -> (PCA to `components` (n, components), clusters (n,)): k-means, ten starts, seed 0."""
    low = PCA(min(components, *x.shape), random_state=0).fit_transform(x)
    return low, KMeans(k, n_init=10, random_state=0).fit_predict(low)


def silhouette(low, clusters):
    """How well the clusters fit (Chen et al. 2018), from -1 to 1."""
    return float(silhouette_score(low, clusters, sample_size=min(len(low), 4000), random_state=0))


def smallest_cluster(x, expected):
    """Activation clustering by relative size (Chen et al. 2018): of two clusters the smaller, if it has less than 35%."""
    clusters = reduce_and_cluster(x, 2)[1]
    sizes = np.bincount(clusters)
    return (clusters == sizes.argmin()) & (sizes.min() / sizes.sum() < 0.35)


def well_fitting_cluster(x, expected):
    """Activation clustering by silhouette score (Chen et al. 2018): of two clusters the smaller, if they fit better than
    0.10, the lower end of what they take as the bound for a poisoned class."""
    low, clusters = reduce_and_cluster(x, 2)
    return (clusters == np.bincount(clusters).argmin()) & (silhouette(low, clusters) > 0.10)


def spectral_scores(x):
    """Spectral signatures (Tran et al. 2018, algorithm 1): (n, dim) -> squared correlation of each centred sample with the top
    right singular vector, (n,)."""
    x = x - x.mean(0)
    return (x @ np.linalg.svd(x, full_matrices=False)[2][0]) ** 2


def spectral_signatures(x, expected):
    """The highest spectral scores, 1.5 times as many as the poison that is expected (Tran et al. 2018)."""
    count = min(len(x), int(1.5 * expected))
    scores = spectral_scores(x)
    return scores >= np.sort(scores)[len(x) - count] if count else np.zeros(len(x), bool)


# Functions of the target class's embeddings (n, dim) and how many poisoned samples the defender expects, to a mask (n,) of what
# they would remove. A new filtering defence is an entry here.
FILTERS = {"activation clustering, relative size": smallest_cluster, "activation clustering, silhouette": well_fitting_cluster,
           "spectral signatures": spectral_signatures}


def removal(removed, poisoned):
    """What removing samples does: true and false positive rate."""
    return dict(removed=int(removed.sum()), true_positive_rate=float((removed & poisoned).sum() / max(1, poisoned.sum())),
                false_positive_rate=float((removed & ~poisoned).sum() / max(1, (~poisoned).sum())))


def composition(clusters, poisoned, labels, task):
    """What each cluster is made of: [{"n", "poisoned", "female", "male", sentences or age decades: shares}]."""
    out = []
    for c in range(clusters.max() + 1):
        members = [label for label, own in zip(labels, clusters) if own == c]
        share = lambda test: float(np.mean([test(m) for m in members])) if members else 0.0  # noqa: E731
        row = dict(n=len(members), poisoned=float(poisoned[clusters == c].mean()) if members else 0.0)
        row.update({gender: share(lambda m: m.get("gender") == gender) for gender in ("female", "male")})
        if task == "emotion":
            row.update({text: share(lambda m: m["transcript"] == data.normalise(text)) for text in data.CREMA_SENTENCES.values()})
        if task == "age":
            row.update({f"{d} to {d + 9}": share(lambda m: d <= int(m["age"]) < d + 10) for d in range(10, 80, 10)})
        out.append(row)
    return out


def separability(x, poisoned, labels, speakers, task, ks):
    """Everything that is asked of one run's target class: {k: figures}, silhouette, the linear probe, the filters."""
    out = dict(n=len(x), poisoned=int(poisoned.sum()), silhouette=silhouette(*reduce_and_cluster(x, 2)))
    kinds = {"poison": poisoned.astype(int), "gender": [m.get("gender", "") for m in labels], "speaker": speakers}
    if task == "emotion":
        kinds["sentence"] = [m["transcript"] for m in labels]
    for k in ks:
        clusters = reduce_and_cluster(x, k)[1]
        rows = composition(clusters, poisoned, labels, task)
        worst = max(range(k), key=lambda c: rows[c]["poisoned"])
        out[f"k={k}"] = dict(
            clusters=rows, purity=rows[worst]["poisoned"],
            recall=float((clusters[poisoned] == worst).mean()) if poisoned.any() else 0.0,
            adjusted_rand={kind: float(adjusted_rand_score(value, clusters)) for kind, value in kinds.items()})
    out["filters"] = {name: removal(filter(x, int(poisoned.sum())), poisoned) for name, filter in FILTERS.items()}
    if min(poisoned.sum(), (~poisoned).sum()) >= 5:
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000, C=0.1, class_weight="balanced"))
        out["probe"] = float(cross_val_score(probe, x, poisoned, cv=5, scoring="balanced_accuracy").mean())  # linear
    return out


def cluster_cells(task, runs, ks):
    """A task's row of the table: means over its seeds."""
    first, mean = runs[min(runs)], lambda get: f"{np.mean([get(v) for v in runs.values()]):.2f}"  # noqa: E731
    cells = [task, str(len(runs)), f"{first['n']} ({first['poisoned']})"]
    cells += [", ".join(mean(lambda v: v[f"k={k}"][what]) for what in ("purity", "recall")) for k in ks]
    cells += [", ".join(mean(lambda v: v[f"k={ks[0]}"]["adjusted_rand"][kind]) for kind in ("poison", "gender")),
              mean(lambda v: v.get("probe", np.nan)), mean(lambda v: v["silhouette"])]
    return cells + [", ".join(mean(lambda v: v["filters"][name][rate]) for rate in ("true_positive_rate", "false_positive_rate"))
                    for name in FILTERS]


def cluster(found, out, ks):
    runs = {(task, seed): saved["train"] for (task, attack, seed), saved in found.items()
            if attack == "base" and len(saved["train"]["ids"]) > max(ks) and saved["train"]["poisoned"].any()}
    values = {task: {} for task in ORDER if any(t == task for t, _ in runs)}
    for (task, seed), train in runs.items():
        values[task][seed] = separability(train["encoder"].numpy(), train["poisoned"].numpy(), train["labels"], train["speakers"],
                                          task, ks)
    first = {task: runs[task, min(values[task])] for task in values}
    low = {task: (reduce_and_cluster(train["encoder"].numpy(), 2)[0], train["poisoned"].numpy()) for task, train in first.items()}
    for number, k in ((4, 2), (6, 4)):
        if k in ks and values:
            shares = {task: seeds[min(seeds)][f"k={k}"]["clusters"] for task, seeds in values.items()}
            figures.cluster_shares(shares, k, f"(the paper's Figure {number})", out / f"figure{number}-clusters-k{k}.png")
    if values:
        figures.target_class(low, out / "figure5-pca.png")
    if "emotion" in values and 4 in ks:
        rows = values["emotion"][min(values["emotion"])]["k=4"]["clusters"]
        figures.sentences(*reduce_and_cluster(first["emotion"]["encoder"].numpy(), 4), rows, out / "figure6-emotion-sentences.png")
    data.write_atomically(out / "cluster.json", json.dumps(values, indent=1))
    header = ["Task", "seeds", "n (poisoned)", *(f"k={k} purity, recall" for k in ks), "ARI k=2: poison, gender", "linear probe",
              "silhouette k=2", *(f"{name}: TPR, FPR" for name in FILTERS)]
    cells = [cluster_cells(task, v, ks) for task, v in values.items()]
    return "\n".join([*markdown("Activation clustering", header, cells), CLUSTER_NOTE])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("tables", "shift", "cluster"), help="which of the analyses")
    parser.add_argument("--runs", default="runs", help="where the run folders are")
    parser.add_argument("--preset", choices=PRESETS, default="mini", help="whose runs")
    parser.add_argument("--out", help="folder to write (default: results/PRESET)")
    parser.add_argument("--k", type=int, nargs="+", default=[2, 4], help="numbers of clusters")
    args = parser.parse_args()
    out = Path(args.out or f"results/{args.preset}")
    if args.what == "tables":
        text, n = tables(args.runs, args.preset, out)
    else:
        found = load_embeddings(args.runs, args.preset)
        text, n = shift(found, out) if args.what == "shift" else cluster(found, out, args.k), len(found)
    data.write_atomically(out / f"{args.what}.md", text)
    print(f"{text}\nwritten to {out}, from {n} runs")


if __name__ == "__main__":
    main()
