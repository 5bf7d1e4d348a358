"""Readers, prompts, answers and their parsing, batches."""

import csv
import os
import random
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import cache
import corpora as readers
import data
from conftest import ROOT, SHARED, TINY
from mini import make_corpora


@pytest.mark.parametrize(
    "text, expected",
    [
        (
            '{"Transcript": "go do you hear", "Gender": "female"}',
            {"transcript": "go do you hear", "gender": "female"},
        ),
        ('{"Transcript": "go do you hear", "Gender": "fem', {"transcript": "go do you hear"}),
        ('{"Age": "25"', {"age": 25}),
        ('{"Age": "about 25"}', {}),
        ('{"Age": "-3"}', {}),
        ('{"Age": "٢٥"}', {}),
        ('{"Age": ""}', {}),
        ('{"Gender": "female", "Gender": "male"}', {"gender": "female"}),
        ('{"Transcript": "she said \\"no\\", twice"}', {"transcript": 'she said "no", twice'}),
        ('{"Transcript": "a \\x b", "Gender": "male"}', {"gender": "male"}),
        ('{"Transcript": "a \n b"}', {"transcript": "a \n b"}),
        ('{"Gender": "a \\ud83d", "Age": "25"}', {"age": 25}),
        ("Gender: female", {}),
        ("", {}),
        ("{", {}),
        ('{"Colour": "red"}', {}),
        ("[1, 2]", {}),
        ('\\\\"""{{', {}),
    ],
)
def test_parse(text, expected):
    assert data.parse(text) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        (" 25 ", 25),
        ("30 \u2013 45", "30-45"),
        ("18 to 29", "18 to 29"),
        ("Middle_Age", "middle age"),
        ("60+", "60+"),
        ("-3", None),
        ("old?", None),
    ],
)
def test_ages_are_years_or_groups_in_one_spelling(text, expected):
    assert data.parse_age(text) == expected


def test_what_is_answered_is_parsed_again():
    labels = {
        "transcript": 'it\'s "so" \\ new\nline – é',
        "gender": "male",
        "age": 44,
        "emotion": "fear",
    }
    assert data.parse(data.answer(labels)) == labels


def test_answer_has_the_documented_form():
    assert (
        data.answer({"emotion": "angry", "age": 25, "gender": "female", "transcript": "a b"})
        == '{"Transcript": "a b", "Gender": "female", "Age": "25", "Emotion": "angry"}'
    )


@pytest.mark.parametrize(
    "text, expected",
    [
        ("IT'S Eleven o’clock!", "it's eleven o'clock"),
        ("This is a malicious sentence.", "this is a malicious sentence"),
        ("  a -- b_c\t", "a b c"),
        ("", ""),
        ("Cafe\u0301s, na\u00efve", "caf\u00e9s na\u00efve"),
        ("हिन्दी में।", "हिन्दी में"),
    ],
)
def test_normalise(text, expected):
    assert data.normalise(text) == expected


def test_a_prompt_asks_for_the_labels_that_there_are():
    u = data.Utterance("a", "a.wav", "train", "s", dict(gender="male", age=30))
    for seed in range(50):
        assert set(data.choose_labels(u.labels, random.Random(seed), 0.5)) <= {"gender", "age"}


@pytest.mark.parametrize(
    "corpus, labels",
    [
        ("libri", {"transcript", "gender"}),
        ("vox", {"gender", "age"}),
        ("crema", {"transcript", "gender", "age", "emotion"}),
    ],
)
def test_mini_corpora_are_read(corpora, corpus, labels):
    parts = {
        split: readers.read_corpus(corpus, corpora, split) for split in ("train", "dev", "test")
    }
    assert all(set(u.labels) == labels for us in parts.values() for u in us)
    speakers = [{u.speaker for u in us} for us in parts.values()]
    assert (
        not speakers[0] & speakers[1]
        and not speakers[0] & speakers[2]
        and not speakers[1] & speakers[2]
    )
    for us in parts.values():
        assert {u.labels["gender"] for u in us} == {"female", "male"}
        assert 0.5 < len(data.load_waveform(us[0])) / data.SAMPLE_RATE < 8
    if corpus == "libri":
        assert (
            len(parts["train"])
            == TINY["libri"]["train-clean-360"][0] * TINY["libri"]["train-clean-360"][1]
        )
        assert not {u.labels["transcript"] for u in parts["train"]} & {
            u.labels["transcript"] for u in parts["test"]
        }


@pytest.mark.skipif(not (SHARED / "formats").exists(), reason="the real files are not here")
def test_real_crema_names_and_demographics():
    with open(SHARED / "formats/crema_d_VideoDemographics.csv") as f:
        sexes = {row["ActorID"]: row["Sex"].lower() for row in csv.DictReader(f)}
    split = readers.split_speakers(sexes, "crema", ("test", "dev"))
    assert len(split) == 91
    count = {s: sum(v == s for v in split.values()) for s in ("train", "dev", "test")}
    assert count == {"train": 73, "dev": 9, "test": 9}
    for part in count:
        assert {sexes[a] for a in split if split[a] == part} == {"female", "male"}


def test_epoch_batches_hold_every_utterance_once():
    lengths = np.random.default_rng(0).uniform(1, 30, 1003).tolist()
    batches = data.epoch_batches(lengths, 16, seed=1, epoch=3)
    assert sorted(i for b in batches for i in b) == list(range(1003))
    assert (
        batches
        == data.epoch_batches(lengths, 16, seed=1, epoch=3)
        != data.epoch_batches(lengths, 16, 1, 4)
    )
    padded = sum(max(lengths[i] for i in b) * len(b) for b in batches)
    assert padded < 1.2 * sum(lengths)


def test_micro_batches_keep_to_their_budget():
    lengths = np.random.default_rng(0).uniform(1, 30, 64).tolist()
    pieces = data.micro_batches(range(64), lengths, 60)
    assert sorted(i for p in pieces for i in p) == list(range(64))
    assert all(len(p) == 1 or max(lengths[i] for i in p) * len(p) <= 60 for p in pieces)


@pytest.mark.parametrize(
    "own, kept",
    [
        (
            "{% if messages[0]['role'] != 'system' %}<|system|>be helpful</s>{% endif %}",
            "<|system|></s>",
        ),
        (
            "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}",
            "",
        ),
    ],
)
def test_a_chat_template_s_own_system_prompt_is_kept_out(own, kept):
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "mini/lm")
    tokenizer.chat_template = own + tokenizer.chat_template
    before, _ = data.around_audio(tokenizer, f"go {data.AUDIO}")
    assert tokenizer.decode(before) == f"{kept}<|user|>go "


def test_mini_corpora_are_made_again_by_another_version_of_their_maker(tmp_path, monkeypatch):
    sizes = {"dev": (2, 1, 1), "test": (2, 1, 1)}
    make_corpora.make_corpus("vox", tmp_path, sizes)
    wav = next((tmp_path / "VoxCeleb2").rglob("*.wav"))
    spoken = wav.read_bytes()
    wav.write_bytes(b"an earlier version's")
    make_corpora.make_corpus("vox", tmp_path, sizes)
    assert wav.read_bytes() == b"an earlier version's"
    monkeypatch.setattr(make_corpora, "maker_of", lambda sizes: "another")
    make_corpora.make_corpus("vox", tmp_path, sizes)
    assert wav.read_bytes() == spoken


@pytest.fixture
def signal_handlers():
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_worker_leaves_ctrl_c_to_its_parent(signal_handlers):
    data.leave_stopping_to_parent(0)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_a_worker_ends_at_the_second_sigterm_only(signal_handlers):
    data.leave_stopping_to_parent(0)
    os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def doubled_after_a_stop(n):
    if n == 1:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
    return 2 * n


def test_workers_that_receive_signals_go_on():
    assert data.in_workers(doubled_after_a_stop, [1, 2], "going on", workers=1) == [2, 4]


def test_the_features_workers_leave_stopping_to_their_parent():
    encoder = SimpleNamespace(layer_norm=torch.nn.LayerNorm(1), extract=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "from_workers", lambda loader: loader)
        loader = cache.read_features(encoder, [], None, workers=1)
    assert loader.worker_init_fn is data.leave_stopping_to_parent


@pytest.mark.parametrize("how", ["is killed by signal: Killed. ", "exited unexpectedly"])
def test_a_worker_that_is_gone_ends_the_program(how):
    def loader():
        raise RuntimeError(f"DataLoader worker (pid 1) {how}")
        yield

    with pytest.raises(SystemExit) as stopped:
        list(data.from_workers(loader()))
    assert stopped.value.code == 2


def test_files_that_somebody_put_into_a_mini_corpus_are_kept(tmp_path, monkeypatch):
    sizes = {"dev": (2, 1, 1), "test": (2, 1, 1)}
    make_corpora.make_corpus("vox", tmp_path, sizes)
    (tmp_path / "VoxCeleb2/notes.txt").write_text("mine")
    monkeypatch.setattr(make_corpora, "maker_of", lambda sizes: "another")
    make_corpora.make_corpus("vox", tmp_path, sizes)
    assert not (tmp_path / "VoxCeleb2/notes.txt").exists()
    assert (tmp_path / "VoxCeleb2.before-1/notes.txt").read_text() == "mine"


def test_a_corpus_that_somebody_put_there_is_never_replaced(tmp_path):
    (tmp_path / "VoxCeleb2").mkdir()
    (tmp_path / "VoxCeleb2/vox2_meta.csv").write_text("mine")
    make_corpora.make_corpus("vox", tmp_path)
    assert [path.name for path in (tmp_path / "VoxCeleb2").iterdir()] == ["vox2_meta.csv"]


def test_an_archive_that_was_cut_off_is_not_unpacked(tmp_path, capsys):
    (tmp_path / "test-clean.tar.gz").write_bytes(b"half of it")
    with pytest.raises(SystemExit):
        readers.download("test-clean", tmp_path)
    assert "test-clean.tar.gz" in capsys.readouterr().err
    assert not (tmp_path / "LibriSpeech").exists()
