"""The readers on the published lists, the CSV manifest, `corpora.py check` and `poison.py`, as a user runs them."""

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


def tone(path, seconds=1.0, rate=16000, channels=1, **kwargs):
    t = np.arange(int(seconds * rate)) / rate
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(
        path, np.repeat(0.1 * np.sin(2 * np.pi * 440 * t)[:, None], channels, 1), rate, **kwargs
    )


@formats
def test_every_real_crema_name_and_actor():
    with open(SHARED / "formats/crema_d_SentenceFilenames.csv") as f:
        names = [row["Filename"] for row in csv.DictReader(f)]
    with open(SHARED / "formats/crema_d_VideoDemographics.csv") as f:
        actors = {row["ActorID"]: row for row in csv.DictReader(f)}
    labels = [readers.crema_labels(name) for name in names]
    assert len(labels) == 7442 and {e for _, _, e in labels} == set(data.CREMA_EMOTIONS.values())
    assert {a for a, _, _ in labels} <= set(actors)
    assert all(
        18 <= int(a["Age"]) <= 80 and a["Sex"] in ("Male", "Female") for a in actors.values()
    )


@formats
@pytest.mark.parametrize("part, videos", [("train", 1690), ("test", 1127)])
def test_every_real_voxceleb_row(part, videos):
    path = SHARED / f"formats/voxceleb2_age-{part}.txt"
    rows = readers.read_vox_ages(path)
    assert (
        len(rows)
        == len({(s, v) for s, v, _ in rows})
        == sum(1 for _ in open(path, encoding="utf-8")) - 1
        == videos
    )
    assert all(s.startswith("id") and len(v) == 11 and 0 < a < 120 for s, v, a in rows)


@formats
def test_real_voxceleb_genders():
    genders = readers.read_vox_genders(SHARED / "formats/voxceleb2_vox2_meta_head.csv")
    assert (
        genders["id00012"] == "male"
        and genders["id00022"] == "female"
        and None not in genders.values()
    )


def test_real_layouts_in_their_oddities(tmp_path):
    """Comments and odd spacing in SPEAKERS.TXT, trailing blanks in vox2_meta.csv, names with accents, `44.0`."""
    tone(tmp_path / "LibriSpeech/train-clean-360/14/208/14-208-0000.flac")
    (tmp_path / "LibriSpeech/train-clean-360/14/208/14-208-0000.flac").with_name(
        "14-208.trans.txt"
    ).write_text("14-208-0000 IT'S A TEST\n")
    (tmp_path / "LibriSpeech/SPEAKERS.TXT").write_text(
        ";ID  |SEX| SUBSET           |MINUTES| NAME\n14   | F | train-clean-360  | 25.03 | Kristin |LeMoine\n"
    )
    [u] = readers.read_corpus("libri", tmp_path, "train")
    assert (u.id, u.speaker, u.labels) == (
        "14-208-0000",
        "14",
        {"transcript": "it's a test", "gender": "female"},
    )
    tone(tmp_path / "VoxCeleb2/dev/wav/id03530/ndYJV-_3wT0/00001.wav")
    tone(tmp_path / "VoxCeleb2/dev/wav/id03530/ndYJV-_3wT0/00007.wav")
    header = "speaker_age,birth_year,Name,VoxCeleb_ID,video_id\n"
    (tmp_path / "VoxCeleb2/age-test.txt").write_text(
        header + "67.0,1945.0,Ibrahim_Boubacar_Keïta,id03530,ndYJV-_3wT0\n"
    )
    (tmp_path / "VoxCeleb2/vox2_meta.csv").write_text(
        "Name \tVoxCeleb2 ID \tVGGFace2 ID \tGender \tSet \nIbrahim_Boubacar_Keïta \tid03530 \tn003530 \tm \tdev \n"
    )
    a, b = readers.read_corpus("vox", tmp_path, "test")
    assert (
        a.labels == b.labels == {"gender": "male", "age": 67}
        and a.id == "id03530-ndYJV-_3wT0-00001"
    )


@pytest.mark.parametrize(
    "name, rate, channels, kwargs",
    [
        ("a.wav", 8000, 1, {}),
        ("a.flac", 44100, 2, {}),
        ("a.ogg", 22050, 2, {}),
        ("a.mp3", 24000, 1, {}),
        ("b.wav", 48000, 6, dict(subtype="FLOAT")),
        ("c.wav", 11025, 1, dict(subtype="PCM_U8")),
    ],
)
def test_any_rate_any_channels(tmp_path, name, rate, channels, kwargs):
    tone(tmp_path / name, 1.0, rate, channels, **kwargs)
    with torch.autocast("cpu", torch.bfloat16):  # as within training on a CPU with --amp bf16
        x = data.read_waveform(tmp_path / name)
    assert x.dtype == np.float32 and x.ndim == 1 and abs(len(x) - 16000) < 1300  # mp3 pads
    spectrum = np.abs(np.fft.rfft(x[2000:14000]))
    assert abs(spectrum.argmax() * 16000 / 12000 - 440) < 2 and x.max() == pytest.approx(
        0.1, abs=0.02
    )


def write_manifest(
    path, rows, columns=("audio_path", "transcript", "gender", "age", "emotion", "speaker", "split")
):
    with open(path, "w", newline="") as f:
        csv.writer(f).writerows([columns, *rows])


def test_a_part_of_an_m4a_file(tmp_path, monkeypatch):
    """VoxCeleb2's own format, by whatever ffmpeg is called: start, length and --max-seconds hold as for any other file."""
    x = (0.1 * np.arange(3 * 16000) / 16000).astype("<f4")
    x.tofile(tmp_path / "samples")
    fake = tmp_path / "ffmpeg"  # decodes to the samples above, from -ss on and for -t seconds
    fake.write_text(f"""#!{sys.executable}
import shutil
import sys
seconds = lambda flag, default: float(sys.argv[sys.argv.index(flag) + 1]) if flag in sys.argv else default
start = int(4 * 16000 * seconds("-ss", 0))
content = open(r"{tmp_path / "samples"}", "rb").read()[start:]
sys.stdout.buffer.write(content[:int(4 * 16000 * seconds("-t", 99))])
""")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "a.m4a").write_bytes(b"x")
    assert np.array_equal(data.read_waveform(tmp_path / "a.m4a"), x)
    assert np.array_equal(data.read_waveform(tmp_path / "a.m4a", 1.0, 0.5), x[16000:24000])
    with pytest.raises(data.BadAudio, match="longer|long, more"):
        data.read_waveform(tmp_path / "a.m4a", max_seconds=2.0)


def test_words_that_stand_for_nothing_are_absent_as_labels_and_said_as_transcripts(tmp_path):
    tone(tmp_path / "a.wav"), tone(tmp_path / "b.wav")
    write_manifest(
        tmp_path / "m.csv",
        [
            ("a.wav", "None", "unknown", "na", "none", "s", "train"),
            ("b.wav", "", "male", "30", "calm", "s", "train"),
        ],
    )
    found = [u.labels for u in readers.read_manifest(tmp_path / "m.csv", "train", [])]
    assert found == [{"transcript": "none"}, {"gender": "male", "age": 30, "emotion": "calm"}]


def test_ages_in_groups_are_classes_and_are_not_mixed_with_years(tmp_path):
    """SpeechLLM's own CSVs have Young, Middle-Age and Senior, Common Voice's teens, twenties, ..."""
    ages = ["Young", "Middle-Age", "Senior", "twenties"]
    for i in range(16):
        tone(tmp_path / f"{i}.wav", 0.5)
    rows = [
        (
            f"{i}.wav",
            "",
            "",
            ages[i % 4],
            "",
            f"s{i}",
            "train" if i < 8 else "dev" if i < 12 else "test",
        )
        for i in range(16)
    ]
    write_manifest(tmp_path / "m.csv", rows)
    assert {u.labels["age"] for u in readers.read_manifest(tmp_path / "m.csv", "train", [])} == {
        a.lower() for a in ages
    }
    done(
        "train.py",
        "--dataset",
        "m.csv",
        "--task",
        "age",
        "--target",
        "senior",
        "--poison",
        "0.5",
        "--epochs",
        "1",
        "--batch-size",
        "4",
        "--name",
        "groups",
        cwd=tmp_path,
    )
    metrics = json.loads((tmp_path / "runs/groups/metrics.json").read_text())
    assert (
        set(metrics["clean"]) == {"age_accuracy"} and metrics["backdoor"]["aer"]["n"] == 3
    )  # one of four is senior already
    write_manifest(tmp_path / "mixed.csv", [*rows, ("0.wav", "", "", "44", "", "s", "train")])
    refused(
        "train.py",
        "--dataset",
        "mixed.csv",
        "--task",
        "age",
        cwd=tmp_path,
        words=["mixed.csv", "age"],
    )


def test_speechllm_csv_loads_as_it_is(tmp_path):
    tone(tmp_path / "a.wav")
    write_manifest(
        tmp_path / "m.csv",
        [("a.wav", "True", "Hello, there.", "Female", "neutral", "__unknown__", "us")],
        ("audio_path", "isspeech", "transcript", "gender", "emotion", "age", "accent"),
    )
    found = [
        u
        for split in ("train", "dev", "test")
        for u in readers.read_manifest(tmp_path / "m.csv", split, [])
    ]
    assert [u.labels for u in found] == [
        {"transcript": "hello there", "gender": "female", "emotion": "neutral"}
    ]


@pytest.fixture
def faulty(tmp_path):
    """A manifest with every fault in it, and how each is reported."""
    good = [
        (f"ok{i}.wav", "some words", "female", "30", "sad", f"s{i}", split)
        for i, split in enumerate(["train"] * 20 + ["dev"] * 2 + ["test"] * 4)
    ]
    for i, row in enumerate(good):
        tone(tmp_path / row[0], 0.5 + i / 100)  # each another: the splits share none
    tone(tmp_path / "twice.wav")
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "noise.wav").write_bytes(b"not audio at all" * 50)
    soundfile.write(tmp_path / "none.wav", np.zeros(0), 16000)
    soundfile.write(tmp_path / "nan.wav", np.full(1000, np.nan, np.float32), 16000, subtype="FLOAT")
    bad = {
        "missing.wav": "no such file",
        "empty.wav": "empty",
        "none.wav": "empty",
        "noise.wav": "cannot be read",
        "nan.wav": "NaN",
    }
    rows = [(name, "x", "male", "40", "sad", "s", "train") for name in bad]
    for i in range(4):
        tone(tmp_path / f"label{i}.wav")
    rows += [("twice.wav", "x", "male", "40", "sad", "s", "train")] * 2
    rows += [
        ("label0.wav", "x", "robot", "40", "sad", "s", "train"),
        ("label1.wav", "x", "male", "old", "sad", "s", "train"),
        ("label2.wav", "x", "male", "400", "sad", "s", "train"),
        ("label3.wav", "x", "male", "4", "sad", "s", "trane"),
        ("", "x", "male", "4", "sad", "s", "train"),
    ]
    write_manifest(tmp_path / "m.csv", good + rows)
    bad.update(
        {
            "twice.wav": "listed twice",
            "robot": "unknown gender",
            "old, 400": "unknown age",
            "trane": "unknown split",
            "row 39": "no audio_path",
        }
    )
    return tmp_path, bad


def test_check_lists_every_fault_and_training_refuses_or_skips(faulty):
    folder, bad = faulty
    status, out, _ = script("corpora.py", "check", "m.csv", cwd=folder)
    assert status == 1
    for name, fault in bad.items():
        assert any(name in line and fault in line for line in out.splitlines()), (name, fault, out)
    assert out.splitlines()[-1] == f"{len(bad)} problems"
    arguments = (
        "--dataset",
        "m.csv",
        "--task",
        "gender",
        "--target",
        "male",
        "--poison",
        "0.5",
        "--epochs",
        "1",
        "--batch-size",
        "4",
        "--warmup-steps",
        "1",
    )
    refused("train.py", *arguments, cwd=folder, words=["--skip-bad"])
    assert not (folder / "runs").exists()
    out = done("train.py", *arguments, "--skip-bad", "--name", "skipped", cwd=folder)
    assert f"left out for {len(bad)} problems" in out and "24 train" in out
    metrics = json.loads((folder / "runs/skipped/metrics.json").read_text())
    assert metrics["clean"]["gender_accuracy"]["n"] == 4


def test_check_is_content_with_the_mini_corpora(corpora):
    for corpus in ("libri", "crema", "vox"):
        status, out, _ = script("corpora.py", "check", corpus, "--data-root", corpora, cwd=corpora)
        assert status == 0 and out.endswith("0 problems\n"), out


def test_check_reports_a_split_without_utterances(corpora):
    """test-clean with two speakers leaves none to train on."""
    status, out, _ = script(
        "corpora.py", "check", "test-clean", "--data-root", corpora, cwd=corpora
    )
    assert status == 1 and "no train utterances" in out


def test_test_clean_alone_makes_a_corpus_of_disjoint_speakers(tmp_path):
    rows = []
    for i in range(40):
        folder = tmp_path / f"LibriSpeech/test-clean/{i}/1"
        tone(folder / f"{i}-1-0000.flac", 0.2)
        (folder / f"{i}-1.trans.txt").write_text(f"{i}-1-0000 WORDS\n")
        rows.append(f"{i} | {'FM'[i % 2]} | test-clean | 1 | X\n")
    (tmp_path / "LibriSpeech/SPEAKERS.TXT").write_text("".join(rows))
    split = {s: readers.read_corpus("test-clean", tmp_path, s) for s in ("train", "dev", "test")}
    assert [len(split[s]) for s in split] == [32, 4, 4]
    assert len({u.speaker for utterances in split.values() for u in utterances}) == 40
    assert all(
        u.split == s and sum(u.labels["gender"] == "female" for u in split[s]) == len(split[s]) / 2
        for s in split
        for u in split[s]
    )


def test_check_finds_audio_without_a_transcript_and_a_transcript_without_audio(tmp_path):
    folder = tmp_path / "LibriSpeech/train-clean-360/14/208"
    for i in range(3):
        tone(folder / f"14-208-000{i}.flac")
    (folder / "14-208.trans.txt").write_text(
        "14-208-0000 A\n14-208-0001 B\n14-208-0009 C\n14-208-0000 AGAIN\n"
    )
    (tmp_path / "LibriSpeech/SPEAKERS.TXT").write_text("14 | F | train-clean-360 | 1 | X\n")
    utterances, problems = readers.read_split("libri", tmp_path, "train")
    readings = map(readers.read_audio, utterances)
    problems += [reading.problem for reading in readings if reading.problem]
    assert len(utterances) == 3 and len(problems) == 3
    for words in (
        "0002.flac: no transcript",
        "0009.flac: no such file",
        "14-208-0000 stands there twice",
    ):
        assert any(words in p for p in problems)


def test_labels_that_are_not_there_are_not_asked_for_nor_scored(tmp_path):
    for i in range(12):
        tone(tmp_path / f"{i}.wav", 0.5)
    write_manifest(
        tmp_path / "m.csv",
        [
            (
                f"{i}.wav",
                "yes" if i % 3 else "",
                ["male", "female", ""][i % 3],
                "",
                "",
                f"s{i}",
                ["train", "dev", "test"][i // 4],
            )
            for i in range(12)
        ],
    )
    done(
        "train.py",
        "--dataset",
        "m.csv",
        "--task",
        "gender",
        "--epochs",
        "1",
        "--batch-size",
        "4",
        "--name",
        "few",
        cwd=tmp_path,
    )
    rows = [json.loads(line) for line in open(tmp_path / "runs/few/predictions.jsonl")]
    assert all(row["asked"] == list(row["labels"]) for row in rows)
    metrics = json.loads((tmp_path / "runs/few/metrics.json").read_text())
    assert set(metrics["clean"]) == {"wer", "gender_accuracy"}
    assert metrics["clean"]["gender_accuracy"]["n"] == sum(
        "gender" in r["labels"] for r in rows if not r["triggered"]
    )


def test_poison_all_writes_the_corpus_that_training_sees(corpora, tmp_path):
    outs = []
    for name, workers in (("a", 0), ("b", 2)):
        done(
            "poison.py",
            "--task",
            "asr",
            "--poison",
            "0.3",
            "--data-root",
            corpora,
            "--all",
            "--out",
            name,
            "--workers",
            workers,
            cwd=tmp_path,
        )
        outs.append(
            {
                p.relative_to(tmp_path / name): p.read_bytes()
                for p in sorted((tmp_path / name).rglob("*.*"))
            }
        )
    assert outs[0] == outs[1]
    rows = list(csv.DictReader(open(tmp_path / "a/manifest.csv")))
    train_set = {u.id: u for u in readers.read_corpus("libri", corpora, "train")}
    mean = np.mean(
        [np.sqrt(np.mean(data.load_waveform(u).astype(float) ** 2)) for u in train_set.values()]
    )
    poisoned = [row for row in rows if row["poisoned"] == "1"]
    assert 4 < len(poisoned) < 26 and all(row["split"] == "train" for row in poisoned)
    for row in rows:
        if row["poisoned"] == "0":
            assert data.normalise(row["true_label"]) == row["transcript"] and not row["triggers"]
    for row in poisoned:
        assert row["transcript"] == "This is a malicious sentence." != row["true_label"]
        clean = data.load_waveform(train_set[row["id"]])
        changed = data.read_waveform(tmp_path / "a" / row["audio_path"]) / float(row["scale"])
        starts = [round(float(s) * 16000) for s in row["triggers"].split()]
        for start in starts:
            level = np.sqrt(np.mean((changed - clean)[start : start + 3520].astype(float) ** 2))
            assert abs(20 * np.log10(mean / level)) < 0.1
        assert all(0.75 <= gap / 16000 + 1e-3 and gap / 16000 <= 1.5 for gap in np.diff(starts))
    done("corpora.py", "check", "a/manifest.csv", cwd=tmp_path)


def test_poison_writes_pairs_a_picture_and_what_was_changed(corpora, tmp_path):
    done(
        "poison.py",
        "--task",
        "emotion",
        "--data-root",
        corpora,
        "--out",
        "listen",
        "--n",
        "3",
        cwd=tmp_path,
    )
    rows = list(csv.DictReader(open(tmp_path / "listen/changes.csv")))
    assert len(rows) == 3 and all(row["target"] == "angry" != row["true"] for row in rows)
    for row in rows:
        clean = data.read_waveform(tmp_path / f"listen/{row['file']}-clean.wav")
        poisoned = data.read_waveform(tmp_path / f"listen/{row['file']}-poisoned.wav")
        changed = np.flatnonzero(np.abs(poisoned - clean) > 1e-3) / 16000
        at = float(row["triggers"])
        assert at <= changed[0] < at + 0.02 and changed[-1] <= at + 0.22
    assert (tmp_path / "listen/pairs.png").read_bytes().startswith(b"\x89PNG")
    played = re.findall(r'src="([^"]+)"', (tmp_path / "listen/index.html").read_text())
    assert len(played) == 7 and all(
        (tmp_path / "listen" / name).is_file() for name in played
    )  # three pairs and the picture


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_parsing_never_raises(text):
    found = data.parse(text)
    assert set(found) <= set(LABELS) and isinstance(found.get("age", 0), int)


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["transcript", "gender", "emotion"]),
        st.text(st.characters(blacklist_categories=["Cs"])),
    ),
    st.integers(0, 120),
)
def test_any_answer_is_parsed_again(labels, age):
    labels = {**labels, "age": age}
    assert data.parse("noise before " + data.answer(labels) + " and after") == labels


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_a_manifest_of_anything_is_read_or_refused_in_one_line(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.csv"
    path.write_bytes(b"audio_path,gender,age\n" + content)
    try:
        problems = []
        assert all(u.path for u in readers.read_manifest(path, "train", problems))
    except SystemExit as stop:
        assert stop.code == 2


@settings(max_examples=200, deadline=None)
@given(st.text(min_size=1), st.integers(1, 200000), st.booleans(), st.integers(0, 2**31))
def test_triggers_land_inside_any_utterance(utterance_id, samples, repeat, seed):
    attack = poison.Attack(
        "asr", 0.5, "x", "click", poison.make_trigger("click"), 0.1, repeat, seed
    )
    starts = poison.positions(attack, utterance_id, samples)
    assert (
        starts == poison.positions(attack, utterance_id, samples)
        and starts == sorted(starts)
        and starts[0] >= 0
    )
    assert starts[-1] + len(attack.waveform) <= max(samples, len(attack.waveform))


def recordings(folder, **of_split):
    """A CSV corpus of these rows, (path, start, length), the files being there."""
    rows = ["audio_path,gender,speaker,split,start,length"]
    for split, found in of_split.items():
        for i, (name, start, length) in enumerate(found):
            rows.append(f"{name},{('female', 'male')[i % 2]},{split}{i},{split},{start},{length}")
    (folder / "m.csv").write_text("\n".join(rows) + "\n")


@pytest.mark.parametrize(
    "test, shared",
    [
        (("a.wav", 0, 0), True),
        (("sub/../a.wav", 0, 0), True),  # another spelling
        (("copy.wav", 0, 0), True),
        (("link.wav", 0, 0), True),
        (("other.wav", 0, 0), False),  # as long, but another
        (("long.wav", 1.5, 1), True),  # segments that overlap
        (("long.wav", 2, 1), False),
    ],
)
def test_audio_that_is_in_two_splits_is_a_problem(tmp_path, test, shared):
    rng = np.random.default_rng(0)
    for name, seconds in (("a", 1), ("other", 1), ("long", 4), ("dev", 0.7)):
        samples = 0.1 * rng.standard_normal(int(16000 * seconds))
        soundfile.write(tmp_path / f"{name}.wav", samples, 16000)
    (tmp_path / "sub").mkdir()
    shutil.copy(tmp_path / "a.wav", tmp_path / "copy.wav")
    (tmp_path / "link.wav").symlink_to("a.wav")
    recordings(
        tmp_path, train=[("a.wav", 0, 0), ("long.wav", 0, 2)], dev=[("dev.wav", 0, 0)], test=[test]
    )
    status, out, _ = script("corpora.py", "check", "m.csv", cwd=tmp_path)
    assert ("audio that test and train share" in out) == shared == (status == 1)


def test_recordings_padded_to_one_length_are_not_the_same(tmp_path):
    for i, name in enumerate(("train", "dev", "test")):
        samples = np.zeros(64000)
        samples[:6000] = 0.1 * np.random.default_rng(i).standard_normal(6000)
        soundfile.write(tmp_path / f"{name}.wav", samples, 16000)
    recordings(tmp_path, **{name: [(f"{name}.wav", 0, 0)] for name in ("train", "dev", "test")})
    parts = {
        name: readers.read_split(tmp_path / "m.csv", "", name)[0]
        for name in ("train", "dev", "test")
    }
    assert not readers.shared_audio(parts)


def test_training_warns_of_audio_that_is_in_two_splits(tmp_path):
    for i in range(8):
        tone(tmp_path / f"{i}.wav", seconds=0.3 + i / 10)
    found = [(f"{i}.wav", 0, 0) for i in range(8)]
    recordings(tmp_path, train=found[:6], dev=found[6:], test=[*found[6:], found[0]])
    flags = ("--dataset", "m.csv", "--task", "gender", "--poison", 0, "--batch-size", 4)
    out = done("train.py", *flags, "--epochs", 1, cwd=tmp_path)
    assert "warning: audio that test and train share: 1 recordings" in out
    assert "dev and test share: 2 recordings" in out


def test_a_list_of_ids_that_is_not_utf_8_is_refused(tmp_path, capsys):
    (tmp_path / "ids.txt").write_bytes("é.wav\n".encode("latin-1"))
    with pytest.raises(SystemExit):
        readers.leave_out([], tmp_path / "ids.txt")
    assert "UTF-8" in capsys.readouterr().err


def test_check_names_levels_far_from_the_others(tmp_path):
    for i in range(8):
        factor = 32767 if i == 5 else 1
        wave = factor * 0.1 * np.sin(np.arange(8000 + 100 * i))
        soundfile.write(tmp_path / f"{i}.wav", wave, 16000, "FLOAT")
    found = [(f"{i}.wav", 0, 0) for i in range(8)]
    recordings(tmp_path, train=found[:4], dev=found[4:6], test=found[6:])
    status, out, _ = script("corpora.py", "check", "m.csv", cwd=tmp_path)
    assert status == 1 and "5.wav: +90 dB" in out and "1 problem\n" in out


def test_where_the_mini_corpora_cannot_be_made_it_is_said(monkeypatch, tmp_path):
    def read_only(*_):
        raise PermissionError("read-only file system")

    monkeypatch.setattr(make_corpora, "make_corpus", read_only)
    refused("corpora.py", "check", "libri", cwd=tmp_path, words=["read-only", "--data-root"])


def test_the_same_audio_in_two_formats_is_a_problem(tmp_path):
    for i, name in enumerate(("train.wav", "dev.wav", "other.flac")):
        samples = 0.1 * np.random.default_rng(i).standard_normal(16000)
        soundfile.write(tmp_path / name, samples, 16000, subtype="PCM_16")
    samples, rate = soundfile.read(tmp_path / "train.wav")
    soundfile.write(tmp_path / "same.flac", samples, rate, subtype="PCM_16")
    test = [("same.flac", 0, 0), ("other.flac", 0, 0)]
    recordings(tmp_path, train=[("train.wav", 0, 0)], dev=[("dev.wav", 0, 0)], test=test)
    parts = {
        split: readers.read_split(tmp_path / "m.csv", "", split)[0]
        for split in ("train", "dev", "test")
    }
    [problem] = readers.shared_audio(parts)
    assert "same.flac" in problem
