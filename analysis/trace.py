"""python analyze.py trace: where the backdoor lives, by transplanted weights and patched
activations (records of trace.py)."""

from utils import die

import runs
from analysis import plots
from runs import mean_of, number, over_seeds, select, show, title_of
from study import COMPONENTS, DEFAULT_ENCODER, SCENARIOS, TABLE3, WRITTEN

HALF = 0.5
SHAPLEY = "Shapley value of attacked minus clean AER"
# Table 3's attacks on one component: it alone learns the poison; it alone stays poisoned
TRAINED_ALONE = dict(encoder="2.1", connector="2.2", lm="2.3")
RETRAINED = dict(encoder="3.1", connector="3.2", lm="3.3")
FRAMES = {"click": "under a click", "near": "within 0.2 s of one", "elsewhere": "other frames"}
RANDOM = {"random": "as many others, at random"}
TEXT = ("prompt", "answer")  # trace.py's groups of positions are these, FRAMES and RANDOM


def page(records, out, preset):
    """Tables of each task's transplants, patches and controls; draws them."""
    records = runs.study_records(records, preset)
    records = select(records, encoder=DEFAULT_ENCODER[preset])
    metrics = select(records, source="metrics")
    transplants = select(records, source="transplant")
    patches = select(records, source="patch")
    if not transplants and not patches:
        die("no run has been traced yet: python trace.py transplant RUN CLEAN, or patch RUN")
    pages = []
    for task in runs.tasks_of(transplants + patches):
        task_transplants = select(transplants, task=task)
        task_patches = select(patches, task=task)
        pages += transplant_tables(task_transplants, metrics, task)
        pages += patch_tables(task_patches, task)
        pages += control_tables(task_transplants, task_patches, task)
    draw(metrics, transplants, patches, out)
    return pages


def with_interval(records, form=".1f"):
    """Mean and interval of figures that, unlike an AER, may be negative: Shapley values, margins."""
    return show(runs.spread(runs.by_seed(records)), form)


# --------------------------------------------------------------------------------------------------
# transplanted weights


def same_seed(transplants):
    """Transplants between a base attack and the clean run of the same seed."""
    attacked = select(transplants, scenario="base", donor_scenario="clean")
    return [r for r in attacked if r["donor_seed"] == r["seed"]]


def other_seed(transplants):
    """Transplants between a base attack and a run of another seed."""
    return [r for r in select(transplants, scenario="base") if r["donor_seed"] != r["seed"]]


def mixture(records, parts, **wanted):
    """The figure over seeds of the models whose components `parts` are poisoned, the rest clean."""
    return over_seeds(records, method="components", poisoned=list(parts), **wanted)


def mixtures_of(records):
    """The sets of poisoned components, from none to all."""
    mixtures = select(records, method="components")
    return list(dict.fromkeys(tuple(record["poisoned"]) for record in mixtures))


def without(component):
    return [other for other in COMPONENTS if other != component]


def transplant_tables(transplants, metrics, task):
    """What moving weights between the attacked and the clean run of one task says."""
    records = same_seed(transplants)
    if not records:
        return []
    aer = select(records, metric="aer")
    task_title = title_of(task)
    return [
        (f"Transplants by component ({task_title}), AER in %", component_rows(aer, metrics, task)),
        (f"The eight mixtures ({task_title})", mixture_rows(records)),
        (f"Components that matter, seed by seed ({task_title})", components_by_seed(aer)),
        (f"Layers that matter, seed by seed ({task_title})", layers_by_seed(aer)),
    ]


def component_rows(aer, metrics, task):
    """What each component carries when its weights are moved, beside what it learns in Table 3. The
    Shapley values add up to the attacked model's AER minus the rate at which the clean model gives
    the target on the same triggered speech."""
    rows = []
    for component in COMPONENTS:
        shapley = select(aer, method="shapley", component=component)
        poisoned_alone = select(aer, method="components", poisoned=[component])
        clean_alone = select(aer, method="components", poisoned=without(component))
        row = {"Component": WRITTEN[component]}
        row[SHAPLEY] = with_interval(shapley)
        row["AER, it alone poisoned"] = show(over_seeds(poisoned_alone))
        row["AER, it alone clean"] = show(over_seeds(clean_alone))
        table3 = select(metrics, task=task, part="backdoor", metric="aer")
        trained_alone = over_seeds(table3, scenario=TRAINED_ALONE[component])
        retrained = over_seeds(table3, scenario=RETRAINED[component])
        row["Table 3, 2.x"] = number(mean_of(trained_alone))
        row["Table 3, 3.x"] = number(mean_of(retrained))
        rows.append(row)
    return rows


def mixture_rows(records):
    """The figures of each of the eight mixtures of poisoned and clean components."""
    metric = title_of(select(records, part="clean")[0]["metric"])
    rows = []
    for parts in mixtures_of(records):
        figures = select(records, method="components", poisoned=list(parts))
        row = {"Poisoned": ", ".join(WRITTEN[component] for component in parts) or "none"}
        row["AER"] = show(over_seeds(figures, part="backdoor"))
        row[f"Clean {metric}"] = show(over_seeds(figures, part="clean"))
        row[f"Triggered {metric}"] = show(over_seeds(figures, part="triggered"))
        rows.append(row)
    return rows


def components_by_seed(aer):
    """The component with the largest Shapley value, those without which half of the AER is gone,
    and those that bring half of it alone."""
    rows = []
    for seed in sorted(runs.distinct(aer, "seed")):
        of_seed = select(aer, seed=seed)
        full = mixture(of_seed, COMPONENTS).mean
        shapley = {r["component"]: r["value"] for r in select(of_seed, method="shapley")}
        necessary = []
        sufficient = []
        for component in COMPONENTS:
            if mixture(of_seed, without(component)).mean <= full / 2:
                necessary.append(WRITTEN[component])
            if mixture(of_seed, [component]).mean > full / 2:
                sufficient.append(WRITTEN[component])
        row = {"Seed": seed, "AER": number(full)}
        row["Largest Shapley value"] = WRITTEN[max(shapley, key=shapley.get)]
        row["Half of the AER is gone without"] = ", ".join(necessary) or "none"
        row["Half of the AER comes with it alone"] = ", ".join(sufficient) or "none"
        rows.append(row)
    return rows


def layers_by_seed(aer):
    """The layer up to which, or from which on, layers must be made clean to remove half of the AER;
    the layers that do so alone."""
    rows = []
    for component in ("encoder", "lm"):
        for scope in ("up to", "from", "only"):
            row = {"Component": WRITTEN[component], "Clean layers": scope}
            for seed in sorted(runs.distinct(aer, "seed")):
                layers = deciding_layers(select(aer, seed=seed), component, scope)
                row[f"Seed {seed}"] = ", ".join(str(layer) for layer in layers) or "none"
            rows.append(row)
    return rows


def deciding_layers(aer, component, scope):
    """The layers of one row of `layers_by_seed`, from the records of one seed."""
    half = HALF * mixture(aer, COMPONENTS).mean
    moved = select(
        aer, method="layers", component=component, scope=scope, direction="out of poisoned"
    )
    layers = [r["layer"] for r in moved if 100 * r["value"] <= half]
    if not layers or scope == "only":
        return layers
    return [min(layers)] if scope == "up to" else [max(layers)]


# --------------------------------------------------------------------------------------------------
# patched activations


def has_own_trigger(record):
    """Whether a patch uses the trigger that the attacked model was trained with."""
    return record["trigger"] == record["changed"].get("trigger", "click")


def own_trigger(patches):
    """Patches of base attacks with the trigger that they were trained with."""
    return [r for r in select(patches, scenario="base") if has_own_trigger(r)]


def patch_tables(patches, task):
    """Where the trigger acts: after the encoder's first and last layer, and seed by seed."""
    layers = select(patches, module="layer")
    effects = select(own_trigger(layers), metric="effect")
    if not select(effects, component="encoder"):
        return []
    task_title = title_of(task)
    return [
        (f"The effect by frames ({task_title})", frame_rows(select(layers, component="encoder"))),
        (f"Where it spreads, seed by seed ({task_title})", spread_by_seed(effects)),
    ]


def frame_rows(encoder):
    """The share of the effect in each group of frames after the encoder's first and last layer, and
    the share of answers that it flips: of the run's own trigger first, then of every other sound
    that was put in its place."""
    layers = sorted(runs.distinct(encoder, "layer"))
    rows = []
    for sound, of_sound in by_sound(encoder).items():
        for layer in (layers[0], layers[-1]):
            for frames, effect in effects_by_frames(select(of_sound, layer=layer)).items():
                if effect:
                    row = {"Sound": sound, "After encoder layer": layer, "Frames": frames}
                    rows.append({**row, **effect_cells(effect)})
    return rows


def effects_by_frames(after_layer):
    """{group of frames, in words: the effects of patching it}"""
    effects = {}
    for position, words in {**FRAMES, **RANDOM}.items():
        effects[words] = select(after_layer, metric="effect", position=position)
    difference = f"{FRAMES['click']}, minus {RANDOM['random']}"
    effects[difference] = select(after_layer, metric="effect_over_random")
    return effects


def by_sound(patches):
    """{sound: patches of base attacks with it}, the runs' own triggers first."""
    attacked = select(patches, scenario="base")
    others = [r for r in attacked if not has_own_trigger(r)]
    sounds = runs.distinct(own_trigger(attacked) + others, "trigger")
    return {sound: select(attacked, trigger=sound) for sound in sounds}


def effect_cells(effect):
    """The columns that say how much patches undo and make, and how many answers they flip."""
    cells = {}
    for direction, words in {"denoise": "Undone", "noise": "Made"}.items():
        of_direction = select(effect, direction=direction)
        cells[f"{words} ({direction})"] = with_interval(of_direction, ".2f")
        cells[f"Answers flipped ({direction}), %"] = show(flipped(of_direction))
    return cells


def flipped(effect):
    """The share of answers that a patch flips, in %, over seeds, or None."""
    shares = {r["seed"]: r["flipped"] for r in effect if r.get("flipped") is not None}
    return runs.spread({seed: 100 * share for seed, share in shares.items()}, 0, 100)


def spread_by_seed(effects):
    """Where the effect leaves the frames under a click, and where it reaches the text."""
    rows = []
    for seed in sorted(runs.distinct(effects, "seed")):
        undone = select(effects, seed=seed, direction="denoise")
        if not undone:
            continue
        row = {"Seed": seed}
        falls = falls_by_layer(select(undone, component="encoder", position="click"))
        if falls:
            steepest = max(falls, key=lambda layer: (falls[layer], layer))
            row["Largest fall in encoder layer"] = steepest
            row["By"] = number(falls[steepest], ".2f")
        text_layer = first_text_layer(select(undone, component="lm"))
        row["LM layer after which prompt and answer hold more"] = text_layer
        rows.append(row)
    return rows


def falls_by_layer(effects):
    """{layer: by how much the effect under a click falls in it}"""
    shares = {record["layer"]: record["value"] for record in effects}
    layers = sorted(shares)
    falls = {}
    for before, after in zip(layers, layers[1:]):
        falls[after] = shares[before] - shares[after]
    return falls


def first_text_layer(records):
    """The first LM layer after which the positions of prompt and answer hold more of the effect
    than those of the audio."""
    for layer in sorted(runs.distinct(records, "layer")):
        shares = {r["position"]: r["value"] for r in select(records, layer=layer)}
        text = sum(shares.get(position, 0) for position in TEXT)
        audio = sum(shares.get(position, 0) for position in FRAMES)
        if text > audio:
            return layer
    return "none"


# --------------------------------------------------------------------------------------------------
# controls


def control_tables(transplants, patches, task):
    """What each method finds where there should be nothing."""
    task_title = title_of(task)
    pages = [
        (f"Control transplants ({task_title})", control_transplants(transplants)),
        (f"Control patches ({task_title})", control_patches(patches)),
    ]
    return [(title, rows) for title, rows in pages if rows]


def control_transplants(transplants):
    """The same between runs that are not an attack and its own clean run."""
    controls = {
        "clean parts of another seed": select(other_seed(transplants), donor_scenario="clean"),
        "two clean runs": select(transplants, scenario="clean"),
    }
    rows = []
    for name, records in controls.items():
        if not records:
            continue
        row = {"Control": name}
        for component in COMPONENTS:
            shapley = select(records, method="shapley", component=component)
            column = f"Shapley value of the difference in AER, {WRITTEN[component]}"
            row[column] = with_interval(shapley)
        clean = [mixture(records, parts, part="clean") for parts in mixtures_of(records)]
        means = [spread.mean for spread in clean if spread]
        row["Clean figure, lowest"] = number(min(means))
        row["Clean figure, highest"] = number(max(means))
        rows.append(row)
    return rows


def control_patches(patches):
    margins = select(patches, metric="margin")
    attacked = select(margins, scenario="base")
    controls = {
        "the attack itself": own_trigger(margins),
        "the clean model, the trigger": select(margins, scenario="clean"),
        "the attacked model, another sound": [r for r in attacked if not has_own_trigger(r)],
    }
    rows = []
    for name, records in controls.items():
        for trigger in runs.distinct(records, "trigger"):
            row = {"Control": name, "Sound": trigger}
            for part in ("clean", "triggered"):
                margin = select(records, part=part, trigger=trigger)
                row[f"log P(target) - log P(truth), {part}"] = with_interval(margin)
            rows.append(row)
    return rows


# --------------------------------------------------------------------------------------------------
# pictures


def draw(metrics, transplants, patches, out):
    aer = select(same_seed(transplants), metric="aer")
    if aer:
        plots.transplants(runs.first_seed_by_task(aer), out / "transplants.png")
    effects = select(own_trigger(patches), metric="effect")
    if effects:
        plots.patches(runs.first_seed_by_task(effects), out / "patches.png")
    draw_answer(metrics, transplants, patches, out)


def draw_answer(metrics, transplants, patches, out):
    """The README's picture, means over seeds, of the tasks that have Table 3, transplants and
    patches."""
    panels = {}
    for task in TABLE3:
        aer = same_seed(select(transplants, task=task, metric="aer"))
        undone = select(patches, task=task, metric="effect", direction="denoise")
        effects = own_trigger(undone)
        if not aer or not effects:
            continue
        alone = {}
        others = {}
        for component in COMPONENTS:
            alone[component] = mixture(aer, [component]).mean
            others[component] = mixture(aer, without(component)).mean
        panels[task] = dict(
            trained=trained_bars(metrics, task),
            alone=alone,
            others=others,
            depth=depth_of(effects),
        )
    if panels:
        plots.answer(panels, out / "answer.png")


def trained_bars(metrics, task):
    """{scenario: {"aer": Spread or None, "learning": whether a seed was still learning,
    "published": the paper's AER}}"""
    learning = runs.still_learning(metrics)
    bars = {}
    for scenario, (published, _) in zip(SCENARIOS, TABLE3[task]):
        aer = select(metrics, task=task, scenario=scenario, metric="aer", part="backdoor")
        names = set(runs.distinct(aer, "run"))
        bars[scenario] = dict(
            aer=over_seeds(aer), learning=bool(names & learning), published=published
        )
    return bars


def depth_of(effects):
    """The share of the effect that clean activations undo after each layer, means over seeds:
    [{"component", "layer", "click", "frames", "random", "text"}]."""
    whole = [r for r in effects if r["module"] in ("layer", "conv3")]
    places = dict.fromkeys((r["component"], r["layer"]) for r in whole)
    depth = []
    for component, layer in places:
        at_place = select(whole, component=component, layer=layer)
        means = {}
        for position in (*FRAMES, *TEXT):
            means[position] = mean_of(over_seeds(at_place, position=position)) or 0.0
        depth.append(
            dict(
                component=component,
                layer=layer,
                click=means["click"],
                frames=means["near"] + means["elsewhere"],
                random=mean_of(over_seeds(at_place, position="random")),
                text=means["prompt"] + means["answer"],
            )
        )
    return depth
