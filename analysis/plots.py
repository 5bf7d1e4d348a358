"""The pictures: one function for each figure, which is given what it draws and computes nothing."""

import itertools

import utils

import matplotlib
import numpy as np

import data
import runs
from study import COMPONENTS, SCENARIOS, WRITTEN

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib import ticker  # noqa: E402

plt.rcParams["text.parse_math"] = False  # a file's name may hold a $

CLEAN = "#1f77b4"
POISONED = "#d62728"
TEXT = "#2ca02c"
GREY = "#bbbbbb"
PALE = "#f2b5b5"
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
    "random": "as many\nothers",
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


def legend_below(fig, *axes, columns=4):
    """One legend for the whole figure, below it, so that it covers nothing."""
    handle_of = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels()):
            handle_of.setdefault(label, handle)
    handles = handle_of.values()
    fig.legend(handles, handle_of.keys(), loc="outside lower center", ncols=columns, fontsize=8)


def heatmap(axis, values, largest):
    """Draws values (rows, columns) as shades of grey, from 0 to `largest`, with numbers; returns
    the image, for a colour bar."""
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
    """Waveform and spectrogram of clean and poisoned audio, triggers shaded. examples: [(utterance
    id, clean waveform, poisoned waveform, triggers' first samples)]"""
    fig, axes = grid(len(examples), 2, 3.8, 2.2)
    rate = data.SAMPLE_RATE
    for (wave, spectrogram), (title, clean, poisoned, starts) in zip(axes, examples):
        seconds = np.arange(max(len(clean), len(poisoned))) / rate
        wave.plot(seconds[: len(poisoned)], poisoned, color=POISONED, lw=0.5, label="poisoned")
        wave.plot(seconds[: len(clean)], clean, color="#333333", lw=0.5, label="clean")
        spectrogram.specgram(poisoned, NFFT=512, noverlap=384, Fs=rate, cmap="gray_r", vmin=-140)
        for start in starts:
            end = start + len(attack.waveform)
            for axis in (wave, spectrogram):
                axis.axvspan(start / rate, end / rate, color=POISONED, alpha=0.15, lw=0)
        wave.set(title=title, xlim=(0, seconds[-1]), ylabel="amplitude")
        spectrogram.set(title="poisoned, triggers shaded", xlim=(0, seconds[-1]), ylabel="Hz")
    legend_below(fig, axes[0, 0])
    for axis in axes[-1]:
        axis.set_xlabel("seconds")
    write(fig, path)


# --------------------------------------------------------------------------------------------------
# a run

LOSSES = {  # of metrics.json: what the curve shows, its colour and its line
    "loss": ("all training samples", CLEAN, "-"),
    "dev_loss": ("development speech", CLEAN, "--"),
    "target_loss": ("the target in poisoned samples", POISONED, "-"),
    "dev_target_loss": ("the target, development speech with the trigger", POISONED, "--"),
}


def curves(training, path):
    """A run's losses by epoch. training: {name: {"by_epoch": losses, None where there is none}}"""
    fig, axis = plt.subplots(figsize=(5.2, 3.8), layout="constrained")  # a phone shows it at half
    for name, (label, color, line) in LOSSES.items():
        if name not in training:
            continue
        by_epoch = training[name]["by_epoch"]
        epochs = [epoch for epoch, loss in enumerate(by_epoch, 1) if loss is not None]
        losses = [loss for loss in by_epoch if loss is not None]
        axis.plot(epochs, losses, line, color=color, marker=".", label=label)
    axis.set(xlabel="epoch", ylabel="loss (nats per token)", yscale="log")
    axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_minor_locator(ticker.NullLocator())
    axis.yaxis.set_major_formatter("{x:g}")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.3)
    legend_below(fig, axis, columns=1)
    write(fig, path)


# --------------------------------------------------------------------------------------------------
# analyze.py learning


def learning(panels, path):
    """For each run, the loss on the target by epoch, in its poisoned training samples and on
    triggered development speech, and how often the target comes first there. panels: [{"title",
    "target_loss", "dev_target_loss", "dev_aer": by epoch}]"""
    columns = min(4, len(panels))
    fig, axes = grid(-(-len(panels) // columns), columns, 3.2, 2.6, sharey=True)
    for axis, panel in zip(axes.flat, panels):
        axis.set(title=panel["title"], xlabel="epoch", yscale="log")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.yaxis.set_major_formatter("{x:g}")
        for name in ("target_loss", "dev_target_loss"):
            label, color, line = LOSSES[name]
            losses = panel.get(name, [])
            epochs = range(1, len(losses) + 1)
            axis.plot(epochs, losses, line, color=color, marker=".", label=label)
        share = axis.twinx()
        shares = [100 * value for value in panel["dev_aer"]]
        label = "the target comes first on development speech (%, right)"
        share.plot(range(1, len(shares) + 1), shares, ":", color=CLEAN, label=label)
        share.set(ylim=(0, 100))
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    fig.supylabel("loss on the target (nats per token)")
    legend_below(fig, axes[0, 0], share, columns=1)
    write(fig, path)


# --------------------------------------------------------------------------------------------------
# analyze.py tables

IN_WORDS = {  # the rows of Table 3
    "base": "base attack: everything learns the poison",
    "1.1": "1.1  clean encoder",
    "1.2": "1.2  clean connector",
    "1.3": "1.3  clean LM",
    "2.1": "2.1  only the encoder learns it",
    "2.2": "2.2  only the connector learns it",
    "2.3": "2.3  only the LM learns it",
    "3.1": "3.1  poisoned encoder",
    "3.2": "3.2  poisoned connector",
    "3.3": "3.3  poisoned LM",
}
STATES = {  # (frozen, the data that the weights were trained on): colour, hatch, legend
    (False, "poisoned"): (POISONED, "", "trained on poisoned data"),
    (True, "poisoned"): (PALE, "////", "frozen, from the base attack"),
    (False, "clean"): (CLEAN, "", "trained on clean data"),
    (True, "clean"): ("#b5cfe8", "////", "frozen, from the clean model"),
}


def scenarios(path):
    """Table 3 as a diagram: what each attack does with the three components."""
    fig, axis = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
    height = 0.62
    left_of = {component: 1.4 * i for i, component in enumerate(COMPONENTS)}  # boxes are 1 wide
    for component, left in left_of.items():
        axis.text(left + 0.5, -0.75, WRITTEN[component], ha="center", fontsize=10)
    for row, (scenario, (frozen, source, trained_on)) in enumerate(SCENARIOS.items()):
        axis.text(-0.15, row, IN_WORDS[scenario], ha="right", va="center", fontsize=9)
        for component, left in left_of.items():
            state = (False, trained_on)
            if component in frozen:
                state = (True, "poisoned" if source == "base" else "clean")
            axis.add_patch(box((left, row - height / 2), height, state))
            if left > 0:
                arrow = dict(arrowstyle="->", color="#555555")
                axis.annotate("", (left, row), (left - 0.4, row), arrowprops=arrow)
    axis.set(xlim=(-3.1, 3.9), ylim=(len(SCENARIOS) - 0.5, -1.1))
    axis.axis("off")
    handles = [box((0, 0), 1, state) for state in STATES]
    fig.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    write(fig, path)


def box(corner, height, state):
    """A component in the diagram of Table 3, in a state of STATES."""
    color, hatch, label = STATES[state]
    how = dict(facecolor=color, hatch=hatch, edgecolor="white", label=label)
    return plt.Rectangle(corner, 1, height, **how)


# --------------------------------------------------------------------------------------------------
# analyze.py shift


def shift_pairs(pairs, tasks, stages, seed, path):
    """Figures 2 and 3. pairs: {(task, stage): {"clean", "triggered": points (n, 2), "cosine": their
    mean}}"""
    fig, axes = grid(len(tasks), len(stages), 3.7, 3.5)
    for row, task in zip(axes, tasks):
        for axis, stage in zip(row, stages):
            axis.set(title=f"{runs.title_of(task)}: {stage}", xticks=[], yticks=[])
            axis.set(xlabel="t-SNE 1", ylabel="t-SNE 2")
            if (task, stage) not in pairs:
                axis.text(0.5, 0.5, "run missing", ha="center", transform=axis.transAxes)
                continue
            clean_x, clean_y = pairs[task, stage]["clean"].T
            triggered_x, triggered_y = pairs[task, stage]["triggered"].T
            x = np.stack([clean_x, triggered_x])
            y = np.stack([clean_y, triggered_y])
            axis.plot(x, y, color=GREY, lw=0.6, zorder=1)
            axis.scatter(clean_x, clean_y, s=12, color=CLEAN, marker="o", label="clean", zorder=2)
            style = dict(s=14, color=POISONED, marker="^", label="triggered", zorder=2)
            axis.scatter(triggered_x, triggered_y, **style)
            axis.set_xlabel(f"t-SNE 1 (mean cosine {pairs[task, stage]['cosine']:.2f})")
    legend_below(fig, *axes.flat)
    fig.suptitle(f"Pairs of test utterances, seed {seed}")
    write(fig, path)


def shift_by_layer(records, tasks, path):
    """The mean cosine after each layer of encoder and LM. records: of one seed, metric
    "layer_cosine"."""
    fig, axes = grid(2, len(tasks), 3.5, 3, sharey=True)
    styles = {
        "clean": ("benign model", "o-"),
        "base": ("base attack", "^--"),
        "3.1": ("attack 3.1", "s:"),
    }
    for column, task in zip(axes.T, tasks):
        for axis, component in zip(column, ("encoder", "lm")):
            for scenario, (label, style) in styles.items():
                line = runs.select(records, task=task, scenario=scenario, component=component)
                layers = [record["layer"] for record in line]
                values = [record["value"] for record in line]
                axis.plot(layers, values, style, label=label, ms=4)
            axis.set(title=f"{runs.title_of(task)}, {WRITTEN[component]}", xlabel="after layer")
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
    for axis, (task, clusters) in zip(axes[0], records.items()):
        for i, (kind, color) in enumerate(kinds.items()):
            shares = [record["value"] for record in runs.select(clusters, of=kind)]
            x = np.arange(len(shares)) + (i - 1) * 0.27
            bars = axis.bar(x, shares, 0.26, color=color, label=kind)
            axis.bar_label(bars, fmt="%.2f", fontsize=7)
        axis.set(title=f"{runs.title_of(task)} attack", xlabel="cluster (samples)", ylim=(0, 1.12))
        sizes = [int(r["value"]) for r in runs.select(clusters, metric="cluster_size")]
        axis.set_xticks(range(len(sizes)), [f"{c} ({n})" for c, n in enumerate(sizes)])
    axes[0, 0].set_ylabel("share of the cluster")
    legend_below(fig, axes[0, 0])
    fig.suptitle(f"The target class, {k} clusters (first seed)")
    write(fig, path)


def sentences(records, path):
    """Figure 6(c): each sentence's share of each of four clusters of the angry class. records:
    metric "share"."""
    names = runs.distinct(records, "of")
    clusters = sorted(runs.distinct(records, "cluster"))
    shares = np.zeros((len(clusters), len(names)))
    for record in records:
        shares[record["cluster"], names.index(record["of"])] = record["value"]
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
        clean_x, clean_y = low[~poisoned, :2].T
        poisoned_x, poisoned_y = low[poisoned, :2].T
        axis.scatter(clean_x, clean_y, s=5, color=GREY, label="clean")
        axis.scatter(poisoned_x, poisoned_y, s=14, color=POISONED, marker="^", label="poisoned")
        axis.set(
            title=f"{runs.title_of(task)} attack",
            xlabel="PCA 1",
            ylabel="PCA 2",
            xticks=[],
            yticks=[],
        )
    legend_below(fig, axes[0, 0])
    fig.suptitle("The target class after the encoder, first seed")
    write(fig, path)


# --------------------------------------------------------------------------------------------------
# analyze.py trace


def transplants(records, path):
    """The cube of the eight mixtures and the AER by layers moved, a row for each task. records:
    {task: metric "aer" of one seed}"""
    fig, axes = grid(len(records), 3, 5, 4.4, width_ratios=(1.2, 1, 1))
    for row, (task, of_task) in zip(axes, records.items()):
        mixtures = runs.select(of_task, method="components")
        cube(row[0], task, {tuple(r["poisoned"]): r["value"] for r in mixtures})
        for axis, component in zip(row[1:], ("encoder", "lm")):
            by_layer(axis, runs.select(of_task, method="layers", component=component))
            axis.set(
                title=f"{runs.title_of(task)}: {WRITTEN[component]} layers moved", xlabel="layer n"
            )
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
    axis.set(title=f"{runs.title_of(task)}: AER (%) by\npoisoned components")
    axis.set(xlim=(-0.4, 1.9), ylim=(-0.4, 1.65))
    axis.axis("off")


def by_layer(axis, records):
    """AER against the layers moved, for both directions and three choices of layers."""
    scopes = {
        "up to": ("layers up to n", "o"),
        "from": ("layers from n on", "s"),
        "only": ("only layer n", "^"),
    }
    directions = {
        "into clean": ("poisoned, in the clean model", "-", POISONED),
        "out of poisoned": ("clean, in the poisoned model", "--", CLEAN),
    }
    for direction, (words, line, color) in directions.items():
        for scope, (which, marker) in scopes.items():
            moved = runs.select(records, direction=direction, scope=scope)
            layers = [record["layer"] for record in moved]
            aer = [100 * record["value"] for record in moved]
            label = f"{which} {words}"
            axis.plot(layers, aer, line + marker, color=color, ms=5, lw=1, label=label)
    axis.set_xticks(sorted(runs.distinct(records, "layer")))


def site_of(record):
    """A place in the model, in words."""
    if record["component"] == "connector":
        return f"connector {record['module']}"
    if record["module"] == "input":
        return "LM input"
    return f"{WRITTEN[record['component']]} {record['layer']}"


def patches(records, path):
    """The effect of whole layers by group of positions and the share of answers that it flips, a
    column for each task. records: {task: of one seed}"""
    panels = {  # (direction, what is shown): title
        ("denoise", "value"): "effect undone by clean activations",
        ("denoise", "flipped"): "answers that these flip back",
        ("noise", "value"): "effect made by triggered activations",
        ("noise", "flipped"): "answers that these flip",
    }
    fig, axes = grid(len(panels), len(records), 4.2, 4.6)
    for column, (task, of_task) in zip(axes.T, records.items()):
        whole = [r for r in of_task if r["module"] not in ("attention", "MLP")]
        sites = list(dict.fromkeys(site_of(record) for record in whole))
        for axis, ((direction, field), title) in zip(column, panels.items()):
            values = patch_matrix(runs.select(whole, direction=direction), sites, field)
            image = heatmap(axis, values, 1)
            axis.set_title(f"{runs.title_of(task)}: {title}", fontsize=9)
            axis.set_xticks(range(len(POSITIONS)), POSITIONS.values(), fontsize=6)
            axis.set_yticks(range(len(sites)), sites, fontsize=7)
    fig.colorbar(image, ax=axes[::2], label="share of the trigger's effect", shrink=0.3)
    fig.colorbar(image, ax=axes[1::2], label="share of answers", shrink=0.3)
    write(fig, path)


def patch_matrix(records, sites, field):
    """A field of the effects as an array (sites, positions), NaN where nothing was patched."""
    positions = list(POSITIONS)
    values = np.full((len(sites), len(positions)), np.nan)
    for record in records:
        if record["position"] in positions and record.get(field) is not None:
            row = sites.index(site_of(record))
            values[row, positions.index(record["position"])] = record[field]
    return values


def scenario_title(scenario):
    """A row of Table 3 in words."""
    frozen, source, _ = SCENARIOS[scenario]
    if not frozen:
        return f"{scenario}: all learn the poison"
    first = WRITTEN[frozen[0]]
    if source == "base":
        return f"{scenario}: {first} poisoned, the rest trained clean"
    if len(frozen) == 1:
        return f"{scenario}: {first} clean"
    free = [WRITTEN[component] for component in COMPONENTS if component not in frozen]
    return f"{scenario}: only {free[0]} learns it"


def answer(panels, path):
    """Where the backdoor lives, a row for each task: Table 3, weights moved, activations moved.
    panels: {task: {"trained": see trained_panel, "alone" and "others": see weights_panel, "depth":
    see depth_panel}}"""
    fig, axes = grid(len(panels), 3, 5, 4.2, width_ratios=(1.15, 0.9, 1.2))
    for (trained, weights, depth), (task, panel) in zip(axes, panels.items()):
        trained_panel(trained, panel["trained"])
        trained.set_title(f"{runs.title_of(task)}: trained (Table 3)")
        weights_panel(weights, panel["alone"], panel["others"])
        weights.set_title(f"{runs.title_of(task)}: weights moved, nothing trained")
        depth_panel(depth, panel["depth"])
        depth.set_title(f"{runs.title_of(task)}: activations moved")
    for column, axis in enumerate(axes[-1]):
        handles = axes[0, column].get_legend_handles_labels()
        axis.legend(*handles, loc="upper center", bbox_to_anchor=(0.5, -0.22), fontsize=8, ncols=2)
    write(fig, path)


def trained_panel(axis, bars):
    """Table 3: our AER with its interval, and the paper's. bars: {scenario: {"aer": Spread or None,
    "learning": whether a seed was still learning, "published": the paper's AER}}"""
    rows = {scenario: row for row, scenario in enumerate(bars)}
    measured = {scenario: bar for scenario, bar in bars.items() if bar["aer"]}
    colors = {False: (POISONED, "here"), True: (PALE, "here, still learning in some seed")}
    for learning, (color, label) in colors.items():
        chosen = [scenario for scenario in measured if measured[scenario]["learning"] == learning]
        y = [rows[scenario] for scenario in chosen]
        means = [measured[scenario]["aer"].mean for scenario in chosen]
        axis.barh(y, means, color=color, label=label)
    label = "95% interval"
    for scenario, bar in measured.items():
        y = rows[scenario]
        aer = bar["aer"]
        axis.plot([aer.low, aer.high], [y, y], "k-", lw=1, label=label)
        axis.text(106, y, f"{aer.mean:.0f}", va="center", fontsize=8)
        label = None
    published = [bar["published"] for bar in bars.values()]
    axis.plot(published, list(rows.values()), "kD", ms=5, label="the paper", clip_on=False)
    axis.set(xlabel="AER (%)", xlim=(0, 116))
    axis.set_yticks(range(len(rows)), [scenario_title(name) for name in rows], fontsize=8)
    axis.invert_yaxis()


def weights_panel(axis, alone, others):
    """AER of mixtures, {component: AER}: one component poisoned, or all but one."""
    x = np.arange(len(COMPONENTS))
    alone_heights = [alone[component] for component in COMPONENTS]
    other_heights = [others[component] for component in COMPONENTS]
    axis.bar(x - 0.2, alone_heights, 0.38, color=POISONED, label="only this part poisoned")
    axis.bar(x + 0.2, other_heights, 0.38, color=GREY, label="all parts but this one")
    axis.set(ylabel="AER (%)", ylim=(0, 103))
    axis.set_xticks(x, list(WRITTEN.values()))


def depth_panel(axis, depth):
    """The share of the trigger's effect that clean activations undo, layer by layer; a line joins
    layers of one component. depth: [{"component", "layer", "click", "frames", "random", "text"}]"""
    groups = {
        "click": ("frames under a click", "o", POISONED),
        "frames": ("other frames", "s", CLEAN),
        "random": ("as many others as under a click", "x", GREY),
        "text": ("prompt and answer", "^", TEXT),
    }
    for group, (label, marker, color) in groups.items():
        for component in COMPONENTS:
            x = [i for i, place in enumerate(depth) if place["component"] == component]
            shares = [depth[i][group] for i in x]
            axis.plot(x, shares, "-" + marker, color=color, ms=4, label=label)
            label = None
    names = [site_of({**place, "module": "layer"}) for place in depth]
    names = [name.replace(" layer", "") for name in names]
    axis.set(ylabel="share of the trigger's effect undone", ylim=(-0.05, 1.1))
    axis.set_xticks(range(len(names)), names, rotation=50, ha="right", fontsize=8)


# --------------------------------------------------------------------------------------------------
# analyze.py defences


def roc(curves, path):
    """True against false positive rate of each detector, a panel for each task. curves: {task:
    {detector: {"false_alarms", "noticed": arrays, "auroc"}}}"""
    fig, axes = grid(1, len(curves), 4.2, 4)
    for axis, (task, detectors) in zip(axes[0], curves.items()):
        for (name, curve), line in zip(detectors.items(), itertools.cycle(LINES)):
            label = f"{name} ({curve['auroc']:.2f})"
            axis.step(curve["false_alarms"], curve["noticed"], line, where="post", label=label)
        axis.set_xscale("symlog", linthresh=0.01)
        axis.xaxis.set_major_formatter(ticker.PercentFormatter(1))
        axis.yaxis.set_major_formatter(ticker.PercentFormatter(1))
        axis.set(
            xlim=(0, 1),
            ylim=(0, 1.02),
            title=runs.title_of(task),
            xlabel="false alarms on clean speech",
        )
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


def repairs(repaired, path):
    """AER against the clean figure, a panel for each task, a point for each repair. repaired:
    {task: {repair: {"backdoor", "clean": record}}}"""
    fig, axes = grid(1, len(repaired), 4.2, 4.6)
    colors = ["black", *plt.cm.tab20.colors]
    for axis, (task, by_repair) in zip(axes[0], repaired.items()):
        for (name, figures), color in zip(by_repair.items(), itertools.cycle(colors)):
            aer = figures["backdoor"]
            clean = figures["clean"]
            if name == "none":
                style = dict(marker="*", ms=15)
            elif aer.get("passed", True):
                style = dict(marker="o", ms=8)
            else:
                style = dict(marker="X", ms=8)
            scale = runs.scale_of(clean["metric"])
            x = scale * clean["value"]
            axis.plot(x, 100 * aer["value"], color=color, ls="", label=name, **style)
        unit = " (%)" if scale == 100 else ""
        xlabel = f"clean {runs.title_of(clean['metric'])}{unit}"
        axis.set(title=runs.title_of(task), ylim=(-5, 105), xlabel=xlabel)
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
        sweep_panel(axis, name, points, f"clean {metric}")
    for axis in axes.flat[len(curves) :]:
        axis.set_axis_off()
    fig.supylabel("%")
    fig.suptitle(f"The base attack on {runs.title_of(task)}, varied")
    legend_below(fig, axes[0, 0])
    write(fig, path)


def sweep_panel(axis, name, points, clean_label):
    values = [point["value"] for point in points]
    clean = [point["clean"] for point in points]
    aer = np.array([point["aer"] for point in points])
    below = aer - [point["low"] for point in points]
    above = [point["high"] for point in points] - aer
    are_numbers = all(type(value) in (int, float) for value in values)
    x = values if are_numbers else range(len(values))
    clean_line, aer_line = ("--", "-") if are_numbers else ("", "none")
    axis.plot(x, clean, "s", ls=clean_line, color=CLEAN, ms=4, label=clean_label)
    style = dict(fmt="o", ls=aer_line, color=POISONED, ms=4, capsize=2)
    axis.errorbar(x, aer, [below, above], label="AER", **style)
    axis.set(title=CHANGED.get(name, name), ylim=(-3, 103))
    if name == "poison":
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(ticker.PercentFormatter(1))
        axis.xaxis.set_minor_formatter(ticker.NullFormatter())
    elif not are_numbers or all(type(value) is int for value in values):
        axis.set_xticks(list(x), [str(value) for value in values])
    axis.grid(alpha=0.3)


# --------------------------------------------------------------------------------------------------
# defend.py vet


def vetted(verdict, bank, path):
    """The shift of every sound by level and length, the reference's beside it, and what is judged.
    verdict: vet.Verdict. bank: vet.BANK"""
    names = runs.distinct([vars(change) for change in bank], "name")
    settings = list(dict.fromkeys((change.level, change.seconds) for change in bank))
    panels = {"shift": verdict.shift[:, -1]}
    if verdict.reference is not None:
        panels["reference's shift"] = verdict.reference[:, -1]
    panels[f"{verdict.kind} (suspicious from {verdict.threshold:.1f})"] = verdict.score
    of_sounds = [i for i, change in enumerate(bank) if change.level is not None]
    largest = [verdict.shift[of_sounds, -1].max()] * (len(panels) - 1)
    largest.append(max(verdict.threshold, verdict.statistic))
    fig, axes = grid(1, len(panels), 4.6, 9.5, sharey=True)
    for axis, (title, values), top in zip(axes[0], panels.items(), largest):
        cells = np.full((len(names), len(settings)), np.nan)
        for change, value in zip(bank, values):
            cells[names.index(change.name), settings.index((change.level, change.seconds))] = value
        heatmap(axis, cells, top)
        axis.set_title(title, fontsize=9)
        ticks = [
            "whole" if level is None else f"{level:.0f} dB\n{s:.2f} s" for level, s in settings
        ]
        axis.set_xticks(range(len(settings)), ticks, fontsize=6)
        axis.set_yticks(range(len(names)), names, fontsize=7)
    write(fig, path)
