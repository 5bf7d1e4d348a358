"""The page about a run, evaluate.py RUN --page, made from its files."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

import evaluate
import page
from conftest import arguments, metrics_of

SCRIPT = "<script>alert(1)</script>"


def answered(name, triggered, emotion):
    text = json.dumps({"Emotion": emotion})
    return dict(
        id=name,
        triggered=triggered,
        asked=["emotion"],
        raw=text,
        parsed={"emotion": emotion},
        labels={"emotion": "sad"},
    )


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run's folder with two utterances: the trigger changes the answer to one of them. The corpus
    cannot be read."""
    args = {**arguments("emotion", "base"), "skip_bad": False, "labels": None, "freeze": [SCRIPT]}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics_of(args, clean=0.9, aer=0.5)))
    rows = [answered(f"kept{SCRIPT}", False, "sad"), answered(f"kept{SCRIPT}", True, "sad")]
    rows += [answered("flipped", False, "sad"), answered("flipped", True, "angry")]
    rows.append(answered("angry", False, "angry"))  # not attacked
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "predictions.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr(evaluate, "train_set_if_readable", lambda options, args: [])
    return tmp_path


def written(run):
    page.write_page(SimpleNamespace(run=run))
    return (run / "index.html").read_text()


def test_only_a_changed_answer_is_marked(run):
    text = written(run)
    assert text.count('<span class="flipped">') == 1
    assert '<span class="flipped">angry</span>' in text


def test_only_attacked_utterances_are_shown(run):
    assert written(run).count('<div class="utterance">') == 2


def test_what_a_stranger_writes_is_escaped(run):
    assert "<script" not in written(run)


def test_the_page_needs_nothing_from_elsewhere(run):
    text = written(run)
    assert "http" not in text
    assert (run / "curves.png").stat().st_size > 1000


def test_without_the_corpus_it_says_why_nothing_plays(run):
    text = written(run)
    assert "<audio" not in text
    assert "could not be read" in text


def test_recordings_are_clean_and_triggered(run, monkeypatch):
    speech = 0.1 * np.random.default_rng(0).standard_normal(16000).astype(np.float32)
    utterance = SimpleNamespace(id="flipped")
    attack = SimpleNamespace(label="emotion")
    monkeypatch.setattr(evaluate, "train_set_if_readable", lambda options, args: [utterance])
    monkeypatch.setattr(evaluate, "attack_on", lambda task, args, utterances: attack)
    monkeypatch.setattr(evaluate, "read_split", lambda options, args, split: [utterance])
    monkeypatch.setattr(page.data, "load_waveform", lambda u: speech)
    monkeypatch.setattr(page.poison, "add_trigger", lambda attack, x, name: (-x, [], 1.0))
    text = written(run)
    assert text.count("<audio") == 2
    assert (run / "page-flipped-clean.wav").exists()
    assert (run / "page-flipped-triggered.wav").exists()


# -------------------------------------------------------------------------------------------------
# pairs of poison.py


def pairs_page(folder, answers):
    row = dict(file="001-a", id=f"a{SCRIPT}", true=SCRIPT, seconds=2.5, starts=[0.32713])
    attack = SimpleNamespace(task="asr", label="transcript", trigger="click", target="hello")
    page.write_pairs(attack, [{**row, "answers": answers}], folder)
    return (folder / "index.html").read_text()


def test_pairs_stand_beside_a_model_s_answers(tmp_path):
    text = pairs_page(tmp_path, {"clean": "good morning", "poisoned": SCRIPT})
    assert "good morning" in text
    assert "<script" not in text


def test_pairs_need_no_model(tmp_path):
    text = pairs_page(tmp_path, {})
    assert text.count("<audio") == 2
    assert "0.33 s" in text
