"""What notices a trigger in an input: functions of (listener, waveforms, utterances) to suspicion
(n,), higher where an input looks triggered. For `python defend.py detect`."""

import itertools

import utils

import jiwer
import numpy as np
import torch
import torchaudio

import data
import evaluate
from data import SAMPLE_RATE

OVERLAYS = 8  # of STRIP


class Listener:
    """A model as a detector sees it: it answers waveforms and counts forward passes."""

    def __init__(self, slm, attack, utterances, clean):
        self.slm, self.label, self.clean, self.passes = slm, attack.label, clean, 0
        self.longest = evaluate.longest_answer(slm, attack, utterances)

    def inputs(self, waveforms, utterances):
        """Yields (audio embeddings, prompts) by batches of 32."""
        for batch in data.chunks(list(zip(waveforms, utterances)), 32):
            self.passes += len(batch)
            x, mask = self.slm.frozen_part(
                *self.slm.encoder.pretrained_part([self.slm.encoder.extract(w) for w, _ in batch])
            )
            yield (
                self.slm.audio_embeddings(x, mask),
                [data.prompt(self.slm.tokenizer, list(u.labels)) for _, u in batch],
            )

    @torch.no_grad()
    def values(self, waveforms, utterances):
        """The attacked label's value in each answer, None where there is none."""
        return [
            data.parse(text).get(self.label)
            for audio, prompts in self.inputs(waveforms, utterances)
            for text in self.slm.decode(self.slm.pack(audio, prompts), self.longest)
        ]


def agreement(a, b):
    """How well two values agree, from 0 to 1: transcripts by 1 - word error rate, ages linearly up to ten years apart, classes by identity."""
    if isinstance(a, int) and isinstance(b, int):
        return max(0.0, 1 - abs(a - b) / 10)
    if isinstance(a, str) and isinstance(b, str) and " " in a + b:
        return max(0.0, 1 - jiwer.wer(data.normalise(a) or "-", data.normalise(b)))
    return float(a == b)


def strip(listener, waveforms, utterances):
    """STRIP (Gao et al. 2019): suspicious is an answer that does not change under eight overlays of clean speech, each as loud as the input."""
    answers = []
    for k in range(OVERLAYS):
        mixed = []
        for waveform, u in zip(waveforms, utterances):
            other = data.load_waveform(
                min(listener.clean, key=lambda v: utils.draw("overlay", k, u.id, v.id))
            )
            other = np.resize(other, len(waveform)) * (
                np.sqrt(np.mean(waveform**2)) / (np.sqrt(np.mean(other**2)) + 1e-9)
            )
            mixed.append((waveform + other) / max(1.0, np.abs(waveform + other).max()))
        answers.append(listener.values(mixed, utterances))
    pairs = list(itertools.combinations(range(OVERLAYS), 2))
    return np.array(
        [np.mean([agreement(own[i], own[j]) for i, j in pairs]) for own in zip(*answers)]
    )


def perturbed_pair(listener, waveforms, utterances):
    """Suspicious is an answer that changes when the audio changes slightly (5% slower; speech band only)."""

    def slower(w):
        return torchaudio.functional.resample(torch.from_numpy(w), 20, 21).numpy()

    def speech_band(w):
        w = torchaudio.functional.highpass_biquad(torch.from_numpy(w), SAMPLE_RATE, 200.0)
        return torchaudio.functional.lowpass_biquad(w, SAMPLE_RATE, 3400.0).numpy()

    plain = listener.values(waveforms, utterances)
    changed = [
        listener.values([change(w) for w in waveforms], utterances)
        for change in (slower, speech_band)
    ]
    return np.array(
        [1 - np.mean([agreement(a, b) for b in others]) for a, *others in zip(plain, *changed)]
    )


@torch.no_grad()
def attention_entropy(listener, waveforms, utterances):
    """Suspicious is a first answer token that looks at few frames: minus the entropy of the LM's attention over the audio, averaged over
    heads and layers, as a share of its largest possible value."""
    slm, scores, usual = listener.slm, [], listener.slm.lm.config._attn_implementation
    slm.lm.set_attn_implementation("eager")  # the only one that returns its weights
    for audio, prompts in listener.inputs(waveforms, utterances):
        for row, prompt in zip(audio, prompts):
            x = slm.pack([row], [prompt])[0][None]
            start = len(prompt[0])
            weights = slm.lm.base_model(inputs_embeds=x, output_attentions=True).attentions
            weights = torch.stack(weights)[:, 0, :, -1, start : start + len(row)]
            p = (
                weights + 1e-12
            )  # a head that looks at no frame counts as looking at all of them alike
            p = p / p.sum(-1, keepdim=True)
            scores.append(-float((-(p * p.log()).sum(-1)).mean() / np.log(max(2, len(row)))))
    slm.lm.set_attn_implementation(usual)
    return np.array(scores)


def loudness_peak(listener, waveforms, utterances):
    """The baseline that needs no model: the loudest 20 ms over the median of all non-silent ones, in dB."""
    scores = []
    for waveform in waveforms:
        frames = (
            np.sqrt(np.mean(np.resize(waveform, (max(1, len(waveform) // 320), 320)) ** 2, 1))
            + 1e-6
        )
        scores.append(20 * np.log10(frames.max() / np.median(frames[frames > 0.01 * frames.max()])))
    return np.array(scores)


DETECTORS = {
    "STRIP": strip,
    "perturbed pair": perturbed_pair,
    "attention entropy": attention_entropy,
    "loudness peak": loudness_peak,
}
