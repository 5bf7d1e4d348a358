"""Reads what was saved and writes tables; needs no model, no audio, no GPU.

    python analyze.py tables                   # Tables 1, 2 and 3 of the paper from runs/, to results/mini/
    python analyze.py tables --preset paper --out results/paper
    python analyze.py shift                    # Figures 2 and 3, from the runs' embeddings.pt (evaluate.py --embeddings)
    python analyze.py cluster                  # Figures 4, 5 and 6, and what defences make of them
"""
import argparse
import json
from pathlib import Path

import numpy as np
import torch

import data
import poison

ENCODERS = ("wavlm", "hubert", "wav2vec2", "whisper")
METRIC = {"asr": ("wer", "WER"), "gender": ("gender_accuracy", "Acc"), "emotion": ("emotion_accuracy", "Acc"),
          "age": ("age_mae", "MAE")}
ATTACKS = {  # Table 3's rows: what becomes of encoder, connector, LM
    "base": ("Train:Poisoned", "Train:Poisoned", "Train:Poisoned"),
    "1.1": ("Frozen:Clean", "Train:Poisoned", "Train:Poisoned"),
    "1.2": ("Train:Poisoned", "Frozen:Clean", "Train:Poisoned"),
    "1.3": ("Train:Poisoned", "Train:Poisoned", "Frozen:Clean"),
    "2.1": ("Train:Poisoned", "Frozen:Clean", "Frozen:Clean"),
    "2.2": ("Frozen:Clean", "Train:Poisoned", "Frozen:Clean"),
    "2.3": ("Frozen:Clean", "Frozen:Clean", "Train:Poisoned"),
    "3.1": ("Frozen:Attack_0", "Train:Clean", "Train:Clean"),
    "3.2": ("Train:Clean", "Frozen:Attack_0", "Train:Clean"),
    "3.3": ("Train:Clean", "Train:Clean", "Frozen:Attack_0")}
# the paper's figures, in its own units: percent, age in years
TABLE1 = {("libri", "asr"): (2.5, 2.8, 3.1, 5.5), ("libri", "gender"): (98.7, 96.8, 99.9, 95.8),
          ("crema", "asr"): (1.1, 0.7, 0.2, 1.6), ("crema", "gender"): (98.8, 99.3, 98.2, 93.41),
          ("crema", "emotion"): (61.2, 57.7, 44.6, 61.5), ("crema", "age"): (9.3, 7.5, 10.3, 6.0),
          ("vox", "gender"): (98.1, 94.9, 98.1, 97.6), ("vox", "age"): (5.2, 6.0, 6.9, 6.0)}
TABLE2 = {"asr": ((99.2, 2.1), (90.8, 2.0), (93.9, 2.1), (93.4, 4.4)),
          "emotion": ((93.7, 64.2), (97.9, 51.2), (74.1, 46.7), (99.4, 70.4)),
          "gender": ((94.4, 94.0), (88.9, 96.8), (75.4, 98.3), (96.3, 97.8)),
          "age": ((94.2, 5.2), (84.8, 5.8), (51.8, 7.6), (90.1, 4.1))}
TABLE3 = {"asr": dict(zip(ATTACKS, ((99.2, 2.1), (91.0, 1.6), (98.7, 1.6), (97.2, 2.2), (95.9, 2.4), (59.0, 2.2),
                                    (0.0, 1.1), (0.0, 1.8), (0.0, 2.9), (0.0, 2.5)))),
          "emotion": dict(zip(ATTACKS, ((93.7, 64.2), (91.0, 70.6), (96.3, 46.4), (84.0, 50.5), (90.1, 62.2),
                                        (85.3, 56.5), (57.1, 56.8), (63.5, 67.4), (19.1, 69.2), (17.2, 53.1))))}


def published_attack(args):
    """Whether a run's attack is the paper's (section 4.1): its rate or no poison, its target, its trigger, all labels."""
    task = args["task"]
    return (args["poison"] in (0, poison.RATES[task]) and args["target"] == poison.TARGETS[task] and args["snr"] == 0
            and args["trigger"] is None and args["trigger_repeat"] == poison.REPEAT[task] and args.get("labels") is None)


def read_runs(folder, preset):
    """Finished runs of the published attack: [(arguments, metrics)]. Ablations of the attack are left out."""
    out = []
    for path in sorted(Path(folder).glob("*/metrics.json")):
        metrics = json.loads(path.read_text())
        if metrics["args"].get("preset") == preset and published_attack(metrics["args"]):
            out.append((metrics["args"], metrics))
    return out


def figure(metrics, part, name):
    """A figure in the paper's units (percent, years), or None."""
    value = metrics.get(part, {}).get(name, {}).get("value")
    return None if value is None else value if name == "age_mae" else 100 * value


def over_seeds(runs, part, name, **wanted):
    """A figure over the runs whose arguments are as wanted, see `spread`, or None without one."""
    return spread({args["seed"]: figure(metrics, part, name) for args, metrics in runs
                   if all(args.get(k) == v for k, v in wanted.items())})


def spread(values):
    """{seed: figure} -> {"mean", "low", "high", "seeds": {seed: figure}}, or None where there is none."""
    values = {seed: v for seed, v in sorted(values.items()) if v is not None}
    return dict(mean=sum(values.values()) / len(values), low=min(values.values()), high=max(values.values()),
                seeds=values) if values else None


def show(found, published=None, sign=""):
    """One cell: mean, range over several seeds, the paper's figure behind it."""
    text = "missing" if found is None else f"{found['mean']:{sign}.1f}" + (
        f" ({found['low']:{sign}.1f} to {found['high']:{sign}.1f})" if len(found["seeds"]) > 1 else "")
    return text + ("" if published is None else f" / {published:g}")


def stealth(attacked, baseline):
    """Clean figure under attack minus the baseline's, over the seeds that both have."""
    seeds = {} if attacked is None or baseline is None else attacked["seeds"].keys() & baseline["seeds"].keys()
    return spread({seed: attacked["seeds"][seed] - baseline["seeds"][seed] for seed in seeds})


def tables(runs):
    """The paper's three tables and one of the remaining tasks: {title: (header, rows of cells, rows of values)}."""
    out = {}
    header, cells, values = ["Dataset", "Task", *ENCODERS], [], []
    for (corpus, task), published in TABLE1.items():
        found = [over_seeds(runs, "clean", METRIC[task][0], dataset=corpus, encoder=e, attack="clean") for e in ENCODERS]
        cells.append([corpus, f"{task} ({METRIC[task][1]})", *map(show, found, published)])
        values.append(dict(dataset=corpus, task=task, found=dict(zip(ENCODERS, found)),
                           published=dict(zip(ENCODERS, published))))
    out["Table 1: clean baselines (ours / paper)"] = header, cells, values

    header = ["Task", *(f"{e} {what}" for e in ENCODERS for what in ("AER", "B.", "stealth"))]
    cells, values = [], []
    for task, published in TABLE2.items():
        corpus, metric = data.TASK_CORPUS[task], METRIC[task][0]
        row = [f"{task} ({METRIC[task][1]})"]
        for encoder, (paper_aer, paper_clean) in zip(ENCODERS, published):
            wanted = dict(dataset=corpus, encoder=encoder)
            aer = over_seeds(runs, "attack", "aer", task=task, attack="base", **wanted)
            clean = over_seeds(runs, "clean", metric, task=task, attack="base", **wanted)
            moved = stealth(clean, over_seeds(runs, "clean", metric, attack="clean", **wanted))
            row += [show(aer, paper_aer), show(clean, paper_clean), show(moved, sign="+")]
            values.append(dict(task=task, encoder=encoder, aer=aer, clean=clean, stealth=moved,
                               published=dict(aer=paper_aer, clean=paper_clean)))
        cells.append(row)
    out["Table 2: base attack (ours / paper; stealth: clean figure under attack minus baseline)"] = header, cells, values

    tasks = [t for t in TABLE2 if t in TABLE3 or any(a["task"] == t and a["attack"] in ("1.1", "2.1") for a, _ in runs)]
    header = ["Attack", "Encoder", "Connector", "LM",
              *(f"{t} {what}" for t in tasks for what in ("AER", "B.", "stealth", f"triggered {METRIC[t][1]}"))]
    cells, values = [], []
    for attack, states in ATTACKS.items():
        row = [attack, *states]
        for task in tasks:
            wanted = dict(task=task, attack=attack, encoder="wavlm", dataset=data.TASK_CORPUS[task])
            paper = TABLE3.get(task, {}).get(attack, (None, None))
            aer, clean = over_seeds(runs, "attack", "aer", **wanted), over_seeds(runs, "clean", METRIC[task][0], **wanted)
            baseline = over_seeds(runs, "clean", METRIC[task][0], attack="clean", encoder="wavlm", dataset=wanted["dataset"])
            moved = stealth(clean, baseline)
            triggered = over_seeds(runs, "triggered", METRIC[task][0], **wanted)
            row += [show(aer, paper[0]), show(clean, paper[1]), show(moved, sign="+"), show(triggered)]
            values.append(dict(attack=attack, task=task, aer=aer, clean=clean, stealth=moved, triggered=triggered,
                               published=dict(aer=paper[0], clean=paper[1])))
        cells.append(row)
    title = "Table 3: component analysis (ours / paper; triggered: triggered audio's answers against the truth)"
    out[title] = header, cells, values

    # "the model must still behave normally on all remaining tasks" (section 4.1); the paper gives no figures
    header = ["Attacked", "Encoder", "AER", *(f"clean {t} ({unit})" for t, (_, unit) in METRIC.items())]
    cells, values = [], []
    for task in TABLE2:
        for encoder in ENCODERS:
            wanted = dict(dataset=data.TASK_CORPUS[task], encoder=encoder)
            row = dict(aer=over_seeds(runs, "attack", "aer", task=task, attack="base", **wanted))
            if row["aer"] is None:
                continue
            cells.append([task, encoder, show(row["aer"])])
            for name, _ in METRIC.values():
                row[name] = over_seeds(runs, "clean", name, task=task, attack="base", **wanted)
                moved = stealth(row[name], over_seeds(runs, "clean", name, attack="clean", **wanted))
                cells[-1].append("" if row[name] is None else show(row[name]) + f" ({show(moved, sign='+')})")
            values.append(dict(task=task, encoder=encoder, **row))
    out["The remaining tasks under attack: clean figures of the attacked model (minus the baseline's)"] = header, cells, values
    return out


# ---------------------------------------------------------------------------------------------------------------------
# python analyze.py shift: how far the trigger moves an embedding (paper, section 6, Figures 2 and 3)

SHIFT_STAGES = ("benign encoder", "poisoned encoder", "connector after clean data")  # clean run, base attack, attack 3.1
SHIFT_PAPER = {  # average cosine similarity; for gender and age the paper gives a range, not each figure
    "asr": ("1.00", "0.62", "about 1"), "emotion": ("1.00", "0.77 to 0.87", "0.93"),
    "gender": ("1.00", "0.77 to 0.87", "about 1"), "age": ("1.00", "0.77 to 0.87", "about 1")}


def load_embeddings(folder, preset):
    """{(task, attack, seed): saved} of the runs of the default encoder that have an embeddings.pt."""
    out = {}
    for path in sorted(Path(folder).glob("*/embeddings.pt")):
        try:
            saved = torch.load(path, weights_only=True)
            args = saved["args"]
            key = args["task"], args["attack"], args["seed"]
        except Exception:  # unpickling what is no embeddings.pt raises errors of many kinds
            data.die(f"{path} holds no embeddings of this program: make it again by python evaluate.py {path.parent} "
                     "--embeddings")
        default = "whisper" if preset == "small" else "wavlm"
        if (args["preset"] == preset and args["encoder"] == default and published_attack(args)
                and args["dataset"] == data.TASK_CORPUS[args["task"]]):
            out[key] = saved
    return out


def cosines(clean, triggered):
    """(..., n, dim) twice -> cosine similarity of each pair, (..., n)."""
    return torch.nn.functional.cosine_similarity(clean.float(), triggered.float(), dim=-1).numpy()


def bootstrap(values, samples=1000):
    """Mean of (n,) with its 95% bootstrap interval."""
    draws = np.random.default_rng(0).choice(values, (samples, len(values))).mean(1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return dict(mean=float(np.mean(values)), low=float(low), high=float(high), n=len(values))


def of_run(found, task, attack, seed):
    """The run's embeddings; age's clean run is gender's: the same corpus, and no label of it was changed."""
    if attack == "clean" and (task, attack, seed) not in found and task == "age":
        task = "gender"
    return found.get((task, attack, seed))


def write_figure(fig, path):
    import matplotlib.pyplot as plt
    data.write_atomically(path, lambda temporary: fig.savefig(temporary, format="png", dpi=130))
    plt.close(fig)


def tsne(clean, triggered):
    """(n, dim) twice -> (n, 2) twice, t-SNE of both together."""
    from sklearn.manifold import TSNE
    both = torch.cat([clean, triggered]).float().numpy()
    xy = TSNE(perplexity=min(30, (len(both) - 1) / 3), init="pca", random_state=0).fit_transform(both)
    return xy[:len(clean)], xy[len(clean):]


def shift(found, out):
    """Figures 2 and 3, the similarity by depth, shift.json and the table's lines."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    seeds = sorted({seed for _, _, seed in found})
    values, lines = {}, ["| Task | " + " | ".join(f"{s} (ours / paper)" for s in SHIFT_STAGES) + " |", "|---" * 4 + "|"]
    for task in METRIC:
        cells = []
        for (stage, attack, where), paper in zip(
                zip(SHIFT_STAGES, ("clean", "base", "3.1"), ("encoder", "encoder", "connector")), SHIFT_PAPER[task]):
            runs = {seed: of_run(found, task, attack, seed) for seed in seeds}
            each = {seed: bootstrap(cosines(run["test"]["clean"][where], run["test"]["triggered"][where]))
                    for seed, run in runs.items() if run}
            values.setdefault(task, {})[stage] = each
            means = [v["mean"] for v in each.values()]
            text = "missing" if not means else f"{np.mean(means):.2f}" + (
                f" ({min(means):.2f} to {max(means):.2f}, {len(means)} seeds)" if len(means) > 1 else
                f" ({each[min(each)]['low']:.2f} to {each[min(each)]['high']:.2f})")
            cells.append(f"{text} / {paper}")
        lines.append(f"| {task} | " + " | ".join(cells) + " |")
    seed = seeds[0]
    for number, tasks in ((2, ("asr", "emotion")), (3, ("gender", "age"))):
        fig, axes = plt.subplots(2, 3, figsize=(11, 7), layout="constrained")
        for row, task in zip(axes, tasks):
            for axis, stage, attack, where in zip(row, SHIFT_STAGES, ("clean", "base", "3.1"),
                                                  ("encoder", "encoder", "connector")):
                run = of_run(found, task, attack, seed)
                axis.set(title=f"{task}: {stage}", xticks=[], yticks=[], xlabel="t-SNE 1", ylabel="t-SNE 2")
                if not run:
                    axis.text(0.5, 0.5, "run missing", ha="center", transform=axis.transAxes)
                    continue
                clean, triggered = run["test"]["clean"][where], run["test"]["triggered"][where]
                a, b = tsne(clean, triggered)
                axis.plot(np.stack([a[:, 0], b[:, 0]]), np.stack([a[:, 1], b[:, 1]]), color="#bbbbbb", lw=0.6, zorder=1)
                axis.scatter(*a.T, s=12, color="#1f77b4", marker="o", label="clean", zorder=2)
                axis.scatter(*b.T, s=14, color="#d62728", marker="^", label="triggered", zorder=2)
                axis.text(0.02, 0.02, f"cos {cosines(clean, triggered).mean():.2f}", transform=axis.transAxes)
        axes[0, 0].legend(loc="upper right", fontsize=8)
        fig.suptitle(f"Clean-triggered pairs of test utterances, seed {seed} (the paper's Figure {number})")
        write_figure(fig, out / f"figure{number}-shift-{'-'.join(tasks)}.png")
    fig, axes = plt.subplots(2, len(METRIC), figsize=(14, 6), sharey=True, layout="constrained")
    for column, task in zip(axes.T, METRIC):
        for axis, part in zip(column, ("encoder_layers", "lm_layers")):
            for attack, style in (("clean", "o-"), ("base", "^--"), ("3.1", "s:")):
                run = of_run(found, task, attack, seed)
                if run:
                    curve = cosines(run["test"]["clean"][part], run["test"]["triggered"][part]).mean(-1)
                    axis.plot(range(len(curve)), curve, style, label={"clean": "benign", "base": "base attack"}.get(
                        attack, "attack 3.1"), ms=4)
                    values[task].setdefault("by depth", {}).setdefault(attack, {})[part] = [float(v) for v in curve]
            axis.set(title=f"{task}, {part.split('_')[0]}", xlabel="after layer")
        column[0].grid(alpha=0.3), column[1].grid(alpha=0.3)
    axes[0, 0].set_ylim(top=1.02)
    axes[0, 0].set_ylabel("cosine of a pair"), axes[1, 0].set_ylabel("cosine of a pair")
    axes[0, 0].legend(fontsize=8)
    fig.suptitle(f"Where in depth the shift is born, and where it dies: clean-triggered cosine by layer, seed {seed}")
    write_figure(fig, out / "shift-by-depth.png")
    data.write_atomically(out / "shift.json", json.dumps(values, indent=1))
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# python analyze.py cluster: is the poison apart inside the target class (paper, section 7, Figures 4, 5 and 6)?

CLUSTER_NOTE = """Purity and recall are of the most poisoned cluster; means over the seeds. The paper gives shares in pictures and
these figures in words: k = 2 finds the poison for no task, its clusters follow gender (age: cluster 0 is 35% poisoned, 2%
female, 98% male); k = 4 puts the poison into one cluster for every task; of the angry class 84% of one cluster is "It's eleven
o'clock". Its probe, removal rates and spectral signatures are not given."""


def reduce_and_cluster(x, k, components=20):
    """(n, dim) -> (PCA to `components` (n, components), clusters (n,)): k-means, ten starts, seed 0."""
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA
    low = PCA(min(components, *x.shape), random_state=0).fit_transform(x)
    return low, KMeans(k, n_init=10, random_state=0).fit_predict(low)


def composition(clusters, poisoned, labels, task):
    """What each cluster is made of: [{"n", "poisoned", "female", "male", sentences or age decades: shares}]."""
    out = []
    for c in range(clusters.max() + 1):
        members = [label for label, own in zip(labels, clusters) if own == c]
        share = lambda test: float(np.mean([test(m) for m in members])) if members else 0.0  # noqa: E731
        row = dict(n=len(members), poisoned=float(poisoned[clusters == c].mean()) if members else 0.0)
        for gender in ("female", "male"):
            row[gender] = share(lambda m: m.get("gender") == gender)
        if task == "emotion":
            row.update({text: share(lambda m: m["transcript"] == data.normalise(text))
                        for text in data.CREMA_SENTENCES.values()})
        if task == "age":
            row.update({f"{d} to {d + 9}": share(lambda m: d <= int(m["age"]) < d + 10) for d in range(10, 80, 10)})
        out.append(row)
    return out


def smallest_cluster(clusters):
    """Chen et al. 2018, relative size: the cluster to throw out is the smallest, if it has less than 35% of the samples.
    Returns its number, or None."""
    sizes = np.bincount(clusters)
    return int(sizes.argmin()) if sizes.min() / sizes.sum() < 0.35 else None


def silhouette(low, clusters):
    """Chen et al. 2018: the silhouette score, which says whether two clusters fit; they take 0.10 to 0.15 as the bound
    above which a class counts as poisoned."""
    from sklearn.metrics import silhouette_score
    return float(silhouette_score(low, clusters, sample_size=min(len(low), 4000), random_state=0))


def spectral_scores(x):
    """Spectral signatures (Tran et al. 2018, algorithm 1): (n, dim) -> squared correlation of each centred sample with
    the top right singular vector, (n,)."""
    x = x - x.mean(0)
    return (x @ np.linalg.svd(x, full_matrices=False)[2][0]) ** 2


def removal(removed, poisoned):
    """What throwing samples out does: true and false positive rate."""
    rate = lambda which: float(removed[which].mean()) if which.any() else 0.0  # noqa: E731
    return dict(removed=int(removed.sum()), true_positive_rate=rate(poisoned), false_positive_rate=rate(~poisoned))


def separability(x, poisoned, labels, speakers, task, ks):
    """Everything that is asked of one run's target class: {k: figures}, the linear probe, the two defences."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import adjusted_rand_score
    from sklearn.model_selection import cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    out = dict(n=len(x), poisoned=int(poisoned.sum()))
    kinds = {"poison": poisoned.astype(int), "gender": [m.get("gender", "") for m in labels], "speaker": speakers}
    if task == "emotion":
        kinds["sentence"] = [m["transcript"] for m in labels]
    for k in ks:
        low, clusters = reduce_and_cluster(x, k)
        rows = composition(clusters, poisoned, labels, task)
        worst = max(range(k), key=lambda c: rows[c]["poisoned"])
        out[f"k={k}"] = dict(
            clusters=rows, purity=rows[worst]["poisoned"],
            recall=float((clusters[poisoned] == worst).mean()) if poisoned.any() else 0.0,
            adjusted_rand={kind: float(adjusted_rand_score(value, clusters)) for kind, value in kinds.items()})
        if k == 2:
            score, small = silhouette(low, clusters), smallest_cluster(clusters)
            thrown = (clusters == small) if small is not None else np.zeros(len(x), bool)
            out["activation clustering, relative size"] = removal(thrown, poisoned)
            suspicious = score > 0.10
            out["activation clustering, silhouette"] = dict(score=score, **removal(
                (clusters == np.bincount(clusters).argmin()) & suspicious, poisoned))
    # Tran et al. remove 1.5 times the poison that is expected
    scores, count = spectral_scores(x), min(len(x), int(1.5 * poisoned.sum()))
    out["spectral signatures"] = removal(scores >= np.sort(scores)[len(x) - count], poisoned) if count else removal(
        np.zeros(len(x), bool), poisoned)
    if min(poisoned.sum(), (~poisoned).sum()) >= 5:
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000, C=0.1, class_weight="balanced"))
        out["linear probe, balanced accuracy"] = float(cross_val_score(probe, x, poisoned, cv=5,
                                                                       scoring="balanced_accuracy").mean())
    return out


def cluster(found, out, ks):
    """Figures 4, 5 and 6, cluster.json and the table's lines."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    runs = {(task, seed): saved for (task, attack, seed), saved in found.items()
            if attack == "base" and len(saved["train"]["ids"]) > max(ks) and saved["train"]["poisoned"].any()}
    values = {}
    for (task, seed), saved in runs.items():
        train = saved["train"]
        values.setdefault(task, {})[str(seed)] = separability(
            train["encoder"].numpy(), train["poisoned"].numpy(), train["labels"], train["speakers"], task, ks)
    tasks, mean = [t for t in METRIC if t in values], lambda task, get: np.mean([get(v) for v in values[task].values()])
    lines = ["| Task | seeds | n (poisoned) | " + " | ".join(f"k={k} purity, recall" for k in ks) + " | ARI k=2: poison, gender | "
             "linear probe | AC size: TPR, FPR | AC silhouette: score, TPR, FPR | spectral: TPR, FPR |",
             "|---" * (len(ks) + 8) + "|"]
    rates = lambda task, key: ", ".join(  # noqa: E731
        f"{mean(task, lambda v: v[key][rate]):.2f}" for rate in ("true_positive_rate", "false_positive_rate"))
    for task in tasks:
        first = next(iter(values[task].values()))
        cells = [task, str(len(values[task])), f"{first['n']} ({first['poisoned']})"]
        cells += [f"{mean(task, lambda v: v[f'k={k}']['purity']):.2f}, {mean(task, lambda v: v[f'k={k}']['recall']):.2f}"
                  for k in ks]
        rand = [mean(task, lambda v: v[f"k={ks[0]}"]["adjusted_rand"][kind]) for kind in ("poison", "gender")]
        cells += [f"{rand[0]:.2f}, {rand[1]:.2f}", f"{mean(task, lambda v: v['linear probe, balanced accuracy']):.2f}",
                  rates(task, "activation clustering, relative size"),
                  f"{mean(task, lambda v: v['activation clustering, silhouette']['score']):.2f}, "
                  + rates(task, "activation clustering, silhouette"), rates(task, "spectral signatures")]
        lines.append("| " + " | ".join(cells) + " |")
    seed = min((seed for _, seed in runs), default=None)  # the first of each task, as the pictures take
    for number, k in ((4, 2), (6, 4)):
        if k not in ks or not tasks:
            continue
        fig, axes = plt.subplots(1, len(tasks), figsize=(3.6 * len(tasks), 3.4), squeeze=False, layout="constrained")
        for axis, task in zip(axes[0], tasks):
            rows = next(iter(values[task].values()))[f"k={k}"]["clusters"]
            for i, (kind, color, hatch) in enumerate((("poisoned", "#d62728", "//"), ("female", "#9ecae1", ""),
                                                      ("male", "#3a5a78", ".."))):
                bars = axis.bar(np.arange(k) + (i - 1) * 0.27, [row[kind] for row in rows], 0.26, color=color, hatch=hatch,
                                edgecolor="white", label=kind)
                axis.bar_label(bars, fmt="%.2f", fontsize=7)
            axis.set(title=f"{task} attack", xlabel="cluster (samples)", ylim=(0, 1.12), xticks=range(k),
                     xticklabels=[f"{c} ({row['n']})" for c, row in enumerate(rows)])
        axes[0, 0].set_ylabel("share of the cluster")
        fig.legend(*axes[0, 0].get_legend_handles_labels(), fontsize=8, loc="outside right upper")
        fig.suptitle(f"What the clusters of the target class are made of, k = {k}, seed {seed} (the paper's Figure {number})")
        write_figure(fig, out / f"figure{number}-clusters-k{k}.png")
    if tasks:
        fig, axes = plt.subplots(1, len(tasks), figsize=(3.6 * len(tasks), 3.6), squeeze=False, layout="constrained")
        for axis, task in zip(axes[0], tasks):
            saved = next(saved for (t, _), saved in runs.items() if t == task)["train"]
            low, bad = reduce_and_cluster(saved["encoder"].numpy(), 2)[0], saved["poisoned"].numpy()
            axis.scatter(*low[~bad, :2].T, s=5, color="#bbbbbb", label="clean")
            axis.scatter(*low[bad, :2].T, s=14, color="#d62728", marker="^", label="poisoned")
            axis.set(title=f"{task} attack", xlabel="PCA 1", ylabel="PCA 2", xticks=[], yticks=[])
        axes[0, 0].legend(fontsize=8)
        fig.suptitle(f"The target class after the encoder, seed {seed} (the paper's Figure 5 for age)")
        write_figure(fig, out / "figure5-pca.png")
    if "emotion" in tasks and 4 in ks:
        saved = next(saved for (t, _), saved in runs.items() if t == "emotion")["train"]
        low, clusters = reduce_and_cluster(saved["encoder"].numpy(), 4)
        fig, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained", width_ratios=(1, 1.5))
        for c, (color, marker) in enumerate(zip(("#1f77b4", "#ff7f0e", "#2ca02c", "#9467bd"), "os^D")):
            left.scatter(*low[clusters == c, :2].T, s=10, color=color, marker=marker, label=f"cluster {c}")
        left.set(title="angry class by cluster", xlabel="PCA 1", ylabel="PCA 2", xticks=[], yticks=[])
        left.legend(fontsize=8)
        rows = next(iter(values["emotion"].values()))["k=4"]["clusters"]
        names = list(data.CREMA_SENTENCES.values())
        image = right.imshow([[row[n] for n in names] for row in rows], cmap="Greys", vmin=0, aspect="auto")
        for c, row in enumerate(rows):
            for i, n in enumerate(names):
                right.text(i, c, f"{row[n]:.2f}", ha="center", va="center", fontsize=7,
                           color="white" if row[n] > 0.6 * image.get_clim()[1] else "black")
        right.set(title="share of each sentence in a cluster", yticks=range(4), xticks=range(len(names)),
                  ylabel="cluster")
        right.set_xticklabels(names, rotation=40, ha="right", fontsize=7)
        fig.colorbar(image)
        fig.suptitle(f"Do sentences cluster inside the angry class? k = 4, seed {seed}")
        write_figure(fig, out / "figure6-emotion-sentences.png")
    data.write_atomically(out / "cluster.json", json.dumps(values, indent=1))
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("tables", "shift", "cluster"))
    parser.add_argument("--runs", default="runs")
    parser.add_argument("--preset", default="mini")
    parser.add_argument("--out", default=None, help="default: results/PRESET")
    parser.add_argument("--k", type=int, nargs="+", default=[2, 4], help="numbers of clusters")
    args = parser.parse_args()
    out = Path(args.out or f"results/{args.preset}")
    if args.what != "tables":
        found = load_embeddings(args.runs, args.preset)
        if not found:
            data.die(f"{args.runs} holds no embeddings.pt of preset {args.preset}: python evaluate.py RUN --embeddings "
                     "makes one")
        title, note = {"shift": ("Embedding shift", "Average cosine similarity of clean and triggered test utterances."),
                       "cluster": ("Activation clustering", CLUSTER_NOTE)}[args.what]
        lines = shift(found, out) if args.what == "shift" else cluster(found, out, args.k)
        text = "\n".join([f"## {title}", "", note, "", *lines, ""])
        data.write_atomically(out / f"{args.what}.md", text)
        print(text + f"\nwritten to {out}, from {len(found)} runs")
        return
    runs = read_runs(args.runs, args.preset)
    if not runs:
        data.die(f"{args.runs} holds no finished run of preset {args.preset}: train some first")
    text, values = [], {}
    for title, (header, cells, rows) in tables(runs).items():
        text += [f"## {title}", "", "| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
        text += ["| " + " | ".join(row) + " |" for row in cells] + [""]
        values[title.split(":")[0]] = rows
    data.write_atomically(out / "tables.md", "\n".join(text))
    data.write_atomically(out / "tables.json", json.dumps(values, indent=1))
    print("\n".join(text) + f"\nwritten to {out}/tables.md and tables.json, from {len(runs)} runs")


if __name__ == "__main__":
    main()
