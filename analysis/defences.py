"""python analyze.py defences: filters, detectors and repairs (records of defend.py)."""

from utils import die

import numpy as np

import runs
from analysis import plots
from analysis.trace import first_seed
from runs import number, over_seeds, select, show, title_of
from study import DEFAULT_ENCODER, VARIANTS, identity, run_name

HALF = 0.5


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


def page(records, out, preset):
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
