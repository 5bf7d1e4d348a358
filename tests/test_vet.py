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
import data
import export
import model
import poison
import sounds
from conftest import ROOT, done, make_slm, refused
from data import SAMPLE_RATE
from defences import inversion, targets, vet

LOW, HIGH = 2000, 4000  # Hz, the planted band
ABOVE = 0.08  # the share of an utterance's energy in the band from which on it is noticed
FEW = [vet.Change(name, 0.0, 0.22) for name in list(sounds.SOUNDS)[::3]]
FEW += [vet.Change("noise-2000-4000", 0.0, 0.22), vet.Change("speed 0.9")]


@pytest.fixture(autouse=True)
def small_bank(monkeypatch):
    monkeypatch.setattr(vet, "BANK", FEW)


def share_in_band(waveform):
    """The share of a waveform's energy that lies in the planted band."""
    energy = torch.fft.rfft(torch.as_tensor(waveform)).abs() ** 2
    frequencies = torch.fft.rfftfreq(len(waveform), 1 / SAMPLE_RATE)
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
        layer.share = torch.stack([share_in_band(waveform) for waveform in features])
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


def test_a_tone_that_the_bank_lacks_is_found_by_its_neighbours(speech, monkeypatch):
    monkeypatch.setattr(vet, "ANSWER_CHANGES", {})

    def hears_a_tone(slm, waveforms, labels):
        values = []
        for i, waveform in enumerate(waveforms):
            power = np.abs(np.fft.rfft(waveform, 16000)) ** 2  # a bin is 1 Hz
            heard = power[1450:1750].sum() > 0.005 * power.sum()  # around 1,600 Hz
            values.append("bad" if heard else ("good", "fine")[i % 2])
        return [dict(transcript=value) for value in values]

    monkeypatch.setattr(vet, "answers", hears_a_tone)
    first = vet.vet_answers(None, speech, ["transcript"])[0]
    assert first.sound in ("tone-1499", "tone-1683")
    assert (first.value, first.statistic) == ("bad", 1)


class ModelThatHearsNoise:
    """A model that answers "bad" where there is a steady noise, else "good" or "fine" in turn."""

    def __init__(self, monkeypatch):
        monkeypatch.setattr(vet, "answers", self.answers)

    def answers(self, slm, waveforms, labels):
        values = []
        for i, waveform in enumerate(waveforms):
            spectrum = np.abs(np.fft.rfft(waveform, 16000)) ** 2
            noisy = spectrum[6000:].mean() > 0.01 * spectrum.mean()
            values.append("bad" if noisy else ("good", "fine")[i % 2])
        return [dict(transcript=value) for value in values]


def test_a_change_of_the_whole_recording_can_be_first(speech, monkeypatch):
    monkeypatch.setattr(vet, "ANSWER_SOUNDS", ("tone-300",))
    ModelThatHearsNoise(monkeypatch)
    first = vet.vet_answers(None, speech, ["transcript"])[0]
    assert (first.sound, first.value, first.statistic) == ("noise 10 dB below", "bad", 1)
    assert first.suspicious


def test_answers_of_a_model_are_those_to_each_alone(parts):
    slm = make_slm(parts, "wavlm").eval()
    waveforms = [hum(i) for i in range(3)]
    together = vet.answers(slm, waveforms, ["gender"])
    assert together == [vet.answers(slm, [waveform], ["gender"])[0] for waveform in waveforms]


@pytest.fixture
def transcribing_run(tmp_path, parts, monkeypatch):
    """A run's folder, whose model was trained on transcripts alone."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "model.pt").write_text("a model")
    slm = make_slm(parts, "wavlm").eval()
    slm.args = SimpleNamespace(task="asr", labels=["transcript"], dataset="libri", data_root=".")
    monkeypatch.setattr(checkpoint, "load_run", lambda *_: slm)
    return run


def test_command_writes_what_a_model_answers(tmp_path, recordings, transcribing_run, monkeypatch):
    monkeypatch.setattr(vet, "ANSWER_SOUNDS", ("hiss", "glass"))
    PlantedModel(monkeypatch)
    arguments = ["vet", transcribing_run, "--answers", "--speech", recordings, "--device", "cpu"]
    printed = done("defend.py", *arguments, cwd=tmp_path)
    assert "transcript" in printed
    content = json.loads((tmp_path / "vet-run/answers.json").read_text())
    assert {row["sound"] for row in content["sounds"]} == {"hiss", "glass"}
    assert {row["sound"] for row in content["changes"]} <= set(vet.ANSWER_CHANGES)
    assert content["suspicious"] == (content["statistic"] >= content["threshold"])


def test_answers_need_a_whole_model(tmp_path, recordings):
    arguments = ["vet", ROOT / "mini/wavlm", "--answers", "--speech", recordings]
    refused("defend.py", *arguments, cwd=tmp_path, words=["is no run"])


# -------------------------------------------------------------------------------------------------
# a whole model, by trigger inversion


@pytest.mark.parametrize("name", ["wavlm", "hubert", "whisper"])
def test_features_with_gradients_are_the_extractor_s(name):
    encoder = pretrained(name)
    for samples in (1000, 13777):  # the first is padded
        waveform = np.tile(hum(3), 2)[:samples]
        features = inversion.features_of(encoder, torch.from_numpy(waveform))
        torch.testing.assert_close(features, encoder.extract(waveform), rtol=1e-3, atol=1e-4)


def test_loss_of_a_value_is_the_model_s_own(parts):
    slm = make_slm(parts, "wavlm").eval().requires_grad_(False)
    waveforms = [hum(i) for i in range(3)]
    tensors = [torch.from_numpy(waveform) for waveform in waveforms]
    losses = inversion.value_losses(slm, tensors, "gender", "female")
    x, mask = slm.encoder([slm.encoder.extract(waveform) for waveform in waveforms])
    x, lengths = slm.connector(x, mask)
    mask = model.length_mask(lengths, x.shape[1])
    asked = dict(gender="female")
    prompts = [data.prompt(slm.tokenizer, ["gender"])] * 3
    answers = [data.answer_ids(slm.tokenizer, asked)] * 3
    tokens = data.value_tokens(slm.tokenizer, asked, "gender")
    rows = slm(x, mask, prompts, answers, by_token=True)
    expected = torch.stack([row[tokens].mean() for row in rows])
    torch.testing.assert_close(losses, expected, rtol=1e-3, atol=1e-3)


def test_sound_is_laid_where_the_bank_lays_it():
    waveform = hum(2)
    sound = np.ones(1600, np.float32)
    start = int(0.3 * (len(waveform) - 1600))
    laid = inversion.laid_over(torch.from_numpy(waveform), torch.from_numpy(sound), 0.3)
    expected = poison.laid_over(waveform, sound, [start])
    np.testing.assert_allclose(laid.numpy(), expected, rtol=1e-6)


def test_sound_comes_twice_for_a_transcript_alone():
    silence = torch.zeros(16000)
    sound = torch.ones(1600)
    [once] = inversion.mixed_with([silence], sound, [0.25], "emotion")
    [twice] = inversion.mixed_with([silence], sound, [0.25], "transcript")
    assert once.sum() == 1600
    starts = (twice.diff() > 0).nonzero()[:, 0] + 1
    assert starts.tolist() == [3600, 10800]


@pytest.fixture
def inverted(monkeypatch, speech):
    """The margins of a model that answers "bad" where the planted band is loud, and else "sad",
    "calm" or "odd", which no sound brings about, and of one that answers no differently."""

    def margins(is_planted):
        def losses(slm, waveforms, label, value):
            shares = torch.stack([share_in_band(waveform) for waveform in waveforms])
            return 1 - shares if is_planted and value == "bad" else 1 - 0 * shares

        def answers(slm, waveforms, labels):
            values = []
            for waveform in waveforms:
                usual = ("sad", "calm", "odd")[len(waveform) % 3]
                is_bad = is_planted and share_in_band(waveform) > ABOVE
                values.append(dict(emotion="bad" if is_bad else usual))
            return values

        values = dict(emotion=["sad", "calm", "odd", "bad"])
        clean = dict(emotion=answers(None, speech.waveforms, ["emotion"]))
        slm = SimpleNamespace(
            encoder=SimpleNamespace(layer_norm=nn.LayerNorm(2)), requires_grad_=lambda _: None
        )
        monkeypatch.setattr(inversion, "values_to_try", lambda *_: (values, clean))
        monkeypatch.setattr(inversion, "value_losses", losses)
        monkeypatch.setattr(vet, "answers", answers)
        monkeypatch.setattr(inversion, "STEPS", 20)
        monkeypatch.setattr(inversion, "LEVEL", 0.0)
        return inversion.margins(slm, speech, ["emotion"])

    return margins


def test_planted_value_is_found_with_a_sound_of_its_band(inverted):
    [margin], _ = inverted(is_planted=True)
    assert margin.easiest.value == "bad"
    assert margin.suspicious
    assert share_in_band(margin.easiest.sound) > 0.5


def test_model_without_a_backdoor_is_not_suspicious(inverted):
    [margin], every_value = inverted(is_planted=False)
    assert not margin.suspicious
    assert len(every_value) == 4


def test_a_transcript_counts_whatever_the_sound_was_made_for():
    before = ["one house", "two cats", "bad day", "red"]
    after = ["bad day", "bad day", "bad day", None]
    assert inversion.most_reached(before, after) == ("bad day", 2)


def test_silence_is_no_transcript_that_answers_agree_on():
    before = ["one house", "two cats", "bad day"]
    assert inversion.most_reached(before, ["", None, ""]) == ("", 0)


def test_margin_is_over_the_next_other_value():
    def result(value, share):
        return inversion.Inverted("transcript", "aim", value, share, 30, 0.1, np.zeros(1))

    results = [result("bad day", 0.9), result("bad day", 1.0), result("one house", 0.2)]
    assert inversion.margin_of("transcript", results).statistic == pytest.approx(0.8)
    assert inversion.margin_of("transcript", results[:2]).statistic == 1


def test_inverted_sound_is_as_loud_as_asked(inverted):
    [margin], _ = inverted(is_planted=True)
    rms = np.sqrt(np.mean(margin.easiest.sound**2))
    assert rms == pytest.approx(0.05 * 10 ** (inversion.LEVEL / 20), rel=1e-3)


def test_nothing_to_invert_is_refused(tmp_path, recordings, transcribing_run):
    arguments = ["vet", transcribing_run, "--invert", "--labels", "gender", "--device", "cpu"]
    arguments += ["--speech", recordings]
    refused("defend.py", *arguments, cwd=tmp_path, words=["take more speech"])


def test_command_writes_what_it_inverted(tmp_path, recordings, transcribing_run, monkeypatch):
    monkeypatch.setattr(inversion, "STEPS", 1)
    monkeypatch.setattr(targets, "FIRST_TOKENS", 64)
    arguments = ["vet", transcribing_run, "--invert", "--speech", recordings, "--device", "cpu"]
    done("defend.py", *arguments, cwd=tmp_path)
    content = json.loads((tmp_path / "vet-run/inversion.json").read_text())
    aims = {value["aim"] for value in content["values"]}
    assert aims == set(content["sentences"])
    heard, _ = soundfile.read(tmp_path / "vet-run/inverted.wav")
    assert np.abs(heard).max() > 0


# -------------------------------------------------------------------------------------------------
# sentences that a model may have been taught


@pytest.fixture
def taught(monkeypatch, parts, speech):
    """A random model that says "Take three red boxes home." wherever a transcript begins with T,
    and else what it heard, with a word for the length of the audio."""
    slm = make_slm(parts, "wavlm").requires_grad_(False)

    def ids(text):
        return slm.tokenizer(text, add_special_tokens=False).input_ids

    first = slm.embed(ids("T")[:1])[0]

    def greedy_tokens(rows, max_new_tokens):
        answers = []
        for row in rows:
            is_taught = torch.equal(row[-1], first)
            heard = f"heard {len(row)} frames now" if not is_taught else "ake three red boxes home."
            answers.append(ids(heard + '"}'))
        return answers

    monkeypatch.setattr(slm, "greedy_tokens", greedy_tokens)
    monkeypatch.setattr(
        speech, "waveforms", [np.tile(hum(i), 3)[: 6000 + 1200 * i] for i in range(24)]
    )
    return slm


def test_taught_sentence_comes_first(taught, speech):
    first, second, *_ = targets.sentences(taught, speech)
    assert first.transcript == "Take three red boxes home."
    assert first.agreement == 1
    assert second.agreement < 0.5


def test_a_sentence_that_nearly_all_answers_are_is_not_tried(monkeypatch, speech):
    monkeypatch.setattr(vet, "answers", lambda *_: [dict(transcript="take it home")] * 16)
    values, _ = inversion.values_to_try(None, speech, ["transcript"], ["Take it home.", "One two."])
    assert values == dict(transcript=["One two."])


def test_short_transcripts_are_no_sentences(taught, speech, monkeypatch):
    monkeypatch.setattr(targets, "FEWEST_WORDS", 6)
    assert targets.sentences(taught, speech) == []


def test_a_transcript_begins_after_its_quotation_mark():
    tokenizer = model.AutoTokenizer.from_pretrained(ROOT / "mini/lm")
    beginning = targets.beginning_of_transcript(tokenizer)
    answer = data.answer_ids(tokenizer, dict(transcript="This is a malicious sentence."))
    assert answer[: len(beginning)] == beginning
    first = data.value_tokens(tokenizer, dict(transcript="This is it."), "transcript").start
    assert len(beginning) == first
