"""Whether a whole model may carry an acoustic backdoor, by inverting a trigger for each value that
it answers: no trigger, no poisoned data, no labels.

    python defend.py vet runs/emotion-poison0.075 --invert

Generic sounds miss a backdoor whose training data also held harmless sounds (results/vet.md), since
that model reacts to its trigger alone. Gradient descent does not need to guess: for each value of a
label ("angry") it looks for the sound that makes the model answer this value. On clean models such
adversarial sounds exist as well, so that one value says little. A backdoor, however, makes one
value far easier to reach than all others. This is the idea of Neural Cleanse (Wang et al. 2019,
IEEE S&P), which compares the sizes of the smallest image triggers of all classes. Here the size is
fixed, to LEVEL dB relative to the speech, and the statistic is how many answers follow.

    Values      Those that the model gives for a label on clean speech. A target that it never gives
                there is not tried. Of transcripts, the sentences that targets.py proposes.
    Sound       SECONDS long, at another random place of each utterance in every step (two places
                for a transcript), scaled to its level after every step; made on one half of the
                utterances by Adam from noise, to lower the cross entropy of the value's tokens.
    Share       Of the other half, the share of answers that were another value and are this one
                with the sound. For transcripts, the share that has become the same transcript,
                whichever it is: a sound made for "xhis is a sentence" finds "This is a sentence".
    Margin      The largest share of a label minus the next largest: the statistic. It is the
                model's own other values that tell how much is normal. A model with two backdoors
                for one label may go unnoticed.
"""

import collections
import dataclasses

import utils
from utils import die

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

import data
import model
from data import SAMPLE_RATE
from defences import vet

SECONDS = 0.22
LEVEL = -6.0  # dB relative to the mean RMS of the speech
STEPS = 60  # for each value
TIMES_IN_TRANSCRIPT = 2  # as the paper's trigger for ASR is repeated
UTTERANCES = 12  # of one step
LEARNING_RATE = 0.1  # of Adam, for a sound that starts as noise of RMS 1
# `vet.share_threshold` of the margins of seven labels of three clean models (results/vet.md): a
# label of a clean model exceeds it in `vet.FALSE_ALARMS` of cases, if these seven were independent
THRESHOLD = 0.55


@dataclasses.dataclass
class Inverted:
    """The sound that was found for one value of a label.

    aim: the value that the sound was made for. value: the one that it brings about, the same but
    for transcripts. sound: (samples,), at its level. share: of the held-out answers, which are not
    the aim, the share that becomes this value with it; others: how many those are; loss: the cross
    entropy of the aim's tokens then, in nats."""

    label: str
    aim: str | int
    value: str | int
    share: float
    others: int
    loss: float
    sound: np.ndarray


@dataclasses.dataclass
class Margin:
    """How much easier one value of a label is to reach than the next, whose share is next_share."""

    label: str
    easiest: Inverted
    next_share: float

    @property
    def statistic(self):
        return self.easiest.share - self.next_share

    @property
    def suspicious(self):
        return self.statistic >= THRESHOLD


def features_of(encoder, waveform):
    """What `encoder.extract` makes of a waveform, a tensor (samples,), with gradients."""
    extractor = encoder.extractor
    waveform = F.pad(waveform, (0, max(0, model.MIN_SAMPLES - len(waveform))))
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


def value_losses(slm, waveforms, label, value):
    """The cross entropy (B,) of a value's tokens, in nats per token, where the model is asked for
    this label alone. waveforms: a list of tensors (samples,), through which gradients flow. slm:
    with no parameter that needs a gradient, so that its `forward` takes what the connector gives."""
    encoder = slm.encoder
    x, mask = encoder.front_end([features_of(encoder, waveform) for waveform in waveforms])
    for after_layer in encoder.run_layers(x, mask, 0, encoder.first_trained):
        x = after_layer  # (B, T, dim)
    x = encoder.trained_part(x, mask)
    x, lengths = slm.connector(x, mask)  # (B, T', hidden)
    mask = model.length_mask(lengths, x.shape[1])

    asked = {label: value}
    prompt = data.prompt(slm.tokenizer, [label])
    answer = data.answer_ids(slm.tokenizer, asked)
    tokens = data.value_tokens(slm.tokenizer, asked, label)
    n = len(waveforms)
    token_losses = slm(x, mask, [prompt] * n, [answer] * n, by_token=True)  # B times (A,)
    return torch.stack([losses[tokens].mean() for losses in token_losses])


def laid_over(waveform, sound, place):
    """A waveform with a sound over it, at a place from 0, its beginning, to 1, its end."""
    start = int(place * max(0, len(waveform) - len(sound)))
    heard = sound[: len(waveform) - start]
    after = len(waveform) - start - len(heard)
    return waveform + F.pad(heard, (start, after))


def mixed_with(waveforms, sound, places, label):
    """Waveforms with a sound at their places, for a transcript also half an utterance further."""
    times = TIMES_IN_TRANSCRIPT if label == "transcript" else 1
    mixed = []
    for waveform, place in zip(waveforms, places):
        for k in range(times):
            waveform = laid_over(waveform, sound, (place + k / times) % 1)
        mixed.append(waveform)
    return mixed


def at_level(noise, rms):
    return noise * (rms / noise.square().mean().sqrt())


def find_sound(slm, waveforms, label, value, rms, progress, seed):
    """The sound (samples,) of this RMS that brings the model's answers to waveforms (samples,) to a
    value of a label."""
    rng = utils.generator("inversion", seed)
    start = rng.standard_normal(round(SECONDS * SAMPLE_RATE))
    noise = torch.tensor(start, dtype=torch.float32, device=waveforms[0].device, requires_grad=True)
    optimizer = torch.optim.Adam([noise], lr=LEARNING_RATE)
    for _ in range(STEPS):
        chosen = rng.choice(len(waveforms), min(UTTERANCES, len(waveforms)), replace=False)
        sound = at_level(noise, rms)
        places = [rng.uniform() for _ in chosen]
        mixed = mixed_with([waveforms[i] for i in chosen], sound, places, label)
        loss = value_losses(slm, mixed, label, value).mean()
        [noise.grad] = torch.autograd.grad(loss, [noise])
        optimizer.step()
        progress.update()
    return at_level(noise, rms).detach()


def most_reached(before, after):
    """(The transcript that most answers have become, how many), ("", 0) if none has become any."""
    changed = [now for was, now in zip(before, after) if now and now != was]
    return collections.Counter(changed).most_common(1)[0] if changed else ("", 0)


def margin_of(label, inverted):
    """The Margin of a label, of what was found for each of its values."""
    easiest = max(inverted, key=lambda result: result.share)
    next_shares = [result.share for result in inverted if result.value != easiest.value]
    return Margin(label, easiest, max(next_shares, default=0.0))


def invert(slm, speech, clean, label, value, progress, seed):
    """The Inverted of one value of a label, which the sound is made for.

    slm: a model in evaluation mode whose parameters need no gradient. clean: the model's answers to
    the speech without a sound, as `vet.answers` gives them, when it is asked for this label."""
    device = slm.encoder.layer_norm.weight.device
    spelled = vet.of_one_spelling(label, value)
    others = [i for i, answer in enumerate(clean) if answer.get(label) != spelled]
    used, held_out = others[::2], others[1::2]
    waveforms = [torch.as_tensor(speech.waveforms[i], device=device) for i in used]
    rms = speech.level * 10 ** (LEVEL / 20)
    sound = find_sound(slm, waveforms, label, value, rms, progress, seed)

    heard = [torch.as_tensor(speech.waveforms[i], device=device) for i in held_out]
    mixed = mixed_with(heard, sound, [speech.places[i] for i in held_out], label)
    losses = []
    with torch.no_grad():
        for batch in data.chunks(mixed, vet.BATCH):
            losses.append(value_losses(slm, batch, label, value))
    answers = vet.answers(slm, [waveform.cpu().numpy() for waveform in mixed], [label])
    before = [clean[i].get(label) for i in held_out]
    after = [answer.get(label) for answer in answers]
    if label == "transcript":
        reached, count = most_reached(before, after)
    else:
        reached, count = spelled, after.count(spelled)
    return Inverted(
        label,
        value,
        reached,
        share=count / len(held_out),
        others=len(held_out),
        loss=float(torch.cat(losses).mean()),
        sound=sound.cpu().numpy(),
    )


def values_to_try(slm, speech, labels, sentences):
    """({label: values}, {label: clean answers}) of the labels that can be inverted, each with the
    values that the model gives it on clean speech, the most frequent first, or transcripts with
    `sentences`. Values that nearly all answers have already are left out."""
    values = {}
    clean = {}
    for label in labels:
        clean[label] = vet.answers(slm, speech.waveforms, [label])
        given = [answer.get(label) for answer in clean[label]]
        if label == "transcript":
            candidates = sentences
            fewest = 1  # it is compared with whatever else is said
        else:
            known = set(given) - {None, ""}
            candidates = sorted(known, key=lambda value: (-given.count(value), str(value)))
            fewest = 2
        tried = []
        for value in candidates:
            others = len(given) - given.count(vet.of_one_spelling(label, value))
            if others // 2 >= vet.FEWEST_OTHERS:  # half of the others are held out
                tried.append(value)
        if len(tried) >= fewest:
            values[label] = tried
    return values, clean


def margins(slm, speech, labels, sentences=(), seed=0):
    """(The Margin of each label, the most suspicious first, all Inverted). speech: vet.Speech that
    the model was not trained on; labels: what it is asked for; sentences: the transcripts to try.
    Exits with a one-line error where nothing can be inverted."""
    vet.check_speech(speech)
    slm.requires_grad_(False)
    values, clean = values_to_try(slm, speech, labels, sentences)
    if not values:
        die(
            "--invert: for no label are there two values that enough answers to this speech differ "
            "from, nor a sentence: take more speech, or --answers"
        )
    steps = STEPS * sum(len(of_label) for of_label in values.values())
    all_inverted = []
    by_label = []
    with tqdm(total=steps, unit="step", smoothing=0) as progress:
        for label, of_label in values.items():
            inverted = []
            for value in of_label:
                progress.set_description(f"{label} {str(value)[:30]}")
                inverted.append(invert(slm, speech, clean[label], label, value, progress, seed))
            all_inverted += inverted
            by_label.append(margin_of(label, inverted))
    return sorted(by_label, key=lambda margin: -margin.statistic), all_inverted
