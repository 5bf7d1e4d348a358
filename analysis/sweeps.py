"""python analyze.py sweeps: the base attack with one thing changed."""

from utils import die

from analysis import plots
from runs import number, over_seeds, select, show, title_of
from study import DEFAULT_ENCODER, SWEPT, TASKS


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


def page(records, out, preset):
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
