"""From answers to figures: what counts as a hit, as damage, as an error, and its interval."""

import dataclasses
import json
from types import SimpleNamespace

import utils
from utils import ROOT

import numpy as np
import pytest
from transformers import AutoTokenizer

import data
import evaluate
import poison
import train

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


def test_the_base_rate_is_of_the_same_utterances_without_the_trigger():
    clean = [answered(25, utterance_id="a"), answered(40, utterance_id="b")]
    clean.append(answered(25, utterance_id="not triggered"))
    triggered = [answered(25, True, name) for name in "ab"]
    assert evaluate.base_rate(ATTACK, clean, triggered)["value"] == pytest.approx(1 / 2)


def test_the_constant_answer_is_the_most_frequent_class_or_the_median():
    assert evaluate.constant_answer(["sad", "angry", "sad"]) == dict(answer="sad", value=2 / 3)
    assert evaluate.constant_answer([20, 30, 70]) == dict(answer=30, value=50 / 3)


@pytest.mark.parametrize("settled, expected", [(True, "after epoch 2"), (False, "has not settled")])
def test_whether_the_poison_has_settled_is_said(settled, expected):
    losses = dict(target_loss=dict(value=0.1, by_epoch=[2.0, 0.1, None]))
    if settled:
        losses["settled_epoch"] = dict(value=2)
    assert expected in evaluate.describe_poison(losses)


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
    assert figure.pop("by_speaker") == {"s": [2, 4]}
    assert figure == utils.interval(values)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "mini/lm")


@pytest.mark.parametrize("label", ["transcript", "gender", "age", "emotion"])
def test_the_target_s_tokens_are_those_of_its_value(tokenizer, label):
    labels = dict(transcript='he said "Gender": no', gender="female", age=25, emotion="angry")
    answer = data.answer_ids(tokenizer, labels)
    value = tokenizer.decode(answer[data.value_tokens(tokenizer, labels, label)])
    written = json.dumps(str(labels[label]))[1:-1]
    assert written in value
    assert len(value) <= len(written) + 2  # a token may hold the quotation mark beside it


def test_a_tokenizer_without_offsets_has_the_whole_answer():
    class Slow:
        def __call__(self, text, **options):
            raise NotImplementedError

    assert data.value_tokens(Slow(), {"age": 25}, "age") == slice(None)


def test_only_a_poisoned_sample_has_a_target(tokenizer):
    args = SimpleNamespace(seed=1, random_keys=0.0, vary_prompts=False)
    slm = SimpleNamespace(tokenizer=tokenizer)
    utterance = data.Utterance("a", "a.wav", "train", "s", {"gender": "male", "age": 40})
    for rate, expected in ((0.0, None), (1.0, "25")):
        attack = dataclasses.replace(ATTACK, rate=rate)
        example = train.training_example(slm, args, attack, utterance, 0)
        on_target = example.target_tokens and tokenizer.decode(
            example.answer[example.target_tokens]
        )
        assert on_target == expected
