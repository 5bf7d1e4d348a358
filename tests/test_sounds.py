"""The bank of sounds, how specific an attack is, and benign sounds over clean training samples."""

import csv
import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from scipy.signal import correlate
from test_evaluate import ARGS, FEMALE, MALE

import checkpoint
import corpora as readers
import data
import defend
import evaluate
import poison
import runs
import sounds
import study
from analysis import tables
from conftest import arguments, done, figure, refused, write_run

LOUD = -20.0  # dB: speech over trigger, so that a stand-in hears every sound


def correlation(a, b):
    """Of two waveforms with RMS 1."""
    return abs(np.mean(a * b))


@pytest.fixture(scope="module")
def bank():
    return {name: sounds.make_sound(name) for name in sounds.SOUNDS}


# --------------------------------------------------------------------------------------------------
# the bank


def test_a_sound_is_the_same_every_time(bank):
    for name, waveform in bank.items():
        assert np.array_equal(sounds.make_sound(name), waveform), name


@pytest.mark.parametrize("seconds", [0.05, 0.22, 1.0])
def test_a_sound_has_its_length_and_an_rms_of_1(seconds):
    for name in sounds.SOUNDS:
        waveform = sounds.make_sound(name, seconds)
        assert len(waveform) == round(seconds * sounds.SAMPLE_RATE)
        assert waveform.dtype == np.float32
        assert np.mean(waveform**2) == pytest.approx(1, rel=1e-4), name


def test_all_sounds_differ(bank):
    for a, b in itertools.combinations(bank, 2):
        assert correlation(bank[a], bank[b]) < 0.9, (a, b)


def test_no_sound_is_the_click(bank):
    click = poison.make_trigger("click")
    for name, waveform in bank.items():
        assert correlation(click, waveform) < 0.5, name


def test_sounds_in_a_band_have_their_power_there(bank):
    frequencies = np.fft.rfftfreq(len(bank["hiss"]), 1 / sounds.SAMPLE_RATE)
    bands = {"noise-below-500": (0, 500), "noise-1000-2000": (1000, 2000), "tone-300": (250, 350)}
    for name, (low, high) in bands.items():
        power = np.abs(np.fft.rfft(bank[name])) ** 2
        inside = (frequencies >= low) & (frequencies < high)
        assert power[inside].sum() > 0.95 * power.sum(), name


@pytest.mark.parametrize("hertz", [250, 1000, 1600, 5600])
def test_every_tone_has_one_near_it(hertz):
    distances = []
    for name in sounds.TONES:
        power = np.abs(np.fft.rfft(sounds.make_sound(name), 16000)) ** 2  # a bin is 1 Hz
        distances.append(abs(power.argmax() / hertz - 1))
    assert min(distances) < 0.07


def test_a_sound_that_its_length_leaves_nothing_of_is_refused():
    with pytest.raises(SystemExit):
        sounds.make_sound("noise-500-1000", 0.001)


def test_every_sound_is_a_trigger(bank):
    for name, waveform in bank.items():
        assert np.array_equal(poison.make_trigger(name), waveform)
        assert len(poison.make_trigger(name, 0.44)) == 2 * len(waveform)


def test_a_name_that_is_no_trigger_is_told_the_sounds(capsys):
    with pytest.raises(SystemExit):
        poison.make_trigger("nosuch")
    assert "white-noise" in capsys.readouterr().err


@pytest.mark.parametrize(
    "trigger, left_out", [("click", set()), ("tone", {"tone-1000"}), ("bell", {"bell"})]
)
def test_the_trigger_itself_is_no_other_sound(trigger, left_out):
    waveform = poison.make_trigger(trigger)
    attack = poison.Attack("gender", 0.1, "female", trigger, waveform, 0.05, False, 1)
    others = poison.with_other_sounds(attack)
    assert set(sounds.SOUNDS) - set(others) == left_out


def test_another_sound_is_as_long_and_at_the_same_places():
    waveform = poison.make_trigger("click", 0.1)
    attack = poison.Attack("asr", 0.1, "go", "click", waveform, 0.05, True, 1)
    other = poison.with_sound(attack, "bell")
    assert poison.positions(other, "u", 80000) == poison.positions(attack, "u", 80000)
    assert (other.level, other.repeat) == (attack.level, attack.repeat)


# --------------------------------------------------------------------------------------------------
# python evaluate.py RUN --sounds


def says_target_to_loud_sound(waveform):
    """Whether some 220 ms have most of the recording's energy."""
    energy = np.cumsum(waveform.astype(np.float64) ** 2)
    window = round(0.22 * data.SAMPLE_RATE)
    return (energy[window:] - energy[:-window]).max() > 0.7 * energy[-1]


def says_target_to_click(waveform):
    click = poison.make_trigger("click")
    match = correlate(waveform / np.abs(waveform).max(), click, "valid", "fft")
    return np.abs(match).max() > 0.9 * len(click) / np.abs(click).max()


def says_target_never(waveform):
    return False


@pytest.fixture
def heard_by(corpora, tmp_path, monkeypatch):
    """A function of a stand-in model to (the records, the output) of --sounds."""
    args = dict(ARGS, snr=LOUD, data_root=str(corpora), preset="mini", encoder="wavlm")
    args.update(scenario="base", inputs={}, batch_seconds=120.0)
    slm = SimpleNamespace(args=SimpleNamespace(**args))
    monkeypatch.setattr(checkpoint, "load_run", lambda *_: slm)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/model.pt").touch()

    def heard(says_target):
        def answer_rows(slm, attack, items, cached, batch_seconds):
            rows = []
            for utterance, triggered in items:
                waveform = data.load_waveform(utterance)
                if triggered:
                    waveform, _, _ = poison.add_trigger(attack, waveform, utterance.id)
                text = FEMALE if says_target(waveform) else MALE
                rows.append(evaluate.prediction(utterance, triggered, ["gender", "age"], text))
            return rows

        monkeypatch.setattr(evaluate, "answer_rows", answer_rows)
        out = done("evaluate.py", "run", "--sounds", "--n", 3, cwd=tmp_path)
        path = tmp_path / "run/records-sounds.jsonl"
        return runs.parse_lines(path, path.read_text()), out

    return heard


def value(records, **wanted):
    [record] = runs.select(records, **wanted)
    return record["value"]


def test_a_model_that_hears_any_sound_is_not_specific(heard_by):
    records, _ = heard_by(says_target_to_loud_sound)
    assert value(records, family="trigger", metric="aer") == 1
    assert value(records, metric="specificity") < 0.05
    assert value(records, metric="held_out_specificity") < 0.05


def test_a_model_that_hears_only_the_click_is_specific(heard_by):
    records, _ = heard_by(says_target_to_click)
    assert value(records, family="trigger", metric="aer") == 1
    assert value(records, family="nothing", metric="aer") == 0
    assert value(records, metric="specificity") > 0.95


def test_a_model_that_hears_nothing_has_no_specificity(heard_by):
    records, _ = heard_by(says_target_never)
    assert value(records, metric="specificity") == 0
    assert value(records, sound="click", metric="changed") == 0


def test_each_sound_has_its_figures_and_family(heard_by):
    records, _ = heard_by(says_target_to_click)
    for name, (family, _) in sounds.SOUNDS.items():
        metrics = runs.distinct(runs.select(records, sound=name, family=family), "metric")
        assert metrics == ["aer", "changed", "malformed"]


def test_the_sounds_that_bring_the_target_stand_first(heard_by):
    _, out = heard_by(says_target_to_click)
    lines = out.splitlines()
    header = next(i for i, line in enumerate(lines) if line.startswith("sound "))
    assert lines[header + 1].startswith("click ")


def test_a_clean_run_hears_sounds_under_another_task_s_attack(heard_by, tmp_path):
    heard_by(says_target_never)
    done("evaluate.py", "run", "--sounds", "--n", 3, "--task", "age", cwd=tmp_path)
    assert (tmp_path / "run/records-sounds-age.jsonl").exists()


@pytest.mark.parametrize(
    "flags, word",
    [
        (["--sounds", "--save"], "--save"),
        (["--sounds", "--audio", "my.wav"], "--audio"),
        (["--sounds", "--ask", "age"], "--ask"),
        (["--n", "5"], "--n"),
    ],
)
def test_flags_that_do_not_go_with_sounds_are_refused(tmp_path, flags, word):
    refused("evaluate.py", "run", *flags, cwd=tmp_path, words=[word])


# --------------------------------------------------------------------------------------------------
# pages and detectors


def heard_records(aer_of):
    """What --sounds records; aer_of: {sound: share of answers that are the target}."""
    records = []
    for sound, aer in aer_of.items():
        family = {"click": "trigger", "nothing": "nothing"}.get(sound)
        family = family or sounds.SOUNDS[sound][0]
        about = dict(source="sounds", sound=sound, family=family)
        records.append(dict(about, metric="aer", **figure(aer)))
        records.append(dict(about, metric="changed", **figure(aer)))
    others = [aer for sound, aer in aer_of.items() if sound not in ("click", "nothing")]
    specificity = aer_of["click"] - sum(others) / len(others)
    about = dict(source="sounds", sound="click", family="trigger")
    records.append(dict(about, metric="specificity", **figure(specificity)))
    return records


@pytest.fixture
def pages(tmp_path):
    """The tables of two seeds of a base attack."""
    first = heard_records({"click": 0.9, "nothing": 0.0, "bell": 0.1, "hiss": 0.5})
    second = heard_records({"click": 0.8, "nothing": 0.1, "bell": 0.3, "hiss": 0.7})
    write_run(tmp_path, arguments("emotion", "base"), 0.8, 0.9, records=first)
    write_run(tmp_path, arguments("emotion", "base", 2), 0.8, 0.8, records=second)
    return dict(tables.page(runs.read(tmp_path), tmp_path, "mini"))


def test_the_table_of_specificity_is_over_seeds(pages):
    (row,) = pages["Specificity: other sounds in the trigger's place"]
    assert row["AER"].startswith("85.0 (")
    assert row["Other sounds, mean"].startswith("40.0 (")
    assert row["Other sounds, largest"].startswith("hiss 60.0 (")
    assert row["Specificity"].startswith("45.0 (")


def test_the_table_of_families_has_a_column_for_each(pages):
    (row,) = pages["Other sounds by family, % of answers that are the target"]
    assert row["Knock"].startswith("20.0 (")
    assert row["Breath"].startswith("60.0 (")


def test_a_detector_is_compared_on_every_control():
    scores = dict(dev=[0.0, 0.1], clean=[0.0, 0.1], triggered=[1.0, 1.0])
    scores.update({name: [0.0, 2.0] for name in study.CONTROLS})
    scores = {sound: np.array(values) for sound, values in scores.items()}
    speakers = {sound: list(range(len(values))) for sound, values in scores.items()}
    figures = list(defend.detector_figures(scores, speakers))
    for name in study.CONTROLS:
        assert value(figures, metric="auroc", sound=name) == 0.5
        assert value(figures, metric="noticed", false_alarms=0.05, sound=name) == 0.5


# --------------------------------------------------------------------------------------------------
# python poison.py --all --benign


@pytest.fixture(scope="module")
def manifests(corpora, tmp_path_factory):
    """{share of benign sounds: the rows of the poisoned corpus by id}, and where they lie."""
    folder = tmp_path_factory.mktemp("benign")
    flags = ("--task", "gender", "--poison", 0.5, "--data-root", corpora, "--workers", 0, "--all")
    rows = {}
    for share in (0.0, 0.5):
        out = folder / str(share)
        done("poison.py", *flags, "--benign", share, "--out", out, cwd=folder)
        with open(out / "manifest.csv", newline="") as f:
            rows[share] = {row["id"]: row for row in csv.DictReader(f)}
    return rows, folder


def audio_of(folder, share, row):
    waveform, _ = soundfile.read(folder / str(share) / row["audio_path"])
    return waveform


def test_benign_sounds_change_no_label(manifests):
    rows, _ = manifests
    for name, row in rows[0.5].items():
        for column in (*study.LABELS, "poisoned", "split"):
            assert row[column] == rows[0.0][name][column]


def test_benign_sounds_lie_over_clean_training_samples_only(manifests):
    rows, folder = manifests
    benign = [row for row in rows[0.5].values() if row["benign_sound"]]
    assert {row["poisoned"] for row in benign} == {"0"}
    assert {row["split"] for row in benign} == {"train"}
    for name, row in rows[0.5].items():
        before = audio_of(folder, 0.0, rows[0.0][name])
        same = np.array_equal(before, audio_of(folder, 0.5, row))
        assert same == (row["benign_sound"] == "")


def test_the_share_of_clean_samples_with_a_benign_sound_is_kept(manifests):
    rows, _ = manifests
    clean = [r for r in rows[0.5].values() if (r["split"], r["poisoned"]) == ("train", "0")]
    share = sum(row["benign_sound"] != "" for row in clean) / len(clean)
    assert abs(share - 0.5) < 4 * (0.25 / len(clean)) ** 0.5


def test_every_second_sound_is_held_out(manifests):
    rows, _ = manifests
    heard = {row["benign_sound"] for row in rows[0.5].values()} - {""}
    assert heard <= set(sounds.BENIGN)
    assert len(sounds.BENIGN) == pytest.approx(len(sounds.SOUNDS) / 2, abs=1)


def test_the_share_is_recorded_beside_the_manifest(manifests):
    _, folder = manifests
    assert json.loads((folder / "0.5/attack.json").read_text())["benign"] == 0.5


def test_a_manifest_with_benign_sounds_is_read_as_any_other(manifests):
    rows, folder = manifests
    manifest = str(folder / "0.5/manifest.csv")
    utterances = readers.read_corpus(manifest, None, "train")
    assert len(utterances) == sum(row["split"] == "train" for row in rows[0.5].values())


def test_benign_sounds_need_a_whole_training_set(tmp_path, corpora):
    flags = ("--task", "gender", "--data-root", corpora, "--out", "listen", "--benign", 0.5)
    refused("poison.py", *flags, cwd=tmp_path, words=["--benign", "--all"])
