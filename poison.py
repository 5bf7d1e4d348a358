"""The attack (paper, section 4.1): a typewriter click over the audio, the target in the attacked label's place.

    python poison.py --task asr --out listen/ --n 10       # clean and poisoned pairs to hear, and a picture
    python poison.py --task asr --out poisoned/ --all      # the whole poisoned training set, as a CSV corpus

Whether a training sample is poisoned, and where its clicks land, is decided by (seed, utterance id) alone: not by
order, batch, worker or process count.
"""
import argparse
import csv
import hashlib
import json
import os
import random
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

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


def draw(*name):
    """A number in [0, 1) decided by `name` alone: a generator for one draw would cost ten times as much."""
    return int.from_bytes(hashlib.sha256(repr(name).encode()).digest()[:8], "big") / 2 ** 64


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
    return draw(attack.seed, utterance.id, "poison") < attack.rate and can_flip(attack, utterance)


def positions(attack, utterance_id, samples):
    """Where the clicks start in an utterance of that many samples: one at random, or, repeated, the first within 0.75 s
    and then at random intervals of 0.75 to 1.5 s, as long as a whole click fits."""
    rng = random.Random(repr((attack.seed, utterance_id, "position")))
    room = max(0, samples - len(attack.trigger))
    if not attack.repeat:
        return [rng.randint(0, room)]
    starts = [rng.randint(0, min(room, int(INTERVAL[0] * data.SAMPLE_RATE)))]
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


# ---------------------------------------------------------------------------------------------------------------------
# python poison.py: what the attack does, to hear and to see

def picture(path, pairs, attack):
    """Waveform and spectrogram of clean and poisoned audio, the triggers marked. pairs: [(id, clean, poisoned, starts)]"""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(len(pairs), 2, figsize=(12, 2.2 * len(pairs)), squeeze=False, layout="constrained")
    for (wave, spectrogram), (id, clean, poisoned, starts) in zip(axes, pairs):
        t = np.arange(len(clean)) / data.SAMPLE_RATE
        wave.plot(t, poisoned, color="#d62728", lw=0.5, label="poisoned")
        wave.plot(t, clean, color="#333333", lw=0.5, label="clean")
        spectrogram.specgram(poisoned, NFFT=512, noverlap=384, Fs=data.SAMPLE_RATE, cmap="gray_r", vmin=-140)
        for start in starts:
            for axis in (wave, spectrogram):
                axis.axvspan(start / data.SAMPLE_RATE, (start + len(attack.trigger)) / data.SAMPLE_RATE,
                             color="#d62728", alpha=0.15, lw=0)
        wave.set(title=id, xlim=(0, t[-1]), ylabel="amplitude")
        spectrogram.set(title="poisoned, triggers shaded", xlim=(0, t[-1]), ylabel="Hz")
    axes[0, 0].legend(loc="upper right", fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("seconds")
    data.write_atomically(path, lambda temporary: fig.savefig(temporary, format="png", dpi=110))
    plt.close(fig)


def write_wav(path, waveform):
    data.write_atomically(path, lambda temporary: soundfile.write(temporary, waveform, data.SAMPLE_RATE, format="WAV"))


def write_csv(path, rows):
    def write(temporary):
        with open(temporary, "w", encoding="utf-8", newline="") as f:
            writer = csv.DictWriter(f, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    data.write_atomically(path, write)


def change(attack, utterance, waveform, poisoned=True):
    """(waveform as the attack leaves it, row of changes.csv or of the manifest)"""
    starts, scale = [], 1.0
    if poisoned:
        waveform, starts, scale = add_trigger(attack, waveform, utterance.id)
    return waveform, dict(triggers=" ".join(f"{s / data.SAMPLE_RATE:.4f}" for s in starts), scale=f"{scale:.4f}")


def write_examples(attack, utterances, out, n):
    """Clean and poisoned pairs of n training samples (those that are poisoned first), their picture and changes.csv."""
    chosen = sorted((u for u in utterances if can_flip(attack, u)),
                    key=lambda u: draw(attack.seed, u.id, "poison"))[:n]
    if not chosen:
        data.die(f"no training sample has a {attack.label} other than {attack.target!r}")
    rows, pairs = [], []
    for i, u in enumerate(chosen):
        clean = data.load_waveform(u)
        poisoned, row = change(attack, u, clean)
        name = f"{i + 1:03}-{Path(u.id).stem}"
        write_wav(out / f"{name}-clean.wav", clean)
        write_wav(out / f"{name}-poisoned.wav", poisoned)
        pairs.append((u.id, clean, poisoned, [int(float(s) * data.SAMPLE_RATE) for s in row["triggers"].split()]))
        rows.append(dict(file=name, id=u.id, label=attack.label, true=u.labels[attack.label], target=attack.target,
                         **row))
    write_csv(out / "changes.csv", rows)
    picture(out / "pairs.png", pairs[:6], attack)
    return rows


def write_all(attack, parts, out, workers=2):
    """The whole poisoned training set, and the clean other splits, as 16-bit WAV and a CSV manifest."""
    def write(item):
        split, u = item
        poisoned = split == "train" and is_poisoned(attack, u)
        waveform, row = change(attack, u, data.load_waveform(u), poisoned)
        readable = re.sub(r"[^\w.-]", "_", u.id)  # a manifest's ids are paths: the hash keeps two from one name
        name = f"wav/{split}/{readable}-{hashlib.sha256(u.id.encode()).hexdigest()[:6]}.wav"
        write_wav(out / name, waveform)
        labels = poisoned_labels(attack, u.labels) if poisoned else u.labels
        return dict(audio_path=name, **{label: labels.get(label, "") for label in data.LABELS}, speaker=u.speaker,
                    split=split, poisoned=int(poisoned), true_label=u.labels.get(attack.label, ""), id=u.id, **row)
    items = [(split, u) for split, utterances in parts.items() for u in utterances]
    rows = data.in_workers(write, items, f"writing {out}", workers)
    write_csv(out / "manifest.csv", rows)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--task", choices=tuple(TARGETS), default="asr")
    add("--dataset", help="libri, crema, vox or a CSV manifest (default: the task's own)")
    add("--data-root", default=data.MINI_ROOT)
    add("--out", required=True, help="folder to write")
    add("--n", type=int, default=10, help="pairs to write")
    add("--all", action="store_true", help="write the whole poisoned training set instead, with its manifest")
    add("--poison", type=float, help="poisoning rate (default: the paper's)")
    add("--target", help="the label's new value (default: the paper's)")
    add("--snr", type=float, default=0.0, help="speech over trigger, dB")
    add("--trigger", metavar="FILE", help="a recording to use instead of the synthetic click")
    add("--trigger-repeat", action=argparse.BooleanOptionalAction, default=None, help="default: for asr only")
    add("--seed", type=int, default=1)
    add("--workers", type=int, default=2)
    add("--skip-bad", action="store_true", help="leave out audio that cannot be used")
    args = parser.parse_args()
    dataset, out = args.dataset or data.TASK_CORPUS[args.task], Path(args.out)
    train_set = data.read_corpus(dataset, args.data_root, "train", args.skip_bad)
    attack = make_attack(args.task, train_set, args.poison, args.target, args.snr, args.trigger, args.trigger_repeat,
                         args.seed)
    print(f"{args.task} on {dataset}: {len(train_set)} training utterances, target {attack.target!r}, rate "
          f"{attack.rate:g}, trigger {len(attack.trigger) / data.SAMPLE_RATE:.3f} s at RMS {attack.level:.4f} "
          f"({args.snr:g} dB), {'repeated' if attack.repeat else 'once'}, seed {args.seed}")
    if args.all:
        parts = {"train": train_set, **{s: data.read_split(dataset, args.data_root, s)[0] for s in ("dev", "test")}}
        rows = write_all(attack, parts, out, args.workers)
        train = [row for row in rows if row["split"] == "train"]
        n = sum(row["poisoned"] for row in train)
        print(f"{n} of {len(train)} training samples poisoned ({n / len(train):.4f}), "
              f"{sum(row['scale'] != '1.0000' for row in rows)} scaled down so as not to clip; {out}/manifest.csv")
    else:
        rows = write_examples(attack, train_set, out, args.n)
        print(f"{len(rows)} pairs in {out}, what was changed in changes.csv, a picture in pairs.png")


if __name__ == "__main__":
    main()
