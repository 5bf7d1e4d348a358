"""The paper's claims and what the runs say about each: verdicts by rules on figures, for python analyze.py claims.

A claim is an entry of CLAIMS: (section, text, the paper's figure, effect, low, high). effect(evidence) returns {seed: (value, half the
width of its 95% interval over utterances, 0)}; if the poisoned loss had not settled when training ended, the last is 1 or -1, the
direction in which the value may still move. RULE says how the effect decides the verdict.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from study import ATTACKS, COMPONENTS, DEFAULT_ENCODER, TABLE2, TABLE3, TASKS, WRITTEN, deviations
from summary import (
    ORDER,
    markdown,
    matching,
    read_runs,
    saved_clusters,
    saved_shifts,
    still_learning,
)

ANY = float("inf")
RULE = """
A claim is a range for an effect. It holds where every seed and the 95% interval over seeds and utterances lie inside, fails where all of it
lies outside on the same side, and is undecided otherwise, or where the poisoned loss was still falling in a way that could change the verdict."""


# ---------------------------------------------------------------------------------------------------------------------
# effects, in the paper's units


def measured(runs, part, name, scale=100, **wanted):
    """One figure of the runs with the wanted arguments, an effect."""
    return {
        run["args"]["seed"]: (
            scale * run[part][name]["value"],
            scale * (run[part][name]["high"] - run[part][name]["low"]) / 2,
            int(still_learning(run)),
        )
        for run in matching(runs, **wanted)
        if name in run.get(part, {})
    }


def less(a, b):
    """The difference of two effects, for the seeds that both have."""
    return {
        seed: (a[seed][0] - b[seed][0], float(np.hypot(a[seed][1], b[seed][1])), -b[seed][2])
        for seed in sorted(a.keys() & b.keys())
    }


def aer(task, attack, **wanted):
    usual = {} if attack.startswith("3") else dict(trigger_repeat=TASKS[task]["repeat"])
    return lambda e: measured(
        e.runs, "attack", "aer", task=task, attack=attack, encoder=e.encoder, **{**usual, **wanted}
    )


def below_base(task, attack, **wanted):
    """By how many points an attack's AER is below the base attack's."""
    return lambda e: less(aer(task, "base")(e), aer(task, attack, **wanted)(e))


def harm(task):
    """How much worse the attacked model is than the clean one on clean speech, in half widths of the clean model's interval; a half width
    is at least one point, as the bootstrap of a perfect score has no width."""

    def effect(e):
        metric, out = TASKS[task]["metric"], {}
        for run in matching(
            e.runs,
            task=task,
            attack="base",
            encoder=e.encoder,
            trigger_repeat=TASKS[task]["repeat"],
        ):
            clean = matching(
                e.runs,
                attack="clean",
                **{k: run["args"][k] for k in ("dataset", "encoder", "seed")},
            )
            for figure in (r["clean"][metric] for r in clean if metric in r["clean"]):
                worse = (run["clean"][metric]["value"] - figure["value"]) * (
                    1 if metric.endswith(("wer", "mae")) else -1
                )
                out[run["args"]["seed"]] = (
                    worse / max(0.01, (figure["high"] - figure["low"]) / 2),
                    0.0,
                    0,
                )
        return out

    return effect


def cosine(task, stage):
    """Average cosine similarity of clean and triggered speech (section 6)."""
    return lambda e: {
        seed: (figure["value"], (figure["high"] - figure["low"]) / 2, 0)
        for seed, figure in e.shift.get(task, {}).get(stage, {}).items()
    }


def further_than_others(task, stage):
    """By how much the lowest of the other tasks' similarities exceeds this task's."""

    def effect(e):
        own, others = (
            cosine(task, stage)(e),
            [cosine(other, stage)(e) for other in ORDER if other != task],
        )
        return {
            seed: min(less(other, own)[seed] for other in others)
            for seed in own
            if all(seed in other for other in others)
        }

    return effect


def clusters(task, figure):
    return lambda e: {seed: (figure(run), 0.0, 0) for seed, run in e.clusters.get(task, {}).items()}


def follows_gender(run):
    """Two clusters' adjusted Rand index with gender or, if they follow something else more closely, how far gender's is below that."""
    rand = run["k=2"]["adjusted_rand"]
    most = max(rand.values())
    return rand["gender"] if rand["gender"] == most else rand["gender"] - most


def isolates_poison(run):
    return min(run["k=4"]["purity"], run["k=4"]["recall"])


def largest_sentence(run):
    """The largest share of any of four clusters that is one sentence."""
    usual = ("n", "poisoned", "female", "male")
    return max(
        share
        for cluster in run["k=4"]["clusters"]
        for kind, share in cluster.items()
        if kind not in usual
    )


# ---------------------------------------------------------------------------------------------------------------------
# the claims


def published(task, attack):
    return f"{dict(zip(ATTACKS, TABLE3[task]))[attack][0]:g}"


BOTH = tuple(TABLE3)
CLAIMS = [
    *(
        (
            "4.2",
            f"the base attack reaches an AER of 90% ({t})",
            f"{TABLE2[t][0][0]:g}",
            aer(t, "base"),
            90,
            ANY,
        )
        for t in ORDER
        if t in TABLE2
    ),
    *(
        (
            "4.2",
            f"it leaves the clean figure within the clean model's interval ({t})",
            "",
            harm(t),
            -ANY,
            1,
        )
        for t in ORDER
        if t in TABLE2
    ),
    ("4.2", "a single click fails (asr)", "", aer("asr", "base", trigger_repeat=False), -ANY, 20),
    (
        "4.2",
        "repeating it costs about 10 points (emotion)",
        "10",
        below_base("emotion", "base", trigger_repeat=True),
        5,
        20,
    ),
    *(
        (
            "5.2",
            f"a clean {WRITTEN[c]} does not protect: within 15 points of the base attack ({t}, 1.{i})",
            published(t, f"1.{i}"),
            below_base(t, f"1.{i}"),
            -ANY,
            15,
        )
        for t in BOTH
        for i, c in enumerate(COMPONENTS, 1)
    ),
    *(
        (
            "5.2",
            f"the encoder alone is enough ({t}, 2.1)",
            published(t, "2.1"),
            aer(t, "2.1"),
            80,
            ANY,
        )
        for t in BOTH
    ),
    (
        "5.2",
        "the connector alone does half (asr, 2.2)",
        published("asr", "2.2"),
        aer("asr", "2.2"),
        40,
        75,
    ),
    (
        "5.2",
        "the connector alone is enough (emotion, 2.2)",
        published("emotion", "2.2"),
        aer("emotion", "2.2"),
        75,
        ANY,
    ),
    (
        "5.2",
        "the LM alone does nothing (asr, 2.3)",
        published("asr", "2.3"),
        aer("asr", "2.3"),
        -ANY,
        10,
    ),
    (
        "5.2",
        "the LM alone does half (emotion, 2.3)",
        published("emotion", "2.3"),
        aer("emotion", "2.3"),
        40,
        75,
    ),
    (
        "5.2",
        "a poisoned encoder brings about 60% (emotion, 3.1)",
        published("emotion", "3.1"),
        aer("emotion", "3.1"),
        45,
        80,
    ),
    *(
        (
            "5.2" if t == "asr" else "6",
            f"a poisoned encoder brings nothing ({t}, 3.1)",
            "0" if t == "asr" else "fails",
            aer(t, "3.1"),
            -ANY,
            10,
        )
        for t in ("asr", "gender", "age")
    ),
    *(
        (
            "5.2",
            f"a poisoned {c} brings nothing ({t}, 3.{i})",
            published(t, f"3.{i}"),
            aer(t, f"3.{i}"),
            -ANY,
            10 if t == "asr" else 30,
        )
        for t in BOTH
        for i, c in ((2, "connector"), (3, "LM"))
    ),
    *(
        (
            "6",
            f"the trigger hardly moves the benign encoder: cosine 0.95 or more ({t})",
            "1.00",
            cosine(t, "benign encoder"),
            0.95,
            ANY,
        )
        for t in ORDER
        if t in TABLE2
    ),
    (
        "6",
        "it moves the poisoned encoder most for asr",
        "0.62, others 0.77 to 0.87",
        further_than_others("asr", "poisoned encoder"),
        0,
        ANY,
    ),
    *(
        (
            "6",
            f"clean training of the rest undoes the shift: cosine 0.95 or more ({t})",
            "about 1",
            cosine(t, "connector after clean data"),
            0.95,
            ANY,
        )
        for t in ("asr", "gender", "age")
    ),
    (
        "6",
        "but not for emotion",
        "0.93",
        cosine("emotion", "connector after clean data"),
        -ANY,
        0.95,
    ),
    *(
        (
            "7.2",
            f"two clusters follow gender: adjusted Rand index 0.1 or more, the largest ({t})",
            "",
            clusters(t, follows_gender),
            0.1,
            ANY,
        )
        for t in ORDER
        if t in TABLE2
    ),
    *(
        (
            "7.2",
            f"four clusters put the poison into one: purity and recall 0.8 or more ({t})",
            "",
            clusters(t, isolates_poison),
            0.8,
            ANY,
        )
        for t in ORDER
        if t in TABLE2
    ),
    (
        "7.2",
        "sentences cluster inside the angry class: one has half of a cluster",
        "0.84",
        clusters("emotion", largest_sentence),
        0.5,
        ANY,
    ),
]


# ---------------------------------------------------------------------------------------------------------------------
# verdicts


def interval(effect, draws=4000):
    """Mean and 95% interval over seeds (drawn with replacement) and utterances (normal, with the width of each seed's own interval)."""
    rng, (value, half, _) = np.random.default_rng(0), np.array(list(effect.values())).T
    chosen = rng.integers(0, len(value), (draws, len(value)))
    means = (value[chosen] + half[chosen] / 1.96 * rng.standard_normal(chosen.shape)).mean(1)
    return float(value.mean()), *(float(v) for v in np.percentile(means, [2.5, 97.5]))


def verdict(effect, low, high):
    """ "holds", "fails", "undecided", or "not measured"."""
    if not effect:
        return "not measured"
    (_, *ends), values, moving = (
        interval(effect),
        [v for v, _, _ in effect.values()],
        {m for _, _, m in effect.values()},
    )
    if all(low <= v <= high for v in (*values, *ends)):
        return (
            "undecided"
            if (1 in moving and high < ANY) or (-1 in moving and low > -ANY)
            else "holds"
        )
    if all(v < low for v in (*values, *ends)):
        return "undecided" if 1 in moving else "fails"
    if all(v > high for v in (*values, *ends)):
        return "undecided" if -1 in moving else "fails"
    return "undecided"


def judged(runs, shift, clusters, encoder):
    """[(section, claim, the paper's figure, effect, verdict)] of one study's evidence."""
    evidence = SimpleNamespace(runs=runs, shift=shift, clusters=clusters, encoder=encoder)
    return [
        (section, text, paper, found := effect(evidence), verdict(found, low, high))
        for section, text, paper, effect, low, high in CLAIMS
    ]


def of_study(folder, preset, ks=(2, 4)):
    """(judgements, number of runs) of the runs in a folder: the study's own and those in which the trigger is repeated where the paper's is
    not, or the other way round."""
    runs = read_runs(folder, preset)
    others = [
        json.loads(path.read_text())
        for path in sorted(Path(folder).glob("*-triggerrepeat*/metrics.json"))
    ]
    runs += [
        run
        for run in others
        if run["args"]["preset"] == preset and list(deviations(run["args"])) == ["trigger_repeat"]
    ]
    return judged(
        runs,
        saved_shifts(folder, preset),
        saved_clusters(folder, preset, ks),
        DEFAULT_ENCODER[preset],
    ), len(runs)


def rows(judgements):
    """The rows of a table: what was measured, seed by seed."""
    out = []
    for section, text, paper, effect, said in judgements:
        form = (
            "{:.1f}" if max((abs(v) for v, _, _ in effect.values()), default=0) >= 5 else "{:.2f}"
        )
        seeds = ", ".join(
            form.format(v) + (" (still learning)" if moving else "")
            for _, (v, _, moving) in sorted(effect.items())
        )
        mean, low, high = map(form.format, interval(effect)) if effect else ("", "", "")
        out.append(
            {
                "Section": section,
                "Claim": text,
                "Paper": paper,
                "By seed": seeds,
                "Effect, 95% interval": f"{mean} ({low} to {high})" if effect else "",
                "Verdict": said,
            }
        )
    return out


def judge(folder, preset, ks):
    """The text of claims.md, on what has run, and the number of runs."""
    found, n = of_study(folder, preset, ks)
    measured = [judgement for judgement in found if judgement[3]]
    said = [verdict for *_, verdict in found]
    counts = ", ".join(
        f"{said.count(v)} {text}"
        for v, text in (
            ("holds", "hold"),
            ("fails", "fail"),
            ("undecided", "undecided"),
            ("not measured", "not measured"),
        )
        if v in said
    )
    sides = [
        {low <= v <= high for v, _, _ in effect.values()}
        for (*_, low, high), (*_, effect, _) in zip(CLAIMS, found)
        if len(effect) > 1
    ]
    agreed = (
        f"\n\nOf the {len(sides)} claims with several seeds, the seeds agree on {sum(len(s) == 1 for s in sides)}."
        if sides
        else ""
    )
    return markdown(f"The paper's claims: {counts}", rows(measured)) + RULE + agreed + "\n", n


def side_by_side(studies):
    """A table of the verdicts in several studies, {name: (preset, folder of runs)}."""
    found = {name: of_study(folder, preset)[0] for name, (preset, folder) in studies.items()}
    table = [
        {
            "Section": claim[0][0],
            "Claim": claim[0][1],
            "Paper": claim[0][2],
            **{name: said if effect else "" for name, (*_, effect, said) in zip(found, claim)},
        }
        for claim in zip(*found.values())
    ]
    return (
        markdown(
            "The paper's claims, study by study",
            [row for row in table if any(row[name] for name in found)],
        )
        + RULE
        + "\n"
    )
