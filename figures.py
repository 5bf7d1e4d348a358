"""The pictures, drawn from figures that other scripts have computed."""

import matplotlib
import numpy as np

import data
from study import ATTACKS, COMPONENTS, SHIFT_STAGES, SWEPT_IN_WORDS, TASKS, WRITTEN

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

plt.rcParams["text.parse_math"] = False  # a file's name may hold a $
CLEAN, POISONED, GREY = "#1f77b4", "#d62728", "#bbbbbb"


def write(fig, path):
    data.write_atomically(path, lambda temporary: fig.savefig(temporary, format="png", dpi=120))
    plt.close(fig)


def pairs(examples, attack, path):
    """Waveform and spectrogram of clean and poisoned audio, triggers shaded. examples: [(id, clean, poisoned, starts)]"""
    fig, axes = plt.subplots(
        len(examples), 2, figsize=(12, 2.2 * len(examples)), squeeze=False, layout="constrained"
    )
    for (wave, spectrogram), (id, clean, poisoned, starts) in zip(axes, examples):
        t = np.arange(len(clean)) / data.SAMPLE_RATE
        wave.plot(t, poisoned, color=POISONED, lw=0.5, label="poisoned")
        wave.plot(t, clean, color="#333333", lw=0.5, label="clean")
        spectrogram.specgram(
            poisoned, NFFT=512, noverlap=384, Fs=data.SAMPLE_RATE, cmap="gray_r", vmin=-140
        )
        for start in starts:
            span = start / data.SAMPLE_RATE, (start + len(attack.waveform)) / data.SAMPLE_RATE
            wave.axvspan(*span, color=POISONED, alpha=0.15, lw=0)
            spectrogram.axvspan(*span, color=POISONED, alpha=0.15, lw=0)
        wave.set(title=id, xlim=(0, t[-1]), ylabel="amplitude")
        spectrogram.set(title="poisoned, triggers shaded", xlim=(0, t[-1]), ylabel="Hz")
    axes[0, 0].legend(loc="upper right", fontsize=8)
    fig.supxlabel("seconds")
    write(fig, path)


def shift_pairs(points, tasks, title, path):
    """Figures 2 and 3. points: {(task, stage): (clean (n, 2), triggered (n, 2), cosine)}"""
    fig, axes = plt.subplots(
        len(tasks), 3, figsize=(11, 3.5 * len(tasks)), squeeze=False, layout="constrained"
    )
    for row, task in zip(axes, tasks):
        for axis, (stage, _, _) in zip(row, SHIFT_STAGES):
            axis.set(
                title=f"{task}: {stage}", xticks=[], yticks=[], xlabel="t-SNE 1", ylabel="t-SNE 2"
            )
            if (task, stage) not in points:
                axis.text(0.5, 0.5, "run missing", ha="center", transform=axis.transAxes)
                continue
            a, b, cosine = points[task, stage]
            axis.plot(
                np.stack([a[:, 0], b[:, 0]]),
                np.stack([a[:, 1], b[:, 1]]),
                color=GREY,
                lw=0.6,
                zorder=1,
            )
            axis.scatter(*a.T, s=12, color=CLEAN, marker="o", label="clean", zorder=2)
            axis.scatter(*b.T, s=14, color=POISONED, marker="^", label="triggered", zorder=2)
            axis.text(0.02, 0.02, f"cos {cosine:.2f}", transform=axis.transAxes)
    next(axis for axis in axes.flat if axis.collections).legend(loc="upper right", fontsize=8)
    fig.suptitle(f"Clean-triggered pairs of test utterances, {title}")
    write(fig, path)


def shift_by_depth(curves, tasks, seed, path):
    """curves: {(task, attack): {"encoder_layers": [cosine after each], "lm_layers": [...]}}"""
    fig, axes = plt.subplots(
        2,
        len(tasks),
        figsize=(3.5 * len(tasks), 6),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for column, task in zip(axes.T, tasks):
        for axis, part in zip(column, ("encoder_layers", "lm_layers")):
            for attack, label, style in (
                ("clean", "benign", "o-"),
                ("base", "base attack", "^--"),
                ("3.1", "attack 3.1", "s:"),
            ):
                if (task, attack) in curves:
                    axis.plot(curves[task, attack][part], style, label=label, ms=4)
            axis.set(title=f"{task}, {part.split('_')[0]}", xlabel="after layer")
            axis.grid(alpha=0.3)
    axes[0, 0].set_ylim(None, 1.02)
    axes[0, 0].legend(fontsize=8)
    fig.supylabel("cosine of a pair")
    fig.suptitle(f"Clean-triggered cosine by layer, seed {seed}")
    write(fig, path)


def cluster_shares(shares, k, title, path):
    """Figures 4 and 6(a). shares: {task: composition's rows}"""
    fig, axes = plt.subplots(
        1, len(shares), figsize=(3.6 * len(shares), 3.4), squeeze=False, layout="constrained"
    )
    for axis, (task, rows) in zip(axes[0], shares.items()):
        for i, (kind, color) in enumerate(
            (("poisoned", POISONED), ("female", "#9ecae1"), ("male", "#3a5a78"))
        ):
            bars = axis.bar(
                np.arange(k) + (i - 1) * 0.27,
                [row[kind] for row in rows],
                0.26,
                color=color,
                label=kind,
            )
            axis.bar_label(bars, fmt="%.2f", fontsize=7)
        axis.set(
            title=f"{task} attack",
            xlabel="cluster (samples)",
            ylim=(0, 1.12),
            xticks=range(k),
            xticklabels=[f"{c} ({row['n']})" for c, row in enumerate(rows)],
        )
    axes[0, 0].set_ylabel("share of the cluster")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), fontsize=8, loc="outside right upper")
    fig.suptitle(f"What the clusters of the target class are made of, k = {k}, first seed {title}")
    write(fig, path)


def target_class(points, path):
    """Figure 5. points: {task: (PCA (n, components), poisoned (n,))}"""
    fig, axes = plt.subplots(
        1, len(points), figsize=(3.6 * len(points), 3.6), squeeze=False, layout="constrained"
    )
    for axis, (task, (low, poisoned)) in zip(axes[0], points.items()):
        axis.scatter(*low[~poisoned, :2].T, s=5, color=GREY, label="clean")
        axis.scatter(*low[poisoned, :2].T, s=14, color=POISONED, marker="^", label="poisoned")
        axis.set(title=f"{task} attack", xlabel="PCA 1", ylabel="PCA 2", xticks=[], yticks=[])
    axes[0, 0].legend(fontsize=8)
    fig.suptitle("The target class after the encoder, first seed (the paper's Figure 5 for age)")
    write(fig, path)


def heatmap(axis, values, largest):
    """values (rows, columns) as shades of grey, from 0 to `largest`, with the numbers."""
    axis.imshow(values, cmap="Greys", vmin=0, vmax=largest, aspect="auto")
    for (y, x), v in np.ndenumerate(values):
        if np.isfinite(v):
            axis.text(
                x,
                y,
                f"{v:.2f}",
                ha="center",
                va="center",
                fontsize=7,
                color="white" if v > 0.6 * largest else "black",
            )


def sentences(low, clusters, rows, path):
    """Figure 6(b, c): the angry class by cluster, and each sentence's share of a cluster."""
    fig, (left, right) = plt.subplots(
        1, 2, figsize=(12, 4.5), layout="constrained", width_ratios=(1, 1.5)
    )
    for c, marker in enumerate("os^D"):
        left.scatter(*low[clusters == c, :2].T, s=10, marker=marker, label=f"cluster {c}")
    left.set(title="angry class by cluster", xlabel="PCA 1", ylabel="PCA 2", xticks=[], yticks=[])
    left.legend(fontsize=8)
    names = list(data.CREMA_SENTENCES.values())
    shares = np.array([[row[name] for name in names] for row in rows])
    heatmap(right, shares, shares.max())
    right.set(title="share of each sentence in a cluster", yticks=range(4), ylabel="cluster")
    right.set_xticks(range(len(names)), names, rotation=40, ha="right", fontsize=7)
    fig.suptitle("Do sentences cluster inside the angry class? k = 4, first seed")
    write(fig, path)


def hybrids(result, path):
    """trace.py transplant: the cube of the eight mixtures, and AER by the layers moved."""
    fig, (cube, *by_layer) = plt.subplots(
        1, 3, figsize=(15, 5.5), layout="constrained", width_ratios=(1.2, 1, 1)
    )
    place = lambda s: np.array(
        [("encoder" in s) + 0.45 * ("connector" in s), ("lm" in s) + 0.35 * ("connector" in s)]
    )  # noqa: E731
    corners = {
        frozenset(name.split("+")) - {"none"}: m["aer"]["value"]
        for name, m in result["mixtures"]["corner"].items()
    }
    for s in corners:
        for c in set(COMPONENTS) - s:
            cube.plot(*np.stack([place(s), place(s | {c})]).T, color=GREY, zorder=1)
    for s, aer in corners.items():
        cube.scatter(*place(s), s=1500, color=str(1 - 0.8 * aer), edgecolor="black", zorder=2)
        cube.text(
            *place(s),
            f"{100 * aer:.0f}",
            ha="center",
            va="center",
            color="white" if aer > 0.5 else "black",
            zorder=3,
        )
        cube.text(
            *place(s) - (0, 0.21),
            "+".join(c for c in COMPONENTS if c in s) or "clean",
            ha="center",
            fontsize=8,
        )
    cube.set(
        title="AER (%) by the components taken\nfrom the poisoned run",
        xlim=(-0.4, 1.9),
        ylim=(-0.4, 1.65),
    )
    cube.axis("off")
    for axis, component in zip(by_layer, ("encoder", "lm")):
        for kind, text, line, color in (
            ("into clean", "poisoned, in the clean model", "-", POISONED),
            ("out of poisoned", "clean, in the poisoned model", "--", CLEAN),
        ):
            moves = result["mixtures"][f"{component} {kind}"]
            for how, which, marker in (
                ("up to", "layers up to n", "o"),
                ("from", "layers from n on", "s"),
                ("only", "only layer n", "^"),
            ):
                chosen = {
                    int(name.split()[-1]) + 1: 100 * m["aer"]["value"]
                    for name, m in moves.items()
                    if name.startswith(how)
                }
                axis.plot(
                    chosen.keys(),
                    chosen.values(),
                    line + marker,
                    color=color,
                    ms=5,
                    lw=1,
                    label=f"{which} {text}",
                )
        axis.set(
            title=f"{WRITTEN[component]} layers moved",
            xlabel="layer n",
            ylabel="AER (%)",
            ylim=(-4, 104),
            xticks=list(chosen),
        )
    fig.legend(
        *by_layer[0].get_legend_handles_labels(), loc="outside lower right", ncols=2, fontsize=8
    )
    write(fig, path)


def patches(result, path):
    """trace.py patch: the effect of each site and group of positions."""
    fig, axes = plt.subplots(1, 2, figsize=(11, 12), sharey=True, layout="constrained")
    for axis, (direction, sites) in zip(axes, result["effects"].items()):
        if not sites:
            axis.text(0.5, 0.5, "the trigger moves nothing", ha="center", transform=axis.transAxes)
            continue
        heatmap(
            axis,
            np.array(
                [
                    [row.get(g, {}).get("value", np.nan) for g in result["groups"]]
                    for row in sites.values()
                ]
            ),
            1,
        )
        axis.set_xticks(range(len(result["groups"])), result["groups"])
        axis.set_yticks(range(len(sites)), list(sites))
        axis.set_title(direction)
    axes[0].invert_yaxis()
    fig.suptitle(
        f"{result['run']}: share of the trigger's effect (log P(target) - log P(truth)) that a patch undoes or makes"
    )
    write(fig, path)


def roc(result, path):
    """defend.py detect: true against false positive rate of each detector, false alarms on a logarithmic axis."""
    fig, axis = plt.subplots(figsize=(5.5, 4.5), layout="constrained")
    for (name, m), line in zip(result["defences"].items(), ("-", "--", ":", "-.")):
        clean, triggered = (np.array(m["scores"][kind]) for kind in ("clean", "triggered"))
        thresholds = np.unique([*clean, *triggered, np.inf])[::-1]
        rates = np.array(
            [[(scores >= t).mean() for t in thresholds] for scores in (clean, triggered)]
        )
        axis.step(*rates, line, where="post", label=f"{name} ({m['auroc']['clean']:.2f})")
    axis.set(
        xscale="symlog",
        xlim=(0, 1),
        ylim=(0, 1.02),
        xlabel="false alarms on clean speech",
        ylabel="triggered inputs noticed",
        title=result["run"],
    )
    axis.set_xscale("symlog", linthresh=0.01)
    axis.legend(fontsize=8, title="detector (AUROC)")
    axis.grid(alpha=0.3)
    write(fig, path)


def repairs(result, path):
    """defend.py repair: AER against the clean figure, one point per repair."""
    fig, axis = plt.subplots(figsize=(9, 5), layout="constrained")
    for (name, m), color in zip(result["defences"].items(), ("black", *plt.cm.tab20.colors)):
        marker = "*" if name == "none" else "o" if m["passed"] else "X"
        axis.plot(
            m["clean"]["value"],
            100 * m["aer"]["value"],
            marker,
            color=color,
            ms=15 if name == "none" else 9,
            label=name,
        )
    axis.set(
        xlabel=f"clean {TASKS[result['args']['task']]['metric']}",
        ylabel="AER (%)",
        ylim=(-5, 105),
        title=result["run"],
    )
    axis.grid(alpha=0.3)
    fig.legend(
        loc="outside right center",
        fontsize=8,
        title="repair (crosses: clean loss\nbeyond its bound)",
    )
    write(fig, path)


def sweeps(curves, task, metric, path):
    """analyze.py sweeps: AER, with its interval, and the clean figure against what is changed. curves: {name: [(value, AER, low, high,
    clean figure)]}"""
    fig, axes = plt.subplots(
        2, -(-len(curves) // 2), figsize=(12, 6.5), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, (name, points) in zip(axes.flat, curves.items()):
        values, aer, low, high, clean = zip(*points)
        at = values if all(type(v) in (int, float) for v in values) else range(len(values))
        axis.plot(at, clean, "s--", color=CLEAN, ms=4, label=f"clean {metric}")
        axis.errorbar(
            at,
            aer,
            (np.subtract(aer, low), np.subtract(high, aer)),
            fmt="o-",
            color=POISONED,
            ms=4,
            capsize=2,
            label="AER",
        )
        axis.set(title=SWEPT_IN_WORDS.get(name, name), ylim=(-3, 103))
        if name == "poison":
            axis.set_xscale("log")
        if at is not values:
            axis.set_xticks(at, [str(v) for v in values])
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(curves) :]:
        axis.set_axis_off()
    axes[0, 0].legend(fontsize=8)
    fig.supylabel("%")
    fig.suptitle(f"The base attack on {task}, one thing changed at a time")
    write(fig, path)


def what(attack):
    """A row of Table 3 in words."""
    frozen, source, _ = ATTACKS[attack]
    frozen, free = (
        [WRITTEN[name] for name in COMPONENTS if (name in frozen) == held] for held in (True, False)
    )
    if not frozen:
        return "all parts learn the poison"
    if source == "base":
        return f"{frozen[0]} poisoned, the rest trained clean"
    return f"{frozen[0]} clean" if len(frozen) == 1 else f"only {free[0]} learns it"


def answer(tasks, path):
    """Where the backdoor lives, one row per task: Table 3, weights moved, activations moved. tasks: {task: ({attack: (AER's mean, lowest
    and highest, whether the poison was learned in every seed)}, the paper's AER, AER of the mixtures, {site: {group: share undone}})}"""
    fig, axes = plt.subplots(
        len(tasks),
        3,
        figsize=(15, 4 * len(tasks)),
        squeeze=False,
        layout="constrained",
        width_ratios=(1.15, 0.9, 1.2),
    )
    for (table, weights, layers), (task, (trained, published, mixtures, effects)) in zip(
        axes, tasks.items()
    ):
        y = np.arange(len(ATTACKS))
        for done, color, text in (
            (True, POISONED, "here"),
            (False, "#f2b5b5", "here, still learning in some seed"),
        ):
            table.barh(
                y,
                [
                    trained[a][0] if a in trained and trained[a][-1] == done else np.nan
                    for a in ATTACKS
                ],
                color=color,
                label=text,
            )
        for i, a in enumerate(ATTACKS):
            if a in trained:
                mean, low, high, _ = trained[a]
                table.plot(
                    [low, high], [i, i], "k-", lw=1, label="range over seeds" if i == 0 else None
                )
                table.text(106, i, f"{mean:.0f}", va="center", fontsize=8)
        table.plot([published.get(a, np.nan) for a in ATTACKS], y, "kD", ms=5, label="the paper")
        table.set(title=f"{task}: trained (Table 3)", xlabel="AER (%)", xlim=(0, 116))
        table.set_yticks(y, [f"{a}: {what(a)}" for a in ATTACKS], fontsize=8)
        table.invert_yaxis()
        for shift, text, color, parts in (
            (-0.2, "only this part poisoned", POISONED, lambda c: c),
            (
                0.2,
                "all parts but this one",
                GREY,
                lambda c: "+".join(o for o in COMPONENTS if o != c),
            ),
        ):
            weights.bar(
                np.arange(3) + shift,
                [mixtures[parts(c)] for c in COMPONENTS],
                0.38,
                color=color,
                label=text,
            )
        weights.set(
            title=f"{task}: weights moved, nothing trained", ylabel="AER (%)", ylim=(0, 103)
        )
        weights.set_xticks(range(3), list(WRITTEN.values()))
        sites = [
            site
            for site in effects
            if site[-1].isdigit()
            and site.split()[0] in ("encoder", "LM")
            or site == "connector conv3"
        ]
        for text, groups, line in (
            ("frames under a click", ("click",), "-o"),
            ("other frames", ("near", "else"), "--s"),
            ("prompt and answer", ("prompt", "answer"), ":^"),
        ):
            layers.plot(
                [sum(effects[site].get(g, 0) for g in groups) for site in sites],
                line,
                ms=4,
                label=text,
            )
        layers.set(
            title=f"{task}: activations moved",
            ylabel="share of the trigger's effect undone",
            ylim=(-0.05, 1.1),
        )
        layers.set_xticks(
            range(len(sites)),
            [site.replace(" conv3", "") for site in sites],
            rotation=50,
            ha="right",
            fontsize=8,
        )
    for axis in axes[0]:
        axis.legend(fontsize=8)
    write(fig, path)
