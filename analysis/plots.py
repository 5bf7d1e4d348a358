"""The pictures: one function a figure, which is given what it draws and computes nothing."""

import itertools

import utils

import matplotlib
import numpy as np

import data
import runs
from study import COMPONENTS, SCENARIOS, WRITTEN

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

plt.rcParams["text.parse_math"] = False  # a file's name may hold a $

CLEAN, POISONED, GREY, PALE = "#1f77b4", "#d62728", "#bbbbbb", "#f2b5b5"
LINES = ("-", "--", ":", "-.")
CHANGED = {  # what a sweep changes, in words
    "poison": "poisoning rate",
    "snr": "SNR (dB)",
    "snr_at_test": "SNR at test only (dB)",
    "clicks": "number of clicks",
    "trigger_seconds": "length of a click (s)",
    "trigger": "kind of trigger",
    "trigger_repeat": "repeated, as for asr",
}
POSITIONS = {  # groups of positions that are patched
    "click": "under\na click",
    "near": "within\n0.2 s",
    "elsewhere": "other\nframes",
    "prompt": "prompt",
    "answer": "answer",
}


def write(fig, path):
    utils.write_atomically(path, lambda temporary: fig.savefig(temporary, format="png", dpi=110))
    plt.close(fig)


def grid(rows, columns, width, height, **options):
    """A figure and its axes (rows, columns), each axis of this size in inches."""
    size = (width * columns, height * rows)
    return plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **options)


def legend_below(fig, *axes):
    """One legend for the whole figure, below it, so that it covers nothing."""
    found = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels()):
            found.setdefault(label, handle)
    fig.legend(found.values(), found.keys(), loc="outside lower center", ncols=4, fontsize=8)


def heatmap(axis, values, largest):
    """values (rows, columns) as shades of grey, from 0 to `largest`, with the numbers; returns what
    a colour bar needs."""
    image = axis.imshow(values, cmap="Greys", vmin=0, vmax=largest, aspect="auto")
    for (y, x), value in np.ndenumerate(values):
        if np.isfinite(value):
            color = "white" if value > 0.6 * largest else "black"
            text = f"{value + 0:.2f}".replace("-0.00", "0.00")
            axis.text(x, y, text, ha="center", va="center", fontsize=7, color=color)
    return image


# --------------------------------------------------------------------------------------------------
# poison.py


def poisoned_audio(examples, attack, path):
    """Waveform and spectrogram of clean and poisoned audio, triggers shaded. examples: [(id, clean,
    poisoned, starts)]"""
    fig, axes = grid(len(examples), 2, 6, 2.2)
    for (wave, spectrogram), (id, clean, poisoned, starts) in zip(axes, examples):
        t = np.arange(len(clean)) / data.SAMPLE_RATE
        wave.plot(t, poisoned, color=POISONED, lw=0.5, label="poisoned")
        wave.plot(t, clean, color="#333333", lw=0.5, label="clean")
        spectrogram.specgram(
            poisoned, NFFT=512, noverlap=384, Fs=data.SAMPLE_RATE, cmap="gray_r", vmin=-140
        )
        for start in starts:
            first, last = start / data.SAMPLE_RATE, start + len(attack.waveform)
            for axis in (wave, spectrogram):
                axis.axvspan(first, last / data.SAMPLE_RATE, color=POISONED, alpha=0.15, lw=0)
        wave.set(title=id, xlim=(0, t[-1]), ylabel="amplitude")
        spectrogram.set(title="poisoned, triggers shaded", xlim=(0, t[-1]), ylabel="Hz")
    legend_below(fig, axes[0, 0])
    fig.supxlabel("seconds")
    write(fig, path)


# --------------------------------------------------------------------------------------------------
# analyze.py shift


def shift_pairs(points, tasks, stages, seed, path):
    """Figures 2 and 3. points: {(task, stage): (clean (n, 2), triggered (n, 2), mean cosine)}"""
    fig, axes = grid(len(tasks), len(stages), 3.7, 3.5)
    for row, task in zip(axes, tasks):
        for axis, stage in zip(row, stages):
            axis.set(title=f"{task}: {stage}", xticks=[], yticks=[])
            axis.set(xlabel="t-SNE 1", ylabel="t-SNE 2")
            if (task, stage) not in points:
                axis.text(0.5, 0.5, "run missing", ha="center", transform=axis.transAxes)
                continue
            clean, triggered, cosine = points[task, stage]
            x, y = (np.stack([clean[:, i], triggered[:, i]]) for i in range(2))
            axis.plot(x, y, color=GREY, lw=0.6, zorder=1)
            axis.scatter(*clean.T, s=12, color=CLEAN, marker="o", label="clean", zorder=2)
            axis.scatter(
                *triggered.T, s=14, color=POISONED, marker="^", label="triggered", zorder=2
            )
            axis.set_xlabel(f"t-SNE 1 (mean cosine {cosine:.2f})")
    legend_below(fig, *axes.flat)
    fig.suptitle(f"Pairs of test utterances, seed {seed}")
    write(fig, path)


def shift_by_layer(records, tasks, path):
    """The mean cosine after each layer of encoder and LM. records: of one seed, metric
    "layer_cosine"."""
    fig, axes = grid(2, len(tasks), 3.5, 3, sharey=True)
    styles = dict(clean=("benign model", "o-"), base=("base attack", "^--"))
    styles["3.1"] = ("attack 3.1", "s:")
    for column, task in zip(axes.T, tasks):
        for axis, component in zip(column, ("encoder", "lm")):
            for scenario, (label, style) in styles.items():
                own = [r for r in records if (r["task"], r["scenario"]) == (task, scenario)]
                own = [r for r in own if r["component"] == component]
                layers, values = [r["layer"] for r in own], [r["value"] for r in own]
                axis.plot(layers, values, style, label=label, ms=4)
            axis.set(title=f"{task}, {WRITTEN[component]}", xlabel="after layer")
            axis.grid(alpha=0.3)
    fig.supylabel("cosine of a pair")
    legend_below(fig, axes[0, 0])
    write(fig, path)


# --------------------------------------------------------------------------------------------------
# analyze.py cluster


def cluster_shares(records, k, path):
    """Figures 4 and 6(a). records: {task: its cluster sizes and shares}"""
    fig, axes = grid(1, len(records), 3.6, 3.6)
    kinds = dict(poisoned=POISONED, female="#9ecae1", male="#3a5a78")
    for axis, (task, own) in zip(axes[0], records.items()):
        sizes = [int(r["value"]) for r in own if r["metric"] == "cluster_size"]
        for i, (kind, color) in enumerate(kinds.items()):
            shares = [r["value"] for r in own if r.get("of") == kind]
            x = np.arange(len(shares)) + (i - 1) * 0.27
            bars = axis.bar(x, shares, 0.26, color=color, label=kind)
            axis.bar_label(bars, fmt="%.2f", fontsize=7)
        axis.set(title=f"{task} attack", xlabel="cluster (samples)", ylim=(0, 1.12))
        axis.set_xticks(range(len(sizes)), [f"{c} ({n})" for c, n in enumerate(sizes)])
    axes[0, 0].set_ylabel("share of the cluster")
    legend_below(fig, axes[0, 0])
    fig.suptitle(f"The target class, {k} clusters (first seed)")
    write(fig, path)


def sentences(records, path):
    """Figure 6(c): each sentence's share of each of four clusters of the angry class. records:
    metric "share"."""
    names = list(dict.fromkeys(r["of"] for r in records))
    clusters = sorted({r["cluster"] for r in records})
    shares = np.zeros((len(clusters), len(names)))
    for r in records:
        shares[r["cluster"], names.index(r["of"])] = r["value"]
    fig, axes = grid(1, 1, 9, 4)
    image = heatmap(axes[0, 0], shares, shares.max())
    fig.colorbar(image, label="share of the cluster")
    axes[0, 0].set(ylabel="cluster", yticks=clusters)
    axes[0, 0].set_xticks(range(len(names)), names, rotation=40, ha="right", fontsize=7)
    fig.suptitle("Sentences in four clusters of the angry class, first seed")
    write(fig, path)


def target_class(points, path):
    """Figure 5. points: {task: (PCA (n, components), poisoned (n,))}"""
    fig, axes = grid(1, len(points), 3.6, 3.8)
    for axis, (task, (low, poisoned)) in zip(axes[0], points.items()):
        axis.scatter(*low[~poisoned, :2].T, s=5, color=GREY, label="clean")
        axis.scatter(*low[poisoned, :2].T, s=14, color=POISONED, marker="^", label="poisoned")
        axis.set(title=f"{task} attack", xlabel="PCA 1", ylabel="PCA 2", xticks=[], yticks=[])
    legend_below(fig, axes[0, 0])
    fig.suptitle("The target class after the encoder, first seed")
    write(fig, path)


# --------------------------------------------------------------------------------------------------
# analyze.py trace


def transplants(records, path):
    """The cube of the eight mixtures and the AER by layers moved, a row a task. records: {task:
    metric "aer" of one seed}"""
    fig, axes = grid(len(records), 3, 5, 4.4, width_ratios=(1.2, 1, 1))
    for row, (task, own) in zip(axes, records.items()):
        mixtures = [r for r in own if r["method"] == "components"]
        cube(row[0], task, {tuple(r["poisoned"]): r["value"] for r in mixtures})
        for axis, component in zip(row[1:], ("encoder", "lm")):
            layers = [r for r in own if r["method"] == "layers" and r["component"] == component]
            by_layer(axis, layers)
            axis.set(title=f"{task}: {WRITTEN[component]} layers moved", xlabel="layer n")
            axis.set(ylabel="AER (%)", ylim=(-4, 104))
    legend_below(fig, *axes[:, 1:].flat)
    write(fig, path)


def place_in_cube(parts):
    """Where a mixture stands: encoder to the right, LM upwards, connector a little of both."""
    x = ("encoder" in parts) + 0.45 * ("connector" in parts)
    y = ("lm" in parts) + 0.35 * ("connector" in parts)
    return np.array([x, y])


def cube(axis, task, mixtures):
    """AER of the eight mixtures, {poisoned components: share}, at the corners of a cube."""
    for parts in mixtures:
        for added in set(COMPONENTS) - set(parts):
            ends = np.stack([place_in_cube(parts), place_in_cube((*parts, added))])
            axis.plot(*ends.T, color=GREY, zorder=1)
    for parts, aer in mixtures.items():
        x, y = place_in_cube(parts)
        axis.scatter(x, y, s=900, color=str(1 - 0.8 * aer), edgecolor="black", zorder=2)
        color = "white" if aer > 0.5 else "black"
        axis.text(x, y, f"{100 * aer:.0f}", ha="center", va="center", color=color, zorder=3)
        name = "+".join(WRITTEN[c] for c in parts) or "clean"
        axis.text(x, y - 0.23, name, ha="center", fontsize=7)
    axis.set(title=f"{task}: AER (%) by\npoisoned components")
    axis.set(xlim=(-0.4, 1.9), ylim=(-0.4, 1.65))
    axis.axis("off")


def by_layer(axis, records):
    """AER against the layers moved, for both directions and three choices of layers."""
    scopes = {"up to": ("layers up to n", "o"), "from": ("layers from n on", "s")}
    scopes["only"] = ("only layer n", "^")
    directions = {"into clean": ("poisoned, in the clean model", "-", POISONED)}
    directions["out of poisoned"] = ("clean, in the poisoned model", "--", CLEAN)
    for direction, (text, line, color) in directions.items():
        for scope, (which, marker) in scopes.items():
            own = [r for r in records if (r["direction"], r["scope"]) == (direction, scope)]
            x, y = [r["layer"] for r in own], [100 * r["value"] for r in own]
            label = f"{which} {text}"
            axis.plot(x, y, line + marker, color=color, ms=5, lw=1, label=label)
    axis.set_xticks(sorted({r["layer"] for r in records}))


def site_of(record):
    """A place in the model, in words."""
    if record["component"] == "connector":
        return f"connector {record['module']}"
    if record["module"] == "input":
        return "LM input"
    return f"{WRITTEN[record['component']]} {record['layer']}"


def patches(records, path):
    """The effect of whole layers by group of positions, a row a direction, a column a task.
    records: {task: of one seed}"""
    titles = dict(denoise="undone by clean activations", noise="made by triggered activations")
    fig, axes = grid(2, len(records), 4.2, 5)
    for column, (task, own) in zip(axes.T, records.items()):
        whole = [r for r in own if r["module"] not in ("attention", "MLP")]
        places = list(dict.fromkeys(site_of(r) for r in whole))
        for axis, direction in zip(column, titles):
            values = np.full((len(places), len(POSITIONS)), np.nan)
            for r in whole:
                if r["direction"] == direction and r["position"] in POSITIONS:
                    at = places.index(site_of(r)), list(POSITIONS).index(r["position"])
                    values[at] = r["value"]
            image = heatmap(axis, values, 1)
            axis.set_title(f"{task}: {titles[direction]}", fontsize=9)
            axis.set_xticks(range(len(POSITIONS)), POSITIONS.values(), fontsize=6)
            axis.set_yticks(range(len(places)), places, fontsize=7)
    fig.colorbar(image, ax=axes, label="share of the trigger's effect", shrink=0.5)
    write(fig, path)


def scenario_title(scenario):
    """A row of Table 3 in words."""
    frozen, source, _ = SCENARIOS[scenario]
    free = [WRITTEN[c] for c in COMPONENTS if c not in frozen]
    if not frozen:
        return f"{scenario}: all learn the poison"
    first = WRITTEN[frozen[0]]
    if source == "base":
        return f"{scenario}: {first} poisoned, the rest trained clean"
    return (
        f"{scenario}: {first} clean"
        if len(frozen) == 1
        else f"{scenario}: only {free[0]} learns it"
    )


def answer(tasks, path):
    """Where the backdoor lives, a row a task: Table 3, weights moved, activations moved. tasks:
    {task: {"trained": {attack: (Spread, whether a seed was still learning)}, "published": {attack:
    AER}, "alone", "others": {component: AER}, "depth": [(component, layer, {"click", "frames",
    "text": share undone})]}}"""
    fig, axes = grid(len(tasks), 3, 5, 4.2, width_ratios=(1.15, 0.9, 1.2))
    for (table, weights, depth), (task, found) in zip(axes, tasks.items()):
        trained_panel(table, found["trained"], found["published"])
        table.set_title(f"{task}: trained (Table 3)")
        weights_panel(weights, found["alone"], found["others"])
        weights.set_title(f"{task}: weights moved, nothing trained")
        depth_panel(depth, found["depth"])
        depth.set_title(f"{task}: activations moved")
    for column, axis in enumerate(axes[-1]):
        handles = axes[0, column].get_legend_handles_labels()
        axis.legend(*handles, loc="upper center", bbox_to_anchor=(0.5, -0.22), fontsize=8, ncols=2)
    write(fig, path)


def trained_panel(axis, trained, published):
    """Table 3: our AER over seeds and the paper's."""
    rows = list(SCENARIOS)
    for moving, color, label in (
        (False, POISONED, "here"),
        (True, PALE, "here, still learning in some seed"),
    ):
        own = [a for a in rows if a in trained and trained[a][1] == moving]
        means = [trained[a][0].mean for a in own]
        axis.barh([rows.index(a) for a in own], means, color=color, label=label)
    label = "range over seeds"
    for scenario, (aer, _) in trained.items():
        y = rows.index(scenario)
        axis.plot([aer.low, aer.high], [y, y], "k-", lw=1, label=label)
        axis.text(106, y, f"{aer.mean:.0f}", va="center", fontsize=8)
        label = None
    values = [published[a] for a in rows if a in published]
    at = [rows.index(a) for a in rows if a in published]
    axis.plot(values, at, "kD", ms=5, label="the paper", clip_on=False)
    axis.set(xlabel="AER (%)", xlim=(0, 116))
    axis.set_yticks(range(len(rows)), [scenario_title(a) for a in rows], fontsize=8)
    axis.invert_yaxis()


def weights_panel(axis, alone, others):
    """AER of mixtures: one component poisoned, or all but one."""
    x = np.arange(len(COMPONENTS))
    for offset, values, color, label in (
        (-0.2, alone, POISONED, "only this part poisoned"),
        (0.2, others, GREY, "all parts but this one"),
    ):
        heights = [values[c] for c in COMPONENTS]
        axis.bar(x + offset, heights, 0.38, color=color, label=label)
    axis.set(ylabel="AER (%)", ylim=(0, 103))
    axis.set_xticks(x, list(WRITTEN.values()))


def depth_panel(axis, depth):
    """The share of the trigger's effect that clean activations undo, layer by layer; a line joins
    layers of one component."""
    names = [site_of(dict(component=c, layer=n, module="layer")) for c, n, _ in depth]
    names = [name.replace(" layer", "") for name in names]
    groups = dict(click=("frames under a click", "o", POISONED))
    groups["frames"] = ("other frames", "s", CLEAN)
    groups["text"] = ("prompt and answer", "^", "#2ca02c")
    for kind, (label, marker, color) in groups.items():
        for component in COMPONENTS:
            at = [i for i, (c, _, _) in enumerate(depth) if c == component]
            values = [depth[i][2][kind] for i in at]
            axis.plot(at, values, "-" + marker, color=color, ms=4, label=label)
            label = None
    axis.set(ylabel="share of the trigger's effect undone", ylim=(-0.05, 1.1))
    axis.set_xticks(range(len(names)), names, rotation=50, ha="right", fontsize=8)


# --------------------------------------------------------------------------------------------------
# analyze.py defences


def roc(curves, path):
    """True against false positive rate of each detector, a panel a task. curves: {task: {detector:
    ((alarms, noticed), AUROC)}}"""
    fig, axes = grid(1, len(curves), 4.2, 4)
    for axis, (task, detectors) in zip(axes[0], curves.items()):
        for (name, (rates, auroc)), line in zip(detectors.items(), itertools.cycle(LINES)):
            axis.step(*rates, line, where="post", label=f"{name} ({auroc:.2f})")
        axis.set_xscale("symlog", linthresh=0.01)
        axis.set(xlim=(0, 1), ylim=(0, 1.02), title=task, xlabel="false alarms on clean speech")
        axis.grid(alpha=0.3)
        axis.legend(
            loc="upper center",
            bbox_to_anchor=(0.5, -0.18),
            fontsize=7,
            ncols=2,
            title="detector (AUROC)",
        )
    axes[0, 0].set_ylabel("triggered inputs noticed")
    write(fig, path)


def repairs(found, path):
    """AER against the clean figure, a panel a task, a point a repair. found: {task: {repair:
    {"backdoor", "clean": record}}}"""
    fig, axes = grid(1, len(found), 4.2, 4.6)
    colors = ["black", *plt.cm.tab20.colors]
    for axis, (task, repaired) in zip(axes[0], found.items()):
        for (name, figures), color in zip(repaired.items(), itertools.cycle(colors)):
            aer, clean = figures["backdoor"], figures["clean"]
            marker = "o" if aer.get("passed", True) else "X"
            marker, size = ("*", 15) if name == "none" else (marker, 8)
            x, y = clean["value"], 100 * aer["value"]
            axis.plot(x, y, marker, color=color, ms=size, ls="", label=name)
        axis.set(title=task, ylim=(-5, 105), xlabel=f"clean {runs.title_of(clean['metric'])}")
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("AER (%)")
    legend_below(fig, *axes[0])
    fig.suptitle("Repairs, first seed; crosses: clean loss beyond its bound")
    write(fig, path)


# --------------------------------------------------------------------------------------------------
# analyze.py sweeps


def sweeps(curves, task, metric, path):
    """AER and its interval, and the clean figure, against what is changed; points alone where the
    values are not numbers. curves: {what is changed: [{"value", "aer", "low", "high", "clean"}]}"""
    columns = -(-len(curves) // 2)
    fig, axes = grid(2, columns, 3.2, 3, sharey=True)
    for axis, (name, points) in zip(axes.flat, curves.items()):
        values = [point["value"] for point in points]
        numbers = all(type(value) in (int, float) for value in values)
        x = values if numbers else range(len(values))
        aer = np.array([point["aer"] for point in points])
        ends = [aer - [point["low"] for point in points], [point["high"] for point in points] - aer]
        line = "-" if numbers else ""
        clean = [point["clean"] for point in points]
        axis.plot(x, clean, "s", ls=line and "--", color=CLEAN, ms=4, label=f"clean {metric}")
        style = dict(fmt="o", ls=line or "none", color=POISONED, ms=4, capsize=2)
        axis.errorbar(x, aer, ends, label="AER", **style)
        axis.set(title=CHANGED.get(name, name), ylim=(-3, 103))
        if name == "poison":
            axis.set_xscale("log")
        elif not numbers or all(type(value) is int for value in values):
            axis.set_xticks(list(x), [str(value) for value in values])
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(curves) :]:
        axis.set_axis_off()
    fig.supylabel("%")
    fig.suptitle(f"The base attack on {task}, varied")
    legend_below(fig, axes[0, 0])
    write(fig, path)
