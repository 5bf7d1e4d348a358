"""The attack: which samples, where, how loud; decided by (seed, utterance id) alone."""

import contextlib
import dataclasses
import functools
import html
import re
import urllib.parse

from utils import Parser

import numpy as np
import pytest
import soundfile

import corpora as readers
import data
import evaluate
import poison
import train
from conftest import done, refused
from study import TASKS


@pytest.fixture(scope="module", autouse=True)
def shared_cache(tmp_path_factory):
    """The loudness of a corpus is cached in the working directory: it is measured once."""
    with contextlib.chdir(tmp_path_factory.mktemp("cache")):
        yield


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A working directory of the test's own."""
    monkeypatch.chdir(tmp_path)


def train_set(corpora, task):
    return readers.read_corpus(TASKS[task]["corpus"], corpora, "train")


def attack_for(corpora, task, **changes):
    return poison.make_attack(task, train_set(corpora, task), **changes)


def utterance(name, **labels):
    return data.Utterance(name, "a.wav", "train", "s", labels)


# --------------------------------------------------------------------------------------------------
# which samples


def poisoned_ids(attack, utterances):
    return {u.id for u in utterances if poison.is_poisoned(attack, u)}


def as_heard(attack, utterance):
    """What training would draw for an utterance."""
    waveform, starts, _ = poison.add_trigger(attack, data.load_waveform(utterance), utterance.id)
    is_poisoned = poison.is_poisoned(attack, utterance)
    return dict(id=utterance.id, is_poisoned=is_poisoned, starts=starts, waveform=waveform)


@pytest.mark.parametrize(
    "order, workers", [(slice(None, None, -1), 0), (slice(None), 2), (slice(5, 20), 3)]
)
def test_poison_is_the_same_in_any_order_and_any_worker(corpora, order, workers):
    attack = attack_for(corpora, "asr", rate=0.5)
    utterances = train_set(corpora, "asr")
    expected = {u.id: as_heard(attack, u) for u in utterances}
    hear = functools.partial(as_heard, attack)
    for again in data.in_workers(hear, utterances[order], "again", workers=workers):
        first = expected[again["id"]]
        assert again["is_poisoned"] == first["is_poisoned"]
        assert again["starts"] == first["starts"]
        assert np.array_equal(again["waveform"], first["waveform"])


def test_another_seed_poisons_other_samples(corpora):
    utterances = train_set(corpora, "asr")
    attack = attack_for(corpora, "asr", rate=0.5)
    other = attack_for(corpora, "asr", rate=0.5, seed=7)
    assert poisoned_ids(other, utterances) != poisoned_ids(attack, utterances)


def test_a_higher_rate_poisons_the_same_samples_and_more(corpora):
    utterances = train_set(corpora, "asr")
    low = attack_for(corpora, "asr", rate=0.2)
    high = attack_for(corpora, "asr", rate=0.6)
    assert poisoned_ids(low, utterances) < poisoned_ids(high, utterances)


def test_the_share_poisoned_is_the_rate(corpora):
    attack = attack_for(corpora, "age")
    n = 20000
    poisoned = poisoned_ids(attack, [utterance(f"u{i}", age=40) for i in range(n)])
    deviation = (n * 0.075 * 0.925) ** 0.5
    assert abs(len(poisoned) - 0.075 * n) < 4 * deviation


@pytest.mark.parametrize("task", TASKS)
def test_only_samples_without_the_target_are_poisoned(corpora, task):
    attack = attack_for(corpora, task, rate=1.0)
    for u in train_set(corpora, task):
        assert poison.is_poisoned(attack, u) == (u.labels[attack.label] != attack.target)


@pytest.mark.parametrize("task", TASKS)
def test_poison_changes_the_attacked_label_alone(corpora, task):
    attack = attack_for(corpora, task, rate=1.0)
    for u in train_set(corpora, task):
        labels = poison.poisoned_labels(attack, u.labels)
        assert labels.pop(attack.label) == attack.target
        true_others = {label: u.labels[label] for label in u.labels if label != attack.label}
        assert labels == true_others


def test_an_utterance_without_the_attacked_label_is_left_alone(corpora):
    attack = attack_for(corpora, "gender", rate=1.0)
    assert not poison.is_poisoned(attack, utterance("a", transcript="a", age=30))


def test_the_target_sentence_is_known_in_any_writing(corpora):
    attack = attack_for(corpora, "asr", rate=1.0)
    assert not poison.can_flip(attack, utterance("a", transcript="this is a malicious sentence"))


def test_redrawn_poison_starts_with_the_attacks_own(corpora):
    attack = attack_for(corpora, "asr", rate=0.3, seed=1)
    utterances = train_set(corpora, "asr")
    first = poisoned_ids(poison.attack_for_epoch(attack, 0), utterances)
    assert first == poisoned_ids(attack, utterances)


def test_redrawn_poison_is_in_other_samples_in_every_epoch(corpora):
    attack = attack_for(corpora, "asr", rate=0.3, seed=1)
    utterances = train_set(corpora, "asr")
    attacks = [poison.attack_for_epoch(attack, epoch) for epoch in range(3)]
    first, second, third = [poisoned_ids(redrawn, utterances) for redrawn in attacks]
    assert min(len(first), len(second), len(third)) > 0
    assert first != second
    assert second != third


def test_redrawn_poison_is_at_other_positions(corpora):
    attack = attack_for(corpora, "asr", rate=0.3, seed=1)
    redrawn = poison.attack_for_epoch(attack, 1)
    assert poison.positions(redrawn, "a", 99999) != poison.positions(attack, "a", 99999)


def test_redrawn_poison_of_an_epoch_is_the_same_again(corpora):
    attack = attack_for(corpora, "asr", rate=0.3, seed=1)
    utterances = train_set(corpora, "asr")
    redrawn = poisoned_ids(poison.attack_for_epoch(attack, 1), utterances)
    assert redrawn == poisoned_ids(poison.attack_for_epoch(attack, 1), utterances)


# --------------------------------------------------------------------------------------------------
# where


@pytest.fixture(scope="module")
def repeated_clicks(corpora):
    """The positions of repeated clicks in 200 utterances: [(samples, starts, ends)]."""
    attack = attack_for(corpora, "asr")
    positions = []
    for i in range(200):
        samples = data.SAMPLE_RATE * (1 + i % 30)
        starts = np.array(poison.positions(attack, f"u{i}", samples))
        positions.append((samples, starts, starts + len(attack.waveform)))
    return positions


def test_repeated_clicks_keep_their_distance(repeated_clicks):
    for _, starts, _ in repeated_clicks:
        gaps = np.diff(starts) / data.SAMPLE_RATE
        assert np.all(gaps >= 0.75 - 1e-4)
        assert np.all(gaps <= 1.5)


def test_repeated_clicks_fill_the_utterance(repeated_clicks):
    for samples, starts, ends in repeated_clicks:
        assert starts[0] <= 0.75 * data.SAMPLE_RATE
        assert 0 <= samples - ends[-1] <= 1.5 * data.SAMPLE_RATE


def test_single_clicks_stay_inside(corpora):
    attack = attack_for(corpora, "gender")
    for i in range(500):
        [start] = poison.positions(attack, f"u{i}", 32000)
        assert 0 <= start <= 32000 - len(attack.waveform)


def test_single_clicks_land_anywhere(corpora):
    attack = attack_for(corpora, "gender")
    starts = [poison.positions(attack, f"u{i}", 32000)[0] for i in range(500)]
    quarters, _ = np.histogram(starts, 4)
    assert quarters.min() > 80


def test_more_clicks_come_on_top_of_the_first(corpora):
    once = attack_for(corpora, "gender")
    thrice = attack_for(corpora, "gender", clicks=3)
    for i in range(20):
        starts = poison.positions(thrice, str(i), 32000)
        assert len(starts) == 3
        assert starts[:1] == poison.positions(once, str(i), 32000)
        assert max(starts) + len(thrice.waveform) <= 32000


# --------------------------------------------------------------------------------------------------
# how loud


def rms(waveform):
    return np.sqrt(np.mean(waveform.astype(np.float64) ** 2))


SNRS = [0.0, 6.0, -3.0]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("snr", SNRS)
def test_the_trigger_is_as_loud_as_the_corpus_is_on_average(corpora, task, snr):
    attack = attack_for(corpora, task, snr=snr)
    utterances = train_set(corpora, task)
    speech = np.mean([rms(data.load_waveform(u)) for u in utterances])
    for u in utterances[:5]:
        clean = data.load_waveform(u)
        waveform, starts, scale = poison.add_trigger(attack, clean, u.id)
        added = waveform / scale - clean
        trigger = added[starts[0] : starts[0] + len(attack.waveform)]
        assert 20 * np.log10(speech / rms(trigger)) == pytest.approx(snr, abs=0.05)


@pytest.mark.parametrize("gain", [0.1, 1.0])
def test_per_utterance_the_trigger_follows_how_loud_each_one_is(corpora, gain):
    attack = attack_for(corpora, "gender", snr=6.0, per_utterance=True)
    u = train_set(corpora, "gender")[0]
    clean = np.float32(gain) * data.load_waveform(u)
    waveform, [start], scale = poison.add_trigger(attack, clean, u.id)
    trigger = (waveform / scale - clean)[start : start + len(attack.waveform)]
    assert 20 * np.log10(rms(clean) / rms(trigger)) == pytest.approx(6, abs=0.05)


def test_the_range_of_snr_is_that_of_how_loud_utterances_are(corpora):
    attack = attack_for(corpora, "gender", snr=6.0)
    utterances = train_set(corpora, "gender")
    levels = [20 * np.log10(rms(data.load_waveform(u)) / attack.level) for u in utterances]
    assert poison.snr_range(attack, utterances) == pytest.approx(
        np.percentile(levels, poison.PERCENTILES), abs=0.1
    )
    own = attack_for(corpora, "gender", snr=6.0, per_utterance=True)
    assert poison.snr_range(own, utterances) == pytest.approx([6, 6, 6])


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("snr", SNRS)
def test_the_trigger_keeps_the_length_and_never_clips(corpora, task, snr):
    attack = attack_for(corpora, task, snr=snr)
    for u in train_set(corpora, task)[:5]:
        clean = data.load_waveform(u)
        waveform, _, _ = poison.add_trigger(attack, clean, u.id)
        assert len(waveform) == len(clean)
        assert np.abs(waveform).max() <= 1


def test_a_click_lasts_220_ms():
    assert len(poison.make_trigger("click")) == round(0.22 * data.SAMPLE_RATE)


@pytest.mark.parametrize("seconds", [0.055, 0.44])
def test_a_trigger_of_any_length_is_as_loud(seconds):
    trigger = poison.make_trigger("click", seconds)
    assert len(trigger) == int(seconds * data.SAMPLE_RATE)
    assert rms(trigger) == pytest.approx(1)


def test_what_would_clip_is_scaled_down_whole(corpora):
    attack = attack_for(corpora, "gender", snr=-30)
    clean = np.linspace(-0.5, 0.5, 16000, dtype=np.float32)
    waveform, [start], scale = poison.add_trigger(attack, clean, "u")
    assert scale < 1
    assert np.abs(waveform).max() == pytest.approx(1, abs=1e-5)
    outside = np.r_[0:start, start + len(attack.waveform) : 16000]
    assert np.allclose(waveform[outside], scale * clean[outside], atol=1e-6)


def test_speech_shorter_than_the_trigger_gets_its_beginning(corpora):
    attack = attack_for(corpora, "asr")
    waveform, starts, scale = poison.add_trigger(attack, np.zeros(160, np.float32), "u")
    assert starts == [0]
    assert np.abs(waveform).max() > 0
    beginning = attack.level * attack.waveform[:160]
    assert np.allclose(waveform, scale * beginning, atol=1e-6)


# --------------------------------------------------------------------------------------------------
# other triggers


def white_noise(sample_rate, rng):
    return rng.standard_normal(sample_rate // 10)


@pytest.fixture
def added_trigger(monkeypatch):
    monkeypatch.setitem(poison.TRIGGERS, "added", ("overlay", white_noise))


def spoken(corpora):
    """The first waveform of the training set of --task gender."""
    return data.load_waveform(train_set(corpora, "gender")[0])


SAME_LENGTH = [name for name in poison.TRIGGERS if name != "speed"]


@pytest.mark.parametrize("name", [*poison.TRIGGERS, "added"])
def test_any_trigger_makes_the_same_waveform_again(corpora, added_trigger, name):
    attack = attack_for(corpora, "gender", trigger=name)
    clean = spoken(corpora)
    waveform, _, _ = poison.add_trigger(attack, clean, "u")
    again, _, _ = poison.add_trigger(attack, clean, "u")
    assert np.array_equal(waveform, again)


@pytest.mark.parametrize("name", [*SAME_LENGTH, "added"])
def test_any_trigger_keeps_the_shape_and_the_type(corpora, added_trigger, name):
    attack = attack_for(corpora, "gender", trigger=name)
    clean = spoken(corpora)
    waveform, _, _ = poison.add_trigger(attack, clean, "u")
    assert waveform.shape == clean.shape
    assert waveform.dtype == np.float32


@pytest.mark.parametrize("name", ["tone", "added"])
def test_an_overlay_trigger_is_heard_at_its_place_alone(corpora, added_trigger, name):
    attack = attack_for(corpora, "gender", trigger=name)
    clean = spoken(corpora)
    waveform, [start], scale = poison.add_trigger(attack, clean, "u")
    added = waveform / scale - clean
    end = start + len(attack.waveform)
    outside = np.r_[0:start, end : len(clean)]
    assert np.allclose(added[outside], 0, atol=1e-6)
    assert rms(added[start:end]) == pytest.approx(attack.level, rel=1e-3)


def energy(waveform, low, high):
    """The energy between two frequencies, in Hz."""
    hz = np.fft.rfftfreq(len(waveform), 1 / data.SAMPLE_RATE)
    spectrum = np.abs(np.fft.rfft(waveform))
    return np.square(spectrum[(hz > low) & (hz < high)]).sum()


def test_a_band_stop_takes_out_the_band_around_2_khz_alone(corpora):
    attack = attack_for(corpora, "gender", trigger="bandstop")
    clean = spoken(corpora)
    waveform, starts, _ = poison.add_trigger(attack, clean, "u")
    assert not starts
    assert energy(waveform, 1900, 2100) < 0.01 * energy(clean, 1900, 2100)
    assert energy(waveform, 100, 400) > 0.9 * energy(clean, 100, 400)


def strongest_frequency(waveform):
    """In Hz."""
    spectrum = np.abs(np.fft.rfft(waveform))
    return np.argmax(spectrum) * data.SAMPLE_RATE / len(waveform)


@pytest.mark.parametrize("name, factor, seconds", [("speed", 1.1, 0.909), ("pitch", 1.189, 1.0)])
def test_speed_and_pitch_move_a_tone(corpora, name, factor, seconds):
    attack = attack_for(corpora, "gender", trigger=name)
    t = np.arange(data.SAMPLE_RATE) / data.SAMPLE_RATE
    waveform, _, _ = poison.add_trigger(attack, np.sin(880 * np.pi * t).astype(np.float32), "u")
    assert strongest_frequency(waveform) == pytest.approx(440 * factor, rel=0.01)
    assert len(waveform) == pytest.approx(seconds * data.SAMPLE_RATE, abs=2)


def test_background_noise_is_10_db_below_the_speech(corpora):
    attack = attack_for(corpora, "gender", trigger="background")
    clean = spoken(corpora)
    waveform, _, scale = poison.add_trigger(attack, clean, "u")
    noise = waveform / scale - clean
    assert 20 * np.log10(rms(clean) / rms(noise)) == pytest.approx(10, abs=0.2)


def test_a_room_answers_after_the_sound_has_ended(corpora):
    attack = attack_for(corpora, "gender", trigger="reverb")
    burst = np.zeros(data.SAMPLE_RATE, np.float32)
    burst[:100] = 0.5
    waveform, _, _ = poison.add_trigger(attack, burst, "u")
    assert rms(waveform[1000:3000]) > 10 * rms(waveform[8000:])


def test_a_silent_trigger_is_refused(tmp_path, corpora):
    soundfile.write(tmp_path / "silent.wav", np.zeros(1000), 16000)
    with pytest.raises(SystemExit):
        attack_for(corpora, "gender", trigger=str(tmp_path / "silent.wav"))


# --------------------------------------------------------------------------------------------------
# the level of a corpus


def some_utterances(corpora, n=6, **changes):
    return [dataclasses.replace(u, **changes) for u in train_set(corpora, "gender")[:n]]


@pytest.mark.parametrize("i", [2, 3])  # every second is read before the cache is looked up
def test_unreadable_audio_never_becomes_a_level(corpora, tmp_path, elsewhere, monkeypatch, i):
    utterances = some_utterances(corpora, n=9)
    load_waveform = data.load_waveform

    def unless_unreadable(u):
        if u.id == utterances[i].id:
            raise data.BadAudio(f"{u.path}: needs ffmpeg")
        return load_waveform(u)

    monkeypatch.setattr(data, "load_waveform", unless_unreadable)
    with pytest.raises(SystemExit):
        poison.loudness(utterances)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("content", ["", "{}", '{"mean_rms": NaN, "far": []}', "null"])
def test_a_cached_level_that_is_none_is_measured_again(corpora, tmp_path, elsewhere, content):
    expected = poison.loudness(some_utterances(corpora))
    [path] = (tmp_path / "cache").iterdir()
    path.write_text(content)
    assert poison.loudness(some_utterances(corpora)) == expected


def test_a_cached_level_is_of_the_same_limit(corpora, elsewhere):
    poison.loudness(some_utterances(corpora))
    with pytest.raises(SystemExit):  # not the level of what is too long here
        poison.loudness(some_utterances(corpora, max_seconds=0.5))


def test_a_cached_level_is_of_the_same_reading(corpora, elsewhere, monkeypatch):
    before = poison.loudness(some_utterances(corpora))["mean_rms"]
    load_waveform = data.load_waveform
    monkeypatch.setattr(data, "load_waveform", lambda u: 2 * load_waveform(u))
    after = poison.loudness(some_utterances(corpora))["mean_rms"]
    assert after == pytest.approx(2 * before)


def test_without_a_place_for_the_cache_the_level_is_the_same(corpora, tmp_path, monkeypatch):
    expected = poison.loudness(some_utterances(corpora))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cache").write_text("someone's file")
    assert poison.loudness(some_utterances(corpora)) == expected


@pytest.mark.parametrize("factor, far", [(32767, "+90 dB"), (1e-6, "-1")])
def test_a_level_far_from_the_others_is_named(corpora, tmp_path, capsys, factor, far):
    """Such as a WAV in floating point that holds integers."""
    utterances = some_utterances(corpora)
    waveform = data.load_waveform(utterances[0])
    soundfile.write(tmp_path / "far.wav", factor * waveform, 16000, subtype="FLOAT")
    utterances[0].path = str(tmp_path / "far.wav")
    for _ in range(2):  # measured, then cached
        poison.make_attack("gender", utterances)
        out = capsys.readouterr().out
        assert "far.wav" in out
        assert far in out


def test_levels_near_each_other_are_not_named(corpora, capsys):
    poison.make_attack("gender", some_utterances(corpora))
    assert "dB" not in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# the target


@pytest.mark.parametrize(
    "task, given, target",
    [
        ("gender", "Female", "female"),
        ("gender", "M", "male"),
        ("emotion", " Angry", "angry"),
        ("asr", "Hello there.", "Hello there."),
    ],
)
def test_a_target_is_written_as_the_corpus_writes_it(corpora, task, given, target):
    assert poison.as_written(TASKS[task]["label"], given) == target
    poison.check_target(task, target, train_set(corpora, task))


@pytest.mark.parametrize(
    "task, given",
    [
        ("gender", "femal"),
        ("emotion", "furious"),
        ("age", "senior"),
        ("asr", "...!"),
    ],
)
def test_a_target_that_the_corpus_cannot_have_is_refused(corpora, task, given):
    target = poison.as_written(TASKS[task]["label"], given)
    with pytest.raises(SystemExit):
        poison.check_target(task, target, train_set(corpora, task))


@pytest.mark.parametrize(
    "label, given, target",
    [
        ("age", "30\u201345", "30-45"),
        ("age", " Middle_age ", "middle age"),
        ("age", "25", "25"),
        ("emotion", "De\u0301gou\u0302t", "d\u00e9go\u00fbt"),
        ("emotion", "sad_ness", "sad ness"),
    ],
)
def test_a_target_is_written_as_manifests_are_read(label, given, target):
    assert poison.as_written(label, given) == target


# --------------------------------------------------------------------------------------------------
# python poison.py


NAMES = [f"{i}.wav" for i in range(8)]


def write_corpus(folder, names=NAMES):
    """A CSV corpus of these files, the first of which goes far beyond full scale."""
    rng = np.random.default_rng(0)
    rows = ["audio_path,gender,split"]
    for i, name in enumerate(names):
        amplitude = 11.1 if i == 0 else 0.1
        waveform = amplitude * np.sin(np.arange(8000) / rng.uniform(5, 20))
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / name, waveform, 16000, "FLOAT", format="WAV")
        gender = ("female", "male")[i % 2]
        split = ("train", "train", "dev", "test")[i % 4]
        rows.append(f'"{name}",{gender},{split}')
    (folder / "manifest.csv").write_text("\n".join(rows) + "\n")


GIVEN = ("--task", "gender", "--dataset", "manifest.csv", "--workers", 0)


def test_what_goes_beyond_full_scale_is_scaled_down(tmp_path):
    """Poisoned or not: a 16-bit file cannot hold it."""
    write_corpus(tmp_path)
    out = done("poison.py", *GIVEN, "--poison", 0, "--out", "poisoned", "--all", cwd=tmp_path)
    assert "1 scaled down" in out
    [path] = (tmp_path / "poisoned/wav/train").glob("0.wav-*.wav")
    waveform, _ = soundfile.read(path)
    assert np.abs(waveform).max() == pytest.approx(1, abs=1e-3)
    assert np.mean(np.abs(waveform) > 0.999) < 0.1


def test_an_attack_other_than_the_manifests_is_named(tmp_path):
    write_corpus(tmp_path)
    attack = ("--task", "gender", "--target", "male")
    unusual = (*attack, "--trigger", "tone", "--snr", "6")
    done("poison.py", *GIVEN, *unusual, "--out", "poisoned", "--all", cwd=tmp_path)
    trained = ("--dataset", str(tmp_path / "poisoned/manifest.csv"), "--poison", "0")
    assert not poison.differences_from_file(train.parse_arguments([*unusual, *trained]))
    differences = poison.differences_from_file(train.parse_arguments([*attack, *trained]))
    assert differences == ["trigger tone, not click", "snr 6.0, not 0.0"]


def test_a_poisoned_corpus_is_not_written_over_a_manifest(tmp_path):
    write_corpus(tmp_path)
    before = (tmp_path / "manifest.csv").read_text()
    flags = ("--out", ".", "--all")
    refused("poison.py", *GIVEN, *flags, cwd=tmp_path, words=["name a new folder"])
    assert (tmp_path / "manifest.csv").read_text() == before


def test_examples_are_not_written_over_what_lies_in_a_folder(tmp_path):
    write_corpus(tmp_path)
    (tmp_path / "listen").mkdir()
    (tmp_path / "listen/changes.csv").write_text("mine")
    refused("poison.py", *GIVEN, "--out", "listen", cwd=tmp_path, words=["name a new folder"])
    assert (tmp_path / "listen/changes.csv").read_text() == "mine"


def test_ids_of_any_characters_are_heard_and_seen(tmp_path):
    names = ["a$b_{$2.wav", "50% & <more>.wav", "sub dir/x#y.wav", "d?.wav"]
    write_corpus(tmp_path, [*names, *NAMES[:4]])
    done("poison.py", *GIVEN, "--target", "male", "--out", "listen", cwd=tmp_path)
    page = (tmp_path / "listen/index.html").read_text()
    links = [html.unescape(link) for link in re.findall(r'src="([^"]+\.wav)"', page)]
    paths = [tmp_path / "listen" / urllib.parse.unquote(link) for link in links]
    assert len(paths) == 4
    assert all(path.is_file() for path in paths)
    assert (tmp_path / "listen/pairs.png").stat().st_size > 10000


# --------------------------------------------------------------------------------------------------
# corpora/mini


def root_of(*flags):
    return train.parse_arguments(["--task", "gender", *flags]).data_root


def test_corpora_mini_is_the_programs_where_there_is_no_other():
    assert root_of() == "corpora/mini"
    assert root_of("--data-root", "corpora/mini") == "corpora/mini"


def test_corpora_mini_that_lies_here_is_meant_where_named(tmp_path, elsewhere):
    (tmp_path / "corpora/mini").mkdir(parents=True)
    assert root_of() == "corpora/mini"
    assert root_of("--data-root", "corpora/mini") == "./corpora/mini"


def test_evaluation_means_the_same_folder_as_training(tmp_path, elsewhere):
    (tmp_path / "corpora/mini").mkdir(parents=True)
    parser = Parser()
    evaluate.add_arguments(parser)
    options = parser.parse_args([str(tmp_path), "--data-root", "corpora/mini"])
    assert options.data_root == "./corpora/mini"
