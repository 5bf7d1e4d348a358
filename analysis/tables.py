"""python analyze.py tables: Tables 1, 2 and 3 of the paper, from the records of finished runs."""

from utils import die

import runs
from analysis import plots
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
# nats per token: of all answers; of the target's own tokens, in training and on development speech
LOSSES = {"target_loss": "Target loss", "dev_target_loss": "On dev, triggered", "loss": "Loss"}
EARLIER_LOSSES = {"poisoned_loss": "Poisoned loss", "loss": "Loss"}  # of whole poisoned answers
AGREEMENT = 15  # points of AER within which a study agrees with the paper


def page(records, out, preset):
    """The paper's tables, ours beside the paper's, and how specific the attacks are."""
    of_study = runs.study_records(records, preset)
    records = select(of_study, source="metrics")
    if not records:
        die("none of these runs is of this preset's study: train some first")
    plots.scenarios(out / "scenarios.png")
    pages = [table1(records), table2(records)]
    for task in runs.tasks_of(records):
        pages.append(table3(records, task, preset))
    pages.append(other_tasks(records))
    heard = select(of_study, source="sounds")
    pages += [specificity(heard), families(heard)]
    return [(title, rows) for title, rows in pages if rows]


def ours_and_paper(spread, published):
    """A cell with our figure and the paper's."""
    ours = show(spread) or MISSING
    return ours if published is None else f"{ours} / {published:g}"


def attack_cells(attacked, clean_runs, metric, published):
    """The columns that Tables 2 and 3 share, from the records of one attack and of the clean runs
    beside it. published: the paper's AER and clean figure, or None for each."""
    published_aer, published_clean = published
    aer = over_seeds(attacked, part="backdoor", metric="aer")
    clean = over_seeds(attacked, part="clean", metric=metric)
    baseline = over_seeds(clean_runs, part="clean", metric=metric)
    return {
        "AER (ours / paper)": ours_and_paper(aer, published_aer),
        "Clean (ours / paper)": ours_and_paper(clean, published_clean),
        "Minus baseline": show(runs.difference(clean, baseline), "+.1f") or MISSING,
    }


def damage_cells(attacked, metric, measured):
    """The columns of what the trigger does to answers, whether or not the target comes out: the
    share of the same utterances that get the target without it, the share of answers that it
    changes, the figure against the truth, the share that is of no use. A table has no column of
    what none of its runs, `measured`, has."""
    figures = {
        "AER without the trigger": dict(part="backdoor", metric="base_rate"),
        "Changed answers": dict(part="backdoor", metric="changed"),
        "Triggered": dict(part="triggered", metric=metric),
        "Unusable answers": dict(part="triggered", metric="unusable"),
    }
    cells = {}
    for column, wanted in figures.items():
        if column == "Triggered" or select(measured, **wanted):
            cells[column] = show(over_seeds(attacked, **wanted)) or MISSING
    return cells


def loss_cells(poisoned, measured):
    """The columns of the last epoch's losses. measured: the records of the table's runs."""
    losses = LOSSES if select(measured, metric="target_loss") else EARLIER_LOSSES
    cells = {}
    for metric, column in losses.items():
        if select(measured, metric=metric):
            cells[column] = show(over_seeds(poisoned, part="training", metric=metric), ".3f")
    return cells


def clean_runs_like(records, attacked):
    """The records of the clean runs on the same corpus and with the same encoder."""
    corpus = attacked[0]["corpus"]
    encoder = attacked[0]["encoder"]
    return select(records, scenario="clean", corpus=corpus, encoder=encoder)


def table1(records):
    """Clean baselines, one column for each encoder."""
    clean = select(records, scenario="clean", part="clean")
    trained = runs.distinct(records, "encoder")
    rows = []
    for (corpus, task), published in TABLE1.items():
        metric = TASKS[task]["metric"]
        row = {"Corpus": corpus, "Task": f"{title_of(task)} ({title_of(metric)})"}
        measured = False
        for encoder, paper in zip(ENCODERS, published):
            if encoder not in trained:
                continue
            spread = over_seeds(clean, corpus=corpus, metric=metric, encoder=encoder)
            measured = measured or spread is not None
            row[encoder] = ours_and_paper(spread, paper)
        if measured:
            rows.append(row)
    return "Table 1: clean baselines (ours / paper)", rows


def table2(records):
    """The base attack, one row for each task and encoder."""
    learning = runs.still_learning(records)
    rows = []
    for task in runs.tasks_of(select(records, scenario="base")):
        published = dict(zip(ENCODERS, TABLE2.get(task, ())))
        for encoder in ENCODERS:
            attacked = select(records, task=task, encoder=encoder, scenario="base")
            if not attacked:
                continue
            metric = runs.metric_of(attacked, task)
            row = {"Task": f"{title_of(task)} ({title_of(metric)})", "Encoder": encoder}
            clean_runs = clean_runs_like(records, attacked)
            paper = published.get(encoder, (None, None))
            row.update(attack_cells(attacked, clean_runs, metric, paper))
            row.update(damage_cells(attacked, metric, records))
            row["Settled after epoch"] = show(over_seeds(attacked, metric="settled_epoch"), ".0f")
            row["Seeds still learning"] = len(learning & set(runs.distinct(attacked, "run")))
            rows.append(row)
    return "Table 2: base attack", rows


def how_trained(scenario):
    """{component in words: how a row of Table 3 trains it}"""
    frozen, source, trained_on = SCENARIOS[scenario]
    cells = {}
    for component in COMPONENTS:
        is_frozen = component in frozen
        cells[WRITTEN[component]] = f"frozen, {source}" if is_frozen else f"trained, {trained_on}"
    return cells


def table3(records, task, preset):
    """The component analysis of one task, one row for each scenario."""
    title = f"Table 3: component analysis ({title_of(task)})"
    records = select(records, encoder=DEFAULT_ENCODER[preset])
    attacked = [r for r in select(records, task=task) if r["scenario"] != "clean"]
    # the study of the other tasks has only the base attack and 3.1: no table of their own
    asked = SCENARIOS if task in TABLE3 else ("1.1", "2.1")
    if not set(runs.distinct(attacked, "scenario")) & set(asked):
        return title, []
    metric = runs.metric_of(attacked, task)
    clean_runs = clean_runs_like(records, attacked)
    published = TABLE3.get(task, [(None, None)] * len(SCENARIOS))
    rows = []
    for scenario, paper in zip(SCENARIOS, published):
        chosen = select(attacked, scenario=scenario)
        row = {"Attack": scenario, **how_trained(scenario)}
        row.update(attack_cells(chosen, clean_runs, metric, paper))
        row.update(damage_cells(chosen, metric, attacked))
        _, _, trained_on = SCENARIOS[scenario]
        if trained_on == "poisoned":
            row.update(loss_cells(chosen, attacked))
        rows.append(row)
    return title, rows


def other_tasks(records):
    """The attacked model's clean figures on all tasks of its corpus, and their distance from the
    clean model's."""
    rows = []
    for task in runs.tasks_of(select(records, scenario="base")):
        for encoder in ENCODERS:
            attacked = select(records, task=task, encoder=encoder, scenario="base")
            aer = over_seeds(attacked, part="backdoor", metric="aer")
            if aer is None:
                continue
            row = {"Attacked": task, "Encoder": encoder, "AER": show(aer)}
            clean_runs = clean_runs_like(records, attacked)
            for other in TASKS:
                metric = runs.metric_of(attacked, other)
                clean = over_seeds(attacked, part="clean", metric=metric)
                baseline = over_seeds(clean_runs, part="clean", metric=metric)
                difference = runs.difference(clean, baseline)
                row[f"Clean {title_of(metric)}"] = show(clean)
                row[f"{title_of(metric)} minus baseline"] = show(difference, "+.1f")
            rows.append(row)
    return "The remaining tasks under attack", rows


# --------------------------------------------------------------------------------------------------
# other sounds in the trigger's place (records of evaluate.py --sounds)

NO_SOUND_OF_THE_BANK = ("trigger", "nothing")  # families


def models_heard(records):
    """Yields (the cells that say which model it is, its records over seeds)."""
    for task in runs.tasks_of(records):
        for encoder in ENCODERS:
            for scenario in ("clean", *SCENARIOS):
                chosen = select(records, task=task, encoder=encoder, scenario=scenario)
                if chosen:
                    yield {"Task": task, "Encoder": encoder, "Attack": scenario}, chosen


def mean_over_sounds(records):
    """The mean share of answers that are the target, over the sounds in these records, by seed."""
    aer = select(records, metric="aer")
    means = {}
    for seed in runs.distinct(aer, "seed"):
        shares = [100 * record["value"] for record in select(aer, seed=seed)]
        means[seed] = sum(shares) / len(shares)
    return runs.spread(means)


def of_bank(records):
    return [r for r in records if r["family"] not in NO_SOUND_OF_THE_BANK]


def largest_sound(records):
    """The sound of the bank that brings the target most often, on average over seeds, as a cell."""
    bank = of_bank(records)
    figures = {s: over_seeds(bank, sound=s, metric="aer") for s in runs.distinct(bank, "sound")}
    name = max(figures, key=lambda sound: figures[sound].mean)
    return f"{name} {show(figures[name])}"


def specificity(records):
    """How often the trigger brings the target, and how often other sounds in its place do."""
    rows = []
    for row, chosen in models_heard(records):
        trigger = select(chosen, family="trigger")
        row["AER"] = show(over_seeds(trigger, metric="aer"))
        row["No sound"] = show(over_seeds(chosen, family="nothing", metric="aer"))
        row["Other sounds, mean"] = show(mean_over_sounds(of_bank(chosen)))
        row["Other sounds, largest"] = largest_sound(chosen)
        row["Specificity"] = show(over_seeds(trigger, metric="specificity"))
        row["Answers that the trigger changes"] = show(over_seeds(trigger, metric="changed"))
        changes = [r["value"] for r in select(of_bank(chosen), metric="changed")]
        row["That other sounds change"] = number(100 * sum(changes) / len(changes))
        rows.append(row)
    return "Specificity: other sounds in the trigger's place", rows


def families(records):
    """The same by the family of the sound."""
    rows = []
    for row, chosen in models_heard(records):
        bank = of_bank(chosen)
        for family in runs.distinct(bank, "family"):
            row[family.capitalize()] = show(mean_over_sounds(select(bank, family=family)))
        rows.append(row)
    return "Other sounds by family, % of answers that are the target", rows


# --------------------------------------------------------------------------------------------------
# several studies


def side_by_side(studies):
    """Table 3 of each task, with columns for each study. studies: {name: (records, preset)}."""
    pages = []
    for task in TABLE3:
        measured = {}
        for name, (records, preset) in studies.items():
            records = select(runs.study_records(records, preset), source="metrics", task=task)
            records = select(records, encoder=DEFAULT_ENCODER[preset])
            if records:
                measured[name] = records
        if measured:
            pages.append(
                (f"Table 3 ({title_of(task)}), study by study", compare_table3(measured, task))
            )
    return pages


def compare_table3(studies, task):
    """studies: {name: its records of the task}"""
    metric = TASKS[task]["metric"]
    baselines = dict(zip(ENCODERS, TABLE1[TASKS[task]["corpus"], task]))
    published = {"clean": (None, baselines["wavlm"]), **dict(zip(SCENARIOS, TABLE3[task]))}
    rows = []
    for scenario, (published_aer, published_clean) in published.items():
        row = {"Attack": scenario}
        row["Paper AER"] = number(published_aer, "g")
        row["Paper clean"] = number(published_clean, "g")
        for name, records in studies.items():
            chosen = select(records, scenario=scenario)
            aer = over_seeds(chosen, part="backdoor", metric="aer")
            clean = over_seeds(chosen, part="clean", metric=metric)
            row[f"{name} AER"] = show(aer)
            row[f"{name} clean"] = number(runs.mean_of(clean))
            row[f"{name} against the paper"] = against_paper(aer, published_aer)
        rows.append(row)
    return rows


def against_paper(aer, published):
    """Whether our AER agrees with the paper's, "" where one of them is missing."""
    if aer is None or published is None:
        return ""
    difference = aer.mean - published
    if abs(difference) <= AGREEMENT:
        return "agrees"
    return "higher" if difference > 0 else "lower"
