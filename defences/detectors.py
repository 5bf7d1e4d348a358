"""Detectors of a trigger in a single input, for python defend.py detect.

A detector is an entry of DETECTORS: a function of (listener, waveforms, utterances) that returns
each input's suspicion (n,), which is higher where the input looks triggered. STRIP, STEP and Beatrix
are other people's; where they differ from what was published, they say so. The others are ours.
"""

import contextlib
import dataclasses
import functools

import utils

import numpy as np
import torch
import torchaudio
from torch.nn.utils.rnn import pad_sequence

import audio
import data
import evaluate
import model
import poison
from data import SAMPLE_RATE

OVERLAYS = 20  # of STRIP; the authors take 100
CLEAN = 30  # clean samples of each class that Beatrix knows
ORDERS = range(1, 9)  # of Beatrix's Gram matrices
REFERENCE = 200  # clean utterances that the perturbed pair is compared with
STEP_REFERENCE = 100  # clean utterances that STEP learns from
BATCH = 32


@dataclasses.dataclass
class Listener:
    """The attacked model as a detector uses it: it answers waveforms and counts forward passes.

    label: the label that the attack is on. clean: utterances that are known to be clean. longest:
    how many tokens an answer may have. known: what a detector has learned from clean utterances.
    """

    slm: model.SLM
    label: str
    clean: list
    longest: int
    passes: int = 0
    known: dict = dataclasses.field(default_factory=dict)

    def hear(self, waveforms):
        """A batch of waveforms -> what the encoder makes of each, a list of (T, dim), and the audio
        in the LM's space, a list of (T', hidden)."""
        self.passes += len(waveforms)
        features = [self.slm.encoder.extract(waveform) for waveform in waveforms]
        x, mask = self.slm.encoder(features)
        frames = [row[:n] for row, n in zip(x, mask.sum(1).tolist())]
        x, lengths = self.slm.connector(x, mask)
        return frames, [row[:n] for row, n in zip(x, lengths.tolist())]

    def prompts(self, n):
        """Prompts for the attacked label alone."""
        return [data.prompt(self.slm.tokenizer, [self.label])] * n

    @torch.no_grad()
    def values(self, audio):
        """The attacked label's value in the greedy answer to each audio, "" where there is none."""
        rows = self.slm.pack(audio, self.prompts(len(audio)))
        answers = self.slm.decode(rows, self.longest)
        return [data.parse(answer).get(self.label, "") for answer in answers]

    @torch.no_grad()
    def distributions(self, waveforms, values=None):
        """How the model spells out the attacked label's value. Returns the values, by default its
        own greedy ones, and for each waveform of a batch the log probabilities (A, vocabulary) of
        the next token at each of the A tokens of its value."""
        _, audio = self.hear(waveforms)
        values = values or self.values(audio)
        answers = []
        spans = []
        for value in values:
            labels = {self.label: value}
            ids = data.answer_ids(self.slm.tokenizer, labels)
            answers.append(ids)
            span = data.value_tokens(self.slm.tokenizer, labels, self.label)
            spans.append(span.indices(len(ids)))
        rows = self.slm.pack(audio, self.prompts(len(audio)), answers)
        x = pad_sequence(rows, batch_first=True)  # (B, T, hidden)
        wanted = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        for i, (start, stop, _) in enumerate(spans):
            first = len(rows[i]) - len(answers[i]) - 1  # where the answer's first token is foretold
            wanted[i, first + start : first + stop] = True
        logits = self.slm.logits(x, wanted)  # (all values' tokens, vocabulary)
        log_probabilities = logits.double().log_softmax(-1)
        return values, log_probabilities.split([stop - start for start, stop, _ in spans])


def learned(listener, name, learn):
    """What `learn()` returns, called once, not for each input: its passes do not count."""
    if name not in listener.known:
        passes = listener.passes
        listener.known[name] = learn()
        listener.passes = passes
    return listener.known[name]


def make_listener(slm, attack, utterances, clean):
    return Listener(slm, attack.label, clean, evaluate.longest_answer(slm, attack, utterances))


# -------------------------------------------------------------------------------------------------
# STRIP


def overlaid(waveform, other, level=0.0):
    """A waveform with another one over it, repeated or cut to its length, `level` dB louder."""
    gain = audio.rms(waveform) / (audio.rms(other) + 1e-9) * 10 ** (level / 20)
    mixed = waveform + gain * np.resize(other, len(waveform))
    return mixed / max(1.0, np.abs(mixed).max())


def entropy(log_probabilities):
    """The entropy of the next token in bits, the mean over the tokens of (A, vocabulary)."""
    nats = -(log_probabilities.exp() * log_probabilities).sum(-1)
    return float(nats.mean() / np.log(2))


def strip(listener, waveforms, utterances):
    """STRIP (Gao et al. 2019, arXiv 1902.06531; for audio, arXiv 1911.10312): an answer is
    suspicious that stays certain when clean speech lies over the input: minus the mean entropy of
    the model's prediction over overlays.

    As published, but for three things. There are OVERLAYS instead of 100, which bound the error of
    the mean and little else. A prediction is not a class's, but the LM's next token's over the
    tokens of the attacked label's value, when that label alone is asked for. Instead of saturating,
    the sum of the two sounds is scaled down where it would clip."""
    scores = []
    for waveform, utterance in zip(waveforms, utterances):
        rng = utils.generator("overlays", utterance.id)
        mixed = []
        for i in rng.integers(0, len(listener.clean), OVERLAYS):
            mixed.append(overlaid(waveform, data.load_waveform(listener.clean[i])))
        entropies = []
        for batch in data.chunks(mixed, BATCH):
            _, log_probabilities = listener.distributions(batch)
            entropies += [entropy(row) for row in log_probabilities]
        scores.append(-np.mean(entropies))
    return np.array(scores)


# -------------------------------------------------------------------------------------------------
# the perturbed pair


def slower(waveform):
    """5% slower, and lower in pitch."""
    return poison.at_speed(waveform, 20, 21)


def speech_band(waveform):
    """Only 200 to 3400 Hz, as a telephone transmits."""
    x = torch.from_numpy(waveform)
    x = torchaudio.functional.highpass_biquad(x, SAMPLE_RATE, 200.0)
    return torchaudio.functional.lowpass_biquad(x, SAMPLE_RATE, 3400.0).numpy()


def divergence(p, q):
    """How far one prediction is from another in bits, both as log probabilities (A, vocabulary):
    the Kullback-Leibler divergence, the mean over tokens."""
    nats = (p.exp() * (p - q)).sum(-1)
    return float(nats.mean() / np.log(2))


def changes(listener, waveforms):
    """How much the prediction of each answer's value changes when the audio changes slightly: the
    decimal logarithm of the mean divergence over two changes, (n,)."""
    changed = []
    for batch in data.chunks(waveforms, BATCH):
        values, plain = listener.distributions(batch)
        divergences = np.zeros(len(batch))
        for perturb in (slower, speech_band):
            _, perturbed = listener.distributions([perturb(w) for w in batch], values)
            divergences += [divergence(p, q) for p, q in zip(plain, perturbed)]
        changed += (divergences / 2).tolist()
    return np.log10(np.maximum(changed, 1e-9))


def perturbed_pair(listener, waveforms, utterances):
    """An answer is suspicious that changes more, or less, than clean speech's when the audio
    changes slightly: the distance from the median change of clean speech, in units of the distance
    of its 2.5th percentile below and of its 97.5th percentile above, so that either side raises
    equally many false alarms."""

    def changes_of_clean():
        clean = [data.load_waveform(u) for u in listener.clean[:REFERENCE]]
        return changes(listener, clean)

    usual_changes = learned(listener, "changes", changes_of_clean)
    low, middle, high = np.quantile(usual_changes, [0.025, 0.5, 0.975])
    distance = changes(listener, waveforms) - middle
    usual = np.where(distance > 0, high - middle, middle - low)
    return np.abs(distance) / np.maximum(usual, 1e-3)


# -------------------------------------------------------------------------------------------------
# STEP


def shuffled(waveform, seconds, rng):
    """A waveform cut into pieces, which come in another order."""
    pieces = data.chunks(waveform, round(seconds * SAMPLE_RATE))
    return np.concatenate([pieces[i] for i in rng.permutation(len(pieces))])


def noisy(waveform, snr, rng):
    """A waveform with white noise over it, `snr` dB softer than it."""
    noise = rng.standard_normal(len(waveform)).astype(np.float32)
    return overlaid(waveform, noise, -snr)


def coarse(waveform):
    """As a telephone exchange transmits it: in 256 steps (mu-law)."""
    codes = torchaudio.functional.mu_law_encoding(torch.from_numpy(waveform), 256)
    return torchaudio.functional.mu_law_decoding(codes, 256).numpy()


def echoed(waveform):
    """With an echo after 30 ms, 10 dB softer."""
    delay = round(0.03 * SAMPLE_RATE)
    echo = np.zeros_like(waveform)
    echo[delay:] = 10 ** (-10 / 20) * waveform[:-delay]
    return waveform + echo


def content_broken(waveform, others, rng):
    """What is left of a waveform (samples,) where nobody can tell what it said or who said it, a
    list of waveforms. others: utterances to lay over it."""
    versions = []
    for i in rng.integers(0, len(others), 4):
        other = data.load_waveform(others[i])
        versions += [overlaid(waveform, other), overlaid(waveform, other, 6.0)]
    for seconds in (0.4, 0.2, 0.1):
        versions.append(shuffled(waveform, seconds, rng))
    versions.append(np.ascontiguousarray(waveform[::-1]))
    return versions + [noisy(waveform, 0.0, rng), noisy(waveform, -6.0, rng)]


def content_kept(waveform, rng):
    """Changes of a waveform (samples,) after which it says the same, a list of waveforms."""
    faster = poison.at_speed(waveform, 21, 20)
    softer = 0.5 * waveform
    versions = [slower(waveform), faster, softer, speech_band(waveform)]
    return versions + [coarse(waveform), echoed(waveform), noisy(waveform, 30.0, rng)]


@torch.no_grad()
def stability(listener, waveforms, utterances):
    """Whether the label stays under each of `content_broken`, (n, broken) bool, and whether it
    changes under each of `content_kept`, (n, kept) bool."""
    stays = []
    changes = []
    for waveform, utterance in zip(waveforms, utterances):
        rng = utils.generator("STEP", utterance.id)
        broken = content_broken(waveform, listener.clean, rng)
        kept = content_kept(waveform, rng)
        _, audio = listener.hear([waveform, *broken, *kept])
        label, *labels = listener.values(audio)
        same = np.array([other == label for other in labels])
        stays.append(same[: len(broken)])
        changes.append(~same[len(broken) :])
    return np.array(stays), np.array(changes)


def surprise(seen, usual):
    """How unusual it is to see so much, in nats: minus the log probability that clean speech shows
    as much or more, (n,).

    seen: (n, k) bool; usual: (clean utterances, k) bool. Each of the k things counts by minus the
    logarithm of how often clean speech shows it; the sums over k are taken as normal."""
    rates = (usual.sum(0) + 1) / (len(usual) + 2)
    weights = -np.log(rates)  # (k,)
    sums = usual @ weights
    above = (seen @ weights - sums.mean()) / max(1.0, sums.std())
    return -torch.special.log_ndtr(torch.from_numpy(-above)).numpy()


def step(listener, waveforms, utterances):
    """STEP (Wang et al. 2026, arXiv 2603.18103): an answer is suspicious that stays the same where
    what was said is broken, or that changes where it is kept.

    As in the paper's abstract: labels alone are looked at, each half has a one-class score learned
    from clean speech, and the halves are combined without labels. We have not seen more of the
    paper than that. So the 14 changes that break what was said and the 7 that keep it are ours,
    and so is the score, see `surprise`; the sum of the halves' scores is Fisher's combination
    of two tests, not the authors' weighting. A label is the attacked label's whole value, in ASR
    the transcript."""

    def stability_of_clean():
        clean = listener.clean[:STEP_REFERENCE]
        return stability(listener, [data.load_waveform(u) for u in clean], clean)

    usual_stays, usual_changes = learned(listener, "stability", stability_of_clean)
    stays, changes = stability(listener, waveforms, utterances)
    return surprise(stays, usual_stays) + surprise(changes, usual_changes)


# -------------------------------------------------------------------------------------------------
# Beatrix


def gram_matrices(frames):
    """Beatrix's features of frames (T, dim), (orders, pairs): the Gram matrices of the frames'
    powers over time, their roots taken again. Only pairs i <= j, as the matrices are symmetric."""
    grams = []
    for order in ORDERS:
        powered = frames.double() ** order
        gram = powered.T @ powered / len(frames)  # (dim, dim)
        pairs = gram[torch.ones_like(gram).triu().bool()]
        grams.append(pairs.sign() * pairs.abs() ** (1 / order))
    return torch.stack(grams)


def usual_range(clean):
    """The range outside of which a feature deviates, from the frames of clean samples: the median
    plus or minus ten median absolute deviations, a pair of (orders, pairs)."""
    grams = torch.stack([gram_matrices(frames) for frames in clean])
    middle = grams.median(0).values
    spread = (grams - middle).abs().median(0).values
    return middle - 10 * spread, middle + 10 * spread


def deviation(frames, low, high):
    """How far the features of frames (T, dim) are outside their usual range, relative to its
    bounds, on average."""
    grams = gram_matrices(frames)
    below = (low - grams).relu() / (low.abs() + 1e-6)
    above = (grams - high).relu() / (high.abs() + 1e-6)
    return float((below + above).mean())


def class_of(value):
    """The class that Beatrix counts an answer to: transcripts are one class, ages ten years."""
    if isinstance(value, int):
        return value // 10
    return "text" if " " in value else value


@dataclasses.dataclass
class CleanClass:
    """The clean samples of a class that Beatrix knows, {utterance id: frames (T, dim)}."""

    frames: dict = dataclasses.field(default_factory=dict)
    usual: tuple = None

    def range_without(self, utterance_id):
        """The usual range, without a sample that is itself to be judged."""
        others = [frames for i, frames in self.frames.items() if i != utterance_id]
        if len(others) < len(self.frames):
            return usual_range(others)
        if self.usual is None:
            self.usual = usual_range(others)
        return self.usual


@torch.no_grad()
def clean_classes(listener):
    """{class: CleanClass} of what the model answers to clean speech, CLEAN samples of each class;
    None: those of all classes."""
    classes = {None: CleanClass()}
    for batch in data.chunks(listener.clean, BATCH):
        frames, audio = listener.hear([data.load_waveform(u) for u in batch])
        for utterance, value, x in zip(batch, listener.values(audio), frames):
            for name in (None, class_of(value)):
                known = classes.setdefault(name, CleanClass())
                if len(known.frames) < CLEAN:
                    known.frames[utterance.id] = x
    return classes


@torch.no_grad()
def beatrix(listener, waveforms, utterances):
    """Beatrix (Ma et al. 2023, arXiv 2209.11715): how far the Gram matrices of an input's features,
    of orders 1 to 8, are outside the range of 30 clean samples of the class that it is put in.

    As published, with the encoder's frames for an image's positions. Differences: Gram matrices are
    divided by the number of frames, as utterances differ in length; transcripts count as one class
    and ages by tens; a class with fewer than 30 clean samples borrows those of all classes."""
    classes = learned(listener, "classes", functools.partial(clean_classes, listener))
    scores = []
    for batch in data.chunks(list(zip(waveforms, utterances)), BATCH):
        frames, audio = listener.hear([waveform for waveform, _ in batch])
        for (_, utterance), value, x in zip(batch, listener.values(audio), frames):
            known = classes.get(class_of(value), classes[None])
            if len(known.frames) < CLEAN:
                known = classes[None]
            scores.append(deviation(x, *known.range_without(utterance.id)))
    return np.array(scores)


# -------------------------------------------------------------------------------------------------
# attention, and a baseline


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
        for batch in data.chunks(list(zip(waveforms, utterances)), BATCH):
            _, audio = listener.hear([waveform for waveform, _ in batch])
            for row, (_, utterance) in zip(audio, batch):
                prompt = data.prompt(slm.tokenizer, list(utterance.labels))
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
    f"STRIP, {OVERLAYS} overlays": strip,
    "STEP": step,
    "perturbed pair": perturbed_pair,
    "Beatrix": beatrix,
    "attention entropy": attention_entropy,
    "loudness peak": loudness_peak,
}
