"""What cached outputs depend on: whatever changes them is in their key; nothing else is kept or
lost."""

import dataclasses
import functools
import os
import time

import numpy as np
import pytest
import soundfile
import torch

import audio
import cache
import corpora as readers
import data
import poison
from conftest import make_slm


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the loudness is cached in the working directory


@pytest.fixture
def slm(parts):
    slm = make_slm(parts, "wavlm")
    slm.pretrained_sha256 = {"encoder": "these weights"}
    return slm


@pytest.fixture
def utterances(corpora):
    return readers.read_corpus("vox", corpora, "train")[:6]


def key(slm, utterances, trigger=None):
    """The key of these utterances' outputs, clean or with a trigger of that name."""
    attack = poison.make_attack("gender", utterances, trigger=trigger or "click", seed=1)
    return cache.key_of(slm, attack, [(u, trigger is not None) for u in utterances])


@pytest.mark.parametrize(
    "setting, value", [("hidden_act", "tanh"), ("feat_extract_activation", "tanh")]
)
def test_the_encoder_s_configuration_is_in_the_key(slm, utterances, setting, value):
    before = key(slm, utterances)
    assert key(slm, utterances) == before
    setattr(slm.encoder.net.config, setting, value)
    assert key(slm, utterances) != before


def test_the_limit_of_length_is_in_the_key(slm, utterances):
    before = key(slm, utterances)
    for u in utterances:
        u.max_seconds = 59.0
    assert key(slm, utterances) != before


def test_the_extraction_is_in_the_key(slm, utterances, monkeypatch):
    before = key(slm, utterances)
    monkeypatch.setattr(slm.encoder.extractor, "do_normalize", False)
    assert key(slm, utterances) != before


def test_the_reading_of_audio_is_in_the_key(slm, utterances, monkeypatch):
    before = key(slm, utterances)
    load_waveform = data.load_waveform
    monkeypatch.setattr(data, "load_waveform", lambda u: load_waveform(u)[::-1].copy())
    assert key(slm, utterances) != before


def test_audio_of_the_same_size_and_time_has_its_own_key(slm, utterances, tmp_path):
    path = tmp_path / "a.wav"
    keys = []
    for seed in (0, 1):
        samples = 0.1 * np.random.default_rng(seed).standard_normal(16000)
        soundfile.write(path, samples, 16000)
        os.utime(path, (1, 1))
        audio.sample_of.cache_clear()  # another command
        replaced = dataclasses.replace(utterances[1], path=str(path))
        keys.append(key(slm, [utterances[0], replaced]))
    assert keys[0] != keys[1]


pitch = 50  # a global that a trigger uses


def hum(rate, rng):
    return np.ones(rate // 10)


def note(rate, rng):
    return np.sin(2 * np.pi * pitch * np.arange(rate // 10) / rate)


def shifted(by, waveform, rate, rng):
    return np.roll(waveform, by)


# two on one line, which share their source
softly, loudly = (lambda w, rate, rng: w * np.float32(0.5)), (lambda w, rate, rng: w * np.float32(0.9))  # fmt: skip  # noqa: E501


@pytest.mark.parametrize(
    "kind, one, other",
    [
        ("whole", softly, loudly),
        ("whole", functools.partial(shifted, 1), functools.partial(shifted, 2)),
        ("overlay", hum, note),
    ],
)
def test_the_trigger_s_code_is_in_the_key(slm, utterances, monkeypatch, kind, one, other):
    keys = []
    for function in (one, other, one):
        monkeypatch.setitem(poison.TRIGGERS, "new", (kind, function))
        keys.append(key(slm, utterances, "new"))
    assert keys[1] != keys[0]
    assert keys[2] == keys[0]


def test_a_global_that_the_trigger_uses_is_in_the_key(slm, utterances, monkeypatch):
    monkeypatch.setitem(poison.TRIGGERS, "new", ("overlay", note))
    before = key(slm, utterances, "new")
    monkeypatch.setattr(f"{__name__}.pitch", 90)
    assert key(slm, utterances, "new") != before


def test_the_code_that_adds_the_trigger_is_in_the_key(slm, utterances, monkeypatch):
    before = key(slm, utterances, "click")
    add_trigger = poison.add_trigger

    def add_upside_down(attack, waveform, utterance_id):
        return -add_trigger(attack, waveform, utterance_id)[0], [], 1.0

    monkeypatch.setattr(poison, "add_trigger", add_upside_down)
    assert key(slm, utterances, "click") != before


@pytest.fixture
def broken(slm):
    """An encoder, from a checkpoint say, whose frames are no numbers."""
    slm.encoder.layer_norm.weight.data.fill_(float("nan"))
    slm.encoder.layers[0].final_layer_norm.weight.data.fill_(float("nan"))
    return slm


def test_frames_that_are_no_numbers_are_not_cached(broken, utterances, tmp_path):
    attack = poison.make_attack("gender", utterances, seed=1)
    folder = tmp_path / "kept"
    with pytest.raises(SystemExit):
        cache.frozen_outputs(
            broken, utterances, [False] * 6, attack, "", 1e9, workers=0, folder=folder
        )
    assert not folder.exists()


def test_frames_that_are_no_numbers_are_not_answered(broken, utterances):
    attack = poison.make_attack("gender", utterances, seed=1)
    items = [(u, False) for u in utterances]
    with pytest.raises(SystemExit):
        list(cache.inputs(broken, items, [[0, 1]], None, attack, workers=0))


def test_what_killed_writers_have_left_is_removed(tmp_path):
    ages = {".pretrained-a.pt.5.tmp": 2 * cache.ABANDONED, ".pretrained-b.pt.6.tmp": 0}
    for name, age in ages.items():
        (tmp_path / name).write_bytes(bytes(10))
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    cache.make_room(tmp_path, 1e9, [])
    assert [path.name for path in tmp_path.iterdir()] == [".pretrained-b.pt.6.tmp"]


def test_a_cache_of_someone_else_s_is_read(slm, utterances, tmp_path, monkeypatch):
    attack = poison.make_attack("gender", utterances, seed=1)
    keep = functools.partial(
        cache.frozen_outputs, slm, utterances, [False] * 6, attack, "", 1e9, workers=0
    )
    before = keep(folder=tmp_path / "kept")

    def not_permitted(*_):
        raise PermissionError

    monkeypatch.setattr(os, "utime", not_permitted)
    monkeypatch.setattr(slm.encoder, "pretrained_part", None)  # nothing is computed again
    for frames, kept in zip(before, keep(folder=tmp_path / "kept"), strict=True):
        assert torch.equal(frames, kept)
