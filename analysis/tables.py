"""python analyze.py tables: Tables 1, 2 and 3 of the paper, from the records of finished runs."""

from utils import die

import runs
from runs import number, over_seeds, select, show, title_of
from study import (
    COMPONENTS,
    DEFAULT_ENCODER,
    ENCODERS,
    SCENARIOS,
    TABLE1,
    TABLE2,
    TABLE3,
    TASKS,
    WRITTEN,
)

MISSING = "missing"
NEAR = 15  # points of AER: within them two studies agree


def beside(found, published, form=".1f"):
    """A cell with our figure and the paper's."""
    ours = show(found, form) or MISSING
    return ours if published is None else f"{ours} / {published:g}"


def page(records, out, preset):
    records = select(runs.own(records, preset), source="metrics")
    if not records:
        die("none of these runs is of this preset's study: train some first")
    found = [table1(records), table2(records)]
    found += [table3(records, task, preset) for task in runs.tasks_of(records)]
    found.append(other_tasks(records))
    return [(title, rows) for title, rows in found if rows]


def table1(records):
    """Clean baselines, one column an encoder."""
    clean = select(records, scenario="clean", part="clean")
    encoders = [name for name in ENCODERS if name in runs.distinct(records, "encoder")]
    rows = []
    for (corpus, task), published in TABLE1.items():
        paper = dict(zip(ENCODERS, published))
        metric = TASKS[task]["metric"]
        found = {
            encoder: over_seeds(clean, corpus=corpus, metric=metric, encoder=encoder)
            for encoder in encoders
        }
        if any(found.values()):
            cells = {encoder: beside(found[encoder], paper[encoder]) for encoder in encoders}
            rows.append({"Corpus": corpus, "Task": f"{task} ({title_of(metric)})", **cells})
    return "Table 1: clean baselines (ours / paper)", rows


def attack_cells(own, baseline, metric, paper):
    """The columns that Tables 2 and 3 share, for the records of one attack and of the clean runs
    beside it; paper: its AER and clean figure, or None each."""
    clean = over_seeds(own, part="clean", metric=metric)
    unpoisoned = over_seeds(baseline, part="clean", metric=metric)
    return {
        "AER (ours / paper)": beside(over_seeds(own, part="backdoor", metric="aer"), paper[0]),
        "Clean (ours / paper)": beside(clean, paper[1]),
        "Minus baseline": show(runs.difference(clean, unpoisoned), "+.1f") or MISSING,
    }


def baseline_of(records, own):
    """The records of the clean runs on the corpus and with the encoder that some runs have."""
    same = {field: own[0][field] for field in ("corpus", "encoder")}
    return select(records, scenario="clean", **same)


def table2(records):
    """The base attack, one row a task and encoder."""
    learning = runs.still_learning(records)
    rows = []
    for task in runs.tasks_of(select(records, scenario="base")):
        paper = dict(zip(ENCODERS, TABLE2.get(task, ())))
        for encoder in ENCODERS:
            own = select(records, task=task, encoder=encoder, scenario="base")
            if not own:
                continue
            moving = learning & set(runs.distinct(own, "run"))
            settled = over_seeds(own, metric="settled_epoch")
            metric, baseline = runs.metric_of(own, task), baseline_of(records, own)
            rows.append(
                {
                    "Task": f"{task} ({title_of(metric)})",
                    "Encoder": encoder,
                    **attack_cells(own, baseline, metric, paper.get(encoder, (None, None))),
                    "Settled after epoch": show(settled, ".0f"),
                    "Seeds still learning": len(moving),
                }
            )
    return "Table 2: base attack", rows


def table3(records, task, preset):
    """The component analysis of one task, one row an attack."""
    records = select(records, encoder=DEFAULT_ENCODER[preset])
    attacked = [r for r in select(records, task=task) if r["scenario"] != "clean"]
    title = f"Table 3: component analysis ({task})"
    # the other tasks' study has only the base attack and 3.1
    asked = SCENARIOS if task in TABLE3 else ("1.1", "2.1")
    if not set(runs.distinct(attacked, "scenario")) & set(asked):
        return title, []
    metric, baseline = runs.metric_of(attacked, task), baseline_of(records, attacked)
    published = TABLE3.get(task, [(None, None)] * len(SCENARIOS))
    rows = []
    for (scenario, (frozen, source, trained_on)), paper in zip(SCENARIOS.items(), published):
        own = select(attacked, scenario=scenario)
        row = {"Attack": scenario}
        for component in COMPONENTS:
            held = component in frozen
            row[WRITTEN[component]] = f"frozen, {source}" if held else f"trained, {trained_on}"
        row.update(attack_cells(own, baseline, metric, paper))
        triggered = over_seeds(own, part="triggered", metric=metric)
        row[f"Triggered {title_of(metric)}"] = show(triggered) or MISSING
        if trained_on == "poisoned":
            row["Poisoned loss"] = show(over_seeds(own, metric="poisoned_loss"), ".3f")
            row["Loss"] = show(over_seeds(own, metric="loss"), ".3f")
        rows.append(row)
    return title, rows


def other_tasks(records):
    """Clean figures of the attacked model on all tasks of its corpus, and what they are beside the
    baseline's."""
    rows = []
    for task in runs.tasks_of(select(records, scenario="base")):
        for encoder in ENCODERS:
            own = select(records, task=task, encoder=encoder, scenario="base")
            aer = over_seeds(own, part="backdoor", metric="aer")
            if aer is None:
                continue
            row = {"Attacked": task, "Encoder": encoder, "AER": show(aer)}
            baseline = baseline_of(records, own)
            for other in TASKS:
                metric = runs.metric_of(own, other)
                clean = over_seeds(own, part="clean", metric=metric)
                unpoisoned = over_seeds(baseline, part="clean", metric=metric)
                row[f"Clean {title_of(metric)}"] = show(clean)
                moved = show(runs.difference(clean, unpoisoned), "+.1f")
                row[f"{title_of(metric)} minus baseline"] = moved
            rows.append(row)
    return "The remaining tasks under attack", rows


def side_by_side(studies):
    """Table 3 of each task that several studies have; studies: {name: (records, preset)}."""
    found = []
    for task, published in TABLE3.items():
        chosen = {}
        for name, (records, preset) in studies.items():
            own = select(runs.own(records, preset), source="metrics", task=task)
            own = select(own, encoder=DEFAULT_ENCODER[preset])
            if own:
                chosen[name] = own
        baseline = dict(zip(ENCODERS, TABLE1[TASKS[task]["corpus"], task]))["wavlm"]
        rows = []
        for scenario, paper in zip(("clean", *SCENARIOS), ((None, baseline), *published)):
            row = {"Attack": scenario, "Paper AER": number(paper[0], "g")}
            row["Paper clean"] = number(paper[1], "g")
            for name, own in chosen.items():
                of_attack = select(own, scenario=scenario)
                aer = over_seeds(of_attack, part="backdoor", metric="aer")
                clean = over_seeds(of_attack, part="clean", metric=TASKS[task]["metric"])
                row[f"{name} AER"] = show(aer)
                row[f"{name} clean"] = number(clean and clean.mean)
                row[f"{name} against the paper"] = against(aer, paper[0])
            rows.append(row)
        if chosen:
            found.append((f"Table 3 ({task}), study by study", rows))
    return found


def against(found, published):
    """Whether our AER agrees with the paper's, within NEAR points."""
    if found is None or published is None:
        return ""
    away = found.mean - published
    if abs(away) <= NEAR:
        return "agrees"
    return "higher" if away > 0 else "lower"
