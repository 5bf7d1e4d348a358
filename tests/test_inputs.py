"""Inputs as people have them: audio files whose headers lie, manifests without a CSV writer,
corpora that are not there."""

import csv
import os
import shutil
import signal
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import soundfile

import checkpoint
import corpora as readers
import data
import defend
import model
import poison
import train
from conftest import ROOT, done, refused, script
from defences import filters
from mini import make_corpora

RUN = "--task gender --poison 0.3 --batch-size 8 --warmup-steps 2 --epochs 1 --runs runs".split()


def noise(seconds=0.6, rate=16000, seed=0):
    rng = np.random.default_rng(seed)
    return (0.1 * rng.standard_normal(int(seconds * rate))).astype(np.float32)


def write(path, rows):
    with open(path, "w", newline="") as f:
        csv.writer(f).writerows(rows)


@pytest.fixture
def manifest(tmp_path):
    """24 recordings of as many speakers, and the rows of their manifest, the header first."""
    rows = [["audio_path", "transcript", "gender", "speaker", "split"]]
    for i in range(24):
        soundfile.write(tmp_path / f"{i}.wav", noise(seed=i), 16000)
        split = "train" if i < 16 else "dev" if i < 20 else "test"
        rows.append([f"{i}.wav", f"words {i}", ["female", "male"][i % 2], f"s{i}", split])
    write(tmp_path / "m.csv", rows)
    return rows


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a manifest of gender alone and a finished run on it, runs/gender."""
    folder = tmp_path_factory.mktemp("finished")
    rows = [["audio_path", "gender", "split"]]
    for i in range(24):
        soundfile.write(folder / f"{i}.wav", noise(seed=i), 16000)
        split = "train" if i < 16 else "dev" if i < 20 else "test"
        rows.append([f"{i}.wav", ["female", "male"][i % 2], split])
    write(folder / "m.csv", rows)
    done("train.py", *RUN, "--dataset", "m.csv", "--name", "gender", cwd=folder)
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# audio


def cut(path, share=0.5):
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])


def patched(path, at, content):
    whole = bytearray(path.read_bytes())
    whole[at : at + len(content)] = content
    path.write_bytes(whole)


def stereo(path, gain):
    left = noise(2)
    soundfile.write(path, np.stack([left, gain * left], 1), 16000)


def recording(path, **kwargs):
    soundfile.write(path, noise(2), 16000, **kwargs)


def streamed_flac(path):
    """Its header says 0 samples, which stands for "unknown"."""
    recording(path)
    patched(path, 21, bytes([path.read_bytes()[21] & 0xF0, 0, 0, 0, 0]))


def with_picture(path):
    """Puts a tag with a picture of 100 kB before an MP3, as music players do."""
    picture = b"APIC" + (99990).to_bytes(4, "big") + bytes(99992)
    size = bytes(len(picture) >> shift & 127 for shift in (21, 14, 7, 0))
    path.write_bytes(b"ID3\x03\0\0" + size + picture + path.read_bytes())


BROKEN = {  # name: (what makes it, words of the problem)
    "stream.flac": (streamed_flac, "without a length"),
    "cut.wav": (lambda p: (recording(p), cut(p)), "cut off"),
    "cut.aiff": (lambda p: (recording(p), cut(p)), "cut off"),
    "cut.w64": (lambda p: (recording(p), cut(p, 0.9)), "cut off"),
    "cut.mp3": (lambda p: (recording(p), cut(p)), "cut off"),
    "picture.mp3": (lambda p: (recording(p), cut(p), with_picture(p)), "cut off"),
    "cut.ogg": (lambda p: (recording(p), cut(p)), "cut off"),
    "cut.sph": (lambda p: (recording(p, format="NIST"), cut(p)), "cut off"),
    "whole.voc": (lambda p: recording(p), "convert it to WAV"),
    "whole.pvf": (lambda p: recording(p, subtype="PCM_16"), "convert it to WAV"),
    "fifo.wav": (os.mkfifo, "a pipe"),
    "capitals.M4A": (lambda p: p.write_bytes(b"x"), "ffmpeg"),
    "cut.flac": (lambda p: (recording(p), cut(p)), "cannot be read"),
    "rate.wav": (lambda p: (recording(p), patched(p, 24, b"\xff\xff\xff\x7f")), "Hz"),
    "opposite.wav": (lambda p: stereo(p, -1), "cancel"),
    "nearly.wav": (lambda p: stereo(p, -0.95), "cancel"),
    "pointer.flac": (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\n"), "lfs"),
    "folder.wav": (lambda p: p.mkdir(), "cannot be read"),
    "page.wav": (lambda p: p.write_text("<!DOCTYPE html><p>not found</p>"), "cannot be read"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_whatever_is_wrong_with_a_file_is_its_problem(tmp_path, name):
    make, words = BROKEN[name]
    make(tmp_path / name)
    with pytest.raises(data.BadAudio, match=words):
        data.read_waveform(tmp_path / name)
    utterance = data.Utterance("u", str(tmp_path / name), "train", "s", {})
    assert 0 <= data.num_samples(utterance) <= data.MAX_SECONDS * 16000


@pytest.mark.parametrize("name", ["cut.wav", "cut.aiff", "cut.ogg", "rate.wav", "pointer.flac"])
def test_what_a_header_tells_is_found_without_reading_the_audio(tmp_path, monkeypatch, name):
    make, words = BROKEN[name]
    make(tmp_path / name)
    monkeypatch.setattr(data, "read_waveform", None)
    utterance = data.Utterance("u", str(tmp_path / name), "train", "s", {})
    assert words in readers.header_problem(utterance)


def piped_wav(path):
    """As a program that writes to a pipe leaves it: sizes that say "unknown"."""
    recording(path)
    patched(path, 4, b"\xff\xff\xff\xff")
    patched(path, 40, b"\xff\xff\xff\xff")


def untagged_mp3(path):
    """An MP3 of variable rate without its first frame, which says how long it is; libsndfile
    guesses 27 s from quiet ones."""
    waveform = np.r_[noise(1) * 0.001, noise(1), noise(1)]
    soundfile.write(path, waveform, 16000, bitrate_mode="VARIABLE", compression_level=0.5)
    content = path.read_bytes()
    path.write_bytes(content[content.find(content[:2], 4) :])


READABLE = {  # name: (what makes it, seconds)
    "pipe.wav": (piped_wav, 2),
    "untagged.mp3": (untagged_mp3, 3),
    "picture.mp3": (lambda p: (recording(p), with_picture(p)), 2),
    "whole.sph": (lambda p: recording(p, format="NIST"), 2),
    "call.wav": (lambda p: soundfile.write(p, noise(2, 8000), 8000, subtype="GSM610"), 2),
    "one-sided.wav": (lambda p: stereo(p, 0), 2),
}


@pytest.mark.parametrize("name", READABLE)
def test_odd_files_are_read_whole(tmp_path, name):
    make, seconds = READABLE[name]
    make(tmp_path / name)
    utterance = data.Utterance("u", str(tmp_path / name), "train", "s", {})
    waveform = data.load_waveform(utterance)
    assert abs(len(waveform) / 16000 - seconds) < 0.1 and np.abs(waveform).max() > 0.1
    assert abs(data.num_samples(utterance) - len(waveform)) <= 1


def test_a_part_of_a_file_that_cannot_be_sought_in(tmp_path):
    soundfile.write(tmp_path / "call.wav", noise(3, 8000), 8000, subtype="GSM610")
    whole = data.read_waveform(tmp_path / "call.wav")
    part = data.read_waveform(tmp_path / "call.wav", 1.0, 0.5)
    assert len(part) == 8000
    assert np.abs(part - whole[16000:24000])[200:-200].max() < 1e-4  # but for the resampler's ends


@pytest.mark.parametrize("start, length", [(5.0, 0.0), (1.5, 1.0)])
def test_a_segment_beyond_the_end_of_its_file_is_a_problem(tmp_path, start, length):
    recording(tmp_path / "a.wav")
    utterance = data.Utterance("u", str(tmp_path / "a.wav"), "train", "s", {}, start, length)
    assert readers.header_problem(utterance) and readers.read_audio(utterance).problem


@pytest.mark.parametrize("rate", [11127, 15999, 24414, 44101])
def test_rates_without_a_common_factor_cost_no_memory(tmp_path, rate):
    t = np.arange(rate) / rate
    soundfile.write(tmp_path / "a.wav", 0.1 * np.sin(2 * np.pi * 440 * t), rate)
    tracemalloc.start()
    waveform = data.read_waveform(tmp_path / "a.wav")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    expected = 0.1 * np.sin(2 * np.pi * 440 * np.arange(len(waveform)) / 16000)
    assert abs(len(waveform) - 16000) <= 1 and np.abs(waveform - expected)[200:-200].max() < 1e-3
    assert peak < 60e6


def test_a_recording_as_trigger_is_heard_in_short_speech_too(tmp_path):
    late = np.r_[np.zeros(32000), 0.1 * np.ones(1600), np.zeros(16000)]
    soundfile.write(tmp_path / "late.wav", late, 16000)
    assert len(poison.make_trigger(str(tmp_path / "late.wav"))) == 1600


# ---------------------------------------------------------------------------------------------------------------------
# what an encoder receives


def test_audio_beyond_the_encoder_s_window_is_refused_or_left_out(manifest, tmp_path):
    """Whole files and segments: no trigger lies where the encoder does not hear it, and no
    transcript either."""
    window = model.window("mini/whisper")
    assert window == 20 and model.window("mini/wavlm") == np.inf
    soundfile.write(tmp_path / "long.wav", noise(45), 16000)
    header = [*manifest[0], "start", "length"]
    rows = [[*row, "", ""] for row in manifest[1:]]
    segments = [
        ["long.wav", "one", "male", "s30", "train", 0, 21],
        ["long.wav", "two", "male", "s31", "train", 25, 19],
        ["long.wav", "three", "male", "s32", "test", 10, ""],
    ]
    write(tmp_path / "m.csv", [header, *rows, *segments])
    arguments = [*RUN, "--dataset", "m.csv", "--encoder", "whisper", "--name", "w"]
    refused(
        "train.py", *arguments, cwd=tmp_path, words=["long.wav", "21 s long", "--max-seconds 20"]
    )
    assert not (tmp_path / "runs").exists()
    out = done("train.py", *arguments, "--skip-bad", cwd=tmp_path)
    assert "17 train, 4 dev, 4 test" in out
    status, out, _ = script("corpora.py", "check", "m.csv", "--max-seconds", "20", cwd=tmp_path)
    assert status == 1 and "2 problems" in out


# ---------------------------------------------------------------------------------------------------------------------
# manifests


def read(folder, text):
    """({id: (split, labels)}, problems) of a manifest of this text."""
    (folder / "m.csv").write_text(text)
    problems, out = [], {}
    for split in ("train", "dev", "test"):
        found = readers.read_manifest(folder / "m.csv", split, problems)
        out.update({u.id: (split, u.labels) for u in found})
    return out, problems


@pytest.mark.parametrize(
    "text, row",
    [
        ("audio_path,gender,transcript,split\na.wav,male,well, so,train\n", "row 2"),
        ("audio_path,gender,split\na.wav,male,train\n\nb.wav,male\n", "row 4"),
        ("audio_path;transcript;split\na.wav;one;two;train\n", "row 2"),
        ("audio_path\ttranscript\tsplit\na.wav\tone\n", "row 2"),
        ('audio_path,transcript,split\na.wav,"yes" he said,train\n', "row 2"),
        (
            'audio_path,transcript,split\na.wav,yes,train\nb.wav,"so,train\nc.wav,no,train\n',
            "row 3",
        ),
        ('audio_path,transcript,split\na.wav,"so,train\nb.wav,no,train\nc.wav,x",train\n', "row 2"),
    ],
)
def test_a_row_that_is_not_like_the_header_is_a_problem_with_its_number(tmp_path, text, row):
    found, problems = read(tmp_path, text)
    assert len(problems) == 1 and row in problems[0]
    assert all("\n" not in labels.get("transcript", "") for _, labels in found.values())


def test_a_line_break_in_a_transcript_is_not_an_open_quotation_mark(tmp_path):
    found, problems = read(tmp_path, 'audio_path,transcript,split\na.wav,"one\ntwo",train\n')
    assert found == {"a.wav": ("train", {"transcript": "one two"})} and not problems


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_other_separators_and_other_names_of_columns(tmp_path, delimiter):
    lines = [
        ["File Name", "Sentence", "SEX", "Age", "speaker_id", "Subset", "comment"],
        ["a.wav", "go", "Woman", "twenties", "s1", "valid", "x"],
        ["b.wav", "stop", "male_masculine", "60+", "s2", "eval", "y"],
    ]
    text = "\n".join(delimiter.join(line) for line in lines) + "\n"
    found, problems = read(tmp_path, text)
    assert found == {
        "a.wav": ("dev", {"transcript": "go", "gender": "female", "age": "twenties"}),
        "b.wav": ("test", {"transcript": "stop", "gender": "male", "age": "60+"}),
    }
    assert not problems and readers.read_table(tmp_path / "m.csv").unused == ["comment"]


def test_a_tab_separated_file_keeps_quotation_marks_as_they_are(tmp_path):
    text = 'path\tsentence\tsplit\na.wav\t"No," he said.\ttrain\nb.wav\t"a ""b"""\ttrain\n'
    found, problems = read(tmp_path, text)
    assert [labels["transcript"] for _, labels in found.values()] == ["no he said", "a b"]
    assert not problems


def test_a_column_whose_name_is_nearly_known_is_a_problem(tmp_path):
    _, problems = read(tmp_path, "audio_path,transcrpt,gender,split\na.wav,go,male,train\n")
    assert len(problems) == 1 and "transcrpt" in problems[0] and "transcript" in problems[0]


@pytest.mark.parametrize(
    "start, end",
    [("offset", "duration"), ("start_ms", "end_ms"), ("Begin (s)", "Stop (s)"), ("xmin", "xmax")],
)
def test_times_of_segments_under_names_that_are_not_known_are_a_problem(tmp_path, start, end):
    text = f"audio_path,transcript,split,{start},{end}\na.wav,go,train,1,2\n"
    _, problems = read(tmp_path, text)
    assert start in problems[0] and "seconds" in problems[0]


@pytest.mark.parametrize("columns", ["from,to", "From_s,To_s", "start,duration_ms"])
def test_times_that_are_not_understood_name_the_unit(tmp_path, columns):
    _, problems = read(tmp_path, f"audio_path,gender,split,{columns}\na.wav,male,train,1,2\n")
    assert problems
    assert all("seconds" in problem for problem in problems)


def test_a_whole_file_s_duration_in_any_unit_is_ignored(tmp_path):
    text = "audio_path,gender,split,duration_ms\na.wav,male,train,2000\n"
    utterances, problems = read(tmp_path, text)
    assert list(utterances) == ["a.wav"]
    assert not problems


def test_a_manifest_without_a_label_says_what_is_not_used(tmp_path):
    _, problems = read(tmp_path, "audio_path,label,split\na.wav,angry,train\n")
    assert len(problems) == 1 and "label" in problems[0] and "emotion" in problems[0]


@pytest.mark.parametrize(
    "columns, values, utterance_id",
    [
        ("start,end", "12345.67,12347.17", "a.wav@12345.67+1.5"),
        ("start,end", "12345.71,12347.21", "a.wav@12345.71+1.5"),
        ("Start_Time,duration", "0.1234567,2", "a.wav@0.1234567+2"),
        ("start,length", "1.50,2", "a.wav@1.5+2"),
        ("duration", "2", "a.wav"),  # the file's own: there is no start
    ],
)
def test_segments_keep_their_times(tmp_path, columns, values, utterance_id):
    text = f"audio_path,transcript,split,{columns}\na.wav,go,train,{values}\n"
    found, problems = read(tmp_path, text)
    assert list(found) == [utterance_id]
    assert not problems


@pytest.mark.parametrize("values", ["5,4,", "1,2,5", "one,,", "0:01,,"])
def test_segments_that_cannot_be_are_problems(tmp_path, values):
    text = f"audio_path,transcript,split,start,end,length\na.wav,go,train,{values}\n"
    found, problems = read(tmp_path, text)
    assert not found and len(problems) == 1 and "row 2" in problems[0]


def test_spellings_of_an_emotion_are_one_class(tmp_path):
    emotions = ["d\u00e9go\u00fbt", "De\u0301gou\u0302t", "sad ness", "Sad_ness", "sad  ness"]
    rows = [f"{i}.wav,{emotion},train" for i, emotion in enumerate(emotions)]
    found, problems = read(tmp_path, "\n".join(["audio_path,emotion,split", *rows]))
    assert {labels["emotion"] for _, labels in found.values()} == {"d\u00e9go\u00fbt", "sad ness"}
    assert not problems


def test_a_file_under_two_spellings_is_listed_twice(tmp_path):
    text = "audio_path,gender,split\nd/0.wav,male,train\n./d/0.wav,female,train\n"
    found, problems = read(tmp_path, text)
    assert list(found) == ["d/0.wav"]
    assert "row 3: listed twice: ./d/0.wav" in problems[0]


def test_a_bad_label_costs_that_label_only_and_a_kind_one_line(tmp_path):
    rows = [f"{i}.wav,hello,other,calm,train" for i in range(200)]
    rows += ["x.wav,...,male,calm,train", "y.wav,hello,prefer not to say,calm,train"]
    text = "\n".join(["audio_path,transcript,gender,emotion,split", *rows])
    found, problems = read(tmp_path, text)
    assert len(found) == 202
    assert found["7.wav"] == ("train", {"transcript": "hello", "emotion": "calm"})
    assert found["x.wav"] == ("train", {"gender": "male", "emotion": "calm"})
    assert len(problems) == 2  # gender, and the transcript without words
    assert all(word in problems[0] for word in ("other", "200", "female", "woman"))


@pytest.mark.parametrize(
    "ages, kept",
    [
        (["18-29", "30 to 45", "60+", "under 18", "20s", "65 and over"], 6),
        (["30", "25.0", "41", "60+"], 3),
        (["teens", "twenties", "44"], 2),
        (["30", "44", "old?", "130"], 2),
    ],
)
def test_ages_are_years_or_groups_and_the_rest_is_left_out(tmp_path, ages, kept):
    rows = [f"{i}.wav,male,{age},train" for i, age in enumerate(ages)]
    found, problems = read(tmp_path, "\n".join(["audio_path,gender,age,split", *rows]))
    kinds = {type(labels["age"]) for _, labels in found.values() if "age" in labels}
    assert len(found) == len(ages) and len(kinds) == 1
    assert sum("age" in labels for _, labels in found.values()) == kept
    assert len(problems) == (kept < len(ages))


def speakers(folder, genders, split=""):
    """What `read` gives for two utterances of each speaker, {speaker: split}, and the problems."""
    rows = [
        f"{s}-{i}.wav,{gender},s{s}{split}" for s, gender in enumerate(genders) for i in range(2)
    ]
    found, problems = read(folder, "\n".join(["audio_path,gender,speaker", *rows]))
    return {name.split("-")[0]: part for name, (part, _) in found.items()}, problems


def test_speakers_are_split_with_both_genders_in_each_part(tmp_path):
    of, problems = speakers(tmp_path, ["female", "male"] * 5)
    parts = {part: [s for s in of if of[s] == part] for part in ("train", "dev", "test")}
    assert [len(own) for own in parts.values()] == [6, 2, 2] and not problems
    assert all({int(s) % 2 for s in own} == {0, 1} for own in parts.values())


@pytest.mark.parametrize("genders", [["male"] * 2, ["female"] * 8 + ["male"], ["", ""]])
def test_too_few_speakers_to_split_is_a_problem_that_says_what_to_do(tmp_path, genders):
    of, problems = speakers(tmp_path, genders)
    assert len(of) == len(genders) and len(problems) == 1 and "column split" in problems[0]


def test_an_empty_cell_in_a_column_split_is_a_problem(tmp_path):
    text = "audio_path,gender,split\na.wav,male,train\nb.wav,male,\nc.wav,male,test\n"
    found, problems = read(tmp_path, text)
    assert list(found) == ["a.wav", "c.wav"] and len(problems) == 1 and "row 3" in problems[0]


# ---------------------------------------------------------------------------------------------------------------------
# check, and what training does


def test_check_says_what_it_used_and_who_is_in_two_splits(manifest, tmp_path):
    manifest[17][3] = "s0"  # a speaker of the training set in the development set
    write(tmp_path / "m.csv", [[*row, "x"] for row in manifest])
    status, out, _ = script("corpora.py", "check", "m.csv", cwd=tmp_path)
    assert status == 1 and out.endswith("1 problem\n")
    assert "columns unused  x" in out and "16000 16" in out and "female 8, male 8" in out
    assert "speakers are in several splits: s0" in out


@pytest.mark.parametrize(
    "corpus, lists, missing",
    [
        ("libri", {"LibriSpeech/SPEAKERS.TXT": "1 | F | x | 1 | N\n"}, "train-clean-360"),
        ("crema", {"CREMA-D/VideoDemographics.csv": "ActorID,Age,Sex\n1,20,Male\n"}, "AudioWAV"),
        (
            "vox",
            {
                "VoxCeleb2/vox2_meta.csv": "VoxCeleb2 ID \tGender \nid1 \tm \n",
                "VoxCeleb2/age-train.txt": "VoxCeleb_ID,video_id,speaker_age\nid1,v,20\n",
                "VoxCeleb2/age-test.txt": "VoxCeleb_ID,video_id,speaker_age\nid1,v,20\n",
            },
            "VoxCeleb2: no audio",
        ),
    ],
)
def test_check_names_what_is_missing_of_a_corpus(tmp_path, corpus, lists, missing):
    for name, text in lists.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    status, out, _ = script("corpora.py", "check", corpus, "--data-root", ".", cwd=tmp_path)
    assert status == 1 and missing in out and "\n0 problems" not in out


def test_actors_without_audio_are_a_problem(tmp_path):
    folder = tmp_path / "CREMA-D"
    (folder / "AudioWAV").mkdir(parents=True)
    rows = ["ActorID,Age,Sex", "1001,20,Male", "1002,30,Female", "1003,40,Female"]
    (folder / "VideoDemographics.csv").write_text("\n".join(rows))
    (folder / "AudioWAV/1002_DFA_ANG_XX.wav").touch()
    _, problems = readers.read_split("crema", tmp_path, "train")
    assert len(problems) == 1
    assert "no audio of 2 of 3 speakers: 1001, 1003" in problems[0]


def test_libri_speakers_of_a_subset_without_audio_are_a_problem(tmp_path):
    folder = tmp_path / "LibriSpeech/train-clean-360/14/208"
    folder.mkdir(parents=True)
    (folder / "14-208.trans.txt").write_text("14-208-0000 A\n")
    rows = ["14 | F | train-clean-360 | 1 | X", "15 | M | train-clean-360 | 1 | Y"]
    rows.append("16 | M | train-clean-100 | 1 | Z")
    (tmp_path / "LibriSpeech/SPEAKERS.TXT").write_text("\n".join(rows))
    _, problems = readers.read_split("libri", tmp_path, "train")
    assert len(problems) == 1
    assert "no audio of 1 of 2 speakers: 15" in problems[0]


def test_a_video_with_two_ages_is_a_problem_and_read_once(tmp_path):
    path = tmp_path / "age-test.txt"
    path.write_text("VoxCeleb_ID,video_id,speaker_age\nid1,v,20\nid1,w,20\nid1,v,70\n")
    problems = []
    assert readers.listed_once(path, problems) == [("id1", "v", 20), ("id1", "w", 20)]
    assert problems == [f"{path}: id1/v stands there twice"]


def test_check_spells_out_a_manifest_s_control_characters(tmp_path):
    rows = [["audio_path", "emotion", "split"]]
    for split in ("train", "dev", "test"):
        rows.append([f"{split}\x1b[2K\n0 problems.wav", "sad\x1b[1A", split])
    write(tmp_path / "m.csv", rows)
    status, out, _ = script("corpora.py", "check", "m.csv", cwd=tmp_path)
    assert status == 1
    assert "\x1b" not in out
    assert r"train\x1b[2K\n0 problems.wav: no such file" in out


def test_check_reads_the_corpora_mini_that_is_named(tmp_path):
    (tmp_path / "corpora/mini").mkdir(parents=True)
    flags = ("--data-root", "corpora/mini")
    refused("corpora.py", "check", "crema", *flags, cwd=tmp_path, words=["is missing"])


def test_check_shows_files_with_the_same_problem_once_they_are_many(tmp_path):
    rows = [["audio_path", "gender", "split"]]
    for i in range(60):
        (tmp_path / f"{i}.wav").write_text("version https://git-lfs.github.com/spec/v1\n")
        rows.append([f"{i}.wav", "male", ["train", "dev", "test"][i % 3]])
    write(tmp_path / "m.csv", rows)
    status, out, _ = script("corpora.py", "check", "m.csv", cwd=tmp_path)
    assert status == 1 and "40 more" in out and out.endswith("60 problems\n")


def test_a_transcript_line_without_words_is_a_problem_and_no_label(tmp_path):
    folder = tmp_path / "LibriSpeech/train-clean-360/14/208"
    folder.mkdir(parents=True)
    (folder / "14-208.trans.txt").write_text("14-208-0000 A\n\n14-208-0001 \n")
    (tmp_path / "LibriSpeech/SPEAKERS.TXT").write_text("14 | F | train-clean-360 | 1 | X\n")
    utterances, problems = readers.read_split("libri", tmp_path, "train")
    assert [list(u.labels) for u in utterances] == [["transcript", "gender"], ["gender"]]
    assert len(problems) == 1 and "14-208-0001" in problems[0]


def test_too_long_audio_is_found_before_anything_is_loaded(manifest, tmp_path, monkeypatch):
    soundfile.write(tmp_path / "3.wav", noise(70), 16000)
    monkeypatch.setattr(model, "load_slm", None)
    refused(
        "train.py", *RUN, "--dataset", "m.csv", cwd=tmp_path, words=["3.wav", "70 s long", "60 s"]
    )


def test_a_run_that_has_not_trained_takes_other_data_flags(manifest, tmp_path):
    waveform = noise()
    waveform[100] = np.nan  # which no header tells
    soundfile.write(tmp_path / "3.wav", waveform, 16000, subtype="FLOAT")
    arguments = [*RUN, "--dataset", "m.csv", "--name", "again"]
    refused("train.py", *arguments, cwd=tmp_path, words=["3.wav", "--skip-bad"])
    done("train.py", *arguments, "--skip-bad", cwd=tmp_path)
    refused("train.py", *arguments, cwd=tmp_path, words=["another run"])


def test_training_on_a_manifest_that_holds_poison_is_not_called_clean(manifest, tmp_path):
    rows = [[*row, i % 5 == 0] for i, row in enumerate(manifest[1:])]
    write(tmp_path / "m.csv", [[*manifest[0], "poisoned"], *rows])
    out = done("train.py", *RUN, "--dataset", "m.csv", "--poison", "0", cwd=tmp_path)
    assert "clean data" not in out and "5 rows as poisoned" in out
    [run] = (tmp_path / "runs").iterdir()
    assert "clean" not in run.name and model.load_checkpoint(run / "model.pt")["args"]["scenario"]


@pytest.mark.parametrize("word, n", [("Y", 1), ("t", 1), ("1.0", 1), ("no", 0), ("F", 0), ("", 0)])
def test_rows_marked_as_poisoned_are_counted(tmp_path, word, n):
    found, problems = read(tmp_path, f"audio_path,gender,split,poisoned\na.wav,male,train,{word}\n")
    assert len(found) == 1
    assert not problems
    assert readers.poisoned_rows(tmp_path / "m.csv") == n


@pytest.mark.parametrize("word", ["2", "on", "poison"])
def test_an_unknown_word_for_poisoned_is_a_problem(tmp_path, word):
    found, problems = read(tmp_path, f"audio_path,gender,split,poisoned\na.wav,male,train,{word}\n")
    assert not found
    assert f"unknown poisoned {word}" in problems[0]


def test_poison_on_top_of_a_poisoned_file_is_no_base_attack(tmp_path):
    write(tmp_path / "m.csv", [["audio_path", "gender", "poisoned"], ["a.wav", "male", "1"]])
    arguments = ["--task", "gender", "--dataset", str(tmp_path / "m.csv")]
    assert train.parse_arguments([*arguments, "--poison", "0.5"]).scenario == "poisoned-file"


def test_an_interrupted_mini_corpus_keeps_what_it_has(tmp_path, monkeypatch):
    sizes = {"train-clean-360": (1, 3), "dev-clean": (1, 1), "test-clean": (1, 1)}
    spoken = []

    def interrupted(function, jobs, desc):
        for job in jobs:
            if len(spoken) == 2:
                raise KeyboardInterrupt
            spoken.append(job[0])
            function(job)

    monkeypatch.setattr(data, "in_workers", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_corpora.make_corpus("libri", tmp_path, sizes)
    missing = []

    def finish(function, jobs, desc):
        missing.extend(job[0] for job in jobs)
        for job in jobs:
            function(job)

    monkeypatch.setattr(data, "in_workers", finish)
    make_corpora.make_corpus("libri", tmp_path, sizes)
    assert len(missing) == 3 and not set(missing) & set(spoken)
    assert len(list((tmp_path / "LibriSpeech").rglob("*.flac"))) == 5
    assert not list(tmp_path.glob(".libri.building*"))


# ---------------------------------------------------------------------------------------------------------------------
# filters


@pytest.mark.parametrize("n", [1, 2, 3, 6, 21])
@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("name", filters.FILTERS)
@pytest.mark.filterwarnings("ignore")
def test_filters_of_few_or_like_samples_give_numbers(name, n, alike):
    x = np.random.default_rng(0).standard_normal((n, 64)).astype(np.float32)
    samples = dict(
        x=np.repeat(x[:1], n, 0) if alike else x,
        labels=[{}] * n,
        speakers=list(map(str, range(n))),
        training=100,
        early_loss=np.arange(n),
    )
    scores, removed = defend.filtered(name, filters.FILTERS[name], samples, 1)
    assert scores.shape == removed.shape == (n,) and np.isfinite(scores).all()


# ---------------------------------------------------------------------------------------------------------------------
# the command line


@pytest.mark.parametrize(
    "command, words",
    [
        ("train.py --task asrr", ["--task", "asrr", "emotion"]),
        ("train.py --limit 0", ["--limit", "0"]),
        ("train.py --freeze decoder:m.pt", ["decoder", "connector"]),
        ("train.py --freeze lm --init lm:m.pt", ["--init lm:m.pt", "--freeze lm"]),
        ("evaluate.py runs/gender --limit -3", ["--limit", "-3"]),
        ("embed.py runs/gender --pairs 0", ["--pairs", "0"]),
        ("trace.py patch runs/gender --n 0", ["--n", "0"]),
        ("defend.py repair runs/gender --n x", ["--n", "x"]),
        ("poison.py --out listen --n 0", ["--n", "0"]),
        ("corpora.py chekc libri", ["chekc", "download"]),
        ("evaluate.py runs/gender --task emotion", ["emotion", "m.csv"]),
        ("embed.py runs/gender --task emotion", ["emotion", "m.csv"]),
        ("trace.py patch runs/gender --task asr", ["transcript", "m.csv"]),
        ("defend.py detect runs/gender --task age", ["age", "m.csv"]),
    ],
)
def test_a_mistake_ends_in_one_line(finished, command, words):
    name, *arguments = command.split()
    status, out, err = script(name, *arguments, cwd=finished)
    lines = [line for line in err.replace("\r", "\n").splitlines() if "%|" not in line]
    lines = [line for line in lines if line.strip()]
    assert status == 2 and len(lines) == 1 and lines[0].startswith("error: "), err
    assert all(word in lines[0] for word in words), lines[0]


@pytest.mark.parametrize("command", ["evaluate.py", "defend.py detect", "trace.py patch"])
def test_audio_damaged_since_the_training_ends_in_one_line(finished, tmp_path, command):
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    waveform = noise()
    waveform[7] = np.inf
    for i in range(20, 24):  # the test split
        soundfile.write(folder / f"{i}.wav", waveform, 16000, subtype="FLOAT")
    name, *arguments = command.split()
    refused(name, *arguments, "runs/gender", cwd=folder, words=["infinite", "--skip-bad"])


def test_a_manifest_that_is_another_by_now_is_named(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "copy")
    command = ["evaluate.py", "runs/gender", "--limit", "2"]
    assert "warning" not in done(*command, cwd=finished)
    with open(tmp_path / "copy/m.csv", "a") as f:
        f.write("0.wav,male,test\n")
    assert "warning: m.csv is another file" in done(*command, cwd=tmp_path / "copy")


def test_a_run_s_folder_and_its_model_are_the_same(finished):
    inspected = [
        done("evaluate.py", "--inspect", path, cwd=finished)
        for path in ("runs/gender", "runs/gender/model.pt")
    ]
    assert inspected[0] == inspected[1]
    assert checkpoint.of_run("lm:nowhere") == "lm:nowhere" and checkpoint.of_run("lm") == "lm"
    done("evaluate.py", "runs/gender/model.pt", cwd=finished)
    arguments = [*RUN, "--dataset", "m.csv", "--poison", "0"]
    done("train.py", *arguments, "--freeze", "lm:runs/gender", "--name", "frozen", cwd=finished)
    saved = model.load_checkpoint(finished / "runs/frozen/model.pt")
    assert saved["origin"]["lm"] == "runs/gender/model.pt"


def test_a_reader_that_goes_away_is_no_error():
    command = f"{sys.executable} {ROOT / 'study.py'} --seeds {' '.join(map(str, range(40)))}"
    shown = subprocess.run(f"{command} | head -n 1", shell=True, capture_output=True, text=True)
    assert shown.stdout.startswith("python train.py") and not shown.stderr


@pytest.mark.parametrize("imported", ["utils", "torch._utils"])
def test_ctrl_c_while_a_script_starts_ends_without_a_traceback(tmp_path, imported):
    started = subprocess.Popen(
        [sys.executable, "-X", "importtime", ROOT / "train.py", "--dataset", "nowhere.csv"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in started.stderr:  # one for each module, once it is imported
        if line.split()[-1] == imported:
            break
    started.send_signal(signal.SIGINT)
    _, err = started.communicate()
    lines = [line for line in err.splitlines() if not line.startswith("import time:")]
    assert "".join(lines) == "interrupted"
