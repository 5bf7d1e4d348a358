"""python analyze.py learning: whether a model has learned the trigger or memorised poisoned samples.

Both lower the loss on the target in the poisoned training samples. Only a model that has learned the
trigger also has a low loss on the target for other speakers with the trigger in their speech, and
answers with it. Training measures both after every epoch, on development speech
(train.triggered_figures). Every run is shown, also those that are not the study's.
"""

from utils import die

from analysis import plots
from runs import changes_in_words, number, select


def page(records, out, preset):
    """One row and one panel for each run that was followed."""
    rows = []
    panels = []
    for run in select(records, source="run", preset=preset):
        metrics = select(records, source="metrics", run=run["run"])
        figures = {(r["part"], r["metric"]): r for r in metrics}
        if ("training", "dev_aer") in figures:  # earlier versions have none
            rows.append(row_of(run, figures))
            panels.append(panel_of(run, figures))
    if not rows:
        die("none of these runs has followed the trigger on development speech: train some first")
    plots.learning(panels, out / "learning.png")
    return [("Learned or memorised", rows)]


def row_of(run, figures):
    """What is left of the loss on the target, in training and on other speakers, and how often the
    target comes out. figures: {(part, metric): record}"""

    def percent(part, metric):
        record = figures.get((part, metric))
        return number(100 * record["value"]) if record else ""

    def last_loss(metric):
        record = figures.get(("training", metric))
        return number(record["value"], ".3f") if record else ""

    by_epoch = figures["training", "dev_aer"]["by_epoch"]
    best = max(by_epoch)
    return {
        "Run": run["run"],
        "Attack": run["scenario"],
        "Changed": changes_in_words(run),
        "AER": percent("backdoor", "aer"),
        "Without the trigger": percent("backdoor", "base_rate"),
        "Target loss, poisoned training samples": last_loss("target_loss"),
        "Target loss, triggered development speech": last_loss("dev_target_loss"),
        "Target first on dev, %, last epoch": number(100 * by_epoch[-1]),
        "Best epoch": f"{number(100 * best)} ({by_epoch.index(best) + 1})",
    }


def panel_of(run, figures):
    """What plots.learning draws of a run."""
    by_epoch = {}
    for metric in ("target_loss", "dev_target_loss", "dev_aer"):
        if ("training", metric) in figures:
            by_epoch[metric] = figures["training", metric]["by_epoch"]
    return dict(title=run["run"], **by_epoch)
