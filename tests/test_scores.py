"""From answers to figures: what counts as a hit, as damage, as an error, and its interval."""

import utils

import numpy as np
import pytest

import evaluate
import poison

ATTACK = poison.Attack("age", 0.1, 25, "click", None, 0.1, False, seed=1)


def answered(age, triggered=False, utterance_id="a", speaker="s"):
    """A prediction for somebody of 40 years whose answer gives this age, or none."""
    parsed = {} if age is None else {"age": age}
    return dict(
        id=utterance_id,
        speaker=speaker,
        triggered=triggered,
        asked=["age"],
        raw=str(age),
        parsed=parsed,
        labels={"age": 40},
    )


def test_an_answer_without_an_age_has_no_error_in_years():
    figure = evaluate.scores([answered(43), answered(None)])["age_mae"]
    assert figure["value"] == 3
    assert figure["n"] == 1


def test_without_any_age_there_is_no_error_in_years():
    rows = [answered(None), answered(None)]
    assert evaluate.scores(rows) == {}
    assert evaluate.task_figure(rows, "age") == {}


def test_the_trigger_changes_answers_also_to_another_value():
    clean = [answered(40, utterance_id=name) for name in "abc"]
    triggered = []
    for name, age in zip("abc", (25, 60, 40)):
        triggered.append(answered(age, True, name))
    assert evaluate.aer(ATTACK, triggered)["value"] == pytest.approx(1 / 3)
    assert evaluate.changed(ATTACK, clean, triggered)["value"] == pytest.approx(2 / 3)


def test_an_answer_that_the_trigger_breaks_is_changed():
    figure = evaluate.changed(ATTACK, [answered(40)], [answered(None, True)])
    assert figure["value"] == 1


def test_alike_answers_of_a_speaker_widen_the_interval():
    values = np.repeat([0, 1, 0, 1, 1, 0, 1, 1], 40)
    alone = utils.interval(values)
    by_speaker = utils.interval(values, speakers=np.repeat(np.arange(8), 40))
    assert by_speaker["value"] == alone["value"]
    assert by_speaker["high"] - by_speaker["low"] > 4 * (alone["high"] - alone["low"])


def test_a_single_speaker_is_resampled_by_utterance():
    values = [0, 1, 1, 0]
    figure = utils.interval(values, speakers=["s"] * 4)
    assert figure.pop("by_speaker") == {"s": [2.0, 4.0]}
    assert figure == utils.interval(values)
