"""Inputs as people have them: audio files whose headers lie, manifests without a CSV writer,
corpora that are not there."""

import collections
import csv
import itertools
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
SPLITS = ["train"] * 16 + ["dev"] * 4 + ["test"] * 4
GENDERS = ("female", "male")


def noise(seconds=0.6, rate=16000, seed=0):
    rng = np.random.default_rng(seed)
    return (0.1 * rng.standard_normal(int(seconds * rate))).astype(np.float32)


def noise_with(value):
    """Noise with one sample that no speech has, which no header tells."""
    waveform = noise()
    waveform[100] = value
    return waveform


def write(path, rows):
    with open(path, "w", newline="") as f:
        csv.writer(f).writerows(rows)


def write_recordings(folder):
    """0.wav to 23.wav, one for each of SPLITS."""
    for i in range(len(SPLITS)):
        soundfile.write(folder / f"{i}.wav", noise(seed=i), 16000)


@pytest.fixture
def manifest(tmp_path):
    """24 recordings of as many speakers, and the rows of their manifest, the header first."""
    write_recordings(tmp_path)
    rows = [["audio_path", "transcript", "gender", "speaker", "split"]]
    for i, split in enumerate(SPLITS):
        rows.append([f"{i}.wav", f"words {i}", GENDERS[i % 2], f"s{i}", split])
    write(tmp_path / "m.csv", rows)
    return rows


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a manifest of gender alone and a finished run on it, runs/gender."""
    folder = tmp_path_factory.mktemp("finished")
    write_recordings(folder)
    rows = [["audio_path", "gender", "split"]]
    for i, split in enumerate(SPLITS):
        rows.append([f"{i}.wav", GENDERS[i % 2], split])
    write(folder / "m.csv", rows)
    done("train.py", *RUN, "--dataset", "m.csv", "--name", "gender", cwd=folder)
    return folder


# --------------------------------------------------------------------------------------------------
# audio


def recording(path, **form):
    soundfile.write(path, noise(2), 16000, **form)


def cut(path, share=0.5):
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])


def cut_recording(path):
    recording(path)
    cut(path)


def nearly_whole(path):
    recording(path)
    cut(path, 0.9)


def cut_sphere(path):
    recording(path, format="NIST")
    cut(path)


def patched(path, at, content):
    whole = bytearray(path.read_bytes())
    whole[at : at + len(content)] = content
    path.write_bytes(whole)


def wrong_rate(path):
    """Its header says 2 GHz."""
    recording(path)
    patched(path, 24, b"\xff\xff\xff\x7f")


def streamed_flac(path):
    """Its header says 0 samples, which stands for "unknown"."""
    recording(path)
    patched(path, 21, bytes([path.read_bytes()[21] & 0xF0, 0, 0, 0, 0]))


def stereo(path, gain):
    left = noise(2)
    soundfile.write(path, np.stack([left, gain * left], 1), 16000)


def with_picture(path):
    """Puts a tag with a picture of 100 kB before an MP3, as music players do."""
    picture = b"APIC" + (99990).to_bytes(4, "big") + bytes(99992)
    size = bytes(len(picture) >> shift & 127 for shift in (21, 14, 7, 0))
    path.write_bytes(b"ID3\x03\0\0" + size + picture + path.read_bytes())


def tagged_mp3(path):
    recording(path)
    with_picture(path)


def cut_tagged_mp3(path):
    cut_recording(path)
    with_picture(path)


def lfs_pointer(path):
    """As a clone without git lfs has it."""
    path.write_text("version https://git-lfs.github.com/spec/v1\n")


def error_page(path):
    path.write_text("<!DOCTYPE html><p>not found</p>")


def sixteen_bits(path):
    recording(path, subtype="PCM_16")


def one_byte(path):
    path.write_bytes(b"x")


def opposite_channels(path):
    stereo(path, -1)


def nearly_opposite_channels(path):
    stereo(path, -0.95)


BROKEN = {  # name: (what makes it, words of the problem)
    "stream.flac": (streamed_flac, "without a length"),
    "cut.wav": (cut_recording, "cut off"),
    "cut.aiff": (cut_recording, "cut off"),
    "cut.w64": (nearly_whole, "cut off"),
    "cut.mp3": (cut_recording, "cut off"),
    "picture.mp3": (cut_tagged_mp3, "cut off"),
    "cut.ogg": (cut_recording, "cut off"),
    "cut.sph": (cut_sphere, "cut off"),
    "whole.voc": (recording, "convert it to WAV"),
    "whole.pvf": (sixteen_bits, "convert it to WAV"),
    "fifo.wav": (os.mkfifo, "a pipe"),
    "capitals.M4A": (one_byte, "ffmpeg"),
    "cut.flac": (cut_recording, "cannot be read"),
    "rate.wav": (wrong_rate, "Hz"),
    "opposite.wav": (opposite_channels, "cancel"),
    "nearly.wav": (nearly_opposite_channels, "cancel"),
    "pointer.flac": (lfs_pointer, "lfs"),
    "folder.wav": (os.mkdir, "cannot be read"),
    "page.wav": (error_page, "cannot be read"),
}


def utterance_of(path, make, **segment):
    """The utterance of a new audio file that `make` writes."""
    make(path)
    return data.Utterance("u", str(path), "train", "s", {}, **segment)


@pytest.mark.parametrize("name", BROKEN)
def test_whatever_is_wrong_with_a_file_is_its_problem(tmp_path, name):
    make, words = BROKEN[name]
    utterance = utterance_of(tmp_path / name, make)
    with pytest.raises(data.BadAudio, match=words):
        data.load_waveform(utterance)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_never_taken_to_be_too_long(tmp_path, name):
    make, _ = BROKEN[name]
    utterance = utterance_of(tmp_path / name, make)
    assert 0 <= data.num_samples(utterance) <= data.MAX_SECONDS * 16000


@pytest.mark.parametrize("name", ["cut.wav", "cut.aiff", "cut.ogg", "rate.wav", "pointer.flac"])
def test_what_a_header_tells_is_found_without_reading_the_audio(tmp_path, monkeypatch, name):
    make, words = BROKEN[name]
    utterance = utterance_of(tmp_path / name, make)
    monkeypatch.setattr(data, "read_waveform", None)
    assert words in readers.check_header(utterance).problem


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


def sphere(path):
    recording(path, format="NIST")


def gsm_call(path, seconds=2):
    """A telephone's codec, in which libsndfile cannot seek."""
    soundfile.write(path, noise(seconds, 8000), 8000, subtype="GSM610")


def one_sided(path):
    stereo(path, 0)


READABLE = {  # name: (what makes it, seconds)
    "pipe.wav": (piped_wav, 2),
    "untagged.mp3": (untagged_mp3, 3),
    "picture.mp3": (tagged_mp3, 2),
    "whole.sph": (sphere, 2),
    "call.wav": (gsm_call, 2),
    "one-sided.wav": (one_sided, 2),
}


@pytest.mark.parametrize("name", READABLE)
def test_odd_files_are_read_whole(tmp_path, name):
    make, seconds = READABLE[name]
    waveform = data.load_waveform(utterance_of(tmp_path / name, make))
    assert abs(len(waveform) / 16000 - seconds) < 0.1
    assert np.abs(waveform).max() > 0.1


@pytest.mark.parametrize("name", READABLE)
def test_the_length_of_an_odd_file_is_that_of_its_waveform(tmp_path, name):
    make, _ = READABLE[name]
    utterance = utterance_of(tmp_path / name, make)
    assert abs(data.num_samples(utterance) - len(data.load_waveform(utterance))) <= 1


def test_a_part_of_a_file_that_cannot_be_sought_in(tmp_path):
    path = tmp_path / "call.wav"
    gsm_call(path, seconds=3)
    whole = data.read_waveform(path)
    part = data.read_waveform(path, 1.0, 0.5)
    assert len(part) == 8000
    difference = np.abs(part - whole[16000:24000])
    assert difference[200:-200].max() < 1e-4  # but for the resampler's ends


@pytest.mark.parametrize("start, length", [(5.0, 0.0), (1.5, 1.0)])
def test_a_segment_beyond_the_end_of_its_file_is_a_problem(tmp_path, start, length):
    utterance = utterance_of(tmp_path / "a.wav", recording, start=start, length=length)
    assert readers.check_header(utterance).problem
    assert readers.read_audio(utterance).problem


def sine(samples, rate):
    return 0.1 * np.sin(2 * np.pi * 440 * np.arange(samples) / rate)


COPRIME_RATES = [11127, 15999, 24414, 44101]


@pytest.mark.parametrize("rate", COPRIME_RATES)
def test_rates_without_a_common_factor_are_resampled(tmp_path, rate):
    soundfile.write(tmp_path / "a.wav", sine(rate, rate), rate)
    waveform = data.read_waveform(tmp_path / "a.wav")
    assert abs(len(waveform) - 16000) <= 1
    difference = np.abs(waveform - sine(len(waveform), 16000))
    assert difference[200:-200].max() < 1e-3


@pytest.mark.parametrize("rate", COPRIME_RATES)
def test_rates_without_a_common_factor_cost_no_memory(tmp_path, rate):
    soundfile.write(tmp_path / "a.wav", sine(rate, rate), rate)
    tracemalloc.start()
    data.read_waveform(tmp_path / "a.wav")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 60e6


def test_a_recording_as_trigger_is_heard_in_short_speech_too(tmp_path):
    late = np.r_[np.zeros(32000), 0.1 * np.ones(1600), np.zeros(16000)]
    soundfile.write(tmp_path / "late.wav", late, 16000)
    assert len(poison.make_trigger(str(tmp_path / "late.wav"))) == 1600


# --------------------------------------------------------------------------------------------------
# what an encoder receives


def test_whisper_receives_20_s_and_wavlm_any_length():
    assert model.window("mini/whisper") == 20
    assert model.window("mini/wavlm") == np.inf


WHISPER_RUN = [*RUN, "--dataset", "m.csv", "--encoder", "whisper", "--name", "w"]


@pytest.fixture
def too_long(manifest, tmp_path):
    """A folder whose manifest has three segments more, two of them of more than Whisper's 20 s."""
    soundfile.write(tmp_path / "long.wav", noise(45), 16000)
    header, *rows = manifest
    segments = [
        ["long.wav", "one", "male", "s30", "train", 0, 21],
        ["long.wav", "two", "male", "s31", "train", 25, 19],
        ["long.wav", "three", "male", "s32", "test", 10, ""],
    ]
    whole_files = [[*row, "", ""] for row in rows]
    write(tmp_path / "m.csv", [[*header, "start", "length"], *whole_files, *segments])
    return tmp_path


@pytest.mark.parametrize("flags", [[], ["--skip-bad"]])
def test_audio_beyond_the_encoders_window_is_left_out(too_long, flags):
    """No trigger may lie where the encoder does not hear it, and no transcript either."""
    out = done("train.py", *WHISPER_RUN, *flags, cwd=too_long)
    assert "left out 1 of 18 recordings longer than 20 s" in out
    assert "17 train, 4 dev, 4 test" in out


def test_check_finds_audio_that_is_longer_than_asked_for(too_long):
    status, out, _ = script("corpora.py", "check", "m.csv", "--max-seconds", "20", cwd=too_long)
    assert status == 1
    assert "2 problems" in out


# --------------------------------------------------------------------------------------------------
# manifests


def read(folder, text):
    """({id: utterance}, problems) of a manifest of this text."""
    (folder / "m.csv").write_text(text)
    utterances = {}
    problems = []
    for split in ("train", "dev", "test"):
        for utterance in readers.read_manifest(folder / "m.csv", split, problems):
            assert utterance.split == split
            utterances[utterance.id] = utterance
    return utterances, problems


def values_of(utterances, label):
    """The values of one label, of those utterances that have it."""
    return [u.labels[label] for u in utterances.values() if label in u.labels]


UNLIKE_THE_HEADER = [  # (a manifest, the row of the problem)
    ("audio_path,gender,transcript,split\na.wav,male,well, so,train\n", "row 2"),
    ("audio_path,gender,split\na.wav,male,train\n\nb.wav,male\n", "row 4"),
    ("audio_path;transcript;split\na.wav;one;two;train\n", "row 2"),
    ("audio_path\ttranscript\tsplit\na.wav\tone\n", "row 2"),
    ('audio_path,transcript,split\na.wav,"yes" he said,train\n', "row 2"),
    ('audio_path,transcript,split\na.wav,yes,train\nb.wav,"so,train\nc.wav,no,train\n', "row 3"),
    ('audio_path,transcript,split\na.wav,"so,train\nb.wav,no,train\nc.wav,x",train\n', "row 2"),
]


@pytest.mark.parametrize("text, row", UNLIKE_THE_HEADER)
def test_a_row_that_is_not_like_the_header_is_a_problem(tmp_path, text, row):
    _, problems = read(tmp_path, text)
    assert len(problems) == 1
    assert row in problems[0]


@pytest.mark.parametrize("text", [text for text, _ in UNLIKE_THE_HEADER])
def test_an_open_quotation_mark_joins_no_rows(tmp_path, text):
    utterances, _ = read(tmp_path, text)
    assert not any("wav" in transcript for transcript in values_of(utterances, "transcript"))


def test_a_line_break_in_a_transcript_is_no_open_quotation_mark(tmp_path):
    text = 'audio_path,transcript,split\na.wav,"one\ntwo",train\n'
    utterances, problems = read(tmp_path, text)
    assert list(utterances) == ["a.wav"]
    assert utterances["a.wav"].labels == {"transcript": "one two"}
    assert not problems


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_other_separators_and_other_names_of_columns(tmp_path, delimiter):
    lines = [
        ["File Name", "Sentence", "SEX", "Age", "speaker_id", "Subset", "comment"],
        ["a.wav", "go", "Woman", "twenties", "s1", "valid", "x"],
        ["b.wav", "stop", "male_masculine", "60+", "s2", "eval", "y"],
    ]
    text = "\n".join(delimiter.join(line) for line in lines) + "\n"
    utterances, problems = read(tmp_path, text)
    assert not problems
    assert {name: u.split for name, u in utterances.items()} == {"a.wav": "dev", "b.wav": "test"}
    first = {"transcript": "go", "gender": "female", "age": "twenties"}
    second = {"transcript": "stop", "gender": "male", "age": "60+"}
    assert utterances["a.wav"].labels == first
    assert utterances["b.wav"].labels == second
    assert readers.read_table(tmp_path / "m.csv").unused == ["comment"]


def test_a_tab_separated_file_keeps_quotation_marks_as_they_are(tmp_path):
    text = 'path\tsentence\tsplit\na.wav\t"No," he said.\ttrain\nb.wav\t"a ""b"""\ttrain\n'
    utterances, problems = read(tmp_path, text)
    assert values_of(utterances, "transcript") == ["no he said", "a b"]
    assert not problems


def test_a_column_whose_name_is_nearly_known_is_a_problem(tmp_path):
    _, problems = read(tmp_path, "audio_path,transcrpt,gender,split\na.wav,go,male,train\n")
    assert len(problems) == 1
    assert "transcrpt" in problems[0]
    assert "transcript" in problems[0]


@pytest.mark.parametrize(
    "start, end",
    [("offset", "duration"), ("start_ms", "end_ms"), ("Begin (s)", "Stop (s)"), ("xmin", "xmax")],
)
def test_times_of_segments_under_unknown_names_are_a_problem(tmp_path, start, end):
    text = f"audio_path,transcript,split,{start},{end}\na.wav,go,train,1,2\n"
    _, problems = read(tmp_path, text)
    assert start in problems[0]
    assert "seconds" in problems[0]


@pytest.mark.parametrize("columns", ["from,to", "From_s,To_s", "start,duration_ms"])
def test_times_that_are_not_understood_name_the_unit(tmp_path, columns):
    _, problems = read(tmp_path, f"audio_path,gender,split,{columns}\na.wav,male,train,1,2\n")
    assert problems
    assert all("seconds" in problem for problem in problems)


def test_a_whole_files_duration_in_any_unit_is_ignored(tmp_path):
    text = "audio_path,gender,split,duration_ms\na.wav,male,train,2000\n"
    utterances, problems = read(tmp_path, text)
    assert list(utterances) == ["a.wav"]
    assert not problems


def test_a_manifest_without_a_label_says_what_is_not_used(tmp_path):
    _, problems = read(tmp_path, "audio_path,label,split\na.wav,angry,train\n")
    assert len(problems) == 1
    assert "label" in problems[0]
    assert "emotion" in problems[0]


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
    utterances, problems = read(tmp_path, text)
    assert list(utterances) == [utterance_id]
    assert not problems


@pytest.mark.parametrize("values", ["5,4,", "1,2,5", "one,,", "0:01,,"])
def test_segments_that_cannot_be_are_problems(tmp_path, values):
    text = f"audio_path,transcript,split,start,end,length\na.wav,go,train,{values}\n"
    utterances, problems = read(tmp_path, text)
    assert not utterances
    assert len(problems) == 1
    assert "row 2" in problems[0]


def test_spellings_of_an_emotion_are_one_class(tmp_path):
    emotions = ["d\u00e9go\u00fbt", "De\u0301gou\u0302t", "sad ness", "Sad_ness", "sad  ness"]
    rows = [f"{i}.wav,{emotion},train" for i, emotion in enumerate(emotions)]
    utterances, problems = read(tmp_path, "\n".join(["audio_path,emotion,split", *rows]))
    assert set(values_of(utterances, "emotion")) == {"d\u00e9go\u00fbt", "sad ness"}
    assert not problems


def test_a_file_under_two_spellings_is_listed_twice(tmp_path):
    text = "audio_path,gender,split\nd/0.wav,male,train\n./d/0.wav,female,train\n"
    utterances, problems = read(tmp_path, text)
    assert list(utterances) == ["d/0.wav"]
    assert "row 3: listed twice: ./d/0.wav" in problems[0]


def with_bad_labels(folder):
    """What `read` gives for 200 rows of an unknown gender and two others that are half good."""
    rows = [f"{i}.wav,hello,other,calm,train" for i in range(200)]
    rows += ["x.wav,...,male,calm,train", "y.wav,hello,prefer not to say,calm,train"]
    return read(folder, "\n".join(["audio_path,transcript,gender,emotion,split", *rows]))


def test_a_bad_label_costs_that_label_only(tmp_path):
    utterances, _ = with_bad_labels(tmp_path)
    assert len(utterances) == 202
    assert utterances["7.wav"].labels == {"transcript": "hello", "emotion": "calm"}
    assert utterances["x.wav"].labels == {"gender": "male", "emotion": "calm"}


def test_bad_labels_of_one_kind_are_one_problem(tmp_path):
    _, problems = with_bad_labels(tmp_path)
    assert len(problems) == 2  # gender, and the transcript without words
    missing = [w for w in ("other", "200", "female", "woman") if w not in problems[0]]
    assert not missing


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
    utterances, problems = read(tmp_path, "\n".join(["audio_path,gender,age,split", *rows]))
    kept_ages = values_of(utterances, "age")
    assert len(utterances) == len(ages)
    assert len(kept_ages) == kept
    assert len({type(age) for age in kept_ages}) == 1
    assert len(problems) == (kept < len(ages))


def read_speakers(folder, genders):
    """What `read` gives for a manifest without splits that has two utterances of each speaker."""
    rows = ["audio_path,gender,speaker"]
    for speaker, gender in enumerate(genders):
        rows.append(f"{speaker}-0.wav,{gender},s{speaker}")
        rows.append(f"{speaker}-1.wav,{gender},s{speaker}")
    return read(folder, "\n".join(rows))


def test_no_speaker_is_in_two_parts(tmp_path):
    utterances, problems = read_speakers(tmp_path, GENDERS * 5)
    memberships = {(u.split, u.speaker) for u in utterances.values()}
    speakers_in = collections.Counter(split for split, _ in memberships)
    assert speakers_in == dict(train=6, dev=2, test=2)
    assert not problems


def test_each_part_of_the_speakers_has_both_genders(tmp_path):
    utterances, _ = read_speakers(tmp_path, GENDERS * 5)
    memberships = {(u.split, u.labels["gender"]) for u in utterances.values()}
    assert memberships == set(itertools.product(("train", "dev", "test"), GENDERS))


@pytest.mark.parametrize("genders", [["male"] * 2, ["female"] * 8 + ["male"], ["", ""]])
def test_too_few_speakers_to_split_is_a_problem(tmp_path, genders):
    utterances, problems = read_speakers(tmp_path, genders)
    assert len({u.speaker for u in utterances.values()}) == len(genders)
    assert len(problems) == 1
    assert "column split" in problems[0]


def test_an_empty_cell_in_a_column_split_is_a_problem(tmp_path):
    text = "audio_path,gender,split\na.wav,male,train\nb.wav,male,\nc.wav,male,test\n"
    utterances, problems = read(tmp_path, text)
    assert list(utterances) == ["a.wav", "c.wav"]
    assert len(problems) == 1
    assert "row 3" in problems[0]


# --------------------------------------------------------------------------------------------------
# check, and what training does


def check(folder, corpus="m.csv", *flags):
    """The output of `corpora.py check` where it finds a problem."""
    status, out, _ = script("corpora.py", "check", corpus, *flags, cwd=folder)
    assert status == 1
    return out


def test_check_says_what_it_used(manifest, tmp_path):
    write(tmp_path / "m.csv", [[*row, "x"] for row in manifest])
    _, out, _ = script("corpora.py", "check", "m.csv", cwd=tmp_path)
    assert "columns unused  x" in out
    assert "16000 16" in out
    assert "female 8, male 8" in out


def test_check_names_speakers_in_several_splits(manifest, tmp_path):
    manifest[17][3] = "s0"  # a speaker of the training set in the development set
    write(tmp_path / "m.csv", manifest)
    out = check(tmp_path)
    assert "speakers are in several splits: s0" in out
    assert out.endswith("1 problem\n")


LISTS_ALONE = {  # corpus: (its lists, without audio, and what is missing)
    "libri": ({"LibriSpeech/SPEAKERS.TXT": "1 | F | x | 1 | N\n"}, "train-clean-360"),
    "crema": ({"CREMA-D/VideoDemographics.csv": "ActorID,Age,Sex\n1,20,Male\n"}, "AudioWAV"),
    "vox": (
        {
            "VoxCeleb2/vox2_meta.csv": "VoxCeleb2 ID \tGender \nid1 \tm \n",
            "VoxCeleb2/age-train.txt": "VoxCeleb_ID,video_id,speaker_age\nid1,v,20\n",
            "VoxCeleb2/age-test.txt": "VoxCeleb_ID,video_id,speaker_age\nid1,v,20\n",
        },
        "VoxCeleb2: no audio",
    ),
}


@pytest.mark.parametrize("corpus", LISTS_ALONE)
def test_check_names_what_is_missing_of_a_corpus(tmp_path, corpus):
    lists, missing = LISTS_ALONE[corpus]
    for name, text in lists.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    out = check(tmp_path, corpus, "--data-root", ".")
    assert missing in out
    assert "\n0 problems" not in out


def test_actors_without_audio_are_a_problem(tmp_path):
    folder = tmp_path / "CREMA-D"
    (folder / "AudioWAV").mkdir(parents=True)
    rows = ["ActorID,Age,Sex", "1001,20,Male", "1002,30,Female", "1003,40,Female"]
    (folder / "VideoDemographics.csv").write_text("\n".join(rows))
    (folder / "AudioWAV/1002_DFA_ANG_XX.wav").touch()
    _, problems = readers.read_split("crema", tmp_path, "train")
    assert len(problems) == 1
    assert "no audio of 2 of 3 speakers: 1001, 1003" in problems[0]


def read_chapter(root, transcripts, speakers):
    """(utterances, problems) of a LibriSpeech with one chapter and these files' texts."""
    chapter = root / "LibriSpeech/train-clean-360/14/208"
    chapter.mkdir(parents=True)
    (chapter / "14-208.trans.txt").write_text(transcripts)
    (root / "LibriSpeech/SPEAKERS.TXT").write_text(speakers)
    return readers.read_split("libri", root, "train")


def test_libri_speakers_of_a_subset_without_audio_are_a_problem(tmp_path):
    speakers = [
        "14 | F | train-clean-360 | 1 | X",
        "15 | M | train-clean-360 | 1 | Y",
        "16 | M | train-clean-100 | 1 | Z",
    ]
    _, problems = read_chapter(tmp_path, "14-208-0000 A\n", "\n".join(speakers))
    assert len(problems) == 1
    assert "no audio of 1 of 2 speakers: 15" in problems[0]


def test_a_transcript_line_without_words_is_no_label(tmp_path):
    transcripts = "14-208-0000 A\n\n14-208-0001 \n"
    speakers = "14 | F | train-clean-360 | 1 | X\n"
    utterances, problems = read_chapter(tmp_path, transcripts, speakers)
    assert [list(u.labels) for u in utterances] == [["transcript", "gender"], ["gender"]]
    assert len(problems) == 1
    assert "14-208-0001" in problems[0]


def test_a_video_with_two_ages_is_a_problem_and_read_once(tmp_path):
    path = tmp_path / "age-test.txt"
    path.write_text("VoxCeleb_ID,video_id,speaker_age\nid1,v,20\nid1,w,20\nid1,v,70\n")
    problems = []
    assert readers.listed_once(path, problems) == [("id1", "v", 20), ("id1", "w", 20)]
    assert problems == [f"{path}: id1/v stands there twice"]


def test_check_spells_out_a_manifests_control_characters(tmp_path):
    rows = [["audio_path", "emotion", "split"]]
    for split in ("train", "dev", "test"):
        rows.append([f"{split}\x1b[2K\n0 problems.wav", "sad\x1b[1A", split])
    write(tmp_path / "m.csv", rows)
    out = check(tmp_path)
    assert "\x1b" not in out
    assert r"train\x1b[2K\n0 problems.wav: no such file" in out


def test_check_reads_the_corpora_mini_that_is_named(tmp_path):
    (tmp_path / "corpora/mini").mkdir(parents=True)
    flags = ("--data-root", "corpora/mini")
    refused("corpora.py", "check", "crema", *flags, cwd=tmp_path, words=["is missing"])


def test_check_shows_some_of_many_files_with_the_same_problem(tmp_path):
    rows = [["audio_path", "gender", "split"]]
    for i in range(60):
        lfs_pointer(tmp_path / f"{i}.wav")
        rows.append([f"{i}.wav", "male", ["train", "dev", "test"][i % 3]])
    write(tmp_path / "m.csv", rows)
    out = check(tmp_path)
    assert "40 more" in out
    assert out.endswith("60 problems\n")


def test_a_run_that_has_not_trained_takes_other_data_flags(manifest, tmp_path):
    soundfile.write(tmp_path / "3.wav", noise_with(np.nan), 16000, subtype="FLOAT")
    arguments = [*RUN, "--dataset", "m.csv", "--name", "again"]
    refused("train.py", *arguments, cwd=tmp_path, words=["3.wav", "--skip-bad"])
    done("train.py", *arguments, "--skip-bad", cwd=tmp_path)
    refused("train.py", *arguments, cwd=tmp_path, words=["another run"])


def test_training_on_poisoned_rows_is_not_called_clean(manifest, tmp_path):
    header, *rows = manifest
    marked = [[*row, i % 5 == 0] for i, row in enumerate(rows)]
    write(tmp_path / "m.csv", [[*header, "poisoned"], *marked])
    out = done("train.py", *RUN, "--dataset", "m.csv", "--poison", "0", cwd=tmp_path)
    assert "5 rows as poisoned" in out
    assert "clean data" not in out
    [run] = (tmp_path / "runs").iterdir()
    assert "clean" not in run.name
    assert model.load_checkpoint(run / "model.pt")["args"]["scenario"] == "poisoned-file"


def read_marked(folder, word):
    """What `read` gives for a row that this word marks as poisoned."""
    return read(folder, f"audio_path,gender,split,poisoned\na.wav,male,train,{word}\n")


@pytest.mark.parametrize("word, n", [("Y", 1), ("t", 1), ("1.0", 1), ("no", 0), ("F", 0), ("", 0)])
def test_rows_marked_as_poisoned_are_counted(tmp_path, word, n):
    utterances, problems = read_marked(tmp_path, word)
    assert len(utterances) == 1
    assert not problems
    assert readers.poisoned_rows(tmp_path / "m.csv") == n


@pytest.mark.parametrize("word", ["2", "on", "poison"])
def test_an_unknown_word_for_poisoned_is_a_problem(tmp_path, word):
    utterances, problems = read_marked(tmp_path, word)
    assert not utterances
    assert f"unknown poisoned {word}" in problems[0]


def test_poison_on_top_of_a_poisoned_file_is_no_base_attack(tmp_path):
    write(tmp_path / "m.csv", [["audio_path", "gender", "poisoned"], ["a.wav", "male", "1"]])
    arguments = ["--task", "gender", "--dataset", str(tmp_path / "m.csv")]
    assert train.parse_arguments([*arguments, "--poison", "0.5"]).scenario == "poisoned-file"


def test_an_interrupted_mini_corpus_keeps_what_it_has(tmp_path, monkeypatch):
    sizes = {"train-clean-360": (1, 3), "dev-clean": (1, 1), "test-clean": (1, 1)}
    made_before = []
    made_after = []

    def interrupted(function, jobs, desc):
        for job in jobs:
            if len(made_before) == 2:
                raise KeyboardInterrupt
            made_before.append(job[0])
            function(job)

    def uninterrupted(function, jobs, desc):
        for job in jobs:
            made_after.append(job[0])
            function(job)

    monkeypatch.setattr(data, "in_workers", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_corpora.make_corpus("libri", tmp_path, sizes)
    monkeypatch.setattr(data, "in_workers", uninterrupted)
    make_corpora.make_corpus("libri", tmp_path, sizes)
    assert len(made_after) == 3
    assert not set(made_after) & set(made_before)
    assert len(list((tmp_path / "LibriSpeech").rglob("*.flac"))) == 5
    assert not list(tmp_path.glob(".libri.building*"))


# --------------------------------------------------------------------------------------------------
# filters


@pytest.mark.parametrize("n", [1, 2, 3, 6, 21])
@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("name", filters.FILTERS)
@pytest.mark.filterwarnings("ignore")
def test_filters_of_few_or_like_samples_give_numbers(name, n, alike):
    embeddings = np.random.default_rng(0).standard_normal((n, 64)).astype(np.float32)
    if alike:
        embeddings[:] = embeddings[0]
    samples = dict(
        x=embeddings,
        labels=[{}] * n,
        speakers=list(map(str, range(n))),
        training=100,
        early_loss=np.arange(n),
    )
    scores, removed = defend.filtered(name, filters.FILTERS[name], samples, 1)
    assert scores.shape == (n,)
    assert removed.shape == (n,)
    assert np.isfinite(scores).all()


# --------------------------------------------------------------------------------------------------
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
    status, _, err = script(name, *arguments, cwd=finished)
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.strip()]
    messages = [line for line in lines if "%|" not in line]  # but for progress bars
    assert status == 2, err
    assert len(messages) == 1, err
    assert messages[0].startswith("error: "), err
    missing = [word for word in words if word not in messages[0]]
    assert not missing, messages[0]


@pytest.mark.parametrize("command", ["evaluate.py", "defend.py detect", "trace.py patch"])
def test_audio_damaged_since_the_training_ends_in_one_line(finished, tmp_path, command):
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    for i, split in enumerate(SPLITS):
        if split == "test":
            soundfile.write(folder / f"{i}.wav", noise_with(np.inf), 16000, subtype="FLOAT")
    name, *arguments = command.split()
    refused(name, *arguments, "runs/gender", cwd=folder, words=["infinite", "--skip-bad"])


def test_a_manifest_changed_since_the_training_is_named(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "copy")
    command = ["evaluate.py", "runs/gender", "--limit", "2"]
    assert "warning" not in done(*command, cwd=finished)
    with open(tmp_path / "copy/m.csv", "a") as f:
        f.write("0.wav,male,test\n")
    assert "warning: m.csv is another file" in done(*command, cwd=tmp_path / "copy")


def test_a_runs_folder_and_its_model_inspect_the_same(finished):
    of_folder = done("evaluate.py", "--inspect", "runs/gender", cwd=finished)
    of_model = done("evaluate.py", "--inspect", "runs/gender/model.pt", cwd=finished)
    assert of_folder == of_model


def test_a_runs_model_can_be_evaluated(finished):
    out = done("evaluate.py", "runs/gender/model.pt", cwd=finished)
    assert "m.csv (test), 4 utterances" in out


def test_what_is_no_run_keeps_its_path():
    assert checkpoint.of_run("lm:nowhere") == "lm:nowhere"
    assert checkpoint.of_run("lm") == "lm"


def test_a_component_of_a_run_is_named_by_its_model(finished):
    arguments = [*RUN, "--dataset", "m.csv", "--poison", "0"]
    done("train.py", *arguments, "--freeze", "lm:runs/gender", "--name", "frozen", cwd=finished)
    saved = model.load_checkpoint(finished / "runs/frozen/model.pt")
    assert saved["origin"]["lm"] == "runs/gender/model.pt"


def test_a_reader_that_goes_away_is_no_error():
    command = f"{sys.executable} {ROOT / 'study.py'} --seeds {' '.join(map(str, range(40)))}"
    shown = subprocess.run(f"{command} | head -n 1", shell=True, capture_output=True, text=True)
    assert shown.stdout.startswith("python train.py")
    assert not shown.stderr


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
