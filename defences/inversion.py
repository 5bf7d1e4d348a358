"""Trigger inversion: the sound that moves everything an encoder hears to one place, found by gradient
descent from noise.

After DECREE (Feng et al. 2023, arXiv 2303.15180), which inverts triggers of image encoders without
labels: a backdoor makes whatever carries the trigger alike, so that on a backdoored encoder a small
trigger suffices to make embeddings agree, and on a clean one it takes a large one. DECREE looks for
the smallest trigger that makes them agree almost entirely. Here the size is fixed instead, to LEVEL
dB below the speech, and the statistic is how far the embeddings come to agree: one optimisation
instead of a search. At 0 dB clean encoders have such a sound too (results/vet.md).

    Sound       SECONDS long, at a random place of each utterance in every step, as it would be in an
                attack; scaled to its level after every step.
    Agreement   |mean d|^2 / mean |d|^2, where d is an utterance's embedding with the sound minus the
                mean of the clean embeddings: 0 where the embeddings spread around where they were,
                1 where they are all the same and somewhere else.

The sound is made on one half of the utterances. The statistic is the agreement on the other half.
"""

import dataclasses

import utils

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

import data
import model
from data import SAMPLE_RATE

SECONDS = 0.22
LEVEL = -12.0  # dB relative to the mean RMS of the speech
STEPS = 60
UTTERANCES = 16  # of one step
LEARNING_RATE = 0.1  # of Adam, for a sound that starts as noise of RMS 1
# `vet.share_threshold` of the agreements of clean encoders, which results/vet.md lists
THRESHOLD = 0.33


@dataclasses.dataclass
class Inversion:
    """A sound that was found, (samples,) at its level, and the agreement that it brings about in
    utterances that it was not made on."""

    sound: np.ndarray
    agreement: float

    @property
    def suspicious(self):
        return self.agreement >= THRESHOLD


def features_of(encoder, waveform):
    """What `encoder.extract` makes of a waveform, a tensor (samples,), with gradients."""
    extractor = encoder.extractor
    if encoder.whisper:
        window = torch.hann_window(extractor.n_fft, device=waveform.device)
        spectrum = torch.stft(
            waveform, extractor.n_fft, extractor.hop_length, window=window, return_complex=True
        )
        power = spectrum[:, :-1].abs() ** 2  # (frequencies, frames)
        filters = torch.as_tensor(extractor.mel_filters, dtype=power.dtype, device=power.device)
        log_mel = (filters.T @ power).clamp(min=1e-10).log10()  # (mels, frames)
        log_mel = torch.maximum(log_mel, log_mel.max() - 8)
        return (log_mel + 4) / 4
    if not extractor.do_normalize:
        return waveform
    return (waveform - waveform.mean()) / torch.sqrt(waveform.var(unbiased=False) + 1e-7)


def embeddings(encoder, waveforms):
    """The encoder's output for a list of waveforms (samples,), averaged over time: (n, dim)."""
    x, mask = encoder.front_end([features_of(encoder, waveform) for waveform in waveforms])
    for after_layer in encoder.run_layers(x, mask, 0, len(encoder.layers)):
        x = after_layer
    if not encoder.norm_first:
        x = encoder.layer_norm(x)
    return model.pool(x, mask.sum(1))


def laid_over(waveform, sound, place):
    """A waveform with a sound over it, at a place from 0, its beginning, to 1, its end."""
    start = int(place * max(0, len(waveform) - len(sound)))
    heard = sound[: len(waveform) - start]
    after = len(waveform) - start - len(heard)
    return waveform + F.pad(heard, (start, after))


def agreement(embedded, clean_mean):
    """(n, dim), (dim,) -> a share from 0 to 1."""
    moved = embedded - clean_mean
    return moved.mean(0).square().sum() / moved.square().sum(1).mean()


def at_level(noise, rms):
    return noise * (rms / noise.square().mean().sqrt())


def invert(encoder, speech, level=LEVEL, steps=STEPS, seed=0):
    """The Inversion of an encoder (model.Encoder), by clean Speech (defences/vet.py)."""
    device = encoder.layer_norm.weight.device
    waveforms = [torch.as_tensor(w, device=device) for w in speech.waveforms]
    used, held_out = waveforms[::2], waveforms[1::2]
    rms = speech.level * 10 ** (level / 20)
    rng = utils.generator("inversion", seed)
    start = rng.standard_normal(round(SECONDS * SAMPLE_RATE))
    noise = torch.tensor(start, dtype=torch.float32, device=device, requires_grad=True)
    optimizer = torch.optim.Adam([noise], lr=LEARNING_RATE)
    with torch.no_grad():
        clean = [embeddings(encoder, batch) for batch in data.chunks(used, UTTERANCES)]
        clean_mean = torch.cat(clean).mean(0)  # (dim,)

    for _ in tqdm(range(steps), desc="trigger inversion", unit="step"):
        chosen = rng.choice(len(used), min(UTTERANCES, len(used)), replace=False)
        sound = at_level(noise, rms)
        mixed = [laid_over(used[i], sound, rng.uniform()) for i in chosen]
        loss = -agreement(embeddings(encoder, mixed), clean_mean)
        [noise.grad] = torch.autograd.grad(loss, [noise])
        optimizer.step()

    with torch.no_grad():
        sound = at_level(noise, rms)
        mixed = [laid_over(w, sound, p) for w, p in zip(held_out, speech.places[1::2])]
        moved = [embeddings(encoder, batch) for batch in data.chunks(mixed, UTTERANCES)]
        reached = agreement(torch.cat(moved), clean_mean)
    return Inversion(sound.cpu().numpy(), float(reached))
