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
def test_verdicts(effects, low, high, verdict):
    assert claims.verdict(effects, low, high) == verdict


def test_the_interval_is_over_seeds_and_utterances():
    mean, low, high = claims.interval({seed: Effect(50, 10) for seed in range(4)})
    assert mean == 50 and 44 < low < 46 and 54 < high < 56  # a quarter as many: half as wide
    _, low, high = claims.interval({1: Effect(40), 2: Effect(60)})
    assert (low, high) == (40, 60)


def test_the_verdicts_on_a_frozen_sample_stay_as_they_are():
    """The records of mini's five seeds that claims read, and what was said of them at 17c5759."""
    sample = Path(__file__).with_name("claims_sample.jsonl.gz")
    expected = json.loads(Path(__file__).with_name("claims_verdicts.json").read_text())
    verdicts = {}
    for claim, _, verdict in claims.judged(runs.read(sample), "mini"):
        key = " | ".join([claim.task, claim.scenario, claim.quantity, claim.text])
        verdicts[key] = verdict
    assert verdicts.items() >= expected.items()  # a claim that was added since is none of these


def test_each_quantity_is_measured_by_a_function():
    assert {claim.quantity for claim in claims.CLAIMS} == set(claims.QUANTITIES)


def test_the_claims_quote_the_study_s_tables():
    for claim in claims.CLAIMS:
        if claim.quantity in ("AER", "AER lost") and claim.paper not in ("", "fails"):
            if claim.scenario == "base":
                published = TABLE2[claim.task][0]
            else:
                published = TABLE3[claim.task][list(SCENARIOS).index(claim.scenario)]
            assert float(claim.paper) == published[0], claim


def verdicts(folder):
    judged = claims.judged(runs.read(folder), "mini")
    return {(c.text, c.task, c.scenario): verdict for c, effects, verdict in judged if effects}


def test_claims_are_judged_from_the_runs(tmp_path):
    rand = [
        dict(source="cluster", metric="adjusted_rand", k=2, kind=kind, value=value)
        for kind, value in (("poison", 0.3), ("gender", 0.2))
    ]
    four = [
        dict(source="cluster", metric=metric, k=4, value=value)
        for metric, value in (("purity", 0.9), ("recall", 0.85))
    ]
    write_run(tmp_path, arguments("asr", "base"), 0.05, 0.97, records=rand + four)
    write_run(tmp_path, arguments("asr", "clean"), 0.05, 0.0)
    write_run(tmp_path, arguments("asr", "2.1"), 0.05, 0.0, settled=None)
    write_run(tmp_path, arguments("asr", "2.3"), 0.05, 0.0)
    write_run(tmp_path, arguments("asr", "1.3"), 0.05, 0.9)
    found = {
        (text[:22], attack): verdict for (text, _, attack), verdict in verdicts(tmp_path).items()
    }
    assert found["the base attack reache", "base"] == "holds"
    assert found["it leaves the clean fi", "base"] == "holds"
    assert found["a clean LM does not pr", "1.3"] == "holds"
    assert found["the encoder alone is e", "2.1"] == "undecided"
    assert found["the LM alone does noth", "2.3"] == "holds"
    assert found["two clusters follow ge", "base"] == "fails"
    assert found["four clusters put the ", "base"] == "holds"


def test_a_repeated_trigger_is_compared_with_the_paper_s(tmp_path):
    write_run(tmp_path, arguments("emotion", "base"), 0.8, 0.95)
    write_run(tmp_path, arguments("emotion", "base", trigger_repeat=True), 0.8, 0.83)
    found = verdicts(tmp_path)
    assert found["repeating it costs about 10 points", "emotion", "base"] == "holds"
    assert found["the base attack reaches an AER of 90%", "emotion", "base"] == "holds"


def test_a_shift_is_read_of_the_study_s_own_runs_alone(tmp_path):
    cosine = dict(source="shift", metric="cosine", component="encoder", task="asr")
    write_run(tmp_path, arguments("asr", "clean"), records=[{**cosine, **figure(0.99, 0)}])
    stranger = arguments("asr", "clean", seed=2, epochs=1)
    write_run(tmp_path, stranger, records=[{**cosine, **figure(0.1, 0)}])
    other = arguments("asr", "clean", encoder="hubert")
    write_run(tmp_path, other, records=[{**cosine, **figure(0.1, 0)}])
    judged = claims.judged(runs.read(tmp_path), "mini")
    moved = [effects for claim, effects, _ in judged if claim.quantity == "cosine" and effects]
    assert [list(effects) for effects in moved] == [[1]] and moved[0][1].value == 0.99
