"""A user's own data in the forms of forms.py: what is read from each, and what is refused."""

import json
import os

import numpy as np
import pytest
import soundfile

import checkpoint
import corpora as readers
import evaluate
import train
from conftest import arguments, done, refused, script
from study import run_name

RUN = "--task gender --poison 0.5 --batch-size 4 --warmup-steps 2 --epochs 1 --name r".split()


def noise(path, seconds=0.5, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = 0.1 * np.random.default_rng(seed).standard_normal(int(16000 * seconds))
    soundfile.write(path, samples, 16000)


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def read(path):
    """({split: utterances}, problems) of a user's own data."""
    problems = []
    parts = {}
    for split in readers.SPLITS:
        parts[split] = readers.read_manifest(path, split, problems)
    return parts, problems


def only(utterances):
    """An utterance that is alone, and whose audio can be read."""
    [utterance] = utterances
    assert not readers.read_audio(utterance).problem
    return utterance


# --------------------------------------------------------------------------------------------------
# a NeMo manifest

NEMO = dict(audio_filepath="a.wav", duration=1.5, text="Good morning.", speaker=7, split="train")


def test_a_nemo_manifest_is_read(tmp_path):
    noise(tmp_path / "a.wav", 1.5)
    row = dict(NEMO, gender="female", age=31, emotion="calm", lang=["en"])
    write(tmp_path / "m.json", json.dumps(row))
    parts, problems = read(tmp_path / "m.json")
    utterance = only(parts["train"])
    expected = dict(transcript="good morning", gender="female", age=31, emotion="calm")
    assert utterance.labels == expected
    assert utterance.speaker == "7"
    assert (utterance.start, utterance.length) == (0, 0)
    assert not problems


def test_an_offset_and_a_duration_are_a_segment(tmp_path):
    noise(tmp_path / "a.wav", 4)
    write(tmp_path / "m.jsonl", json.dumps(dict(NEMO, offset=2)))
    parts, _ = read(tmp_path / "m.jsonl")
    utterance = only(parts["train"])
    assert (utterance.start, utterance.length) == (2, 1.5)


def test_lines_that_are_no_objects_are_problems(tmp_path):
    write(tmp_path / "m.json", json.dumps(NEMO), "[1]", "{", json.dumps(dict(NEMO, text=None)))
    _, problems = read(tmp_path / "m.json")
    assert any("rows 2, 3: no JSON object" in problem for problem in problems)


@pytest.mark.parametrize("text", ["[", '{"text": "no audio"}', "a,b", ""])
def test_a_json_file_that_is_no_manifest_is_refused(tmp_path, capsys, text):
    write(tmp_path / "m.json", text)
    with pytest.raises(SystemExit):
        read(tmp_path / "m.json")
    assert "m.json" in capsys.readouterr().err


def test_half_of_a_surrogate_pair_can_be_written(tmp_path):
    write(tmp_path / "m.json", r'{"audio_filepath": "a", "split": "dev", "speaker": "\ud800"}')
    parts, _ = read(tmp_path / "m.json")
    parts["dev"][0].speaker.encode()


# --------------------------------------------------------------------------------------------------
# a Hugging Face audiofolder


@pytest.mark.parametrize("folder", ["", "data/"])
def test_an_audiofolder_with_one_list_is_read(tmp_path, folder):
    noise(tmp_path / folder / "a.wav")
    lines = [
        "file_name,transcription,gender,speaker_id,split",
        f"{folder}a.wav,Yes,M,s1,validation",
    ]
    write(tmp_path / "metadata.csv", *lines)
    parts, problems = read(tmp_path)
    utterance = only(parts["dev"])
    assert utterance.labels == dict(transcript="yes", gender="male")
    assert utterance.speaker == "s1"
    assert not problems


def write_split_folders(folder):
    for name in ("train", "validation", "test"):
        noise(folder / name / "a.wav")
        write(folder / name / "metadata.jsonl", json.dumps(dict(file_name="a.wav", text=name)))


def test_an_audiofolder_s_folders_are_its_splits(tmp_path):
    write_split_folders(tmp_path)
    parts, problems = read(tmp_path)
    transcripts = {split: only(parts[split]).labels["transcript"] for split in parts}
    assert transcripts == {"train": "train", "dev": "validation", "test": "test"}
    assert not problems


def test_the_folder_of_a_file_is_its_split(tmp_path):
    write(tmp_path / "metadata.csv", "file_name,gender", "test/a.wav,male", "train/b.wav,female")
    parts, _ = read(tmp_path)
    assert [u.id for u in parts["train"]] == ["train/b.wav"]
    assert [u.id for u in parts["test"]] == ["test/a.wav"]


def test_a_fault_in_a_folder_names_its_list_and_line(tmp_path):
    write_split_folders(tmp_path)
    write(tmp_path / "test/metadata.jsonl", json.dumps(dict(file_name="a.wav", gender="mail")))
    _, problems = read(tmp_path)
    assert any("test/metadata.jsonl:1" in problem for problem in problems)


def test_metadata_without_file_name_is_refused(tmp_path, capsys):
    write(tmp_path / "metadata.csv", "path,text", "a.wav,yes")
    with pytest.raises(SystemExit):
        read(tmp_path)
    assert "file_name" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# a Kaldi data folder


def write_kaldi(folder, wav="call1 call1.wav"):
    noise(folder / "call1.wav", 3)
    write(folder / "wav.scp", wav)
    write(folder / "text", "call1 GOOD MORNING")
    write(folder / "utt2spk", "call1 ann")
    write(folder / "spk2gender", "ann f")


def all_of(parts):
    return parts["train"] + parts["dev"] + parts["test"]


def test_a_kaldi_folder_is_read(tmp_path):
    write_kaldi(tmp_path)
    parts, _ = read(tmp_path)
    utterance = only(all_of(parts))
    assert utterance.labels == dict(transcript="good morning", gender="female")
    assert utterance.speaker == "ann"


def test_kaldi_s_segments_are_utterances(tmp_path):
    write_kaldi(tmp_path)
    write(tmp_path / "segments", "u1 call1 0.5 1.25", "u2 call1 2 -1", "u3 call2 0 1", "u4 call1")
    write(tmp_path / "text", "u1 yes", "u2 no", "u5 lost")
    write(tmp_path / "utt2spk", "u1 ann", "u2 ann")
    parts, problems = read(tmp_path)
    u1, u2 = sorted(all_of(parts), key=lambda u: u.start)
    assert (u1.start, u1.length, u1.labels["transcript"]) == (0.5, 0.75, "yes")
    assert (u2.start, u2.length, u2.labels["transcript"]) == (2, 0, "no")
    for place in ("row u3", "row u4", "row u5"):
        assert any(place in problem for problem in problems)


def test_kaldi_s_folders_are_its_splits(tmp_path):
    for name in ("train", "dev", "test"):
        write_kaldi(tmp_path / name)
    parts, problems = read(tmp_path)
    assert [only(parts[split]).id for split in parts] == [f"{s}/call1.wav" for s in parts]
    assert not problems


def test_kaldi_s_paths_may_start_where_the_command_runs(tmp_path, monkeypatch):
    write_kaldi(tmp_path / "data", "call1 wavs/a.wav")
    noise(tmp_path / "wavs/a.wav")
    monkeypatch.chdir(tmp_path)
    parts, _ = read("data")
    only(all_of(parts))


def test_audio_that_a_command_makes_is_refused(tmp_path):
    write_kaldi(tmp_path / "d", "call1 sph2pipe -f wav call1.sph |")
    words = ["wav.scp", "call1", "write the audio out first"]
    refused("corpora.py", "check", "d", cwd=tmp_path, words=words)


# --------------------------------------------------------------------------------------------------
# a Common Voice release

COMMON_VOICE = "client_id\tpath\tsentence_id\tsentence\tup_votes\tage\tgender\taccents\tsegment"


def write_common_voice(folder, *names):
    for i, name in enumerate(names):
        noise(folder / f"clips/{i}.mp3")
        row = f'{i:0128x}\t{i}.mp3\tx\t"""Yes"" she said.\t2\ttwenties\tmale_masculine\t\t'
        write(folder / f"{name}.tsv", COMMON_VOICE, row)


def test_a_common_voice_release_is_read(tmp_path):
    write_common_voice(tmp_path, "validated")
    parts, _ = read(tmp_path)
    utterance = only(all_of(parts))
    assert utterance.labels == dict(transcript="yes she said", gender="male", age="twenties")
    assert utterance.speaker == f"{0:0128x}"
    assert utterance.id == "clips/0.mp3"


def test_common_voice_s_own_splits_are_used(tmp_path):
    write_common_voice(tmp_path, "train", "dev", "test", "validated")
    parts, problems = read(tmp_path)
    assert [only(parts[split]).id for split in parts] == [f"clips/{i}.mp3" for i in range(3)]
    assert not problems


def test_one_of_common_voice_s_lists_is_read(tmp_path):
    write_common_voice(tmp_path, "train", "dev", "test", "validated")
    parts, _ = read(tmp_path / "validated.tsv")
    assert only(all_of(parts)).id == "clips/3.mp3"


def test_a_gender_that_is_no_label_is_none(tmp_path):
    write_common_voice(tmp_path, "validated")
    path = tmp_path / "validated.tsv"
    path.write_text(path.read_text().replace("male_masculine", "non-binary"))
    parts, problems = read(tmp_path)
    assert "gender" not in only(all_of(parts)).labels
    assert not any("unknown gender" in problem for problem in problems)


def test_a_release_without_a_known_list_is_refused(tmp_path):
    write_common_voice(tmp_path / "cv", "other")
    refused("corpora.py", "check", "cv", cwd=tmp_path, words=["validated.tsv", "wav.scp"])


# --------------------------------------------------------------------------------------------------
# a folder, as far as the commands know it by its name


@pytest.fixture
def audiofolder(tmp_path):
    """data/, 16 recordings in three splits, one more of 8 s for training; some are poisoned."""
    rows = ["file_name,gender,poisoned"]
    for i, split in enumerate(["train"] * 10 + ["dev"] * 3 + ["test"] * 3):
        noise(tmp_path / f"data/{split}/{i}.wav", 0.4, seed=i)
        rows.append(f"{split}/{i}.wav,{('female', 'male')[i % 2]},{int(i < 2)}")
    noise(tmp_path / "data/train/long.wav", 8, seed=99)
    write(tmp_path / "data/metadata.csv", *rows, "train/long.wav,male,0")
    return tmp_path


def test_training_leaves_out_what_is_too_long(audiofolder):
    command = ["train.py", *RUN, "--dataset", "data", "--max-seconds", "5"]
    out = done(*command, cwd=audiofolder)
    assert "left out 1 of 11 recordings longer than 5 s" in out
    assert "10 train, 3 dev, 3 test" in out
    assert "marks 2 rows as poisoned" in out


def test_check_lists_what_is_too_long(audiofolder):
    command = ["corpora.py", "check", "data", "--max-seconds", "5"]
    status, out, _ = script(*command, cwd=audiofolder)
    assert status == 1
    assert "long.wav: 8 s long" in out
    assert "audiofolder: data/metadata.csv" in out


def test_a_run_records_the_lists_of_a_folder(audiofolder, monkeypatch):
    monkeypatch.chdir(audiofolder)
    args = train.parse_arguments([*RUN, "--dataset", "data"])
    record = checkpoint.open_run(audiofolder / "runs/r", args)
    sha256 = checkpoint.file_sha256("data/metadata.csv")
    assert record["inputs"]["data/metadata.csv"] == sha256


@pytest.mark.parametrize("dataset, name", [("a/data/", "data"), ("data", "data"), (".", "here")])
def test_a_run_is_called_by_its_folder(tmp_path, monkeypatch, dataset, name):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert f"gender-{name}-" in run_name(arguments("gender", "clean", dataset=dataset))


def test_a_folder_that_is_none_of_the_forms_is_refused(tmp_path):
    (tmp_path / "train").mkdir()
    words = ["wav.scp", "metadata.csv", "validated.tsv"]
    refused("train.py", *RUN, "--dataset", ".", cwd=tmp_path, words=words)
    assert os.listdir(tmp_path) == ["train"]


# --------------------------------------------------------------------------------------------------
# what a model has not learned


def unlearned(task, true, answered):
    """What evaluate.py says of answers to a task with these true labels."""
    label = evaluate.TASKS[task]["label"]
    rows = []
    for value, answer in zip(true, answered):
        parsed = {label: answer} if answer is not None else {}
        row = dict(asked=[label], labels={label: value}, parsed=parsed, triggered=False)
        rows.append(dict(row, speaker="", raw="x"))
    return evaluate.unlearned(evaluate.Evaluation(dict(clean=evaluate.scores(rows)), rows))


UNLEARNED = [  # (task, true labels, answers)
    ("asr", ["good morning", "yes"], ["so", "yes"]),
    ("gender", ["male", "male", "female"], ["male", "male", "male"]),
    ("emotion", ["sad", "sad", "angry"], ["angry", None, "angry"]),
    ("age", [20, 30, 70], [30, 30, 30]),
    ("age", [20, 30, 70], [None, None, None]),
    ("age", ["twenties", "senior"], ["senior", "senior"]),
]
LEARNED = [
    ("asr", ["good morning", "yes"], ["good morning", "no"]),
    ("gender", ["male", "male", "female"], ["male", "male", "female"]),
    ("gender", ["male", "male"], ["male", "male"]),
    ("age", [20, 30, 70], [20, 30, 40]),
]


@pytest.mark.parametrize("task, true, answered", UNLEARNED)
def test_a_label_that_is_not_learned_is_named(task, true, answered):
    [text] = unlearned(task, true, answered)
    assert evaluate.TASKS[task]["label"] in text


@pytest.mark.parametrize("task, true, answered", LEARNED)
def test_a_label_that_is_learned_is_not_named(task, true, answered):
    assert unlearned(task, true, answered) == []
