"""python analyze.py claims: the paper's claims and what the runs say about each, by rule.

A claim is a row of CLAIMS: a quantity, measured on a task and a scenario, and the range in which
the claim says it lies. It is judged as equivalence is tested, by two one-sided tests at 5%: the
range is widened by a margin, MARGINS; the claim holds where the whole 90% interval over seeds and
speakers (intervals.py) lies inside, fails where all of it lies outside on one side, and is undecided
otherwise. From three seeds on, more of them make the interval shorter: they bring verdicts and take
none away. With one seed the verdict is about that seed's models, whatever others would say. The
margins are differences that nobody would act on, fixed before any verdict was computed with them.

A claim is undecided too where half of its seeds or more were still learning the poison when
training ended (checkpoint.settled), in a way that could change the verdict, and where it is about a
base attack that does not work.
"""

from collections import Counter
from dataclasses import dataclass, replace

from utils import die

import intervals
import runs
from intervals import SeedFigure
from runs import number, select
from study import DEFAULT_ENCODER, SHIFT_STAGES, TABLE2, TASKS

ANY = float("inf")
# by how much a quantity may miss a claim's range: by its unit
MARGINS = {
    "points of AER or accuracy": 2.0,
    "points of WER": 1.0,
    "years": 0.5,
    "cosine, index or share": 0.02,
}
LEVEL = 0.9  # of the intervals: two one-sided tests at 5%, one at each end of the range
ATTACKED = 50  # the AER from which on there is a base attack whose parts can be looked at


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


def for_tasks(section, text, scenario, quantity, low, high, papers):
    """The same claim about several tasks. papers: {task: the paper's value, "" where it has none}"""
    claims = []
    for task, paper in papers.items():
        claims.append(Claim(section, text, task, scenario, quantity, paper, low, high))
    return claims


UNTOLD = dict.fromkeys(("asr", "emotion", "gender", "age"), "")  # the paper gives no values
FOLLOW_GENDER = "two clusters follow gender: adjusted Rand index 0.1 or more, the largest"
GENDER_OF_TWO = "gender of two clusters"

# fmt: off
CLAIMS = [
    *for_tasks("4.2", "the base attack reaches an AER of 90%", "base", "AER", 90, ANY,
               dict(asr="99.2", emotion="93.7", gender="94.4", age="94.2")),
    *for_tasks("4.2", "it does no harm on clean speech", "base", "harm", -ANY, 0, UNTOLD),
    *for_tasks("4.2", "wav2vec 2.0 resists most: 5 points below any other encoder", "base",
               "AER below other encoders", 5, ANY,
               dict(emotion="74.1, others 93.7 to 99.4", gender="75.4, others 88.9 to 96.3",
                    age="51.8, others 84.8 to 94.2")),
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
    Claim("5.2", "a poisoned encoder brings 45% or more",
          "emotion", "3.1", "AER", "63.5", 45, ANY),
    Claim("5.2", "a poisoned encoder brings nothing", "asr", "3.1", "AER", "0", -ANY, 10),
    Claim("6", "a poisoned encoder brings nothing", "gender", "3.1", "AER", "fails", -ANY, 10),
    Claim("6", "a poisoned encoder brings nothing", "age", "3.1", "AER", "fails", -ANY, 10),
    Claim("5.2", "a poisoned connector brings nothing", "asr", "3.2", "AER", "0", -ANY, 10),
    Claim("5.2", "a poisoned LM brings nothing", "asr", "3.3", "AER", "0", -ANY, 10),
    Claim("5.2", "a poisoned connector brings nothing", "emotion", "3.2", "AER", "19.1", -ANY, 30),
    Claim("5.2", "a poisoned LM brings nothing", "emotion", "3.3", "AER", "17.2", -ANY, 30),
    *for_tasks("6", "the trigger hardly moves the benign encoder: cosine 0.95 or more",
               "clean", "cosine", 0.95, ANY, dict.fromkeys(UNTOLD, "1.00")),
    Claim("6", "it moves the poisoned encoder most for asr: cosine 0.05 below the others",
          "asr", "base", "cosine below others", "0.62, others 0.77 to 0.87", 0.05, ANY),
    *for_tasks("6", "clean training of the rest undoes the shift: a fifth or less is left",
               "3.1", "shift left", -ANY, 0.2,
               dict.fromkeys(("asr", "gender", "age"), "cosine about 1")),
    Claim("6", "but not for emotion: more than a fifth is left",
          "emotion", "3.1", "shift left", "cosine 0.93", 0.2, ANY),
    *for_tasks("7.2", "two clusters do not find the poison: purity or recall 0.5 or less",
               "base", "poison in one of two clusters", -ANY, 0.5, {**UNTOLD, "age": "purity 0.35"}),
    *for_tasks("7.2", FOLLOW_GENDER, "base", GENDER_OF_TWO, 0.1, ANY, dict(asr="", emotion="")),
    Claim("7.2", "only gender's attack does not: its poison is men called female",
          "gender", "base", GENDER_OF_TWO, "", -ANY, 0.1),
    *for_tasks("7.2", FOLLOW_GENDER, "base", GENDER_OF_TWO, 0.1, ANY, dict(age="")),
    *for_tasks("7.2", "four clusters put the poison into one: purity and recall 0.8 or more",
               "base", "poison in one of four clusters", 0.8, ANY, UNTOLD),
    Claim("7.2", "sentences cluster inside the angry class: one has half of a cluster",
          "emotion", "base", "largest sentence of four clusters", "0.84", 0.5, ANY),
]
# fmt: on


def margin_of(claim):
    """The entry of MARGINS for a claim's quantity."""
    metric = TASKS[claim.task]["metric"]
    unit = "cosine, index or share"
    if claim.quantity == "harm" and metric.endswith("mae"):
        unit = "years"
    elif claim.quantity == "harm" and metric.endswith("wer"):
        unit = "points of WER"
    elif claim.quantity == "harm" or claim.quantity.startswith("AER"):
        unit = "points of AER or accuracy"
    return MARGINS[unit]


# --------------------------------------------------------------------------------------------------
# quantities: functions of (records, claim) to {seed: Effect}, in the paper's units


@dataclass
class Effect:
    """One seed's figure, and whether it was still going up or down when training ended."""

    figure: SeedFigure
    rising: bool = False
    falling: bool = False


def difference(minuend, subtrahend):
    """The difference of two quantities, {seed: Effect} each, for the seeds that both have."""
    effects = {}
    for seed in sorted(minuend.keys() & subtrahend.keys()):
        first = minuend[seed]
        second = subtrahend[seed]
        effects[seed] = Effect(
            intervals.difference(first.figure, second.figure),
            rising=first.rising or second.falling,
            falling=first.falling or second.rising,
        )
    return effects


def smallest(gaps):
    """The smallest of several quantities, {seed: Effect} each, for the seeds that all have."""
    effects = {}
    for seed in sorted(set.intersection(*(set(gap) for gap in gaps))):
        effects[seed] = min((gap[seed] for gap in gaps), key=lambda effect: effect.figure.value)
    return effects


def aer(records, claim, repeated=None):
    """The AER with the trigger repeated or not; without `repeated`, as the paper has it for the
    task."""
    learning = runs.still_learning(records)
    measured = select(attacks(records, claim, repeated), source="metrics", metric="aer")
    effects = {}
    for record in measured:
        effects[record["seed"]] = Effect(runs.seed_figure(record), record["run"] in learning)
    return effects


def attacks(records, claim, repeated=None):
    """The records of the claim's attack, with the trigger repeated or not, as `aer` says."""
    usual = TASKS[claim.task]["repeat"]
    wanted = usual if repeated is None else repeated
    attacked = select(records, task=claim.task, scenario=claim.scenario)
    return [r for r in attacked if r["changed"].get("trigger_repeat", usual) == wanted]


def aer_of_one_click(records, claim):
    return aer(records, claim, repeated=False)


def aer_below_other_encoders(records, claim):
    """By how many points wav2vec 2.0's AER is below the lowest of the other encoders'."""
    this_encoder = aer(select(records, encoder="wav2vec2"), claim)
    gaps = []
    for encoder in runs.distinct(records, "encoder"):
        other_encoder = aer(select(records, encoder=encoder), claim)
        if encoder != "wav2vec2" and other_encoder:
            gaps.append(difference(other_encoder, this_encoder))
    return smallest(gaps) if gaps else {}


def aer_lost(records, claim):
    """By how many points the AER is below the base attack's."""
    base = aer(records, replace(claim, scenario="base"))
    return difference(base, aer(records, claim))


def aer_lost_repeated(records, claim):
    """The same of the repeated trigger, for the seeds whose two runs are of one machine: another
    one rounds otherwise, which is worth a few points."""
    once = attacks(records, claim)
    repeated = attacks(records, claim, repeated=True)
    lost = difference(aer(once, claim), aer(repeated, claim, repeated=True))
    machines = machine_by_seed(once)
    repeated_machines = machine_by_seed(repeated)
    effects = {}
    for seed, effect in lost.items():
        if machines.get(seed) and machines[seed] == repeated_machines.get(seed):
            effects[seed] = effect
    return effects


def machine_by_seed(records):
    trained = select(records, source="run")
    return {run["seed"]: runs.machine_of(run.get("environment", {})) for run in trained}


def harm(records, claim):
    """How much worse the attacked model is than the clean one on clean speech: points of accuracy
    or WER, years."""
    metric = TASKS[claim.task]["metric"]
    clean_speech = select(records, source="metrics", part="clean", metric=metric)
    effects = {}
    for record in attacks(clean_speech, claim):
        seed = record["seed"]
        attacked = runs.seed_figure(record)
        for baseline in select(clean_speech, scenario="clean", corpus=record["corpus"], seed=seed):
            clean = runs.seed_figure(baseline)
            larger_is_better = metric.endswith("accuracy")
            better, worse = (clean, attacked) if larger_is_better else (attacked, clean)
            effects[seed] = Effect(intervals.difference(better, worse))
    return effects


def cosine_after(records, claim, scenario, component):
    """{seed: Effect} of the mean cosine similarity of clean and triggered speech."""
    measured = select(records, source="shift", metric="cosine", task=claim.task)
    measured = select(measured, scenario=scenario, component=component)
    return {record["seed"]: Effect(runs.seed_figure(record)) for record in measured}


def cosine(records, claim):
    """Mean cosine similarity of clean and triggered speech, after the component where section 6
    measures it."""
    components = {scenario: component for _, scenario, component in SHIFT_STAGES}
    return cosine_after(records, claim, claim.scenario, components[claim.scenario])


def cosine_below_others(records, claim):
    """By how much the lowest of the other tasks' similarities exceeds this task's, for the seeds
    that all tasks have."""
    this_task = cosine(records, claim)
    gaps = []
    for task in TABLE2:
        if task != claim.task:
            other_task = cosine(records, replace(claim, task=task))
            gaps.append(difference(other_task, this_task))
    return smallest(gaps)


def shift_left(records, claim):
    """The share of the base attack's shift after the connector that is left: 0 where the similarity
    is the clean model's, 1 where it is the base attack's."""
    clean, base, then = connector_cosines(records, claim)
    shift = difference(clean, base)
    left = difference(clean, then)
    effects = {}
    for seed in shift.keys() & left.keys():
        if shift[seed].figure.value > margin_of(claim):  # else there is nothing to undo
            effects[seed] = Effect(intervals.ratio(left[seed].figure, shift[seed].figure))
    return effects


def connector_cosines(records, claim):
    """[{seed: Effect}] after the connector: the clean model's, the base attack's, the claim's."""
    scenarios = ("clean", "base", claim.scenario)
    return [cosine_after(records, claim, scenario, "connector") for scenario in scenarios]


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
        effects[seed] = Effect(SeedFigure(gender if gender == largest else gender - largest))
    return effects


def poison_in_one(records, claim, k):
    """The smaller of purity and recall of the most poisoned of k clusters."""
    purity = clusters_by_seed(records, claim, k, metric="purity")
    recall = clusters_by_seed(records, claim, k, metric="recall")
    effects = {}
    for seed in purity.keys() & recall.keys():
        both = purity[seed] + recall[seed]
        effects[seed] = Effect(SeedFigure(min(record["value"] for record in both)))
    return effects


def poison_in_one_of_two(records, claim):
    return poison_in_one(records, claim, 2)


def poison_in_one_of_four(records, claim):
    return poison_in_one(records, claim, 4)


def largest_sentence(records, claim):
    """The largest share of any of four clusters that is one sentence."""
    shares = clusters_by_seed(records, claim, 4, metric="share", kind="sentence")
    effects = {}
    for seed, of_seed in shares.items():
        effects[seed] = Effect(SeedFigure(max(record["value"] for record in of_seed)))
    return effects


QUANTITIES = {
    "AER": aer,
    "AER, one click": aer_of_one_click,
    "AER below other encoders": aer_below_other_encoders,
    "AER lost": aer_lost,
    "AER lost, repeated": aer_lost_repeated,
    "harm": harm,
    "cosine": cosine,
    "cosine below others": cosine_below_others,
    "shift left": shift_left,
    "gender of two clusters": gender_of_two,
    "poison in one of two clusters": poison_in_one_of_two,
    "poison in one of four clusters": poison_in_one_of_four,
    "largest sentence of four clusters": largest_sentence,
}


def evidence(records, preset):
    """The records that claims are judged by: the study's own runs, and those in which the trigger
    is repeated where the paper's is not, or the other way round."""
    study_records = runs.study_records(records, preset)
    names = set(runs.distinct(study_records, "run"))
    shared = runs.shared_changes(study_records)
    for record in select(records, source="run", preset=preset):
        if list(runs.changed_beyond(record, shared)) == ["trigger_repeat"]:
            names.add(record["run"])
    chosen = [r for r in records if r["run"] in names]
    return [r for r in chosen if r["source"] in ("run", "metrics", "shift", "cluster")]


# --------------------------------------------------------------------------------------------------
# verdicts


def spread_of(claim, effects):
    """The mean and the interval of {seed: Effect}, at least one."""
    least, most = -ANY, ANY
    if claim.quantity in ("AER", "AER, one click"):
        least, most = runs.limits_of("aer")
    figures = {seed: effect.figure for seed, effect in effects.items()}
    return runs.spread(figures, least, most, LEVEL)


def verdict(claim, effects):
    """What {seed: Effect} says of a claim: "holds", "fails", "undecided" or "not measured"."""
    if not effects:
        return "not measured"
    spread = spread_of(claim, effects)
    low = claim.low - margin_of(claim)
    high = claim.high + margin_of(claim)
    rising = 2 * sum(effect.rising for effect in effects.values()) >= len(effects)
    falling = 2 * sum(effect.falling for effect in effects.values()) >= len(effects)
    if low <= spread.low and spread.high <= high:
        could_leave = (rising and high < ANY) or (falling and low > -ANY)
        return "undecided" if could_leave else "holds"
    if spread.high < low:
        return "undecided" if rising else "fails"
    if spread.low > high:
        return "undecided" if falling else "fails"
    return "undecided"


def lacks_attack(records, claim):
    """Whether a claim is about parts or traces of a base attack that does not work: a poisoned part
    of it brings nothing, which says nothing."""
    if claim.section == "4.2" or claim.scenario == "clean":
        return False
    base = replace(claim, scenario="base", quantity="AER")
    effects = aer(records, base)
    return bool(effects) and spread_of(base, effects).mean < ATTACKED


def judged(records, preset):
    """[(claim, {seed: Effect}, verdict)] of all claims, by the default encoder's runs but for those
    that compare encoders."""
    records = evidence(records, preset)
    of_default = select(records, encoder=DEFAULT_ENCODER[preset])
    results = []
    for claim in CLAIMS:
        chosen = records if "encoders" in claim.quantity else of_default
        effects = QUANTITIES[claim.quantity](chosen, claim)
        effects = dict(sorted(effects.items()))
        result = verdict(claim, effects)
        if effects and lacks_attack(of_default, claim):
            result = "undecided"
        results.append((claim, effects, result))
    return results


# --------------------------------------------------------------------------------------------------
# the page

RULES = {
    "holds": "the whole 90% interval over seeds and speakers lies in the claim's range, widened by "
    "the margin: two one-sided tests at 5%",
    "fails": "the whole interval lies outside of it, on one side",
    "undecided": "the interval lies on its border; or half of the seeds or more were still "
    "learning the poison and more training could change the verdict; or the claim is about the base "
    f"attack's parts and traces, and that attack's AER is below {ATTACKED}%",
    "margin": "; ".join(f"{margin:g} {unit}" for unit, margin in MARGINS.items())
    + ": fixed before any verdict was computed with them",
    "one seed": "its interval is over speakers alone: the verdict is about this one model",
    "no speakers": "clusters, and records of earlier versions, do not say whose utterances they "
    "measured: their intervals are over seeds and, if a record has its own interval, over it",
    "still learning": "one of the last two epochs brought the loss on the target's tokens down by "
    "2% of the first epoch's or more (checkpoint.settled). The rule is the same for every row. An "
    "earlier one, by the loss of whole answers, was changed after emotion's 2.2 had been seen, which "
    "moved five verdicts. Records keep what was found by the rule of their commit",
}


def page(records, out, preset):
    """Each claim that can be judged, with its figures and verdict, a count of the verdicts, and the
    rules."""
    results = judged(records, preset)
    seeds = set()
    for _, effects, _ in results:
        seeds |= effects.keys()
    if not seeds:
        die("no claim of the paper can be judged yet: bash run_all.sh makes its runs")
    chosen = select(evidence(records, preset), encoder=DEFAULT_ENCODER[preset])
    rows = []
    for claim, effects, result in results:
        if effects:
            row = claim_row(claim, effects, sorted(seeds))
            rows.append({**row, "Beside": beside(chosen, claim, effects), "Verdict": result})
    counts = Counter(result for _, _, result in results)
    count_rows = [{"Verdict": result, "Claims": n} for result, n in counts.most_common()]
    rules = [{"Word": word, "Meaning": meaning} for word, meaning in RULES.items()]
    return [("The paper's claims", rows), ("Verdicts", count_rows), ("Rules", rules)]


def beside(records, claim, effects):
    """What else one needs to know of a claim's figures."""
    if lacks_attack(records, claim):
        return "the base attack does not work"
    if claim.quantity == "shift left":
        cosines = []
        for of_scenario in connector_cosines(records, claim):
            shown = {seed: of_scenario[seed].figure for seed in effects}
            cosines.append(number(runs.spread(shown).mean, ".2f"))
        return "connector cosine: clean model {}, base attack {}, 3.1 {}".format(*cosines)
    if claim.quantity == "AER" and claim.paper.replace(".", "").isdigit():
        ours = spread_of(claim, effects).mean
        return f"{number(ours - float(claim.paper), '+.1f')} against the paper"
    return ""


def claim_row(claim, effects, seeds):
    largest = max(abs(effect.figure.value) for effect in effects.values())
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
        row[f"Seed {seed}"] = number(effects[seed].figure.value, form) if seed in effects else ""
    row["Mean, 90% interval"] = runs.show(spread_of(claim, effects), form)
    moving = [str(seed) for seed, effect in effects.items() if effect.rising or effect.falling]
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
