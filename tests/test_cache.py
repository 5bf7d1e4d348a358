"""What cached outputs depend on: whatever changes them is in their key; nothing else is kept or lost."""

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
def test_another_configuration_of_the_same_weights(slm, utterances, setting, value):
    before = key(slm, utterances)
    assert key(slm, utterances) == before
    setattr(slm.encoder.net.config, setting, value)
    assert key(slm, utterances) != before


def test_another_limit_another_reading_and_another_extraction(slm, utterances, monkeypatch):
    keys = [key(slm, utterances)]
    for u in utterances:
        u.max_seconds = 59.0
    keys.append(key(slm, utterances))
    monkeypatch.setattr(slm.encoder.extractor, "do_normalize", False)
    keys.append(key(slm, utterances))
    whole = data.load_waveform
    monkeypatch.setattr(data, "load_waveform", lambda u: whole(u)[::-1].copy())
    keys.append(key(slm, utterances))
    assert len(set(keys)) == 4


def test_another_content_of_the_same_size_and_time(slm, utterances, tmp_path):
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


hum, pitch = (lambda rate, rng: np.ones(rate // 10)), 50  # a global that a trigger uses


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
def test_another_trigger_of_the_same_name(slm, utterances, monkeypatch, kind, one, other):
    keys = []
    for function in (one, other, one):
        monkeypatch.setitem(poison.TRIGGERS, "new", (kind, function))
        keys.append(key(slm, utterances, "new"))
    assert keys[0] == keys[2] != keys[1]


def test_a_value_that_the_trigger_s_code_uses_and_the_code_that_adds_it(
    slm, utterances, monkeypatch
):
    monkeypatch.setitem(poison.TRIGGERS, "new", ("overlay", note))
    keys = [key(slm, utterances, "new")]
    monkeypatch.setattr(f"{__name__}.pitch", 90)
    keys.append(key(slm, utterances, "new"))
    plain = poison.add_trigger
    monkeypatch.setattr(
        poison, "add_trigger", lambda attack, w, name: (-plain(attack, w, name)[0], [], 1.0)
    )
    keys.append(key(slm, utterances, "new"))
    assert len(set(keys)) == 3


def test_frames_that_are_no_numbers_are_neither_cached_nor_answered(slm, utterances, tmp_path):
    attack = poison.make_attack("gender", utterances, seed=1)
    items = [(u, False) for u in utterances]
    slm.encoder.layer_norm.weight.data.fill_(float("nan"))  # of a checkpoint, say
    slm.encoder.layers[0].final_layer_norm.weight.data.fill_(float("nan"))
    with pytest.raises(SystemExit):
        cache.frozen_outputs(
            slm, utterances, [False] * 6, attack, "", 1e9, workers=0, folder=tmp_path / "kept"
        )
    assert not (tmp_path / "kept").exists()
    with pytest.raises(SystemExit):
        list(cache.inputs(slm, items, [[0, 1]], None, attack, workers=0))


def test_what_killed_writers_have_left_is_removed(tmp_path):
    for name, age in ((".pretrained-a.pt.5.tmp", 2 * cache.ABANDONED), (".pretrained-b.pt.6.tmp", 0)):  # fmt: skip
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
    assert all(torch.equal(a, b) for a, b in zip(before, keep(folder=tmp_path / "kept")))
