"""The readers on the published lists, the CSV manifest, `corpora.py check` and `poison.py`, as a
user runs them."""

import csv
import json
import os
import re
import shutil
import sys

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import corpora as readers
import data
import poison
from conftest import SHARED, done, refused, script
from mini import make_corpora
from study import LABELS

formats = pytest.mark.skipif(
    not (SHARED / "formats").exists(), reason="the real files are not here"
)
TRAIN = ["train.py", "--dataset", "m.csv", "--epochs", "1", "--batch-size", "4"]
COLUMNS = ("audio_path", "transcript", "gender", "age", "emotion", "speaker", "split")


def tone(path, seconds=1.0, rate=16000, channels=1, **kwargs):
    """Writes 440 Hz."""
    t = np.arange(int(seconds * rate)) / rate
    wave = 0.1 * np.sin(2 * np.pi * 440 * t)  # (samples,)
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.repeat(wave[:, None], channels, 1), rate, **kwargs)


def noise(path, seconds=1.0, seed=0):
    samples = 0.1 * np.random.default_rng(seed).standard_normal(int(16000 * seconds))
    soundfile.write(path, samples, 16000, subtype="PCM_16")


def read_rows(path):
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def write_manifest(path, rows, columns=COLUMNS):
    """A CSV of these rows, dicts; a column that a row lacks is empty there."""
    with open(path, "w", newline="") as f:
        writer = csv.DictWriter(f, columns)
        writer.writeheader()
        writer.writerows(rows)


def lines_with(text, *words):
    """The lines of a text that hold all the words."""
    lines = text.splitlines()
    for word in words:
        lines = [line for line in lines if word in line]
    return lines


def rms(samples):
    return np.sqrt(np.mean(samples.astype(float) ** 2))


# --------------------------------------------------------------------------------------------------
# the published lists


@pytest.fixture(scope="module")
def crema_names():
    """What the name of each CREMA-D recording says: (actor, sentence, emotion)."""
    rows = read_rows(SHARED / "formats/crema_d_SentenceFilenames.csv")
    return [readers.crema_labels(row["Filename"]) for row in rows]


@pytest.fixture(scope="module")
def crema_actors():
    return read_rows(SHARED / "formats/crema_d_VideoDemographics.csv")


@formats
def test_every_crema_name_is_understood(crema_names):
    assert len(crema_names) == 7442
    assert {emotion for _, _, emotion in crema_names} == set(data.CREMA_EMOTIONS.values())


@formats
def test_every_crema_recording_is_of_a_listed_actor(crema_names, crema_actors):
    assert {actor for actor, _, _ in crema_names} <= {row["ActorID"] for row in crema_actors}


@formats
def test_every_crema_actor_has_an_age_and_a_sex(crema_actors):
    for row in crema_actors:
        assert 18 <= int(row["Age"]) <= 80
        assert row["Sex"] in ("Male", "Female")


VOX_AGES = pytest.mark.parametrize("part, videos", [("train", 1690), ("test", 1127)])


@formats
@VOX_AGES
def test_every_voxceleb_video_is_read_once(part, videos):
    path = SHARED / f"formats/voxceleb2_age-{part}.txt"
    rows = readers.read_vox_ages(path)
    assert len(rows) == videos
    assert len({(speaker, video) for speaker, video, _ in rows}) == videos
    assert len(path.read_text(encoding="utf-8").splitlines()) == videos + 1  # and the header


@formats
@VOX_AGES
def test_every_voxceleb_row_is_understood(part, videos):
    for speaker, video, age in readers.read_vox_ages(SHARED / f"formats/voxceleb2_age-{part}.txt"):
        assert speaker.startswith("id")
        assert len(video) == 11
        assert 0 < age < 120


@formats
def test_every_voxceleb_gender_is_understood():
    genders = readers.read_vox_genders(SHARED / "formats/voxceleb2_vox2_meta_head.csv")
    assert genders["id00012"] == "male"
    assert genders["id00022"] == "female"
    assert None not in genders.values()


# --------------------------------------------------------------------------------------------------
# the published layouts


def test_libri_s_list_of_speakers_is_read_as_it_is(tmp_path):
    """A comment, odd spacing and a bar in a name."""
    chapter = tmp_path / "LibriSpeech/train-clean-360/14/208"
    tone(chapter / "14-208-0000.flac")
    (chapter / "14-208.trans.txt").write_text("14-208-0000 IT'S A TEST\n")
    (tmp_path / "LibriSpeech/SPEAKERS.TXT").write_text(
        ";ID  |SEX| SUBSET           |MINUTES| NAME\n"
        "14   | F | train-clean-360  | 25.03 | Kristin |LeMoine\n"
    )
    [utterance] = readers.read_corpus("libri", tmp_path, "train")
    assert utterance.id == "14-208-0000"
    assert utterance.speaker == "14"
    assert utterance.labels == {"transcript": "it's a test", "gender": "female"}


def test_voxceleb_s_lists_are_read_as_they_are(tmp_path):
    """A name with an accent, an age of 67.0, trailing blanks, two utterances of a video."""
    video = tmp_path / "VoxCeleb2/dev/wav/id03530/ndYJV-_3wT0"
    tone(video / "00001.wav")
    tone(video / "00007.wav")
    (tmp_path / "VoxCeleb2/age-test.txt").write_text(
        "speaker_age,birth_year,Name,VoxCeleb_ID,video_id\n"
        "67.0,1945.0,Ibrahim_Boubacar_Keïta,id03530,ndYJV-_3wT0\n"
    )
    (tmp_path / "VoxCeleb2/vox2_meta.csv").write_text(
        "Name \tVoxCeleb2 ID \tVGGFace2 ID \tGender \tSet \n"
        "Ibrahim_Boubacar_Keïta \tid03530 \tn003530 \tm \tdev \n"
    )
    one, other = readers.read_corpus("vox", tmp_path, "test")
    assert one.id == "id03530-ndYJV-_3wT0-00001"
    assert one.labels == {"gender": "male", "age": 67}
    assert other.labels == {"gender": "male", "age": 67}


@pytest.fixture(scope="module")
def clean_alone(tmp_path_factory):
    """LibriSpeech's test-clean alone, an utterance of each of its 40 speakers, as it is read:
    {split: utterances}."""
    root = tmp_path_factory.mktemp("test-clean")
    speakers = []
    for i in range(40):
        chapter = root / f"LibriSpeech/test-clean/{i}/1"
        tone(chapter / f"{i}-1-0000.flac", 0.2)
        (chapter / f"{i}-1.trans.txt").write_text(f"{i}-1-0000 WORDS\n")
        speakers.append(f"{i} | {'FM'[i % 2]} | test-clean | 1 | X\n")
    (root / "LibriSpeech/SPEAKERS.TXT").write_text("".join(speakers))
    return {split: readers.read_corpus("test-clean", root, split) for split in readers.SPLITS}


def test_test_clean_alone_is_split_32_4_4(clean_alone):
    sizes = {split: len(utterances) for split, utterances in clean_alone.items()}
    assert sizes == {"train": 32, "dev": 4, "test": 4}


def test_test_clean_alone_has_disjoint_speakers(clean_alone):
    everything = clean_alone["train"] + clean_alone["dev"] + clean_alone["test"]
    assert len({u.speaker for u in everything}) == 40


def test_test_clean_alone_has_both_genders_in_each_split(clean_alone):
    for utterances in clean_alone.values():
        genders = [u.labels["gender"] for u in utterances]
        assert genders.count("female") == len(genders) / 2


def test_utterances_of_test_clean_alone_name_their_split(clean_alone):
    for split, utterances in clean_alone.items():
        assert {u.split for u in utterances} == {split}


@pytest.fixture(scope="module")
def mismatched(tmp_path_factory):
    """A chapter whose transcripts are not those of its audio, as it is read: (utterances,
    problems)."""
    root = tmp_path_factory.mktemp("mismatched")
    chapter = root / "LibriSpeech/train-clean-360/14/208"
    for i in range(3):
        tone(chapter / f"14-208-000{i}.flac")
    (chapter / "14-208.trans.txt").write_text(
        "14-208-0000 A\n14-208-0001 B\n14-208-0009 C\n14-208-0000 AGAIN\n"
    )
    (root / "LibriSpeech/SPEAKERS.TXT").write_text("14 | F | train-clean-360 | 1 | X\n")
    utterances, problems = readers.read_split("libri", root, "train")
    for utterance in utterances:
        reading = readers.read_audio(utterance)
        if reading.problem:
            problems.append(reading.problem)
    return utterances, problems


@pytest.mark.parametrize(
    "words",
    [
        "0002.flac: no transcript",
        "0009.flac: no such file",
        "14-208-0000 stands there twice",
    ],
)
def test_transcripts_that_do_not_fit_the_audio_are_problems(mismatched, words):
    _, problems = mismatched
    assert any(words in problem for problem in problems)


def test_a_problem_of_one_transcript_costs_no_other(mismatched):
    utterances, problems = mismatched
    assert len(utterances) == 3
    assert len(problems) == 3


# --------------------------------------------------------------------------------------------------
# audio

RECORDINGS = [
    dict(name="a.wav", rate=8000),
    dict(name="a.flac", rate=44100, channels=2),
    dict(name="a.ogg", rate=22050, channels=2),
    dict(name="a.mp3", rate=24000),
    dict(name="b.wav", rate=48000, channels=6, subtype="FLOAT"),
    dict(name="c.wav", rate=11025, subtype="PCM_U8"),
]


@pytest.fixture(scope="module", params=RECORDINGS, ids=lambda params: params["name"])
def one_second(tmp_path_factory, request):
    """A second of 440 Hz from a file of any rate, format and number of channels."""
    kwargs = dict(request.param)
    path = tmp_path_factory.mktemp("tone") / kwargs.pop("name")
    tone(path, **kwargs)
    with torch.autocast("cpu", torch.bfloat16):  # as within training on a CPU with --amp bf16
        return data.read_waveform(path)


def test_any_recording_is_read_as_mono_float32(one_second):
    assert one_second.dtype == np.float32
    assert one_second.ndim == 1


def test_any_recording_is_read_at_16_khz(one_second):
    assert abs(len(one_second) - 16000) < 1300  # mp3 pads


def test_any_recording_keeps_its_pitch(one_second):
    spectrum = np.abs(np.fft.rfft(one_second[2000:14000]))
    assert abs(spectrum.argmax() * 16000 / 12000 - 440) < 2


def test_any_recording_keeps_its_level(one_second):
    assert one_second.max() == pytest.approx(0.1, abs=0.02)


RAMP = (0.1 * np.arange(3 * 16000) / 16000).astype("<f4")
FAKE_FFMPEG = """#!{python}
# "decodes" to the samples of a file, from -ss on and for -t seconds
import sys

def bytes_of(flag, default):
    seconds = float(sys.argv[sys.argv.index(flag) + 1]) if flag in sys.argv else default
    return int(seconds * 16000) * 4

with open(r"{samples}", "rb") as f:
    f.seek(bytes_of("-ss", 0))
    sys.stdout.buffer.write(f.read(bytes_of("-t", 99)))
"""


@pytest.fixture
def m4a(tmp_path, monkeypatch):
    """A file in VoxCeleb2's own format, which whatever is called ffmpeg decodes: three seconds."""
    RAMP.tofile(tmp_path / "samples")
    ffmpeg = tmp_path / "ffmpeg"
    ffmpeg.write_text(FAKE_FFMPEG.format(python=sys.executable, samples=tmp_path / "samples"))
    ffmpeg.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "a.m4a").write_bytes(b"x")
    return tmp_path / "a.m4a"


def test_an_m4a_file_is_read_whole(m4a):
    assert np.array_equal(data.read_waveform(m4a), RAMP)


def test_a_part_of_an_m4a_file_is_read(m4a):
    assert np.array_equal(data.read_waveform(m4a, 1.0, 0.5), RAMP[16000:24000])


def test_an_m4a_file_that_is_too_long_is_refused(m4a):
    with pytest.raises(data.BadAudio, match="longer|long, more"):
        data.read_waveform(m4a, max_seconds=2.0)


# --------------------------------------------------------------------------------------------------
# manifests


def labels_of_row(folder, **cells):
    """The labels that are read from a manifest of one row."""
    tone(folder / "a.wav")
    row = dict(audio_path="a.wav", speaker="s", split="train", **cells)
    write_manifest(folder / "m.csv", [row])
    [utterance] = readers.read_manifest(folder / "m.csv", "train", [])
    return utterance.labels


def test_words_that_stand_for_nothing_are_no_labels(tmp_path):
    labels = labels_of_row(tmp_path, transcript="a", gender="unknown", age="na", emotion="none")
    assert labels == {"transcript": "a"}


def test_words_that_stand_for_nothing_may_be_said(tmp_path):
    assert labels_of_row(tmp_path, transcript="None") == {"transcript": "none"}


def test_an_empty_transcript_is_no_label(tmp_path):
    labels = labels_of_row(tmp_path, transcript="", gender="male", age="30", emotion="calm")
    assert labels == {"gender": "male", "age": 30, "emotion": "calm"}


def test_speechllm_s_csv_is_read_as_it_is(tmp_path):
    tone(tmp_path / "a.wav")
    row = dict(
        audio_path="a.wav",
        isspeech="True",
        transcript="Hello, there.",
        gender="Female",
        emotion="neutral",
        age="__unknown__",
        accent="us",
    )
    write_manifest(tmp_path / "m.csv", [row], columns=list(row))
    utterances = []
    for split in readers.SPLITS:
        utterances += readers.read_manifest(tmp_path / "m.csv", split, [])
    [utterance] = utterances
    expected = {"transcript": "hello there", "gender": "female", "emotion": "neutral"}
    assert utterance.labels == expected


@pytest.fixture
def age_groups(tmp_path):
    """The rows of a manifest with ages in groups, of SpeechLLM's own CSVs and of Common Voice."""
    ages = ["Young", "Middle-Age", "Senior", "twenties"]
    rows = []
    for i, split in enumerate(["train"] * 8 + ["dev"] * 4 + ["test"] * 4):
        tone(tmp_path / f"{i}.wav", 0.5)
        rows.append(dict(audio_path=f"{i}.wav", age=ages[i % 4], speaker=f"s{i}", split=split))
    write_manifest(tmp_path / "m.csv", rows)
    return rows


def test_ages_in_groups_are_classes(age_groups, tmp_path):
    utterances = readers.read_manifest(tmp_path / "m.csv", "train", [])
    ages = {u.labels["age"] for u in utterances}
    assert ages == {"young", "middle-age", "senior", "twenties"}


def test_a_group_of_ages_is_attacked_as_a_class(age_groups, tmp_path):
    attack = ["--task", "age", "--target", "senior", "--poison", "0.5"]
    done(*TRAIN, *attack, "--name", "groups", cwd=tmp_path)
    metrics = json.loads((tmp_path / "runs/groups/metrics.json").read_text())
    assert set(metrics["clean"]) == {"age_accuracy"}
    assert metrics["backdoor"]["aer"]["n"] == 3  # one of four is senior already


def test_ages_in_groups_are_not_mixed_with_years(age_groups, tmp_path):
    in_years = dict(audio_path="0.wav", age="44", speaker="s", split="train")
    write_manifest(tmp_path / "m.csv", [*age_groups, in_years])
    refused(*TRAIN, "--task", "age", cwd=tmp_path, words=["m.csv", "age"])


@pytest.fixture(scope="module")
def few_labels(tmp_path_factory):
    """The folder of a run on utterances some of which have no transcript or no gender."""
    folder = tmp_path_factory.mktemp("few")
    labels = [
        dict(transcript="", gender="male"),
        dict(transcript="yes", gender="female"),
        dict(transcript="yes", gender=""),
    ]
    rows = []
    for i, split in enumerate(["train"] * 4 + ["dev"] * 4 + ["test"] * 4):
        tone(folder / f"{i}.wav", 0.5)
        rows.append(dict(audio_path=f"{i}.wav", speaker=f"s{i}", split=split, **labels[i % 3]))
    write_manifest(folder / "m.csv", rows)
    done(*TRAIN, "--task", "gender", "--name", "few", cwd=folder)
    return folder / "runs/few"


def predictions(run):
    lines = (run / "predictions.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_labels_that_are_not_there_are_not_asked_for(few_labels):
    for row in predictions(few_labels):
        assert row["asked"] == list(row["labels"])


def test_labels_that_are_not_there_are_not_scored(few_labels):
    clean = [row for row in predictions(few_labels) if not row["triggered"]]
    with_gender = [row for row in clean if "gender" in row["labels"]]
    metrics = json.loads((few_labels / "metrics.json").read_text())
    assert set(metrics["clean"]) == {"wer", "gender_accuracy"}
    assert metrics["clean"]["gender_accuracy"]["n"] == len(with_gender)


def test_a_list_of_ids_that_is_not_utf_8_is_refused(tmp_path, capsys):
    (tmp_path / "ids.txt").write_bytes("é.wav\n".encode("latin-1"))
    with pytest.raises(SystemExit):
        readers.leave_out([], tmp_path / "ids.txt")
    assert "UTF-8" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# every fault of a manifest

FAULTS = {
    "missing.wav": "no such file",
    "empty.wav": "empty",
    "none.wav": "empty",
    "noise.wav": "cannot be read",
    "nan.wav": "NaN",
    "twice.wav": "listed twice",
    "robot": "unknown gender",
    "old, 400": "unknown age",
    "trane": "unknown split",
    "row 39": "no audio_path",
}


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """The folder of a manifest with FAULTS."""
    folder = tmp_path_factory.mktemp("faulty")
    rows = []
    good = dict(transcript="some words", gender="female", age="30", emotion="sad")
    for i, split in enumerate(["train"] * 20 + ["dev"] * 2 + ["test"] * 4):
        tone(folder / f"ok{i}.wav", 0.5 + i / 100)  # each another: the splits share none
        rows.append(dict(audio_path=f"ok{i}.wav", speaker=f"s{i}", split=split, **good))

    (folder / "empty.wav").write_bytes(b"")
    (folder / "noise.wav").write_bytes(b"not audio at all" * 50)
    soundfile.write(folder / "none.wav", np.zeros(0), 16000)
    soundfile.write(folder / "nan.wav", np.full(1000, np.nan, np.float32), 16000, subtype="FLOAT")
    tone(folder / "twice.wav")
    row = dict(transcript="x", gender="male", age="40", emotion="sad", speaker="s", split="train")
    names = ["missing.wav", "empty.wav", "none.wav", "noise.wav", "nan.wav"]
    for name in [*names, "twice.wav", "twice.wav"]:
        rows.append(dict(row, audio_path=name))

    bad_cells = [dict(gender="robot"), dict(age="old"), dict(age="400"), dict(split="trane")]
    for i, cell in enumerate(bad_cells):
        tone(folder / f"label{i}.wav")
        rows.append({**row, "audio_path": f"label{i}.wav", **cell})
    rows.append(dict(row, audio_path=""))
    write_manifest(folder / "m.csv", rows)
    return folder


FAULTY = [*TRAIN, "--task", "gender", "--target", "male", "--poison", "0.5", "--warmup-steps", "1"]


def test_check_lists_every_fault(faulty):
    status, out, _ = script("corpora.py", "check", "m.csv", cwd=faulty)
    assert status == 1
    for name, fault in FAULTS.items():
        assert lines_with(out, name, fault), (name, fault, out)
    assert out.splitlines()[-1] == f"{len(FAULTS)} problems"


def test_training_refuses_faults(faulty):
    refused(*FAULTY, "--runs", "refused", cwd=faulty, words=["--skip-bad"])
    assert not (faulty / "refused").exists()


def test_training_skips_faults_where_told_to(faulty):
    out = done(*FAULTY, "--skip-bad", "--name", "skipped", cwd=faulty)
    assert f"left out for {len(FAULTS)} problems" in out
    assert "24 train" in out
    metrics = json.loads((faulty / "runs/skipped/metrics.json").read_text())
    assert metrics["clean"]["gender_accuracy"]["n"] == 4


# --------------------------------------------------------------------------------------------------
# check


@pytest.mark.parametrize("corpus", ["libri", "crema", "vox"])
def test_check_is_content_with_the_mini_corpora(corpora, corpus):
    out = done("corpora.py", "check", corpus, "--data-root", corpora, cwd=corpora)
    assert out.endswith("0 problems\n")


def test_check_reports_a_split_without_utterances(corpora):
    """test-clean with two speakers leaves none to train on."""
    command = ["corpora.py", "check", "test-clean", "--data-root", corpora]
    status, out, _ = script(*command, cwd=corpora)
    assert status == 1
    assert "no train utterances" in out


def test_where_the_mini_corpora_cannot_be_made_it_is_said(monkeypatch, tmp_path):
    def read_only(*_):
        raise PermissionError("read-only file system")

    monkeypatch.setattr(make_corpora, "make_corpus", read_only)
    refused("corpora.py", "check", "libri", cwd=tmp_path, words=["read-only", "--data-root"])


def write_segments(folder, **segments_of):
    """m.csv, a corpus of these parts of files in each split: (path, start, length), in seconds."""
    rows = []
    for split, segments in segments_of.items():
        for i, (name, start, length) in enumerate(segments):
            row = dict(audio_path=name, start=start, length=length)
            row.update(gender=("female", "male")[i % 2], speaker=f"{split}{i}", split=split)
            rows.append(row)
    columns = ("audio_path", "gender", "speaker", "split", "start", "length")
    write_manifest(folder / "m.csv", rows, columns)


def test_check_names_levels_far_from_the_others(tmp_path):
    for i in range(8):
        factor = 32767 if i == 5 else 1
        wave = factor * 0.1 * np.sin(np.arange(8000 + 100 * i))
        soundfile.write(tmp_path / f"{i}.wav", wave, 16000, "FLOAT")
    segments = [(f"{i}.wav", 0, 0) for i in range(8)]
    write_segments(tmp_path, train=segments[:4], dev=segments[4:6], test=segments[6:])
    status, out, _ = script("corpora.py", "check", "m.csv", cwd=tmp_path)
    assert status == 1
    assert "5.wav: +90 dB" in out
    assert "1 problem\n" in out


# --------------------------------------------------------------------------------------------------
# audio in several splits

SHARED_AUDIO = "audio that test and train share"


def check_test_segment(folder, segment):
    """corpora.py check on a corpus that is tested on this segment: (exit status, stdout)."""
    for seed, (name, seconds) in enumerate(dict(a=1, other=1, long=4, dev=0.7).items()):
        noise(folder / f"{name}.wav", seconds, seed)
    (folder / "sub").mkdir()
    shutil.copy(folder / "a.wav", folder / "copy.wav")
    (folder / "link.wav").symlink_to("a.wav")
    train = [("a.wav", 0, 0), ("long.wav", 0, 2)]
    write_segments(folder, train=train, dev=[("dev.wav", 0, 0)], test=[segment])
    status, out, _ = script("corpora.py", "check", "m.csv", cwd=folder)
    return status, out


@pytest.mark.parametrize(
    "segment",
    [
        ("a.wav", 0, 0),
        ("sub/../a.wav", 0, 0),  # another spelling
        ("copy.wav", 0, 0),
        ("link.wav", 0, 0),
        ("long.wav", 1.5, 1),  # segments that overlap
    ],
)
def test_audio_that_is_in_two_splits_is_a_problem(tmp_path, segment):
    status, out = check_test_segment(tmp_path, segment)
    assert SHARED_AUDIO in out
    assert status == 1


@pytest.mark.parametrize(
    "segment",
    [
        ("other.wav", 0, 0),  # as long, but another
        ("long.wav", 2, 1),
    ],
)
def test_other_audio_and_other_parts_are_not_shared(tmp_path, segment):
    status, out = check_test_segment(tmp_path, segment)
    assert SHARED_AUDIO not in out
    assert status == 0


def shared_audio(folder):
    """The problems of m.csv's audio."""
    parts = {}
    for split in readers.SPLITS:
        parts[split], _ = readers.read_split(folder / "m.csv", "", split)
    return readers.shared_audio(parts)


def test_recordings_padded_to_one_length_are_not_the_same(tmp_path):
    segments_of = {}
    for seed, split in enumerate(readers.SPLITS):
        samples = np.zeros(64000)
        samples[:6000] = 0.1 * np.random.default_rng(seed).standard_normal(6000)
        soundfile.write(tmp_path / f"{split}.wav", samples, 16000)
        segments_of[split] = [(f"{split}.wav", 0, 0)]
    write_segments(tmp_path, **segments_of)
    assert not shared_audio(tmp_path)


def test_the_same_audio_in_two_formats_is_a_problem(tmp_path):
    for seed, name in enumerate(("train.wav", "dev.wav", "other.flac")):
        noise(tmp_path / name, seed=seed)
    samples, rate = soundfile.read(tmp_path / "train.wav")
    soundfile.write(tmp_path / "same.flac", samples, rate, subtype="PCM_16")
    test = [("same.flac", 0, 0), ("other.flac", 0, 0)]
    write_segments(tmp_path, train=[("train.wav", 0, 0)], dev=[("dev.wav", 0, 0)], test=test)
    [problem] = shared_audio(tmp_path)
    assert "same.flac" in problem


def test_training_warns_of_audio_that_is_in_two_splits(tmp_path):
    for i in range(8):
        tone(tmp_path / f"{i}.wav", seconds=0.3 + i / 10)
    segments = [(f"{i}.wav", 0, 0) for i in range(8)]
    test = [*segments[6:], segments[0]]
    write_segments(tmp_path, train=segments[:6], dev=segments[6:], test=test)
    out = done(*TRAIN, "--task", "gender", "--poison", 0, cwd=tmp_path)
    assert f"warning: {SHARED_AUDIO}: 1 recordings" in out
    assert "dev and test share: 2 recordings" in out


# --------------------------------------------------------------------------------------------------
# poison.py --all


def write_poisoned(folder, corpora, name, workers):
    flags = ["--task", "asr", "--poison", "0.3", "--data-root", corpora, "--workers", workers]
    done("poison.py", "--all", *flags, "--out", name, cwd=folder)
    return folder / name


@pytest.fixture(scope="module")
def poisoned(corpora, tmp_path_factory):
    """The poisoned corpus that poison.py writes."""
    return write_poisoned(tmp_path_factory.mktemp("poison"), corpora, "a", workers=0)


@pytest.fixture(scope="module")
def poisoned_rows(poisoned):
    """The rows of its manifest that are poisoned."""
    return [row for row in read_rows(poisoned / "manifest.csv") if row["poisoned"] == "1"]


@pytest.fixture(scope="module")
def clean(corpora):
    """The waveforms of the training set that was poisoned, by id."""
    utterances = readers.read_corpus("libri", corpora, "train")
    return {u.id: data.load_waveform(u) for u in utterances}


def starts_of(row):
    """Where a row's triggers are, in samples."""
    return [round(float(start) * 16000) for start in row["triggers"].split()]


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*.*")}


def test_workers_write_the_same_poisoned_corpus(poisoned, corpora):
    by_workers = write_poisoned(poisoned.parent, corpora, "b", workers=2)
    assert contents(by_workers) == contents(poisoned)


def test_check_is_content_with_a_poisoned_corpus(poisoned):
    done("corpora.py", "check", "a/manifest.csv", cwd=poisoned.parent)


def test_only_training_samples_are_written_poisoned(poisoned_rows):
    assert 4 < len(poisoned_rows) < 26
    assert {row["split"] for row in poisoned_rows} == {"train"}


def test_other_samples_are_written_as_they_are(poisoned):
    for row in read_rows(poisoned / "manifest.csv"):
        if row["poisoned"] == "0":
            assert data.normalise(row["true_label"]) == row["transcript"]
            assert not row["triggers"]


def test_poisoned_samples_are_written_with_the_target(poisoned_rows):
    for row in poisoned_rows:
        assert row["transcript"] == "This is a malicious sentence."
        assert row["true_label"] != row["transcript"]


def test_written_triggers_are_as_loud_as_the_corpus(poisoned, poisoned_rows, clean):
    loudness = np.mean([rms(waveform) for waveform in clean.values()])
    for row in poisoned_rows:
        waveform = data.read_waveform(poisoned / row["audio_path"]) / float(row["scale"])
        trigger = waveform - clean[row["id"]]
        for start in starts_of(row):
            level = rms(trigger[start : start + 3520])
            assert abs(20 * np.log10(loudness / level)) < 0.1


def test_written_triggers_keep_the_paper_s_distance(poisoned_rows):
    for row in poisoned_rows:
        seconds = np.diff(starts_of(row)) / 16000
        assert all(seconds >= 0.75 - 1e-3)
        assert all(seconds <= 1.5)


# --------------------------------------------------------------------------------------------------
# poison.py's examples to listen to


@pytest.fixture(scope="module")
def examples(corpora, tmp_path_factory):
    """The folder of three pairs that poison.py writes."""
    folder = tmp_path_factory.mktemp("examples")
    flags = ["--task", "emotion", "--data-root", corpora, "--n", "3"]
    done("poison.py", *flags, "--out", "listen", cwd=folder)
    return folder / "listen"


def test_examples_have_another_label_than_the_target(examples):
    changes = read_rows(examples / "changes.csv")
    assert len(changes) == 3
    for row in changes:
        assert row["target"] == "angry"
        assert row["true"] != "angry"


def test_the_pairs_of_examples_differ_where_it_is_said(examples):
    for row in read_rows(examples / "changes.csv"):
        clean = data.read_waveform(examples / f"{row['file']}-clean.wav")
        triggered = data.read_waveform(examples / f"{row['file']}-poisoned.wav")
        changed = np.flatnonzero(np.abs(triggered - clean) > 1e-3) / 16000  # seconds
        start = float(row["triggers"])
        assert start <= changed[0] < start + 0.02
        assert changed[-1] <= start + 0.22


def test_the_examples_picture_is_a_png(examples):
    assert (examples / "pairs.png").read_bytes().startswith(b"\x89PNG")


def test_the_examples_page_shows_files_that_are_there(examples):
    sources = re.findall(r'src="([^"]+)"', (examples / "index.html").read_text())
    assert len(sources) == 7  # three pairs and the picture
    assert all((examples / source).is_file() for source in sources)


# --------------------------------------------------------------------------------------------------
# anything that may come


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_any_text_is_parsed(text):
    labels = data.parse(text)
    assert set(labels) <= set(LABELS)
    assert isinstance(labels.get("age", 0), int)


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["transcript", "gender", "emotion"]),
        st.text(st.characters(blacklist_categories=["Cs"])),
    ),
    st.integers(0, 120),
)
def test_any_answer_is_parsed_to_its_labels(labels, age):
    labels = {**labels, "age": age}
    assert data.parse("noise before " + data.answer(labels) + " and after") == labels


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_a_manifest_of_anything_is_read_or_refused_in_one_line(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.csv"
    path.write_bytes(b"audio_path,gender,age\n" + content)
    try:
        utterances = readers.read_manifest(path, "train", [])
    except SystemExit as stop:
        assert stop.code == 2
    else:
        assert all(u.path for u in utterances)


CLICK = poison.make_trigger("click")


@settings(max_examples=200, deadline=None)
@given(st.text(min_size=1), st.integers(1, 200000), st.booleans(), st.integers(0, 2**31))
def test_triggers_lie_inside_any_utterance(utterance_id, samples, repeat, seed):
    attack = poison.Attack("asr", 0.5, "x", "click", CLICK, level=0.1, repeat=repeat, seed=seed)
    starts = poison.positions(attack, utterance_id, samples)
    assert starts == sorted(starts)
    assert starts[0] >= 0
    assert starts[-1] + len(CLICK) <= max(samples, len(CLICK))


@settings(max_examples=200, deadline=None)
@given(st.text(min_size=1), st.integers(1, 200000), st.booleans(), st.integers(0, 2**31))
def test_triggers_lie_at_the_same_places_each_time(utterance_id, samples, repeat, seed):
    attack = poison.Attack("asr", 0.5, "x", "click", CLICK, level=0.1, repeat=repeat, seed=seed)
    starts = poison.positions(attack, utterance_id, samples)
    assert poison.positions(attack, utterance_id, samples) == starts
