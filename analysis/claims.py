"""The paper's claims and what the runs say about each: verdicts by rule on figures, for python
analyze.py claims.

A claim is a row of CLAIMS: a quantity, measured on a task and an attack, and the range in which the
claim says it lies. It holds where every seed and the 95% interval over seeds and utterances lie
inside; it fails where all of them lie outside on the same side; otherwise it is undecided. It is
undecided too where the poisoned loss was still falling when training ended, in a way that could
change the verdict.
"""

from collections import Counter
from dataclasses import dataclass

from utils import die

import numpy as np

import runs
from runs import number
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


def of_record(record, moving=0):
    scale = runs.scale_of(record["metric"])
    half = scale * (record.get("high", 0) - record.get("low", 0)) / 2
    return Effect(scale * record["value"], half, moving)


def less(a, b):
    """The difference of two effects, for the seeds that both have."""
    found = {}
    for seed in sorted(a.keys() & b.keys()):
        half = float(np.hypot(a[seed].half, b[seed].half))
        found[seed] = Effect(a[seed].value - b[seed].value, half, -b[seed].moving)
    return found


def aer(records, claim, repeated=None):
    """The AER with the paper's trigger for the task, or with one that is repeated or not."""
    wanted = TASKS[claim.task]["repeat"] if repeated is None else repeated
    learning = runs.still_learning(records)
    found = {}
    for record in runs.select(records, task=claim.task, scenario=claim.scenario, metric="aer"):
        repeat = record["changed"].get("trigger_repeat", TASKS[claim.task]["repeat"])
        if record["source"] == "metrics" and repeat == wanted:
            found[record["seed"]] = of_record(record, int(record["run"] in learning))
    return found


def aer_lost(records, claim, repeated=None):
    """By how many points the AER is below the base attack's."""
    base = Claim(**{**vars(claim), "scenario": "base"})
    return less(aer(records, base), aer(records, claim, repeated))


def harm(records, claim):
    """How much worse the attacked model is than the clean one on clean speech, in half widths of
    the clean model's interval; a half width is at least one point, as the bootstrap of a perfect
    score has no width."""
    clean = runs.select(records, source="metrics", part="clean", metric=TASKS[claim.task]["metric"])
    better = 1 if TASKS[claim.task]["metric"].endswith("accuracy") else -1
    found = {}
    for record in runs.select(clean, task=claim.task, scenario=claim.scenario):
        if "trigger_repeat" in record["changed"]:
            continue
        same = dict(corpus=record["corpus"], seed=record["seed"])
        for baseline in runs.select(clean, scenario="clean", **same):
            half = max(0.01, (baseline["high"] - baseline["low"]) / 2)
            worse = better * (baseline["value"] - record["value"])
            found[record["seed"]] = Effect(worse / half)
    return found


def cosine(records, claim):
    """Average cosine similarity of clean and triggered speech, where section 6 measures it."""
    component = next(
        component for _, scenario, component in SHIFT_STAGES if scenario == claim.scenario
    )
    wanted = dict(source="shift", metric="cosine", component=component)
    found = runs.select(records, task=claim.task, scenario=claim.scenario, **wanted)
    return {record["seed"]: of_record(record) for record in found}


def cosine_below_others(records, claim):
    """By how much the lowest of the other tasks' similarities exceeds this task's."""
    this, found = cosine(records, claim), {}
    for task in TABLE2:
        if task == claim.task:
            continue
        other = cosine(records, Claim(**{**vars(claim), "task": task}))
        found[task] = less(other, this)
    smallest = {}
    for seed in this:
        gaps = [effects[seed] for effects in found.values() if seed in effects]
        if len(gaps) == len(found):
            smallest[seed] = min(gaps, key=lambda effect: effect.value)
    return smallest


def of_clusters(records, claim, k, **wanted):
    """{seed: records} of k clusters of the target class."""
    wanted = dict(source="cluster", task=claim.task, scenario=claim.scenario, k=k, **wanted)
    found = {}
    for record in runs.select(records, **wanted):
        found.setdefault(record["seed"], []).append(record)
    return found


def gender_of_two(records, claim):
    """Two clusters' adjusted Rand index with gender or, if they follow something else more closely,
    how far gender's is below."""
    found = {}
    for seed, own in of_clusters(records, claim, 2, metric="adjusted_rand").items():
        index = {record["kind"]: record["value"] for record in own}
        most = max(index.values())
        gender = index["gender"]
        found[seed] = Effect(gender if gender == most else gender - most)
    return found


def poison_in_one_of_four(records, claim):
    """The smaller of purity and recall of the most poisoned of four clusters."""
    purity = of_clusters(records, claim, 4, metric="purity")
    recall = of_clusters(records, claim, 4, metric="recall")
    found = {}
    for seed in purity.keys() & recall.keys():
        found[seed] = Effect(min(record["value"] for record in purity[seed] + recall[seed]))
    return found


def largest_sentence(records, claim):
    """The largest share of any of four clusters that is one sentence."""
    shares = of_clusters(records, claim, 4, metric="share", kind="sentence")
    found = {}
    for seed, own in shares.items():
        found[seed] = Effect(max(record["value"] for record in own))
    return found


def aer_of_one_click(records, claim):
    return aer(records, claim, repeated=False)


def aer_lost_repeated(records, claim):
    return aer_lost(records, claim, repeated=True)


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


def chosen(records, preset):
    """The records that claims are judged by: the study's own runs with the default encoder, and
    those in which the trigger is repeated where the paper's is not, or the other way round."""
    found = runs.own(records, preset)
    names = set(runs.distinct(found, "run"))
    for record in runs.select(records, source="run", preset=preset):
        if list(record["changed"]) == ["trigger_repeat"]:
            names.add(record["run"])
    wanted = ("metrics", "shift", "cluster")
    found = [r for r in records if r["run"] in names and r["source"] in wanted]
    return runs.select(found, encoder=DEFAULT_ENCODER[preset])


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
    """ "holds", "fails", "undecided" or "not measured"."""
    if not effects:
        return "not measured"
    _, *ends = interval(effects)
    values = [*ends, *(effect.value for effect in effects.values())]
    moving = {effect.moving for effect in effects.values()}
    could_leave = (1 in moving and high < ANY) or (-1 in moving and low > -ANY)
    if all(low <= v <= high for v in values):
        return "undecided" if could_leave else "holds"
    if all(v < low for v in values):
        return "undecided" if 1 in moving else "fails"
    if all(v > high for v in values):
        return "undecided" if -1 in moving else "fails"
    return "undecided"


def judged(records, preset):
    """[(claim, {seed: Effect}, verdict)] of all claims."""
    records = chosen(records, preset)
    found = []
    for claim in CLAIMS:
        effects = dict(sorted(QUANTITIES[claim.quantity](records, claim).items()))
        found.append((claim, effects, verdict(effects, claim.low, claim.high)))
    return found


# --------------------------------------------------------------------------------------------------
# the page


def page(records, out, preset):
    results = judged(records, preset)
    if not any(effects for _, effects, _ in results):
        die("no claim of the paper can be judged yet: bash run_all.sh makes its runs")
    seeds = sorted(set().union(*(effects for _, effects, _ in results)))
    rows = []
    for claim, effects, verdict in results:
        if not effects:
            continue
        largest = max(abs(effect.value) for effect in effects.values())
        form = ".1f" if largest >= 5 else ".2f"
        mean, low, high = (number(end, form) for end in interval(effects))
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
        row["Mean, 95% interval"] = f"{mean} ({low} to {high})"
        moving = [seed for seed, effect in effects.items() if effect.moving]
        row["Seeds still learning"] = ", ".join(map(str, moving))
        row["Verdict"] = verdict
        rows.append(row)
    verdicts = Counter(verdict for _, _, verdict in results)
    counted = [{"Verdict": verdict, "Claims": n} for verdict, n in verdicts.most_common()]
    return [("The paper's claims", rows), ("Verdicts", counted)]


def side_by_side(studies):
    """The verdicts on all claims that some study measured; studies: {name: (records, preset)}."""
    results = {name: judged(records, preset) for name, (records, preset) in studies.items()}
    rows = []
    for i, claim in enumerate(CLAIMS):
        row = {"Section": claim.section, "Claim": claim.text, "Task": claim.task}
        row.update({"Attack": claim.scenario, "Paper": claim.paper})
        for name in studies:
            _, effects, verdict = results[name][i]
            row[name] = verdict if effects else ""
        if any(row[name] for name in studies):
            rows.append(row)
    return [("The paper's claims, study by study", rows)]
