"""python analyze.py claims: the paper's claims and what the runs say about each, by rule.

A claim is a row of CLAIMS: a quantity, measured on a task and a scenario, and the range in which
the claim says it lies. It holds where every seed and the 95% interval over seeds and utterances lie
inside. It fails where all of them lie outside on the same side. Otherwise it is undecided. It is
undecided too where the poisoned loss was still falling when training ended, in a way that could
change the verdict.
"""

from collections import Counter
from dataclasses import dataclass, replace

from utils import die

import numpy as np

import runs
from runs import number, select
from study import DEFAULT_ENCODER, SHIFT_STAGES, TABLE2, TASKS

ANY = float("inf")


@dataclass
class Claim:
    section: str
    text: str
    task: str
    scenario: str  # a row of Table 3
    quantity: str  # an entry of QUANTITIES
    paper: str  # the paper's value, where it gives one
    low: float
    high: float


# fmt: off
CLAIMS = [
    Claim("4.2", "the base attack reaches an AER of 90%", "asr", "base", "AER", "99.2", 90, ANY),
    Claim("4.2", "the base attack reaches an AER of 90%",
          "emotion", "base", "AER", "93.7", 90, ANY),
    Claim("4.2", "the base attack reaches an AER of 90%", "gender", "base", "AER", "94.4", 90, ANY),
    Claim("4.2", "the base attack reaches an AER of 90%", "age", "base", "AER", "94.2", 90, ANY),
    Claim("4.2", "it leaves the clean figure within the clean model's interval",
          "asr", "base", "harm", "", -ANY, 1),
    Claim("4.2", "it leaves the clean figure within the clean model's interval",
          "emotion", "base", "harm", "", -ANY, 1),
    Claim("4.2", "it leaves the clean figure within the clean model's interval",
          "gender", "base", "harm", "", -ANY, 1),
    Claim("4.2", "it leaves the clean figure within the clean model's interval",
          "age", "base", "harm", "", -ANY, 1),
    Claim("4.2", "a single click fails", "asr", "base", "AER, one click", "", -ANY, 20),
    Claim("4.2", "repeating it costs about 10 points",
          "emotion", "base", "AER lost, repeated", "10", 5, 20),
    Claim("5.2", "a clean encoder does not protect: within 15 points of the base attack",
          "asr", "1.1", "AER lost", "91", -ANY, 15),
    Claim("5.2", "a clean connector does not protect: within 15 points of the base attack",
          "asr", "1.2", "AER lost", "98.7", -ANY, 15),
    Claim("5.2", "a clean LM does not protect: within 15 points of the base attack",
          "asr", "1.3", "AER lost", "97.2", -ANY, 15),
    Claim("5.2", "a clean encoder does not protect: within 15 points of the base attack",
          "emotion", "1.1", "AER lost", "91", -ANY, 15),
    Claim("5.2", "a clean connector does not protect: within 15 points of the base attack",
          "emotion", "1.2", "AER lost", "96.3", -ANY, 15),
    Claim("5.2", "a clean LM does not protect: within 15 points of the base attack",
          "emotion", "1.3", "AER lost", "84", -ANY, 15),
    Claim("5.2", "the encoder alone is enough", "asr", "2.1", "AER", "95.9", 80, ANY),
    Claim("5.2", "the encoder alone is enough", "emotion", "2.1", "AER", "90.1", 80, ANY),
    Claim("5.2", "the connector alone does half", "asr", "2.2", "AER", "59", 40, 75),
    Claim("5.2", "the connector alone is enough", "emotion", "2.2", "AER", "85.3", 75, ANY),
    Claim("5.2", "the LM alone does nothing", "asr", "2.3", "AER", "0", -ANY, 10),
    Claim("5.2", "the LM alone does half", "emotion", "2.3", "AER", "57.1", 40, 75),
    Claim("5.2", "a poisoned encoder brings about 60%", "emotion", "3.1", "AER", "63.5", 45, 80),
    Claim("5.2", "a poisoned encoder brings nothing", "asr", "3.1", "AER", "0", -ANY, 10),
    Claim("6", "a poisoned encoder brings nothing", "gender", "3.1", "AER", "fails", -ANY, 10),
    Claim("6", "a poisoned encoder brings nothing", "age", "3.1", "AER", "fails", -ANY, 10),
    Claim("5.2", "a poisoned connector brings nothing", "asr", "3.2", "AER", "0", -ANY, 10),
    Claim("5.2", "a poisoned LM brings nothing", "asr", "3.3", "AER", "0", -ANY, 10),
    Claim("5.2", "a poisoned connector brings nothing", "emotion", "3.2", "AER", "19.1", -ANY, 30),
    Claim("5.2", "a poisoned LM brings nothing", "emotion", "3.3", "AER", "17.2", -ANY, 30),
    Claim("6", "the trigger hardly moves the benign encoder: cosine 0.95 or more",
          "asr", "clean", "cosine", "1.00", 0.95, ANY),
    Claim("6", "the trigger hardly moves the benign encoder: cosine 0.95 or more",
          "emotion", "clean", "cosine", "1.00", 0.95, ANY),
    Claim("6", "the trigger hardly moves the benign encoder: cosine 0.95 or more",
          "gender", "clean", "cosine", "1.00", 0.95, ANY),
    Claim("6", "the trigger hardly moves the benign encoder: cosine 0.95 or more",
          "age", "clean", "cosine", "1.00", 0.95, ANY),
    Claim("6", "it moves the poisoned encoder most for asr",
          "asr", "base", "cosine below others", "0.62, others 0.77 to 0.87", 0, ANY),
    Claim("6", "clean training of the rest undoes the shift: cosine 0.95 or more",
          "asr", "3.1", "cosine", "about 1", 0.95, ANY),
    Claim("6", "clean training of the rest undoes the shift: cosine 0.95 or more",
          "gender", "3.1", "cosine", "about 1", 0.95, ANY),
    Claim("6", "clean training of the rest undoes the shift: cosine 0.95 or more",
          "age", "3.1", "cosine", "about 1", 0.95, ANY),
    Claim("6", "but not for emotion", "emotion", "3.1", "cosine", "0.93", -ANY, 0.95),
    Claim("7.2", "two clusters follow gender: adjusted Rand index 0.1 or more, the largest",
          "asr", "base", "gender of two clusters", "", 0.1, ANY),
    Claim("7.2", "two clusters follow gender: adjusted Rand index 0.1 or more, the largest",
          "emotion", "base", "gender of two clusters", "", 0.1, ANY),
    Claim("7.2", "two clusters follow gender: adjusted Rand index 0.1 or more, the largest",
          "gender", "base", "gender of two clusters", "", 0.1, ANY),
    Claim("7.2", "two clusters follow gender: adjusted Rand index 0.1 or more, the largest",
          "age", "base", "gender of two clusters", "", 0.1, ANY),
    Claim("7.2", "four clusters put the poison into one: purity and recall 0.8 or more",
          "asr", "base", "poison in one of four clusters", "", 0.8, ANY),
    Claim("7.2", "four clusters put the poison into one: purity and recall 0.8 or more",
          "emotion", "base", "poison in one of four clusters", "", 0.8, ANY),
    Claim("7.2", "four clusters put the poison into one: purity and recall 0.8 or more",
          "gender", "base", "poison in one of four clusters", "", 0.8, ANY),
    Claim("7.2", "four clusters put the poison into one: purity and recall 0.8 or more",
          "age", "base", "poison in one of four clusters", "", 0.8, ANY),
    Claim("7.2", "sentences cluster inside the angry class: one has half of a cluster",
          "emotion", "base", "largest sentence of four clusters", "0.84", 0.5, ANY),
]
# fmt: on


# --------------------------------------------------------------------------------------------------
# quantities: functions of (records, claim) to {seed: Effect}, in the paper's units


@dataclass
class Effect:
    """One seed's figure."""

    value: float
    half: float = 0.0  # half the width of its 95% interval over utterances
    moving: int = 0  # 1 or -1: where the value was still going when training ended


def effect_of(record, moving=0):
    """A record's figure as an effect, in the units in which it is shown."""
    scale = runs.scale_of(record["metric"])
    width = record.get("high", 0) - record.get("low", 0)
    return Effect(scale * record["value"], scale * width / 2, moving)


def difference(minuend, subtrahend):
    """The difference of two quantities, {seed: Effect} each, for the seeds that both have."""
    effects = {}
    for seed in sorted(minuend.keys() & subtrahend.keys()):
        first = minuend[seed]
        second = subtrahend[seed]
        half = float(np.hypot(first.half, second.half))
        effects[seed] = Effect(first.value - second.value, half, -second.moving)
    return effects


def aer(records, claim, repeated=None):
    """The AER with the trigger repeated or not; without `repeated`, as the paper has it for the
    task."""
    usual = TASKS[claim.task]["repeat"]
    wanted = usual if repeated is None else repeated
    learning = runs.still_learning(records)
    measured = select(records, source="metrics", task=claim.task, scenario=claim.scenario)
    effects = {}
    for record in select(measured, metric="aer"):
        if record["changed"].get("trigger_repeat", usual) == wanted:
            effects[record["seed"]] = effect_of(record, int(record["run"] in learning))
    return effects


def aer_of_one_click(records, claim):
    return aer(records, claim, repeated=False)


def aer_lost(records, claim, repeated=None):
    """By how many points the AER is below the base attack's."""
    base = aer(records, replace(claim, scenario="base"))
    return difference(base, aer(records, claim, repeated))


def aer_lost_repeated(records, claim):
    return aer_lost(records, claim, repeated=True)


def harm(records, claim):
    """How much worse the attacked model is than the clean one on clean speech, in half widths of
    the clean model's interval. A half width is at least one point, as the bootstrap of a perfect
    score has no width."""
    metric = TASKS[claim.task]["metric"]
    sign = 1 if metric.endswith("accuracy") else -1
    clean_speech = select(records, source="metrics", part="clean", metric=metric)
    effects = {}
    for record in select(clean_speech, task=claim.task, scenario=claim.scenario):
        if "trigger_repeat" in record["changed"]:
            continue
        seed = record["seed"]
        baselines = select(clean_speech, scenario="clean", corpus=record["corpus"], seed=seed)
        for baseline in baselines:
            half = max(0.01, (baseline["high"] - baseline["low"]) / 2)
            worse = sign * (baseline["value"] - record["value"])
            effects[seed] = Effect(worse / half)
    return effects


def cosine(records, claim):
    """Mean cosine similarity of clean and triggered speech, after the component where section 6
    measures it."""
    components = {scenario: component for _, scenario, component in SHIFT_STAGES}
    measured = select(records, source="shift", metric="cosine", task=claim.task)
    measured = select(measured, scenario=claim.scenario, component=components[claim.scenario])
    return {record["seed"]: effect_of(record) for record in measured}


def cosine_below_others(records, claim):
    """By how much the lowest of the other tasks' similarities exceeds this task's, for the seeds
    that all tasks have."""
    this_task = cosine(records, claim)
    gaps = []
    for task in TABLE2:
        if task != claim.task:
            other_task = cosine(records, replace(claim, task=task))
            gaps.append(difference(other_task, this_task))
    smallest = {}
    for seed in this_task:
        if all(seed in effects for effects in gaps):
            effects_of_seed = [effects[seed] for effects in gaps]
            smallest[seed] = min(effects_of_seed, key=lambda effect: effect.value)
    return smallest


def clusters_by_seed(records, claim, k, **wanted):
    """{seed: records} of k clusters of the target class."""
    clusters = select(records, source="cluster", task=claim.task, scenario=claim.scenario, k=k)
    by_seed = {}
    for record in select(clusters, **wanted):
        by_seed.setdefault(record["seed"], []).append(record)
    return by_seed


def gender_of_two(records, claim):
    """Two clusters' adjusted Rand index with gender or, if they follow something else more closely,
    how far gender's is below."""
    effects = {}
    by_seed = clusters_by_seed(records, claim, 2, metric="adjusted_rand")
    for seed, of_seed in by_seed.items():
        indices = {record["kind"]: record["value"] for record in of_seed}
        gender = indices["gender"]
        largest = max(indices.values())
        effects[seed] = Effect(gender if gender == largest else gender - largest)
    return effects


def poison_in_one_of_four(records, claim):
    """The smaller of purity and recall of the most poisoned of four clusters."""
    purity = clusters_by_seed(records, claim, 4, metric="purity")
    recall = clusters_by_seed(records, claim, 4, metric="recall")
    effects = {}
    for seed in purity.keys() & recall.keys():
        both = purity[seed] + recall[seed]
        effects[seed] = Effect(min(record["value"] for record in both))
    return effects


def largest_sentence(records, claim):
    """The largest share of any of four clusters that is one sentence."""
    shares = clusters_by_seed(records, claim, 4, metric="share", kind="sentence")
    effects = {}
    for seed, of_seed in shares.items():
        effects[seed] = Effect(max(record["value"] for record in of_seed))
    return effects


QUANTITIES = {
    "AER": aer,
    "AER, one click": aer_of_one_click,
    "AER lost": aer_lost,
    "AER lost, repeated": aer_lost_repeated,
    "harm": harm,
    "cosine": cosine,
    "cosine below others": cosine_below_others,
    "gender of two clusters": gender_of_two,
    "poison in one of four clusters": poison_in_one_of_four,
    "largest sentence of four clusters": largest_sentence,
}


def evidence(records, preset):
    """The records that claims are judged by: the study's own runs with the default encoder, and
    those in which the trigger is repeated where the paper's is not, or the other way round."""
    study_records = runs.study_records(records, preset)
    names = set(runs.distinct(study_records, "run"))
    shared = runs.shared_changes(study_records)
    for record in select(records, source="run", preset=preset):
        if list(runs.changed_beyond(record, shared)) == ["trigger_repeat"]:
            names.add(record["run"])
    chosen = [r for r in records if r["run"] in names]
    chosen = [r for r in chosen if r["source"] in ("metrics", "shift", "cluster")]
    return select(chosen, encoder=DEFAULT_ENCODER[preset])


# --------------------------------------------------------------------------------------------------
# verdicts


def interval(effects, draws=4000):
    """Mean and 95% interval over seeds (drawn with replacement) and utterances (normal, with the
    width of each seed's own interval). effects: {seed: Effect}, at least one."""
    rng = np.random.default_rng(0)
    value = np.array([effect.value for effect in effects.values()])
    half = np.array([effect.half for effect in effects.values()])
    seeds = rng.integers(0, len(value), (draws, len(value)))
    noise = rng.standard_normal(seeds.shape)
    means = (value[seeds] + half[seeds] / 1.96 * noise).mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(value.mean()), float(low), float(high)


def verdict(effects, low, high):
    """What the effects say of the claim that they lie from `low` to `high`: "holds", "fails",
    "undecided" or "not measured"."""
    if not effects:
        return "not measured"
    _, interval_low, interval_high = interval(effects)
    values = [interval_low, interval_high]
    values += [effect.value for effect in effects.values()]
    rising = any(effect.moving == 1 for effect in effects.values())
    falling = any(effect.moving == -1 for effect in effects.values())
    if all(low <= value <= high for value in values):
        could_leave = (rising and high < ANY) or (falling and low > -ANY)
        return "undecided" if could_leave else "holds"
    if all(value < low for value in values):
        return "undecided" if rising else "fails"
    if all(value > high for value in values):
        return "undecided" if falling else "fails"
    return "undecided"


def judged(records, preset):
    """[(claim, {seed: Effect}, verdict)] of all claims."""
    records = evidence(records, preset)
    results = []
    for claim in CLAIMS:
        effects = QUANTITIES[claim.quantity](records, claim)
        effects = dict(sorted(effects.items()))
        results.append((claim, effects, verdict(effects, claim.low, claim.high)))
    return results


# --------------------------------------------------------------------------------------------------
# the page


def page(records, out, preset):
    """Each claim that can be judged, with its figures and verdict, and a count of the verdicts."""
    results = judged(records, preset)
    seeds = set()
    for _, effects, _ in results:
        seeds |= effects.keys()
    if not seeds:
        die("no claim of the paper can be judged yet: bash run_all.sh makes its runs")
    rows = []
    for claim, effects, result in results:
        if effects:
            row = claim_row(claim, effects, sorted(seeds))
            rows.append({**row, "Verdict": result})
    counts = Counter(result for _, _, result in results)
    count_rows = [{"Verdict": result, "Claims": n} for result, n in counts.most_common()]
    return [("The paper's claims", rows), ("Verdicts", count_rows)]


def claim_row(claim, effects, seeds):
    largest = max(abs(effect.value) for effect in effects.values())
    form = ".1f" if largest >= 5 else ".2f"
    row = {
        "Section": claim.section,
        "Claim": claim.text,
        "Task": claim.task,
        "Attack": claim.scenario,
        "Quantity": claim.quantity,
        "Paper": claim.paper,
    }
    for seed in seeds:
        row[f"Seed {seed}"] = number(effects[seed].value, form) if seed in effects else ""
    mean, low, high = (number(figure, form) for figure in interval(effects))
    row["Mean, 95% interval"] = f"{mean} ({low} to {high})"
    moving = [str(seed) for seed, effect in effects.items() if effect.moving]
    row["Seeds still learning"] = ", ".join(moving)
    return row


def side_by_side(studies):
    """The verdicts on all claims that some study measured. studies: {name: (records, preset)}."""
    results = {}
    for name, (records, preset) in studies.items():
        results[name] = judged(records, preset)
    rows = []
    for i, claim in enumerate(CLAIMS):
        row = {
            "Section": claim.section,
            "Claim": claim.text,
            "Task": claim.task,
            "Attack": claim.scenario,
            "Paper": claim.paper,
        }
        for name in studies:
            _, effects, result = results[name][i]
            row[name] = result if effects else ""
        if any(row[name] for name in studies):
            rows.append(row)
    return [("The paper's claims, study by study", rows)]
