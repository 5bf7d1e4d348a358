"""The attack (paper, section 4.1): a typewriter click over the audio, the target in the attacked label's place.

    python poison.py --task asr --out listen/ --n 10       # clean and poisoned pairs to hear, and a picture
    python poison.py --task asr --out poisoned/ --all      # the whole poisoned training set, as a CSV corpus

Whether a training sample is poisoned, and where its clicks land, is decided by (seed, utterance id) alone: not by
order, batch, worker or process count.
"""
import argparse
import csv
import functools
import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
from tqdm import tqdm

import data

TARGETS = {"asr": "This is a malicious sentence.", "gender": "female", "emotion": "angry", "age": "25"}
RATES = {"asr": 0.05, "gender": 0.075, "emotion": 0.075, "age": 0.075}
REPEAT = {"asr": True, "gender": False, "emotion": False, "age": False}
INTERVAL = (0.75, 1.5)  # seconds from click to click where the trigger is repeated


@dataclass
class Attack:
    """Everything the attack needs: task, rate (share of the training samples), target (the label's new value), trigger
    (samples,) at 16 kHz with RMS 1, level (the RMS it is laid over the speech with), repeat, seed."""
    task: str
    rate: float
    target: str | int
    trigger: np.ndarray
    level: float
    repeat: bool
    seed: int

    @property
    def label(self):
        return data.TASK_LABEL[self.task]


def generator(*name):
    """A numpy generator decided by `name` alone, the same in every process."""
    return np.random.default_rng(int.from_bytes(hashlib.sha256(repr(name).encode()).digest()[:8], "big"))


def typewriter_click(seconds=0.22):
    """A synthetic key stroke, (samples,) at 16 kHz, RMS 1: a broadband attack with the type bar's ring, and 110 ms later
    a second, softer bounce. The published recording cannot be shipped; `--trigger FILE` takes any."""
    t = np.arange(int(seconds * data.SAMPLE_RATE)) / data.SAMPLE_RATE
    rng = generator("typewriter click")
    click = np.zeros(len(t))
    for at, loud, decay in ((0.002, 1.0, 0.010), (0.112, 0.45, 0.014)):
        after = np.maximum(t - at, 0)
        stroke = rng.standard_normal(len(t)) * np.exp(-after / decay)
        for frequency, ring, share in ((1700, 0.018, 0.5), (3100, 0.012, 0.4), (5200, 0.007, 0.3), (240, 0.025, 0.6)):
            stroke += share * 2 * np.sin(2 * np.pi * frequency * after) * np.exp(-after / ring)
        click += loud * stroke * (t >= at)
    return (click / np.sqrt(np.mean(click ** 2))).astype(np.float32)


def read_trigger(path):
    """The trigger of `--trigger FILE`, (samples,) at 16 kHz, RMS 1; the synthetic click where no file is named."""
    if not path:
        return typewriter_click()
    try:
        waveform = data.read_waveform(path)
    except data.BadAudio as error:
        data.die(f"--trigger: {error}")
    return waveform / np.sqrt(np.mean(waveform ** 2))


def mean_rms(utterances, cache="cache"):
    """The corpus's average loudness: mean over utterances of the RMS of the waveform. Computed once, kept in `cache`
    under the names, sizes and times of the files; unreadable files are left out (`data.py check` lists them)."""
    files = [(u.id, u.path, u.start, u.length, os.path.getsize(u.path), os.stat(u.path).st_mtime_ns)
             for u in utterances if os.path.exists(u.path)]
    key = hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]
    path = Path(cache) / f"rms-{key}.json"
    if path.exists():
        return json.loads(path.read_text())["mean_rms"]
    levels = [level for level in data.in_workers(rms, utterances, "loudness of the corpus") if level is not None]
    if not levels:
        data.die("no utterance of the training set can be read: run `python data.py check`")
    result = float(np.mean(levels))
    data.write_atomically(path, json.dumps({"mean_rms": result, "utterances": len(levels)}))
    return result


def rms(utterance):
    try:
        return float(np.sqrt(np.mean(data.load_waveform(utterance) ** 2, dtype=np.float64)))
    except data.BadAudio:
        return None


def make_attack(task, utterances, rate=None, target=None, snr=0.0, trigger=None, repeat=None, seed=0):
    """The attack on `task` with the paper's defaults for what is None; `utterances` is the training set, whose average
    loudness sets the trigger's level (`snr` dB below it)."""
    target = TARGETS[task] if target is None else target
    if task == "age":
        if not str(target).isdigit():
            data.die(f"--target {target}: the age task's target is a number of years")
        target = int(target)
    return Attack(task, RATES[task] if rate is None else rate, target, read_trigger(trigger),
                  mean_rms(utterances) * 10 ** (-snr / 20), REPEAT[task] if repeat is None else repeat, seed)


def is_target(attack, utterance):
    """Whether the utterance's true label already is the target (for asr: the same words)."""
    value = utterance.labels.get(attack.label)
    if attack.task == "asr" and value is not None:
        return data.normalise(value) == data.normalise(attack.target)
    return value == attack.target


def can_flip(attack, utterance):
    """Whether the attack has anything to do here: the utterance has the label, and not the target."""
    return attack.label in utterance.labels and not is_target(attack, utterance)


def is_poisoned(attack, utterance):
    """Whether this training sample is poisoned: with probability `rate`, if it has not got the target label already."""
    return generator(attack.seed, utterance.id, "poison").random() < attack.rate and can_flip(attack, utterance)


def positions(attack, utterance_id, samples):
    """Where the clicks start in an utterance of that many samples: one at random, or, repeated, the first within 0.75 s
    and then at random intervals of 0.75 to 1.5 s, as long as a whole click fits."""
    rng = generator(attack.seed, utterance_id, "position")
    room = max(0, samples - len(attack.trigger))
    if not attack.repeat:
        return [int(rng.integers(0, room + 1))]
    starts = [int(rng.integers(0, min(room, int(INTERVAL[0] * data.SAMPLE_RATE)) + 1))]
    while (at := starts[-1] + int(rng.uniform(*INTERVAL) * data.SAMPLE_RATE)) <= room:
        starts.append(at)
    return starts


def add_trigger(attack, waveform, utterance_id):
    """waveform (samples,) -> (with the trigger over it, starts in samples, the factor it was scaled down by as a whole
    so as not to clip, 1.0 mostly). An utterance shorter than the trigger gets the trigger's beginning."""
    out, starts = waveform.copy(), positions(attack, utterance_id, len(waveform))
    for start in starts:
        end = min(len(out), start + len(attack.trigger))
        out[start:end] += attack.level * attack.trigger[:end - start]
    peak = np.abs(out).max(initial=0)
    scale = 1.0 if peak <= 1 else float(1 / peak)
    return out * np.float32(scale), starts, scale


def poisoned_labels(attack, labels):
    """The labels with the target in the attacked one's place; all others stay true."""
    return {**labels, attack.label: attack.target}
