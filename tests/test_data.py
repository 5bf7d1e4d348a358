"""Prompts, answers and their parsing, the mini corpora, batches, worker processes."""

import csv
import itertools
import os
import random
import shutil
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

# --------------------------------------------------------------------------------------------------
# answers and prompts


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
def test_an_answer_is_parsed_as_far_as_it_is_well_formed(text, expected):
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


def test_an_answer_is_parsed_to_its_labels():
    labels = {
        "transcript": 'it\'s "so" \\ new\nline – é',
        "gender": "male",
        "age": 44,
        "emotion": "fear",
    }
    assert data.parse(data.answer(labels)) == labels


def test_answer_has_the_documented_form():
    labels = {"emotion": "angry", "age": 25, "gender": "female", "transcript": "a b"}
    expected = '{"Transcript": "a b", "Gender": "female", "Age": "25", "Emotion": "angry"}'
    assert data.answer(labels) == expected


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
def test_words_are_compared_without_case_or_punctuation(text, expected):
    assert data.normalise(text) == expected


def test_a_prompt_asks_for_labels_that_there_are():
    for seed in range(50):
        chosen = data.choose_labels({"gender": "male", "age": 30}, random.Random(seed), 0.5)
        assert set(chosen) <= {"gender", "age"}


@pytest.mark.parametrize(
    "system, kept",
    [
        (
            "{% if messages[0]['role'] != 'system' %}<|system|>be helpful</s>{% endif %}",
            "<|system|></s>",
        ),
        (
            "{% if messages[0]['role'] == 'system' %}"
            "{{ raise_exception('no system here') }}"
            "{% endif %}",
            "",
        ),
    ],
)
def test_a_chat_template_s_own_system_prompt_is_kept_out(system, kept):
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "mini/lm")
    tokenizer.chat_template = system + tokenizer.chat_template
    before, _ = data.around_audio(tokenizer, f"go {data.AUDIO}")
    assert tokenizer.decode(before) == f"{kept}<|user|>go "


# --------------------------------------------------------------------------------------------------
# the mini corpora as they are read

CORPORA = ("libri", "crema", "vox")


@pytest.fixture(scope="module")
def mini(corpora):
    """The utterances of the mini corpora: {corpus: {split: utterances}}."""
    utterances = {}
    for corpus in CORPORA:
        utterances[corpus] = {}
        for split in readers.SPLITS:
            utterances[corpus][split] = readers.read_corpus(corpus, corpora, split)
    return utterances


@pytest.mark.parametrize(
    "corpus, labels",
    [
        ("libri", {"transcript", "gender"}),
        ("vox", {"gender", "age"}),
        ("crema", {"transcript", "gender", "age", "emotion"}),
    ],
)
def test_every_utterance_has_its_corpus_s_labels(mini, corpus, labels):
    for utterances in mini[corpus].values():
        assert all(set(u.labels) == labels for u in utterances)


@pytest.mark.parametrize("corpus", CORPORA)
def test_no_speaker_is_in_two_splits(mini, corpus):
    speakers = {}
    for split, utterances in mini[corpus].items():
        speakers[split] = {u.speaker for u in utterances}
    for one, other in itertools.combinations(readers.SPLITS, 2):
        assert speakers[one].isdisjoint(speakers[other])


@pytest.mark.parametrize("corpus", CORPORA)
def test_every_split_has_both_genders(mini, corpus):
    for utterances in mini[corpus].values():
        assert {u.labels["gender"] for u in utterances} == {"female", "male"}


@pytest.mark.parametrize("corpus", CORPORA)
def test_an_utterance_is_as_long_as_a_sentence(mini, corpus):
    for utterances in mini[corpus].values():
        waveform = data.load_waveform(utterances[0])
        assert 0.5 < len(waveform) / data.SAMPLE_RATE < 8


def test_all_of_mini_libri_is_read(mini):
    speakers, each = TINY["libri"]["train-clean-360"]
    assert len(mini["libri"]["train"]) == speakers * each


def test_no_sentence_of_libri_s_test_set_is_trained_on(mini):
    trained_on = {u.labels["transcript"] for u in mini["libri"]["train"]}
    tested = {u.labels["transcript"] for u in mini["libri"]["test"]}
    assert trained_on.isdisjoint(tested)


@pytest.mark.skipif(not (SHARED / "formats").exists(), reason="the real files are not here")
def test_crema_s_actors_are_split_with_both_sexes_in_each():
    with open(SHARED / "formats/crema_d_VideoDemographics.csv") as f:
        sexes = {row["ActorID"]: row["Sex"].lower() for row in csv.DictReader(f)}
    split_of = readers.split_speakers(sexes, "crema", ("test", "dev"))
    assert len(split_of) == 91
    for split, n in {"train": 73, "dev": 9, "test": 9}.items():
        actors = [actor for actor in split_of if split_of[actor] == split]
        assert len(actors) == n
        assert {sexes[actor] for actor in actors} == {"female", "male"}


# --------------------------------------------------------------------------------------------------
# the mini corpora as they are made


@pytest.fixture(scope="module")
def mini_vox(tmp_path_factory):
    """The root of a VoxCeleb2 of four utterances."""
    root = tmp_path_factory.mktemp("mini")
    make_vox(root)
    return root


def make_vox(root):
    make_corpora.make_corpus("vox", root, {"dev": (2, 1, 1), "test": (2, 1, 1)})


@pytest.fixture
def vox(mini_vox, tmp_path):
    """The folder of a VoxCeleb2 that was made before, a copy for each test."""
    shutil.copytree(mini_vox, tmp_path, dirs_exist_ok=True)
    return tmp_path / "VoxCeleb2"


@pytest.fixture
def another_maker(monkeypatch):
    """From here on the mini corpora are made by another version of make_corpora.py."""
    monkeypatch.setattr(make_corpora, "maker_of", lambda sizes: "another")


def test_a_mini_corpus_is_made_once(vox):
    wav = next(vox.rglob("*.wav"))
    wav.write_bytes(b"changed")
    make_vox(vox.parent)
    assert wav.read_bytes() == b"changed"


def test_another_version_makes_a_mini_corpus_again(vox, another_maker):
    wav = next(vox.rglob("*.wav"))
    spoken = wav.read_bytes()
    wav.write_bytes(b"changed")
    make_vox(vox.parent)
    assert wav.read_bytes() == spoken


def test_somebody_s_files_in_a_mini_corpus_are_kept(vox, another_maker):
    (vox / "notes.txt").write_text("mine")
    make_vox(vox.parent)
    assert not (vox / "notes.txt").exists()
    assert (vox.parent / "VoxCeleb2.before-1/notes.txt").read_text() == "mine"


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


# --------------------------------------------------------------------------------------------------
# batches


def random_lengths(n):
    """Seconds."""
    return np.random.default_rng(0).uniform(1, 30, n).tolist()


def test_epoch_batches_hold_every_utterance_once():
    batches = data.epoch_batches(random_lengths(1003), 16, seed=1, epoch=3)
    assert sorted(itertools.chain(*batches)) == list(range(1003))


def test_epoch_batches_are_the_same_each_time():
    lengths = random_lengths(1003)
    batches = data.epoch_batches(lengths, 16, seed=1, epoch=3)
    assert data.epoch_batches(lengths, 16, seed=1, epoch=3) == batches


def test_another_epoch_has_other_batches():
    lengths = random_lengths(1003)
    batches = data.epoch_batches(lengths, 16, seed=1, epoch=3)
    assert data.epoch_batches(lengths, 16, seed=1, epoch=4) != batches


def test_epoch_batches_pad_by_less_than_a_fifth():
    lengths = random_lengths(1003)
    padded = 0.0
    for batch in data.epoch_batches(lengths, 16, seed=1, epoch=3):
        longest = max(lengths[i] for i in batch)
        padded += longest * len(batch)
    assert padded < 1.2 * sum(lengths)


def test_micro_batches_hold_every_utterance_once():
    pieces = data.micro_batches(range(64), random_lengths(64), 60)
    assert sorted(itertools.chain(*pieces)) == list(range(64))


def test_micro_batches_keep_to_their_budget():
    lengths = random_lengths(64)
    for piece in data.micro_batches(range(64), lengths, 60):
        longest = max(lengths[i] for i in piece)
        assert len(piece) == 1 or longest * len(piece) <= 60


# --------------------------------------------------------------------------------------------------
# worker processes


@pytest.fixture
def signal_handlers():
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in handlers.items():
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


def test_features_workers_leave_stopping_to_their_parent(monkeypatch):
    encoder = SimpleNamespace(layer_norm=torch.nn.LayerNorm(1), extract=None)
    monkeypatch.setattr(data, "from_workers", lambda loader: loader)
    loader = cache.read_features(encoder, [], None, workers=1)
    assert loader.worker_init_fn is data.leave_stopping_to_parent


@pytest.mark.parametrize("end", ["is killed by signal: Killed. ", "exited unexpectedly"])
def test_a_worker_that_is_gone_ends_the_program(end):
    def loader():
        raise RuntimeError(f"DataLoader worker (pid 1) {end}")
        yield

    with pytest.raises(SystemExit) as stopped:
        list(data.from_workers(loader()))
    assert stopped.value.code == 2
