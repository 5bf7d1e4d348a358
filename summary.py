"""Reads the study's finished runs and turns them into figures over seeds and table cells, for analyze.py and report.py."""

import hashlib
import json
from pathlib import Path

from data import die
from study import (
    ATTACKS,
    NEARER,
    SHIFT_STAGES,
    TABLE2,
    TASKS,
    clean_task,
    deviations,
    identity,
    run_name,
)

ORDER = [
    *TABLE2,
    *(task for task in TASKS if task not in TABLE2),
]  # the paper's tasks in its order, then any other
UNIT = {
    task: {"wer": "WER", "accuracy": "Acc", "mae": "MAE"}[TASKS[task]["metric"].rpartition("_")[2]]
    for task in TASKS
}


def belongs(folder, args, preset):
    """Whether a run folder is one of the study's: it has the name that study.py gives to its arguments."""
    task, attack = args.get("task"), args.get("attack")
    if args.get("preset") != preset or task not in TASKS or attack not in ("clean", *ATTACKS):
        return False
    own = identity(
        preset,
        clean_task(task) if attack == "clean" else task,
        args["encoder"],
        attack,
        args["seed"],
    )
    return folder.name == run_name(own)


def same_model(path, sha256):
    """Ends in one line if a file was made from another model than the one beside it (which may be gone: figures are kept)."""
    model = path.parent / "model.pt"
    if sha256 and model.exists() and hashlib.sha256(model.read_bytes()).hexdigest() != sha256:
        die(
            f"{path} was made from another model than {model}: make it again by evaluate.py --save, embed.py or analyze.py"
        )


def saved_figures(folder, pattern):
    """Yields (path, contents) of each of the runs' JSON files with this name, none of which may be of another model."""
    for path in sorted(Path(folder).glob(f"*/{pattern}")):
        figures = json.loads(path.read_text())
        same_model(path, figures.get("model_sha256"))
        yield path, figures


def read_runs(folder, preset):
    """metrics.json of each of the study's finished runs. Ends in one line if two have different settings."""
    runs = []
    for path, metrics in saved_figures(folder, "metrics.json"):
        if belongs(path.parent, metrics["args"], preset):
            runs.append((path.parent, metrics))
            (first, ours), (last, theirs) = (
                (run, deviations(m["args"]) or "the preset") for run, m in (runs[0], runs[-1])
            )
            if ours != theirs:
                die(
                    f"{first} and {last} have different settings ({ours}; {theirs}): move one of them out of {folder}"
                )
    return [metrics for _, metrics in runs]


def saved_clusters(folder, preset, ks):
    """{task: {seed: figures}} of all runs' cluster.json; no model need be there."""
    values = {}
    for path, saved in saved_figures(folder, "cluster.json"):
        args = saved["args"]
        if belongs(path.parent, args, preset) and all(f"k={k}" in saved for k in ks):
            values.setdefault(args["task"], {})[args["seed"]] = saved
    return {task: dict(sorted(values[task].items())) for task in ORDER if task in values}


def saved_shifts(folder, preset):
    """{task: {stage: {seed: average cosine}}} of all runs' shift-TASK.json; no model need be there."""
    values = {}
    for _, saved in saved_figures(folder, "shift-*.json"):
        args = saved["args"]
        for stage, attack, part in SHIFT_STAGES:
            if (args["preset"], args["attack"]) == (preset, attack):
                values.setdefault(args["task"], {}).setdefault(stage, {})[args["seed"]] = saved[
                    part
                ]
    return {task: values[task] for task in ORDER if task in values}


def matching(runs, **wanted):
    """The runs with these arguments."""
    return [run for run in runs if all(run["args"].get(k) == v for k, v in wanted.items())]


def still_learning(run):
    """Whether the loss on poisoned samples was still falling when training ended, so that a low AER says little: it had not settled, or
    it has fallen ever since, too slowly to be noticed from one epoch to the next, and is still above the loss on all."""
    training = run.get("training", {})
    if "poisoned_loss" not in training or "settled_epoch" not in training:
        return "poisoned_loss" in training
    excess = [
        poisoned - loss
        for poisoned, loss in zip(
            training["poisoned_loss"]["by_epoch"], training["loss"]["by_epoch"]
        )
    ]
    return (
        excess[-1] >= NEARER
        and excess[training["settled_epoch"]["value"] - 1] - excess[-1] >= NEARER
    )


# ---------------------------------------------------------------------------------------------------------------------
# figures over seeds


def spread(values):
    """{seed: figure} -> {"mean", "low", "high", "seeds": {seed: figure}}, or None if there is none."""
    values = {seed: v for seed, v in sorted(values.items()) if v is not None}
    if values:
        mean = sum(values.values()) / len(values)
        return dict(mean=mean, low=min(values.values()), high=max(values.values()), seeds=values)


def over_seeds(runs, part, name, **wanted):
    """A figure, in the paper's units (percent, years), over the runs with the wanted arguments."""
    scale = 1 if name.endswith(("mae", "loss", "epoch")) else 100
    return spread(
        {
            run["args"]["seed"]: scale * run[part][name]["value"]
            for run in matching(runs, **wanted)
            if name in run.get(part, {})
        }
    )


def stealth(attacked, baseline):
    """Clean figure under attack minus the baseline's, for the seeds that both have."""
    seeds = (
        {}
        if attacked is None or baseline is None
        else attacked["seeds"].keys() & baseline["seeds"].keys()
    )
    return spread({seed: attacked["seeds"][seed] - baseline["seeds"][seed] for seed in seeds})


def scale_of(metric):
    """Shares are shown in percent, ages in years."""
    return 1 if metric.endswith("mae") else 100


def show(found, published=None, form=".1f"):
    """One cell: the mean, the range if there are several seeds, then the paper's figure."""
    text = f"{found['mean']:{form}}" if found else "missing"
    if found and len(found["seeds"]) > 1:
        text += f" ({found['low']:{form}} to {found['high']:{form}})"
    return text if published is None else f"{text} / {published:g}"


def listed(names):
    """Names in words: "a, b and c", or "none"."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]])) or "none"


def markdown(title, rows):
    """A Markdown table with a title; rows: [{column: cell}], none for the title alone."""
    if not rows:
        return f"## {title}\n"
    lines = [list(rows[0]), *(row.values() for row in rows)]
    header, *body = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([f"## {title}", "", header, "|---" * len(rows[0]) + "|", *body, ""])
