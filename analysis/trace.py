"""python analyze.py trace: where the backdoor lives, by transplanted weights and patched
activations (records of trace.py)."""

from utils import die

import runs
from analysis import plots
from runs import number, over_seeds, select, show, title_of
from study import COMPONENTS, DEFAULT_ENCODER, SCENARIOS, TABLE3, WRITTEN

HALF = 0.5
# Table 3's attacks on one component: it alone learns the poison; it alone stays poisoned
TRAINED_ALONE = dict(encoder="2.1", connector="2.2", lm="2.3")
RETRAINED = dict(encoder="3.1", connector="3.2", lm="3.3")


def page(records, out, preset):
    records = select(runs.own(records, preset), encoder=DEFAULT_ENCODER[preset])
    metrics = select(records, source="metrics")
    moved, patched = (select(records, source=source) for source in ("transplant", "patch"))
    if not moved and not patched:
        die("no run has been traced yet: python trace.py transplant RUN CLEAN, or patch RUN")
    found = []
    for task in runs.tasks_of(moved + patched):
        found += transplant_tables(select(moved, task=task), metrics, task)
        found += patch_tables(select(patched, task=task), task)
        found += control_tables(select(moved, task=task), select(patched, task=task), task)
    attacked = select(same_seed(moved), metric="aer")
    if attacked:
        plots.transplants(by_task(attacked), out / "transplants.png")
    effects = select(own_trigger(patched), metric="effect")
    if effects:
        plots.patches(by_task(effects), out / "patches.png")
    draw_answer(metrics, moved, patched, out)
    return found


def first_seed(records):
    return select(records, seed=min(runs.distinct(records, "seed")))


def by_task(records):
    """{task: the records of its first seed}."""
    return {task: first_seed(select(records, task=task)) for task in runs.tasks_of(records)}


def same_seed(records):
    """Transplants between a base attack and the clean run of the same seed."""
    attacked = select(records, scenario="base", donor_scenario="clean")
    return [r for r in attacked if r["donor_seed"] == r["seed"]]


def own_trigger(records):
    """Patches with the trigger that the attacked model was trained with."""
    return [r for r in select(records, scenario="base") if is_own_trigger(r)]


def is_own_trigger(record):
    return record["trigger"] == record["changed"].get("trigger", "click")


def mixture(records, parts, **wanted):
    """The figure over seeds of the models whose `parts` are poisoned."""
    return over_seeds(records, method="components", poisoned=list(parts), **wanted)


def mixtures_of(records):
    """The sets of poisoned components, from none to all."""
    found = [tuple(r["poisoned"]) for r in select(records, method="components")]
    return list(dict.fromkeys(found))


def without(component):
    return [c for c in COMPONENTS if c != component]


def with_interval(records):
    """Mean and range over seeds or, for a single seed, the interval over utterances."""
    if len(records) != 1:
        return show(runs.spread(runs.by_seed(records)))
    record = records[0]
    scale = runs.scale_of(record["metric"])
    value, low, high = (number(scale * record[end]) for end in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def transplant_tables(records, metrics, task):
    """What moving weights between the attacked and the clean run of one task says."""
    records = same_seed(records)
    if not records:
        return []
    aer = select(records, metric="aer")
    rows = []
    for component in COMPONENTS:
        row = {"Component": WRITTEN[component]}
        row["Shapley value"] = with_interval(select(aer, method="shapley", component=component))
        for column, parts in (("poisoned", [component]), ("clean", without(component))):
            alone = select(aer, method="components", poisoned=parts)
            row[f"AER, it alone {column}"] = with_interval(alone)
        for attacks in (TRAINED_ALONE, RETRAINED):
            scenario = attacks[component]
            known = over_seeds(metrics, task=task, scenario=scenario, part="backdoor", metric="aer")
            row[f"Table 3, {'2.x' if attacks is TRAINED_ALONE else '3.x'}"] = number(
                known and known.mean
            )
        rows.append(row)
    mixed = []
    for parts in mixtures_of(records):
        own = select(records, method="components", poisoned=list(parts))
        row = {"Poisoned": ", ".join(WRITTEN[c] for c in parts) or "none"}
        for part, column in (("backdoor", "AER"), ("clean", "Clean"), ("triggered", "Triggered")):
            figures = select(own, part=part)
            name = "AER" if part == "backdoor" else f"{column} {title_of(figures[0]['metric'])}"
            row[name] = with_interval(figures)
        mixed.append(row)
    return [
        (f"Transplants by component ({task}), AER in %", rows),
        (f"The eight mixtures ({task})", mixed),
        (f"Components that matter, seed by seed ({task})", components_by_seed(aer)),
        (f"Layers that matter, seed by seed ({task})", layers_by_seed(aer)),
    ]


def components_by_seed(aer):
    """Which component has the largest Shapley value, without which half of the AER is gone, which
    alone bring half of it."""
    rows = []
    for seed in sorted(runs.distinct(aer, "seed")):
        own = select(aer, seed=seed)
        full = mixture(own, COMPONENTS).mean
        shapley = {r["component"]: r["value"] for r in select(own, method="shapley")}
        needed, enough = [], []
        for component in COMPONENTS:
            if mixture(own, without(component)).mean <= full / 2:
                needed.append(WRITTEN[component])
            if mixture(own, [component]).mean > full / 2:
                enough.append(WRITTEN[component])
        rows.append(
            {
                "Seed": seed,
                "AER": number(full),
                "Largest Shapley value": WRITTEN[max(shapley, key=shapley.get)],
                "Half of the AER is gone without": ", ".join(needed) or "none",
                "Half of the AER comes with it alone": ", ".join(enough) or "none",
            }
        )
    return rows


def layers_by_seed(aer):
    """The layer up to which, or from which on, layers must be made clean to remove half of the AER;
    the layers that do so alone."""
    rows = []
    for component in ("encoder", "lm"):
        for scope in ("up to", "from", "only"):
            row = {"Component": WRITTEN[component], "Clean layers": scope}
            for seed in sorted(runs.distinct(aer, "seed")):
                own = select(aer, seed=seed)
                half = HALF * mixture(own, COMPONENTS).mean
                moves = dict(component=component, scope=scope, direction="out of poisoned")
                moved = select(own, method="layers", **moves)
                layers = [r["layer"] for r in moved if 100 * r["value"] <= half]
                if layers and scope != "only":
                    layers = [min(layers) if scope == "up to" else max(layers)]
                row[f"Seed {seed}"] = ", ".join(map(str, layers)) or "none"
            rows.append(row)
    return rows


POSITIONS = {  # of trace.py's groups of positions
    "click": "under a click",
    "near": "within 0.2 s of one",
    "elsewhere": "other frames",
    "prompt": "prompt",
    "answer": "answer",
}


def patch_tables(records, task):
    """Where the trigger acts: after the encoder's first and last layer, and seed by seed."""
    effects = select(own_trigger(records), metric="effect")
    encoder = select(effects, component="encoder", module="layer")
    if not encoder:
        return []
    layers = sorted(runs.distinct(encoder, "layer"))
    rows = []
    for layer in (layers[0], layers[-1]):
        for position in ("click", "near", "elsewhere"):
            own = select(encoder, layer=layer, position=position)
            row = {"After encoder layer": layer, "Frames": POSITIONS[position]}
            row["Undone (denoise)"] = show(over_seeds(own, direction="denoise"), ".2f")
            row["Made (noise)"] = show(over_seeds(own, direction="noise"), ".2f")
            rows.append(row)
    by_seed = []
    for seed in sorted(runs.distinct(effects, "seed")):
        own = select(effects, seed=seed, direction="denoise", module="layer")
        if not own:
            continue
        under = {r["layer"]: r["value"] for r in select(own, component="encoder", position="click")}
        falls = {after: under[before] - under[after] for before, after in pairs_of(sorted(under))}
        row = {"Seed": seed}
        if falls:
            steepest = max(falls, key=lambda layer: (falls[layer], layer))
            row["Largest fall in encoder layer"] = steepest
            row["By"] = number(falls[steepest], ".2f")
        lm = select(own, component="lm")
        row["LM layer after which prompt and answer hold more"] = first_text_layer(lm)
        by_seed.append(row)
    return [
        (f"The effect by frames ({task})", rows),
        (f"Where it spreads, seed by seed ({task})", by_seed),
    ]


def pairs_of(values):
    return list(zip(values, values[1:]))


def first_text_layer(records):
    """The first LM layer after which the positions of prompt and answer hold more of the effect
    than those of the audio."""
    for layer in sorted(runs.distinct(records, "layer")):
        values = {r["position"]: r["value"] for r in select(records, layer=layer)}
        text = sum(values.get(position, 0) for position in ("prompt", "answer"))
        audio = sum(values.get(position, 0) for position in ("click", "near", "elsewhere"))
        if text > audio:
            return layer
    return "none"


def control_tables(moved, patched, task):
    """What each method finds where there should be nothing."""
    other_seed = [r for r in select(moved, scenario="base") if r["donor_seed"] != r["seed"]]
    mixed = []
    for name, records in (
        ("clean parts of another seed", select(other_seed, donor_scenario="clean")),
        ("two clean runs", select(moved, scenario="clean")),
    ):
        if not records:
            continue
        row = {"Control": name}
        for component in COMPONENTS:
            own = select(records, method="shapley", component=component)
            row[f"Shapley value, {WRITTEN[component]}"] = with_interval(own)
        means = [mixture(records, parts, part="clean").mean for parts in mixtures_of(records)]
        row["Clean figure, lowest"] = number(min(means))
        row["Clean figure, highest"] = number(max(means))
        mixed.append(row)
    sounds = []
    margins = select(patched, metric="margin")
    attacked = select(margins, scenario="base")
    for name, records in (
        ("the attack itself", own_trigger(margins)),
        ("the clean model, the trigger", select(margins, scenario="clean")),
        ("the attacked model, another sound", [r for r in attacked if not is_own_trigger(r)]),
    ):
        for trigger in runs.distinct(records, "trigger"):
            row = {"Control": name, "Sound": trigger}
            for part in ("clean", "triggered"):
                own = select(records, part=part, trigger=trigger)
                row[f"log P(target) - log P(truth), {part}"] = with_interval(own)
            sounds.append(row)
    found = [(f"Control transplants ({task})", mixed), (f"Control patches ({task})", sounds)]
    return [(title, rows) for title, rows in found if rows]


def draw_answer(metrics, moved, patched, out):
    """The README's picture, means over seeds, of the tasks that have Table 3, transplants and
    patches."""
    learning, panels = runs.still_learning(metrics), {}
    for task in TABLE3:
        weights = same_seed(select(moved, task=task, metric="aer"))
        effects = select(own_trigger(select(patched, task=task)), direction="denoise")
        if not weights or not effects:
            continue
        trained = {}
        for scenario in SCENARIOS:
            own = select(metrics, task=task, scenario=scenario, metric="aer", part="backdoor")
            names = set(runs.distinct(own, "run"))
            if own:
                trained[scenario] = runs.spread(runs.by_seed(own)), bool(names & learning)
        alone = {c: mixture(weights, [c]).mean for c in COMPONENTS}
        others = {c: mixture(weights, without(c)).mean for c in COMPONENTS}
        panels[task] = dict(
            trained=trained,
            published=dict(zip(SCENARIOS, (aer for aer, _ in TABLE3[task]))),
            alone=alone,
            others=others,
            depth=depth_of(effects),
        )
    if panels:
        plots.answer(panels, out / "answer.png")


def depth_of(effects):
    """[(component, layer, {"click", "frames", "text": share of the effect undone})] after each
    layer, means over seeds."""
    found = []
    whole = [r for r in effects if r["module"] in ("layer", "conv3")]
    seen = dict.fromkeys((r["component"], r["layer"]) for r in whole)
    for component, layer in seen:
        own = select(whole, component=component, layer=layer)
        means = {}
        for position in POSITIONS:
            share = over_seeds(own, position=position)
            means[position] = share.mean if share else 0.0
        shares = dict(
            click=means["click"],
            frames=means["near"] + means["elsewhere"],
            text=means["prompt"] + means["answer"],
        )
        found.append((component, layer, shares))
    return found
