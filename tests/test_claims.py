"""analysis/claims.py: verdicts follow from figures by rule."""

import json
from pathlib import Path

import numpy as np
import pytest

import intervals
import runs
from analysis import claims
from analysis.claims import ANY, Effect
from conftest import arguments, figure, write_run
from intervals import SeedFigure
from study import SCENARIOS, TABLE2, TABLE3


def effects(*figures, rising=0, falling=0):
    """{seed: Effect} of pairs of a value and half of its interval; the first seeds were moving."""
    by_seed = {}
    for seed, (value, half) in enumerate(figures):
        figure = SeedFigure(value, half=half)
        by_seed[seed] = Effect(figure, rising=seed < rising, falling=seed < falling)
    return by_seed


def of_aer(low, high):
    """A claim about the AER, in which the margin is 2 points."""
    return claims.Claim("", "", "asr", "base", "AER", "", low, high)


@pytest.mark.parametrize(
    "measured, low, high, verdict",
    [
        ({}, 90, ANY, "not measured"),
        (effects((95, 1), (97, 1), (96, 1)), 90, ANY, "holds"),
        (effects((89, 0.5)), 90, ANY, "holds"),  # no more than the margin below
        (effects((89, 2)), 90, ANY, "undecided"),  # speakers do not suffice
        (effects((95, 1), (85, 1), (91, 1)), 90, ANY, "undecided"),  # seeds do not suffice
        (effects((20, 3), (40, 3), (30, 3)), 90, ANY, "fails"),
        (effects((0, 0), rising=1), 90, ANY, "undecided"),  # it was still learning
        (effects((0, 0), rising=1), -ANY, 10, "undecided"),
        (effects((0, 0), (0, 0), (0, 0), rising=1), -ANY, 10, "holds"),  # one seed of three
        (effects((99, 0), rising=1), 90, ANY, "holds"),
        (effects((99, 0), rising=1), 40, 75, "fails"),
        (effects((20, 1), falling=1), -ANY, 15, "undecided"),
        (effects((5, 1), falling=1), -ANY, 15, "holds"),
    ],
)
def test_a_verdict_follows_from_the_effects(measured, low, high, verdict):
    assert claims.verdict(of_aer(low, high), measured) == verdict


def share_that_hold(seeds, repetitions=200):
    """How often an attack that does no harm is said to do none, in simulated studies whose seeds'
    accuracies differ by 0.2 points of standard deviation, and 40 speakers by 1 from seed to seed."""
    claim = claims.Claim("", "", "emotion", "base", "harm", "", -ANY, 0)
    rng = np.random.default_rng(0)
    holding = 0
    for _ in range(repetitions):
        accuracy = rng.uniform(0.6, 0.9, 40)  # of each speaker
        harm = {}
        for seed in range(seeds):
            pair = []
            for _ in ("clean", "attacked"):
                hits = 100 * (accuracy + rng.normal(0, 0.002) + rng.normal(0, 0.01, 40))
                sums = {speaker: (n, 100) for speaker, n in enumerate(hits)}
                pair.append(intervals.of_sums(sums, 100))
            harm[seed] = Effect(intervals.difference(*pair))
        holding += claims.verdict(claim, harm) == "holds"
    return holding / repetitions


def test_seeds_take_no_verdict_away():
    shares = [share_that_hold(seeds) for seeds in (1, 3, 10)]
    assert min(shares) > 0.9


def test_the_verdicts_on_a_frozen_sample_stay_as_they_are():
    """The records of mini's five seeds that claims read, and the verdicts on them."""
    sample = Path(__file__).with_name("claims_sample.jsonl.gz")
    expected = json.loads(Path(__file__).with_name("claims_verdicts.json").read_text())
    verdicts = {}
    for claim, _, verdict in claims.judged(runs.read(sample), "mini"):
        key = " | ".join([claim.task, claim.scenario, claim.quantity, claim.text])
        verdicts[key] = verdict
    assert verdicts.items() >= expected.items()  # a claim that was added since is none of these


def test_each_quantity_is_measured_by_a_function():
    assert {claim.quantity for claim in claims.CLAIMS} == set(claims.QUANTITIES)


def published_aer(claim):
    if claim.scenario == "base":
        return TABLE2[claim.task][0][0]
    return TABLE3[claim.task][list(SCENARIOS).index(claim.scenario)][0]


def test_the_claims_quote_the_study_s_tables():
    of_tables = [claim for claim in claims.CLAIMS if claim.quantity in ("AER", "AER lost")]
    quoted = [claim for claim in of_tables if claim.paper not in ("", "fails")]
    assert quoted
    for claim in quoted:
        assert float(claim.paper) == published_aer(claim), claim


def verdicts(folder):
    """{(task, scenario, quantity): verdict} of the claims that the runs measure"""
    judged = claims.judged(runs.read(folder), "mini")
    by_claim = {}
    for claim, effects, verdict in judged:
        if effects:
            by_claim[claim.task, claim.scenario, claim.quantity] = verdict
    return by_claim


def test_aer_and_harm_are_judged_from_the_metrics(tmp_path):
    write_run(tmp_path, arguments("asr", "base"), 0.05, 0.97)
    write_run(tmp_path, arguments("asr", "clean"), 0.05, 0.0)
    write_run(tmp_path, arguments("asr", "1.3"), 0.05, 0.9)
    write_run(tmp_path, arguments("asr", "2.3"), 0.05, 0.0)
    write_run(tmp_path, arguments("emotion", "base"), 0.81, 0.97)
    write_run(tmp_path, arguments("emotion", "clean"), 0.8, 0.0)
    by_claim = verdicts(tmp_path)
    assert by_claim["asr", "base", "AER"] == "holds"
    assert by_claim["emotion", "base", "harm"] == "holds"
    assert by_claim["asr", "1.3", "AER lost"] == "holds"
    assert by_claim["asr", "2.3", "AER"] == "holds"


def test_parts_of_an_attack_that_fails_decide_nothing(tmp_path):
    write_run(tmp_path, arguments("asr", "base"), 0.05, 0.2)
    write_run(tmp_path, arguments("asr", "3.1"), 0.05, 0.0)
    assert verdicts(tmp_path)["asr", "3.1", "AER"] == "undecided"
    assert verdicts(tmp_path)["asr", "base", "AER"] == "fails"


def test_a_run_that_is_still_learning_decides_nothing(tmp_path):
    write_run(tmp_path, arguments("asr", "2.1"), 0.05, 0.0, settled=None)
    assert verdicts(tmp_path)["asr", "2.1", "AER"] == "undecided"


def test_clusters_are_judged_from_their_records(tmp_path):
    two = dict(source="cluster", k=2)
    index = dict(two, metric="adjusted_rand")
    four = dict(source="cluster", k=4)
    records = [
        dict(index, kind="poison", value=0.3),
        dict(index, kind="gender", value=0.2),
        dict(two, metric="purity", value=0.9),
        dict(two, metric="recall", value=0.8),
        dict(four, metric="purity", value=0.9),
        dict(four, metric="recall", value=0.85),
    ]
    write_run(tmp_path, arguments("asr", "base"), aer=0.9, records=records)
    by_claim = verdicts(tmp_path)
    assert by_claim["asr", "base", "gender of two clusters"] == "fails"
    assert by_claim["asr", "base", "poison in one of two clusters"] == "fails"
    assert by_claim["asr", "base", "poison in one of four clusters"] == "holds"


def test_gender_s_attack_is_the_one_that_follows_no_gender(tmp_path):
    index = dict(source="cluster", k=2, metric="adjusted_rand")
    records = [dict(index, kind="poison", value=0.0), dict(index, kind="gender", value=0.0)]
    for task in ("gender", "age"):
        write_run(tmp_path, arguments(task, "base"), aer=0.9, records=records)
    by_claim = verdicts(tmp_path)
    assert by_claim["gender", "base", "gender of two clusters"] == "holds"
    assert by_claim["age", "base", "gender of two clusters"] == "fails"


def write_both_triggers(folder):
    """The runs of emotion's attack with one click and with repeated ones."""
    once = write_run(folder, arguments("emotion", "base"), 0.8, 0.95)
    repeated = arguments("emotion", "base", trigger_repeat=True)
    return once, write_run(folder, repeated, 0.8, 0.83)


def test_a_repeated_trigger_is_compared_with_the_paper_s(tmp_path):
    once, repeated = write_both_triggers(tmp_path)
    for run in (once, repeated):
        (run / "environment.json").write_text(json.dumps(dict(machine="x86_64", cpu="AVX2")))
    by_claim = verdicts(tmp_path)
    assert by_claim["emotion", "base", "AER lost, repeated"] == "holds"
    assert by_claim["emotion", "base", "AER"] == "holds"


def test_triggers_of_two_machines_are_not_compared(tmp_path):
    once, repeated = write_both_triggers(tmp_path)
    assert ("emotion", "base", "AER lost, repeated") not in verdicts(tmp_path)
    (once / "environment.json").write_text(json.dumps(dict(gpu="one")))
    (repeated / "environment.json").write_text(json.dumps(dict(gpu="another")))
    assert ("emotion", "base", "AER lost, repeated") not in verdicts(tmp_path)


def connector_shift(cosine):
    return [dict(source="shift", metric="cosine", component="connector", **figure(cosine, 0))]


@pytest.mark.parametrize("left, verdict", [(0.95, "holds"), (0.8, "fails")])
def test_a_shift_is_undone_from_the_attack_s_to_the_clean_s(tmp_path, left, verdict):
    cosines = {"clean": 0.98, "base": 0.6, "3.1": left}
    for scenario, value in cosines.items():
        write_run(tmp_path, arguments("asr", scenario), aer=0.9, records=connector_shift(value))
    assert verdicts(tmp_path)["asr", "3.1", "shift left"] == verdict


def test_encoders_are_compared_with_wav2vec2(tmp_path):
    aer_of = dict(wavlm=0.95, hubert=0.9, wav2vec2=0.6)
    for encoder, aer in aer_of.items():
        write_run(tmp_path, {**arguments("age", "base"), "encoder": encoder}, aer=aer)
    assert verdicts(tmp_path)["age", "base", "AER below other encoders"] == "holds"


@pytest.mark.parametrize("changes", [dict(seed=2, epochs=1), dict(encoder="hubert")])
def test_a_shift_is_read_of_the_study_s_own_runs_alone(tmp_path, changes):
    shift = dict(source="shift", metric="cosine", component="encoder", task="asr")
    write_run(tmp_path, arguments("asr", "clean"), records=[{**shift, **figure(0.99, 0)}])
    other = {**arguments("asr", "clean"), **changes}
    write_run(tmp_path, other, records=[{**shift, **figure(0.1, 0)}])
    effects = {}
    for claim, by_seed, _ in claims.judged(runs.read(tmp_path), "mini"):
        if claim.quantity == "cosine" and by_seed:
            effects[claim.task, claim.scenario] = by_seed
    assert effects == {("asr", "clean"): {1: Effect(SeedFigure(0.99))}}
