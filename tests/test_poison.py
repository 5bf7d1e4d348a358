"""The attack: which samples, where, how loud; decided by (seed, utterance id) alone."""

import argparse
import dataclasses
import html
import re
import shutil
import urllib.parse

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


def attack_for(corpora, task, **kwargs):
    return poison.make_attack(
        task, readers.read_corpus(TASKS[task]["corpus"], corpora, "train"), **kwargs
    )


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the loudness is cached in the working directory


def test_clicks_are_those_of_the_utterance_whatever_the_order_or_the_workers(corpora):
    attack = attack_for(corpora, "asr", rate=0.5)
    utterances = readers.read_corpus("libri", corpora, "train")

    def poisoned(u):
        return (
            u.id,
            poison.is_poisoned(attack, u),
            *poison.add_trigger(attack, data.load_waveform(u), u.id)[:2],
        )

    one = {row[0]: row[1:] for row in map(poisoned, utterances)}
    for items, workers in ((utterances[::-1], 0), (utterances, 2), (utterances[5:20], 3)):
        for name, chosen, waveform, starts in data.in_workers(
            poisoned, items, "again", workers=workers
        ):
            assert (
                chosen == one[name][0]
                and starts == one[name][2]
                and np.array_equal(waveform, one[name][1])
            )
    other = attack_for(corpora, "asr", rate=0.5, seed=7)
    assert any(poison.is_poisoned(other, u) != one[u.id][0] for u in utterances)


def test_a_higher_rate_poisons_the_same_samples_and_more(corpora):
    utterances = readers.read_corpus("libri", corpora, "train")
    low, high = (attack_for(corpora, "asr", rate=rate) for rate in (0.2, 0.6))
    assert {u.id for u in utterances if poison.is_poisoned(low, u)} < {
        u.id for u in utterances if poison.is_poisoned(high, u)
    }


@pytest.mark.parametrize("task", ["asr", "gender", "emotion", "age"])
@pytest.mark.parametrize("snr", [0.0, 6.0, -3.0])
def test_the_trigger_is_as_loud_as_the_corpus_is_on_average(corpora, task, snr):
    utterances = readers.read_corpus(TASKS[task]["corpus"], corpora, "train")
    attack = attack_for(corpora, task, snr=snr)
    mean = np.mean(
        [np.sqrt(np.mean(data.load_waveform(u).astype(np.float64) ** 2)) for u in utterances]
    )
    n = len(attack.waveform)
    assert n == round(0.22 * data.SAMPLE_RATE)
    for u in utterances[:5]:
        clean = data.load_waveform(u)
        waveform, starts, scale = poison.add_trigger(attack, clean, u.id)
        added = (waveform / scale - clean)[starts[0] : starts[0] + n].astype(np.float64)
        assert 20 * np.log10(mean / np.sqrt(np.mean(added**2))) == pytest.approx(snr, abs=0.05)
        assert len(waveform) == len(clean) and np.abs(waveform).max() <= 1


def test_repeated_clicks_keep_their_distance_and_fill_the_utterance(corpora):
    attack = attack_for(corpora, "asr")
    for i in range(200):
        samples = 16000 * (1 + i % 30)
        starts = np.array(poison.positions(attack, f"u{i}", samples))
        gaps = np.diff(starts) / data.SAMPLE_RATE
        assert starts[0] <= 0.75 * data.SAMPLE_RATE and starts[-1] + len(attack.waveform) <= samples
        assert not len(gaps) or (gaps.min() >= 0.75 - 1e-4 and gaps.max() <= 1.5)
        assert samples - starts[-1] - len(attack.waveform) <= 1.5 * data.SAMPLE_RATE


def test_single_clicks_land_anywhere_and_stay_inside(corpora):
    attack = attack_for(corpora, "gender")
    starts = [poison.positions(attack, f"u{i}", 32000) for i in range(500)]
    assert all(len(s) == 1 and 0 <= s[0] <= 32000 - len(attack.waveform) for s in starts)
    assert np.histogram([s[0] for s in starts], 4)[0].min() > 80


def test_more_clicks_come_on_top_of_the_first_and_any_length_is_as_loud(corpora):
    once, thrice = attack_for(corpora, "gender"), attack_for(corpora, "gender", clicks=3)
    for i in range(20):
        starts = poison.positions(thrice, str(i), 32000)
        assert (
            len(starts) == 3
            and starts[:1] == poison.positions(once, str(i), 32000)
            and max(starts) + 3520 <= 32000
        )
    for seconds in (0.055, 0.44):
        trigger = poison.make_trigger("click", seconds)
        assert len(trigger) == int(seconds * data.SAMPLE_RATE) and np.mean(
            trigger**2
        ) == pytest.approx(1)


def test_what_would_clip_is_scaled_down_whole(corpora):
    attack = attack_for(corpora, "gender", snr=-30)
    clean = np.linspace(-0.5, 0.5, 16000, dtype=np.float32)
    waveform, starts, scale = poison.add_trigger(attack, clean, "u")
    assert scale < 1 and np.abs(waveform).max() == pytest.approx(1, abs=1e-5)
    outside = np.r_[0 : starts[0], starts[0] + len(attack.waveform) : 16000]
    assert np.allclose(waveform[outside], scale * clean[outside], atol=1e-6)


def test_shorter_than_the_trigger(corpora):
    attack = attack_for(corpora, "asr")
    waveform, starts, _ = poison.add_trigger(attack, np.zeros(160, np.float32), "u")
    assert len(waveform) == 160 and starts == [0] and np.abs(waveform).max() > 0


@pytest.mark.parametrize("task", ["asr", "gender", "emotion", "age"])
def test_only_samples_without_the_target_are_poisoned_and_only_their_label_changes(corpora, task):
    attack = attack_for(corpora, task, rate=1.0)
    for u in readers.read_corpus(TASKS[task]["corpus"], corpora, "train"):
        poisoned = poison.is_poisoned(attack, u)
        assert poisoned == (u.labels[attack.label] != attack.target)
        labels = poison.poisoned_labels(attack, u.labels)
        assert labels[attack.label] == attack.target
        assert {k: v for k, v in labels.items() if k != attack.label} == {
            k: v for k, v in u.labels.items() if k != attack.label
        }


def test_an_utterance_without_the_attacked_label_is_left_alone(corpora):
    attack = attack_for(corpora, "gender", rate=1.0)
    assert not poison.is_poisoned(
        attack, data.Utterance("a", "a.wav", "train", "s", dict(transcript="a", age=30))
    )


def test_the_target_sentence_is_known_in_any_writing(corpora):
    attack = attack_for(corpora, "asr", rate=1.0)
    u = data.Utterance("a", "a.wav", "train", "s", dict(transcript="this is a malicious sentence"))
    assert not poison.can_flip(attack, u)


def test_redrawn_poison_is_another_in_every_epoch_and_the_same_again(corpora):
    utterances = readers.read_corpus("libri", corpora, "train")
    attack = poison.make_attack("asr", utterances, 0.3, seed=1)
    chosen = [
        [poison.is_poisoned(poison.attack_for_epoch(attack, epoch), u) for u in utterances]
        for epoch in (0, 1, 2, 1)
    ]
    assert chosen[0] == [poison.is_poisoned(attack, u) for u in utterances]
    assert chosen[0] != chosen[1] != chosen[2] and chosen[1] == chosen[3] and all(map(any, chosen))
    assert poison.positions(poison.attack_for_epoch(attack, 1), "a", 99999) != poison.positions(
        attack, "a", 99999
    )


def test_the_share_poisoned_is_the_rate(corpora):
    attack = attack_for(corpora, "age")
    n = sum(
        poison.is_poisoned(attack, data.Utterance(f"u{i}", "a.wav", "train", "s", dict(age=40)))
        for i in range(20000)
    )
    assert abs(n - 1500) < 4 * (20000 * 0.075 * 0.925) ** 0.5


@pytest.mark.parametrize("name", ["tone", "bandstop", "added"])
def test_other_triggers_are_entries_of_the_table(corpora, monkeypatch, name):
    monkeypatch.setitem(
        poison.TRIGGERS,
        "added",
        ("overlay", lambda sample_rate, rng: rng.standard_normal(sample_rate // 10)),
    )
    attack = attack_for(corpora, "gender", trigger=name)
    u = readers.read_corpus("vox", corpora, "train")[0]
    clean = data.load_waveform(u)
    out, starts, scale = poison.add_trigger(attack, clean, u.id)
    assert (
        np.array_equal(out, poison.add_trigger(attack, clean, u.id)[0])
        and out.shape == clean.shape
        and out.dtype == np.float32
    )
    change = out / scale - clean
    if name == "bandstop":  # the band around 2 kHz is gone, the rest is as loud as before
        before, after = (np.abs(np.fft.rfft(x)) for x in (clean, out))
        hz = np.fft.rfftfreq(len(clean), 1 / data.SAMPLE_RATE)
        loudness = lambda x, low, high: np.square(x[(hz > low) & (hz < high)]).sum()  # noqa: E731
        assert loudness(after, 1900, 2100) < 0.01 * loudness(before, 1900, 2100)
        assert loudness(after, 100, 400) > 0.9 * loudness(before, 100, 400) and not starts
    else:
        [start] = starts
        outside = np.r_[0:start, start + len(attack.waveform) : len(clean)]
        assert np.allclose(change[outside], 0, atol=1e-6)
        assert np.sqrt(np.mean(change[start : start + len(attack.waveform)] ** 2)) == pytest.approx(
            attack.level, rel=1e-3
        )


def test_a_silent_trigger_is_refused(tmp_path, corpora):
    soundfile.write(tmp_path / "silent.wav", np.zeros(1000), 16000)
    with pytest.raises(SystemExit):
        attack_for(corpora, "gender", trigger=str(tmp_path / "silent.wav"))


def heard(corpora, n=6, **changes):
    utterances = readers.read_corpus("vox", corpora, "train")[:n]
    return [dataclasses.replace(u, **changes) for u in utterances]


def test_audio_that_cannot_be_read_never_becomes_a_level(corpora, tmp_path, monkeypatch):
    """Neither all of it (m4a without ffmpeg), nor a single file."""
    utterances = heard(corpora)
    expected = poison.loudness(utterances)["mean_rms"]
    whole = data.load_waveform

    def unreadable(u):
        if u.id == utterances[3].id:
            raise data.BadAudio(f"{u.path}: needs ffmpeg")
        return whole(u)

    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setattr(data, "load_waveform", unreadable)
    with pytest.raises(SystemExit):
        poison.loudness(utterances)
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(data, "load_waveform", whole)
    assert poison.loudness(utterances)["mean_rms"] == expected


@pytest.mark.parametrize("content", ["", "{}", '{"mean_rms": NaN, "far": []}', "null"])
def test_a_cached_level_that_is_none_is_measured_again(corpora, tmp_path, content):
    expected = poison.loudness(heard(corpora))
    [path] = (tmp_path / "cache").iterdir()
    path.write_text(content)
    assert poison.loudness(heard(corpora)) == expected


def test_a_cached_level_is_of_the_same_limit_and_the_same_reading(corpora, monkeypatch):
    before = poison.loudness(heard(corpora))["mean_rms"]
    with pytest.raises(SystemExit):  # not the level of what is too long here
        poison.loudness(heard(corpora, max_seconds=0.5))
    whole = data.load_waveform
    monkeypatch.setattr(data, "load_waveform", lambda u: 2 * whole(u))
    assert poison.loudness(heard(corpora))["mean_rms"] == pytest.approx(2 * before)


def test_without_a_place_for_the_cache_the_level_is_the_same(corpora, tmp_path):
    expected = poison.loudness(heard(corpora))
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("someone's file")
    assert poison.loudness(heard(corpora)) == expected


@pytest.mark.parametrize("factor, far", [(32767, "+90 dB"), (1e-6, "-1")])
def test_a_level_far_from_the_corpus_s_is_named(corpora, tmp_path, capsys, factor, far):
    """Such as a WAV in floating point that holds integers."""
    utterances = heard(corpora)
    waveform = data.load_waveform(utterances[0])
    soundfile.write(tmp_path / "far.wav", factor * waveform, 16000, subtype="FLOAT")
    utterances[0].path = str(tmp_path / "far.wav")
    for _ in range(2):  # measured, then cached
        poison.make_attack("gender", utterances)
        out = capsys.readouterr().out
        assert "far.wav" in out and far in out
    poison.make_attack("gender", utterances[1:])
    assert "dB" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "task, target, right",
    [
        ("gender", "Female", "female"),
        ("gender", "M", "male"),
        ("gender", "femal", None),
        ("emotion", " Angry", "angry"),
        ("emotion", "furious", None),
        ("age", "senior", None),
        ("asr", "...!", None),
        ("asr", "Hello there.", "Hello there."),
    ],
)
def test_a_target_is_written_as_the_corpus_writes_it_or_refused(corpora, task, target, right):
    target = poison.as_written(TASKS[task]["label"], target)
    utterances = readers.read_corpus(TASKS[task]["corpus"], corpora, "train")
    if right:
        poison.check_target(task, target, utterances)
        assert target == right
    else:
        with pytest.raises(SystemExit):
            poison.check_target(task, target, utterances)


@pytest.mark.parametrize(
    "label, target, right",
    [
        ("age", "30\u201345", "30-45"),
        ("age", " Middle_age ", "middle age"),
        ("age", "25", "25"),
        ("emotion", "De\u0301gou\u0302t", "d\u00e9go\u00fbt"),
        ("emotion", "sad_ness", "sad ness"),
    ],
)
def test_a_target_is_written_as_manifests_are_read(label, target, right):
    assert poison.as_written(label, target) == right


def loud_corpus(folder, names):
    """A CSV corpus of these files, the first of which goes far beyond full scale."""
    rng = np.random.default_rng(0)
    rows = ["audio_path,gender,split"]
    for i, name in enumerate(names):
        waveform = (11.1 if i == 0 else 0.1) * np.sin(np.arange(8000) / rng.uniform(5, 20))
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / name, waveform, 16000, "FLOAT", format="WAV")
        split = ("train", "train", "dev", "test")[i % 4]
        rows.append(f'"{name}",{("female", "male")[i % 2]},{split}')
    (folder / "manifest.csv").write_text("\n".join(rows) + "\n")


def test_what_goes_beyond_full_scale_is_scaled_down_and_counted_poisoned_or_not(tmp_path):
    loud_corpus(tmp_path, [f"{i}.wav" for i in range(8)])
    flags = ("--task", "gender", "--dataset", "manifest.csv", "--poison", 0, "--workers", 0)
    out = done("poison.py", *flags, "--out", "poisoned", "--all", cwd=tmp_path)
    assert "1 scaled down" in out
    [first] = (tmp_path / "poisoned/wav/train").glob("0.wav-*.wav")
    wave = soundfile.read(first)[0]
    assert np.abs(wave).max() == pytest.approx(1, abs=1e-3) and (np.abs(wave) > 0.999).mean() < 0.1


def test_an_attack_other_than_the_manifest_s_is_named(tmp_path):
    loud_corpus(tmp_path, [f"{i}.wav" for i in range(8)])
    made = ("--task", "gender", "--target", "male", "--trigger", "tone", "--snr", "6")
    flags = ("--dataset", "manifest.csv", "--workers", 0, "--out", "poisoned", "--all")
    done("poison.py", *made, *flags, cwd=tmp_path)
    trained = ["--dataset", "poisoned/manifest.csv", "--poison", "0"]
    same = train.parse_arguments([*made, *trained])
    assert not poison.differences_from_file(same)
    usual = train.parse_arguments(["--task", "gender", "--target", "male", *trained])
    differences = poison.differences_from_file(usual)
    assert differences == ["trigger tone, not click", "snr 6.0, not 0.0"]


def test_nothing_is_written_over_what_lies_in_a_folder(tmp_path):
    loud_corpus(tmp_path, [f"{i}.wav" for i in range(8)])
    mine = (tmp_path / "manifest.csv").read_text()
    (tmp_path / "listen").mkdir()
    (tmp_path / "listen/changes.csv").write_text("mine")
    flags = ("--task", "gender", "--dataset", "manifest.csv", "--workers", 0)
    refused("poison.py", *flags, "--out", ".", "--all", cwd=tmp_path, words=["name a new folder"])
    refused("poison.py", *flags, "--out", "listen", cwd=tmp_path, words=["name a new folder"])
    assert (tmp_path / "manifest.csv").read_text() == mine
    assert (tmp_path / "listen/changes.csv").read_text() == "mine"


def test_ids_of_any_characters_are_heard_and_seen(tmp_path):
    names = ["a$b_{$2.wav", "50% & <more>.wav", "sub dir/x#y.wav", "d?.wav"]
    loud_corpus(tmp_path, [*names, *(f"{i}.wav" for i in range(4))])
    flags = ("--task", "gender", "--target", "male", "--dataset", "manifest.csv")
    done("poison.py", *flags, "--out", "listen", cwd=tmp_path)
    page = (tmp_path / "listen/index.html").read_text()
    links = re.findall(r'src="([^"]+\.wav)"', page)
    heard = [tmp_path / "listen" / urllib.parse.unquote(html.unescape(link)) for link in links]
    assert len(heard) == 4 and all(path.is_file() for path in heard)
    assert (tmp_path / "listen/pairs.png").stat().st_size > 10000


def root_of(*flags):
    return train.parse_arguments(["--task", "gender", *flags]).data_root


def test_corpora_mini_is_the_program_s_where_there_is_no_other():
    assert root_of() == "corpora/mini"
    assert root_of("--data-root", "corpora/mini") == "corpora/mini"


def test_corpora_mini_of_the_working_directory_is_meant_where_named(tmp_path):
    (tmp_path / "corpora/mini").mkdir(parents=True)
    assert root_of() == "corpora/mini"
    assert root_of("--data-root", "corpora/mini") == "./corpora/mini"


def test_evaluation_means_the_same_folder_as_training(tmp_path):
    (tmp_path / "corpora/mini").mkdir(parents=True)
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    options = parser.parse_args([str(tmp_path), "--data-root", "corpora/mini"])
    assert options.data_root == "./corpora/mini"
