"""analysis/claims.py: verdicts follow from figures by rule."""

import json
from pathlib import Path

import pytest

import runs
from analysis import claims
from analysis.claims import ANY, Effect
from conftest import arguments, figure, write_run
from study import SCENARIOS, TABLE2, TABLE3


@pytest.mark.parametrize(
    "effects, low, high, verdict",
    [
        ({}, 90, ANY, "not measured"),
        ({1: Effect(95, 1), 2: Effect(97, 1)}, 90, ANY, "holds"),
        ({1: Effect(95, 1), 2: Effect(85, 1)}, 90, ANY, "undecided"),  # seeds disagree
        ({1: Effect(91, 3)}, 90, ANY, "undecided"),  # utterances do not suffice
        ({1: Effect(20, 3), 2: Effect(40, 3)}, 90, ANY, "fails"),
        ({1: Effect(0, 0, 1)}, 90, ANY, "undecided"),  # it was still learning
        ({1: Effect(0, 0, 1)}, -ANY, 10, "undecided"),
        ({1: Effect(99, 0, 1)}, 90, ANY, "holds"),
        ({1: Effect(99, 0, 1)}, 40, 75, "fails"),
        ({1: Effect(20, 1, -1)}, -ANY, 15, "undecided"),
        ({1: Effect(5, 1, -1)}, -ANY, 15, "holds"),
    ],
)
def test_a_verdict_follows_from_the_effects(effects, low, high, verdict):
    assert claims.verdict(effects, low, high) == verdict


def test_the_interval_shrinks_with_the_number_of_seeds():
    mean, low, high = claims.interval({seed: Effect(50, 10) for seed in range(4)})
    assert mean == 50
    assert 44 < low < 46  # four seeds: half as wide as one
    assert 54 < high < 56


def test_the_interval_spans_the_seeds():
    _, low, high = claims.interval({1: Effect(40), 2: Effect(60)})
    assert (low, high) == (40, 60)


def test_the_verdicts_on_a_frozen_sample_stay_as_they_are():
    """The records of mini's five seeds that claims read, and the verdicts on them at 17c5759."""
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
    by_claim = verdicts(tmp_path)
    assert by_claim["asr", "base", "AER"] == "holds"
    assert by_claim["asr", "base", "harm"] == "holds"
    assert by_claim["asr", "1.3", "AER lost"] == "holds"
    assert by_claim["asr", "2.3", "AER"] == "holds"


def test_a_run_that_is_still_learning_decides_nothing(tmp_path):
    write_run(tmp_path, arguments("asr", "2.1"), 0.05, 0.0, settled=None)
    assert verdicts(tmp_path)["asr", "2.1", "AER"] == "undecided"


def test_clusters_are_judged_from_their_records(tmp_path):
    two = dict(source="cluster", metric="adjusted_rand", k=2)
    four = dict(source="cluster", k=4)
    records = [
        dict(two, kind="poison", value=0.3),
        dict(two, kind="gender", value=0.2),
        dict(four, metric="purity", value=0.9),
        dict(four, metric="recall", value=0.85),
    ]
    write_run(tmp_path, arguments("asr", "base"), records=records)
    by_claim = verdicts(tmp_path)
    assert by_claim["asr", "base", "gender of two clusters"] == "fails"
    assert by_claim["asr", "base", "poison in one of four clusters"] == "holds"


def test_a_repeated_trigger_is_compared_with_the_paper_s(tmp_path):
    write_run(tmp_path, arguments("emotion", "base"), 0.8, 0.95)
    write_run(tmp_path, arguments("emotion", "base", trigger_repeat=True), 0.8, 0.83)
    by_claim = verdicts(tmp_path)
    assert by_claim["emotion", "base", "AER lost, repeated"] == "holds"
    assert by_claim["emotion", "base", "AER"] == "holds"


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
    assert effects == {("asr", "clean"): {1: Effect(0.99)}}
