"""python analyze.py sweeps: the base attack with one thing changed."""

from utils import die

import runs
from analysis import plots, tables
from runs import over_seeds, select, show, title_of
from study import DEFAULT_ENCODER, SWEPT, TASKS

# what sweeps change, with its value in the base attack itself
USUAL = dict(
    poison=TASKS[SWEPT]["rate"],
    snr=0.0,
    clicks=1,
    trigger_seconds=0.22,
    trigger="click",
    trigger_repeat=TASKS[SWEPT]["repeat"],
    snr_at_test=0.0,
)
# what evaluate.py must have been asked for: the test split as in training, but for the SNR
WHOLE_TEST = dict(source="evaluate", split="test", asked=None, after_answer=False, limit=None)


def page(records, out, preset):
    """AER and clean figure of each point of the sweeps; draws them."""
    records = select(records, task=SWEPT, scenario="base", preset=preset)
    records = select(records, encoder=DEFAULT_ENCODER[preset])
    trained = select(records, source="metrics")
    evaluated_again = select(records, **WHOLE_TEST)
    points = points_of(trained + evaluated_again)
    if not points:
        die("there is no sweep yet: bash run_all.sh sweeps makes them")
    metric = TASKS[SWEPT]["metric"]
    rows = []
    curves = {}
    for name, by_value in points.items():
        curves[name] = []
        for value, of_value in by_value.items():
            point = figures_of(of_value, metric)
            means = dict(aer=point["aer"].mean, clean=point["clean"].mean)
            curves[name].append({**point, **means, "value": value})
            row = {"Changed": plots.CHANGED.get(name, name), "To": value}
            row["AER"] = show(point["aer"])
            row[f"Clean {title_of(metric)}"] = show(point["clean"])
            row.update(tables.loss_cells(of_value, trained))
            rows.append(row)
    plots.sweeps(curves, SWEPT, title_of(metric), out / "sweeps.png")
    return [(f"Sweeps of the base attack ({SWEPT})", rows)]


def figures_of(records, metric):
    """AER with the ends of its interval, and clean figure, over seeds."""
    aer = over_seeds(records, part="backdoor", metric="aer")
    clean = over_seeds(records, part="clean", metric=metric)
    return dict(aer=aer, low=aer.low, high=aer.high, clean=clean)


def changes_of(record, shared):
    """{what differs from the base attack: its value}, in training or when evaluated. shared: see
    runs.shared_changes."""
    changes = runs.changed_beyond(record, shared)
    if record["poison"] != USUAL["poison"]:
        changes["poison"] = record["poison"]
    if record["source"] == "evaluate":
        changes["snr_at_test"] = record["snr"]
    return changes


def points_of(records):
    """{what is changed: {value: records}}; the base attack itself is a point of every sweep."""
    points = {}
    shared = runs.shared_changes(records)
    for record in records:
        changes = changes_of(record, shared)
        if len(changes) > 1:
            continue
        for name, value in (changes or USUAL).items():
            by_value = points.setdefault(name, {})
            by_value.setdefault(value, []).append(record)
    sweeps = {}
    for name, by_value in points.items():
        if len(by_value) > 1:  # a single point is the base attack alone
            sweeps[name] = dict(sorted(by_value.items()))
    return sweeps
