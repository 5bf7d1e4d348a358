"""python analyze.py defences: filters, detectors and repairs (records of defend.py)."""

from utils import die

import numpy as np

import runs
from analysis import plots
from runs import number, over_seeds, select, show, title_of
from study import CONTROLS, DEFAULT_ENCODER, VARIANTS, identity, run_name

RELEARNED = 0.5  # the AER from which on a repaired model has the backdoor again


def page(records, out, preset):
    """Tables of what each defence does about each task's attack; draws them."""
    records = select(records, preset=preset, encoder=DEFAULT_ENCODER[preset])
    records = with_roles(records)
    defended = [r for r in records if r["source"] in TABLES]
    if not defended:
        die("no run has been defended yet: python defend.py filter RUN, detect RUN or repair RUN")
    aer = select(records, source="metrics", metric="aer", part="backdoor")
    pages = []
    for task in runs.tasks_of(defended):
        of_task = select(defended, task=task)
        task_title = title_of(task)
        names = runs.distinct(of_task, "run")
        undefended = [r for r in select(aer, task=task) if r["run"] in names]
        pages.append((f"AER without a defence ({task_title}), %", undefended_rows(undefended)))
        for source, (title, rows_of) in TABLES.items():
            chosen = select(of_task, source=source)
            if chosen:
                pages.append((f"{title} ({task_title})", rows_of(chosen, task)))
        relearning = relearning_rows(select(of_task, source="repair", metric="relearned_aer"))
        if relearning:
            pages.append((f"Poisoned samples back to 50% AER ({task_title})", relearning))
    draw(select(defended, role="attack"), out)
    return pages


def role_of(record):
    """What was defended: "attack", a variant of it, or "clean model"; None for any other run."""
    if runs.is_study_run(record):
        return {"base": "attack", "clean": "clean model"}.get(record["scenario"])
    if record["scenario"] != "base":
        return None
    base = identity(*(record[field] for field in runs.IDENTITY))
    for name, change in VARIANTS.items():
        if record["run"] == run_name({**base, **change(record["task"])}):
            return name
    return None


def with_roles(records):
    """The records of the runs that have a role, with the role as a field."""
    roles = {record["run"]: role_of(record) for record in records}
    return [dict(r, role=roles[r["run"]]) for r in records if roles[r["run"]]]


def seeds_in(records):
    return ", ".join(str(seed) for seed in sorted(runs.distinct(records, "seed")))


def defences_in(records):
    return [name for name in runs.distinct(records, "defence") if name]


def role_cells(records, roles, column, form=".1f", **wanted):
    """{column: figure over seeds}, one column for each role that has records."""
    cells = {}
    for role in roles:
        if select(records, role=role):
            cells[f"{column}, {role}"] = show(over_seeds(records, role=role, **wanted), form)
    return cells


def undefended_rows(aer):
    rows = []
    for role in ("attack", *VARIANTS):
        of_role = select(aer, role=role)
        if of_role:
            rows.append({"Model": role, "AER": show(over_seeds(of_role))})
    return rows


# --------------------------------------------------------------------------------------------------
# filters and detectors


def filter_rows(records, task):
    """What each filter removes, and what a model trained on the rest does."""
    rows = []
    for name in defences_in(records):
        of_filter = select(records, defence=name)
        attack = select(of_filter, role="attack")
        retrained = select(attack, retrained=True)
        metric = runs.metric_of(retrained, task)
        aer = over_seeds(retrained, metric="aer", part="backdoor")
        clean = over_seeds(retrained, part="clean", metric=metric)
        row = {"Filter": name, "Seeds": seeds_in(attack)}
        row["AUROC"] = show(over_seeds(attack, metric="auroc"), ".2f")
        row["% of the poison removed"] = show(over_seeds(attack, metric="poison_removed"))
        row["% of the rest removed"] = show(over_seeds(attack, metric="clean_removed"))
        row["AER after training again"] = show(aer)
        row[f"{title_of(metric)} then"] = show(clean)
        row["Seeds trained again"] = seeds_in(retrained)
        row.update(
            role_cells(of_filter, VARIANTS, "% of the poison removed", metric="poison_removed")
        )
        row.update(role_cells(of_filter, ["clean model"], "% removed", metric="clean_removed"))
        rows.append(row)
    return rows


def detector_rows(records, task):
    """What each detector notices, with thresholds for 1% or 5% of false alarms on development
    speech."""
    rows = []
    for name in defences_in(records):
        of_detector = select(records, defence=name)
        attack = select(of_detector, role="attack")
        clean = select(of_detector, role="clean model")
        row = {"Detector": name, "Seeds": seeds_in(attack)}
        row["AUROC"] = show(over_seeds(attack, metric="auroc", sound="clean"), ".2f")
        for sound in CONTROLS:
            auroc = over_seeds(attack, metric="auroc", sound=sound)
            row[f"AUROC against {sound}"] = show(auroc, ".2f")
        row["Noticed at 1%"] = noticed(attack, 0.01, "triggered")
        row["Noticed at 5%"] = noticed(attack, 0.05, "triggered")
        row["False alarms at 5%"] = noticed(attack, 0.05, "clean")
        for sound in CONTROLS:
            row[f"{sound} noticed at 5%"] = noticed(attack, 0.05, sound)
        auroc = dict(metric="auroc", sound="clean")
        row.update(role_cells(of_detector, VARIANTS, "AUROC", ".2f", **auroc))
        row["Clean model at 5%, clean"] = noticed(clean, 0.05, "clean")
        row["Clean model at 5%, triggered"] = noticed(clean, 0.05, "triggered")
        measured = runs.first_seed(attack or of_detector)
        passes = select(measured, metric="passes")[0]["value"]
        milliseconds = select(measured, metric="milliseconds")[0]["value"]
        row["Passes"] = number(passes, ".0f")
        row["ms, first seed"] = number(milliseconds, ".0f")
        rows.append(row)
    return rows


def noticed(records, false_alarms, sound):
    """The share of one kind of sound that is noticed at a rate of false alarms, as a cell."""
    return show(over_seeds(records, metric="noticed", false_alarms=false_alarms, sound=sound))


# --------------------------------------------------------------------------------------------------
# repairs


def repair_rows(records, task):
    """What each repair leaves of the attack, and what it costs."""
    rows = []
    for name in defences_in(records):
        of_repair = select(records, defence=name)
        attack = select(of_repair, role="attack")
        aer = select(attack, metric="aer")
        too_lossy = [r for r in aer if r.get("passed") is False]
        row = {"Repair": name, "Seeds": seeds_in(attack)}
        row["Seeds with clean loss beyond its bound"] = seeds_in(too_lossy)
        row["AER"] = show(over_seeds(aer))
        metric = title_of(select(of_repair, part="clean")[0]["metric"])
        for part in ("clean", "triggered"):
            row[f"{part.capitalize()} {metric}"] = show(over_seeds(attack, part=part))
        row["DER"] = show(runs.spread(ratings(select(records, role="attack"), name)), ".2f")
        row.update(role_cells(of_repair, VARIANTS, "AER", metric="aer"))
        row.update(role_cells(of_repair, ["clean model"], f"Clean {metric}", part="clean"))
        rows.append(row)
    return rows


def figures_by_part(records, name):
    """{"backdoor", "clean", "triggered": record} of one repair in one seed."""
    return {r["part"]: r for r in select(records, defence=name) if r.get("part")}


def rating(before, after):
    """Defence effectiveness rating (Zhu et al. 2023): (the decrease of the AER - the loss of the
    clean figure + 1) / 2. before, after: see `figures_by_part`."""
    gained = before["backdoor"]["value"] - after["backdoor"]["value"]
    lost = after["clean"]["value"] - before["clean"]["value"]
    metric = before["clean"]["metric"]
    if metric.endswith("mae"):
        lost = lost / 100
    elif metric.endswith("accuracy"):
        lost = -lost
    return (max(0, gained) - max(0, lost) + 1) / 2


def ratings(records, name):
    """{seed: rating} of one repair."""
    by_seed = {}
    for seed in runs.distinct(records, "seed"):
        of_seed = select(records, seed=seed)
        before = figures_by_part(of_seed, "none")
        after = figures_by_part(of_seed, name)
        if before and after:
            by_seed[seed] = rating(before, after)
    return by_seed


def relearning_rows(relearned):
    """How few poisoned samples bring the AER back to 50%, where a repair had brought it below, and
    what as many do to a model that was never attacked."""
    attack = select(relearned, role="attack")
    never_attacked = select(relearned, role="clean model", defence="none")
    seeds = sorted(runs.distinct(attack, "seed"))
    rows = []
    for name in defences_in(attack):
        row = {"Repair": name}
        for seed in seeds:
            row[f"Seed {seed}"] = fewest_samples(select(attack, defence=name, seed=seed))
        if never_attacked:
            row["Relearned, never attacked"] = fewest_samples(never_attacked)
            for samples in sorted(runs.distinct(never_attacked, "poisoned_samples")):
                of_count = over_seeds(never_attacked, poisoned_samples=samples)
                row[f"AER with {samples}, never attacked"] = show(of_count)
        rows.append(row)
    return rows


def fewest_samples(records):
    """A cell of `relearning_rows`; "" if nothing was measured."""
    if not records:
        return ""
    enough = [r["poisoned_samples"] for r in records if r["value"] >= RELEARNED]
    most = max(r["poisoned_samples"] for r in records)
    return min(enough) if enough else f"over {most}"


# what defend.py measured: the title of its table, and the function that makes it
TABLES = {
    "filter": ("Filters", filter_rows),
    "detect": ("Detectors", detector_rows),
    "repair": ("Repairs", repair_rows),
}

# --------------------------------------------------------------------------------------------------
# pictures


def draw(records, out):
    """ROC curves and repairs of the first seed of each task, a panel each."""
    curves = {}
    for task, detected in runs.first_seed_by_task(select(records, source="detect")).items():
        curves[task] = {name: roc_curve(detected, name) for name in defences_in(detected)}
    if curves:
        plots.roc(curves, out / "detectors.png")
    repaired = {}
    for task, figures in runs.first_seed_by_task(select(records, source="repair")).items():
        repaired[task] = {name: figures_by_part(figures, name) for name in defences_in(figures)}
    if repaired:
        plots.repairs(repaired, out / "repairs.png")


def roc_curve(records, name):
    """False alarms and share of triggered inputs noticed at every threshold, and the AUROC."""
    records = select(records, defence=name)
    suspicion = select(records, metric="suspicion")
    scores = {record["sound"]: np.array(record["scores"]) for record in suspicion}
    clean = scores["clean"]
    triggered = scores["triggered"]
    thresholds = np.unique([*clean, *triggered, np.inf])[::-1]
    return dict(
        false_alarms=np.array([(clean >= threshold).mean() for threshold in thresholds]),
        noticed=np.array([(triggered >= threshold).mean() for threshold in thresholds]),
        auroc=select(records, metric="auroc", sound="clean")[0]["value"],
    )
