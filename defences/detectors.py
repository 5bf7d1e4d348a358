"""Detectors of a trigger in a single input, for python defend.py detect.

A detector is an entry of DETECTORS: a function of (listener, waveforms, utterances) that returns
each input's suspicion (n,), which is higher where the input looks triggered.
"""

import contextlib
import dataclasses
import itertools

import utils

import jiwer
import numpy as np
import torch
import torchaudio

import data
import evaluate
import model
from data import SAMPLE_RATE

OVERLAYS = 8  # of STRIP
BATCH = 32


@dataclasses.dataclass
class Listener:
    """The attacked model as a detector uses it: it answers waveforms and counts forward passes.

    label: the label that the attack is on. clean: utterances that are known to be clean. longest:
    how many tokens an answer may have.
    """

    slm: model.SLM
    label: str
    clean: list
    longest: int
    passes: int = 0

    def inputs(self, waveforms, utterances):
        """Yields (audio embeddings, prompts) batch by batch."""
        for batch in data.chunks(list(zip(waveforms, utterances)), BATCH):
            self.passes += len(batch)
            features = [self.slm.encoder.extract(waveform) for waveform, _ in batch]
            x, mask = self.slm.encoder.pretrained_part(features)
            x, mask = self.slm.frozen_part(x, mask)
            audio = self.slm.audio_embeddings(x, mask)
            yield audio, [data.prompt(self.slm.tokenizer, list(u.labels)) for _, u in batch]

    @torch.no_grad()
    def values(self, waveforms, utterances):
        """The attacked label's value in each answer, None where there is none."""
        values = []
        for audio, prompts in self.inputs(waveforms, utterances):
            for answer in self.slm.decode(self.slm.pack(audio, prompts), self.longest):
                values.append(data.parse(answer).get(self.label))
        return values


def make_listener(slm, attack, utterances, clean):
    return Listener(slm, attack.label, clean, evaluate.longest_answer(slm, attack, utterances))


def agreement(a, b):
    """How well two values agree, from 0 to 1: transcripts by 1 - word error rate, ages linearly up
    to ten years apart, classes by identity."""
    if isinstance(a, int) and isinstance(b, int):
        return max(0.0, 1 - abs(a - b) / 10)
    if isinstance(a, str) and isinstance(b, str) and " " in a + b:
        return max(0.0, 1 - jiwer.wer(data.normalise(a) or "-", data.normalise(b)))
    return float(a == b)


def rms(waveform):
    return np.sqrt(np.mean(waveform**2))


def overlaid(waveform, other):
    """A waveform with another one over it, repeated or cut to its length and equally loud."""
    gain = rms(waveform) / (rms(other) + 1e-9)
    mixed = waveform + gain * np.resize(other, len(waveform))
    return mixed / max(1.0, np.abs(mixed).max())


def strip(listener, waveforms, utterances):
    """STRIP (Gao et al. 2019, arXiv 1902.06531): an answer is suspicious that does not change when
    clean speech lies over the input."""
    answers = []  # OVERLAYS lists of n values
    for k in range(OVERLAYS):
        mixed = []
        for waveform, u in zip(waveforms, utterances):
            other = first_drawn(listener.clean, "overlay", k, u.id)
            mixed.append(overlaid(waveform, data.load_waveform(other)))
        answers.append(listener.values(mixed, utterances))
    scores = []
    for values in zip(*answers):
        pairs = itertools.combinations(values, 2)
        scores.append(np.mean([agreement(a, b) for a, b in pairs]))
    return np.array(scores)


def first_drawn(utterances, *name):
    """One of the utterances, decided by `name` alone."""
    return min(utterances, key=lambda u: utils.draw(*name, u.id))


def slower(waveform):
    """5% slower, and lower in pitch."""
    return torchaudio.functional.resample(torch.from_numpy(waveform), 20, 21).numpy()


def speech_band(waveform):
    """Only 200 to 3400 Hz, as a telephone transmits."""
    x = torch.from_numpy(waveform)
    x = torchaudio.functional.highpass_biquad(x, SAMPLE_RATE, 200.0)
    return torchaudio.functional.lowpass_biquad(x, SAMPLE_RATE, 3400.0).numpy()


def perturbed_pair(listener, waveforms, utterances):
    """An answer is suspicious that changes when the audio changes slightly."""
    plain = listener.values(waveforms, utterances)
    after_slower = listener.values([slower(w) for w in waveforms], utterances)
    after_band = listener.values([speech_band(w) for w in waveforms], utterances)
    scores = []
    for value, a, b in zip(plain, after_slower, after_band):
        scores.append(1 - np.mean([agreement(value, a), agreement(value, b)]))
    return np.array(scores)


@contextlib.contextmanager
def eager_attention(lm):
    """A context in which the LM returns its attention weights: no other implementation can."""
    usual = lm.config._attn_implementation
    lm.set_attn_implementation("eager")
    yield
    lm.set_attn_implementation(usual)


def relative_entropy(weights):
    """The entropy of attention weights over T frames (..., T), averaged over all heads, as a share
    of its largest possible value, log T."""
    p = weights + 1e-12  # a head that looks at no frame counts as looking at all of them alike
    p = p / p.sum(-1, keepdim=True)
    entropy = -(p * p.log()).sum(-1)
    return float(entropy.mean() / np.log(max(2, weights.shape[-1])))


@torch.no_grad()
def attention_entropy(listener, waveforms, utterances):
    """An input is suspicious in which the first token of the answer attends to few frames: minus
    the entropy of the LM's attention over the audio, averaged over heads and layers."""
    slm = listener.slm
    scores = []
    with eager_attention(slm.lm):
        for audio, prompts in listener.inputs(waveforms, utterances):
            for row, prompt in zip(audio, prompts):
                (x,) = slm.pack([row], [prompt])  # (T, hidden)
                output = slm.lm.base_model(inputs_embeds=x[None], output_attentions=True)
                weights = torch.stack(output.attentions)[:, 0, :, -1]  # (layers, heads, T)
                start = len(prompt[0])
                scores.append(-relative_entropy(weights[..., start : start + len(row)]))
    return np.array(scores)


def loudness_peak(listener, waveforms, utterances):
    """A baseline without a model: the loudest 20 ms over the median of all that are not silent, in
    dB."""
    scores = []
    for waveform in waveforms:
        n = max(1, len(waveform) // 320)
        frames = np.resize(waveform, (n, 320))  # 20 ms each
        levels = np.sqrt(np.mean(frames**2, 1)) + 1e-6
        audible = levels[levels > 0.01 * levels.max()]
        scores.append(20 * np.log10(levels.max() / np.median(audible)))
    return np.array(scores)


DETECTORS = {
    "STRIP": strip,
    "perturbed pair": perturbed_pair,
    "attention entropy": attention_entropy,
    "loudness peak": loudness_peak,
}
