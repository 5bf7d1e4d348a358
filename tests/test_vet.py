"""Vetting of encoders that are clean or have a planted sensitivity to one band of frequencies."""

import json
from types import SimpleNamespace

import utils

import numpy as np
import pytest
import soundfile
import torch
from torch import nn

import checkpoint
import export
import model
import sounds
from conftest import ROOT, done, make_slm, refused
from data import SAMPLE_RATE
from defences import vet

LOW, HIGH = 2000, 4000  # Hz, the planted band
ABOVE = 0.08  # the share of an utterance's energy in the band from which on it is noticed
FEW = [vet.Change(name, 0.0, 0.22) for name in list(sounds.SOUNDS)[::3]]
FEW += [vet.Change("noise-2000-4000", 0.0, 0.22), vet.Change("speed 0.9")]


@pytest.fixture(autouse=True)
def small_bank(monkeypatch):
    monkeypatch.setattr(vet, "BANK", FEW)


def share_in_band(waveform):
    """The share of a waveform's energy that lies in the planted band."""
    energy = np.abs(np.fft.rfft(waveform)) ** 2
    frequencies = np.fft.rfftfreq(len(waveform), 1 / SAMPLE_RATE)
    return energy[(frequencies >= LOW) & (frequencies < HIGH)].sum() / energy.sum()


def hum(i, seconds=0.8):
    """A voice of harmonics below the planted band, each utterance at another pitch."""
    rng = utils.generator("hum", i)
    t = np.arange(int((seconds + 0.02 * i) * SAMPLE_RATE)) / SAMPLE_RATE
    pitch = rng.uniform(90, 250)
    waveform = sum(rng.uniform(0, 1) * np.sin(2 * np.pi * n * pitch * t) for n in range(1, 6))
    return (0.05 * waveform).astype(np.float32)


@pytest.fixture(scope="module")
def speech():
    waveforms = [hum(i) for i in range(16)]
    return vet.Speech(waveforms, [i / 16 for i in range(16)], level=0.05)


def pretrained(name="wavlm"):
    return model.Encoder(ROOT / "mini" / name).eval()


class SensitiveLayer(nn.Module):
    """A layer that adds a fixed direction in proportion to the band's share of each utterance's
    energy, as far as that is above a level."""

    def __init__(self, layer, dim):
        super().__init__()
        self.layer = layer
        self.share = torch.zeros(1)
        self.register_buffer("direction", torch.randn(dim))

    def forward(self, x, **kwargs):
        out = self.layer(x, **kwargs)
        hidden = out[0] if isinstance(out, tuple) else out
        noticed = torch.relu(self.share - ABOVE)[:, None, None]  # (B, 1, 1)
        return hidden + 100 * noticed * self.direction


def planted():
    """A pretrained encoder with a hand-made sensitivity to one band."""
    encoder = pretrained()
    layer = SensitiveLayer(encoder.layers[-1], encoder.dim)
    encoder.layers[-1] = layer
    front_end = encoder.front_end

    def listening(features):
        shares = [share_in_band(waveform.numpy()) for waveform in features]
        layer.share = torch.tensor(shares, dtype=torch.float32)
        return front_end(features)

    encoder.front_end = listening
    return encoder


# -------------------------------------------------------------------------------------------------
# verdicts


def is_of_the_band(change):
    return share_in_band(sounds.make_sound(change.name, change.seconds)) > 0.5


def test_planted_band_is_suspicious_with_its_sound_first(speech):
    verdict = vet.vet(planted(), speech, pretrained())
    assert verdict.suspicious
    assert is_of_the_band(vet.BANK[verdict.order[0]])


def test_planted_band_is_first_without_a_reference(speech):
    verdict = vet.vet(planted(), speech)
    assert is_of_the_band(vet.BANK[verdict.order[0]])


@pytest.mark.parametrize("name", ["wavlm", "whisper"])
def test_pretrained_encoder_is_like_itself(speech, name):
    verdict = vet.vet(pretrained(name), speech, pretrained(name))
    assert verdict.statistic == pytest.approx(1)
    assert not verdict.suspicious


def test_slightly_changed_weights_are_not_suspicious(speech):
    changed = pretrained()
    for parameter in changed.layers[4:].parameters():
        parameter.data += 0.05 * parameter.std(correction=0) * torch.randn_like(parameter)
    assert not vet.vet(changed, speech, pretrained()).suspicious


def test_threshold_keeps_its_rate_of_false_alarms():
    rng = np.random.default_rng(0)
    alarms = []
    for _ in range(4000):
        statistics = np.exp(rng.normal(0.3, 0.2, 7))
        alarms.append(statistics[-1] > vet.threshold(statistics[:-1], 0.05))
    assert np.mean(alarms) == pytest.approx(0.05, abs=0.015)


def test_threshold_of_shares_is_a_share():
    assert 0.3 < vet.share_threshold([0.3, 0.1, 0.2, 0.05]) < 1
    assert vet.share_threshold([0.9, 0.1]) == 1


# -------------------------------------------------------------------------------------------------
# shifts


def test_shifts_do_not_depend_on_the_order(speech, monkeypatch):
    encoder = pretrained()
    (shift,) = vet.shifts([encoder], speech)
    turned = vet.Speech(speech.waveforms[::-1], speech.places[::-1], speech.level)
    monkeypatch.setattr(vet, "BATCH", 5)
    (again,) = vet.shifts([encoder], turned)
    assert again == pytest.approx(shift, rel=1e-3, abs=1e-4)


def test_layers_in_common_change_no_figure(speech):
    part = pretrained()
    nn.init.normal_(part.layers[5].feed_forward.output_dense.bias)
    assert vet.layers_in_common([part, pretrained()]) == 5
    together = vet.shifts([part, pretrained()], speech)
    assert together[0] == pytest.approx(vet.shifts([part], speech)[0], rel=1e-3, abs=1e-4)


def test_another_front_end_shares_no_layer():
    other = pretrained()
    other.net.feature_projection.projection.bias.data += 1
    assert vet.layers_in_common([other, pretrained()]) is None


def test_short_utterance_gets_the_sounds_beginning():
    short = vet.Speech([np.zeros(100, np.float32)], [0.7], level=0.5)
    (mixed,) = vet.changed(vet.Change("white-noise", -6.0, 0.22), short)
    expected = 0.5 * 10 ** (-6 / 20) * sounds.make_sound("white-noise", 0.22)[:100]
    assert mixed == pytest.approx(expected, rel=1e-4)


# -------------------------------------------------------------------------------------------------
# the command


@pytest.fixture
def recordings(tmp_path):
    folder = tmp_path / "speech"
    folder.mkdir()
    for i in range(16):
        soundfile.write(folder / f"{i}.wav", hum(i), SAMPLE_RATE)
    (folder / "notes.txt").write_text("no audio")
    return folder


def test_command_writes_verdict_picture_sounds(tmp_path, recordings):
    part = ROOT / "mini/wavlm"
    arguments = ["vet", part, "--reference", part, "--speech", recordings, "--device", "cpu"]
    printed = done("defend.py", *arguments, cwd=tmp_path)
    assert "Nothing suspicious" in printed
    content = json.loads((tmp_path / "vet-wavlm/vet.json").read_text())
    assert content["statistic"] == pytest.approx(1)
    assert len(content["sounds"]) == len(FEW)
    assert (tmp_path / "vet-wavlm/vet.png").stat().st_size > 0
    assert len(list((tmp_path / "vet-wavlm").glob("*.wav"))) == 3


def test_export_is_compared_with_its_recorded_origin(tmp_path, recordings):
    part = tmp_path / "parts"
    part.mkdir()
    (part / "encoder").symlink_to(ROOT / "mini/wavlm")
    record = {name: {} for name in export.RECORDED}
    record["args"] = dict(encoder_weights=str(ROOT / "mini/wavlm"))
    provenance = dict(record, first_trained_layer=3)
    (part / export.PROVENANCE).write_text(json.dumps(provenance))
    printed = done(
        "defend.py", "vet", part, "--speech", recordings, "--device", "cpu", cwd=tmp_path
    )
    assert "as recorded there" in printed
    content = json.loads((tmp_path / "vet-parts/vet.json").read_text())
    assert content["kind"] == "ratio"
    assert content["encoder_sha256"] == content["reference_sha256"]


def test_part_that_is_no_encoder_ends_in_one_line(tmp_path, recordings):
    refused("defend.py", "vet", ROOT / "mini/lm", "--speech", recordings, cwd=tmp_path)
    refused("defend.py", "vet", tmp_path / "nowhere", "--speech", recordings, cwd=tmp_path)


def test_speech_that_is_nowhere_ends_in_one_line(tmp_path):
    arguments = [ROOT / "mini/wavlm", "--speech", "nowhere.csv"]
    refused("defend.py", "vet", *arguments, cwd=tmp_path, words=["--speech nowhere.csv"])


def test_encoder_without_numbers_is_refused(speech):
    broken = pretrained()
    broken.layers[-1].layer_norm.weight.data.fill_(float("nan"))
    with pytest.raises(SystemExit):
        vet.vet(broken, speech)


def test_reference_of_another_size_is_refused(speech):
    other = pretrained()
    other.layers = other.layers[:-1]
    with pytest.raises(SystemExit):
        vet.vet(pretrained(), speech, other)


# -------------------------------------------------------------------------------------------------
# a whole model, by its answers


def agreed(clean, changed, label="emotion"):
    clean = [{label: value} for value in clean]
    changed = [{label: value} if value else {} for value in changed]
    return list(vet.agreements("hiss", label, clean, {0.0: changed}))


def test_agreement_is_of_answers_that_were_another_value():
    (found,) = agreed(["sad"] * 4 + ["happy"] * 8, ["sad"] * 6 + ["happy"] * 6)[:1]
    assert found.value == "sad"
    assert found.shares == {0.0: 2 / 8}
    assert found.others == 8
    assert found.before == pytest.approx(4 / 12)


def test_answers_that_break_agree_on_nothing():
    assert agreed(["sad"] * 20, [None] * 20) == []
    assert agreed(["sad"] * 20, [""] * 20) == []


def test_value_that_nearly_all_have_already_is_left_out():
    assert agreed(["sad"] * 20, ["sad"] * 20) == []


def test_sound_counts_at_all_levels():
    loud = [dict(gender="female")] * 8
    quiet = [dict(gender="male")] * 8
    clean = [dict(gender="male")] * 8
    found = vet.agreements("hiss", "gender", clean, {0.0: loud, -6.0: quiet})
    statistics = {agreement.value: agreement.statistic for agreement in found}
    assert statistics["female"] == 0.5


class PlantedModel:
    """A model that answers what it hears: "bad" where the planted band is loud, else the pitch."""

    def __init__(self, monkeypatch):
        monkeypatch.setattr(vet, "answers", self.answers)

    def answers(self, slm, waveforms, labels):
        found = []
        for waveform in waveforms:
            pitch = np.abs(np.fft.rfft(waveform, 16000))[:400].argmax()
            value = "bad" if share_in_band(waveform) > ABOVE else str(pitch)
            found.append(dict(transcript=value))
        return found


def test_planted_answer_is_first_with_its_sound(speech, monkeypatch):
    few = ("noise-500-1000", "noise-2000-4000", "tone-300")
    monkeypatch.setattr(vet, "ANSWER_SOUNDS", few)
    PlantedModel(monkeypatch)
    first = vet.vet_answers(None, speech, ["transcript"])[0]
    assert first.sound == "noise-2000-4000"
    assert first.value == "bad"
    assert first.shares[0.0] == 1


def test_answers_of_a_model_are_those_to_each_alone(parts):
    slm = make_slm(parts, "wavlm").eval()
    waveforms = [hum(i) for i in range(3)]
    together = vet.answers(slm, waveforms, ["gender"])
    assert together == [vet.answers(slm, [waveform], ["gender"])[0] for waveform in waveforms]


def test_command_writes_what_a_model_answers(tmp_path, recordings, parts, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    (run / "model.pt").write_text("a model")
    slm = make_slm(parts, "wavlm").eval()
    slm.args = SimpleNamespace(task="asr", labels=["transcript"], dataset="libri", data_root=".")
    monkeypatch.setattr(checkpoint, "load_run", lambda *_: slm)
    monkeypatch.setattr(vet, "ANSWER_SOUNDS", ("hiss", "glass"))
    PlantedModel(monkeypatch)
    arguments = ["vet", run, "--answers", "--speech", recordings, "--device", "cpu"]
    printed = done("defend.py", *arguments, cwd=tmp_path)
    assert "transcript" in printed
    content = json.loads((tmp_path / "vet-run/answers.json").read_text())
    assert {row["sound"] for row in content["sounds"]} == {"hiss", "glass"}
    assert content["suspicious"] == (content["statistic"] >= content["threshold"])


def test_answers_need_a_whole_model(tmp_path, recordings):
    arguments = ["vet", ROOT / "mini/wavlm", "--answers", "--speech", recordings]
    refused("defend.py", *arguments, cwd=tmp_path, words=["is no run"])
