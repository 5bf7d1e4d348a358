"""The attack (paper, section 4.1): a trigger in the audio, the target in the attacked label's place.

    python poison.py --task asr --out listen/ --n 10       # clean and poisoned pairs to hear, and a picture
    python poison.py --task asr --out poisoned/ --all      # the whole poisoned training set, as a CSV corpus

Whether a training sample is poisoned, and where its trigger lands, is decided by (seed, utterance id) alone: not by
order, batch, worker or process count.
"""

import argparse
import contextlib
import csv
import dataclasses
import functools
import hashlib
import html
import io
import json
import math
import random
import re
import urllib.parse
from pathlib import Path

import utils
from utils import (
    ROOT,
    Parser,
    count,
    die,
    draw,
    whole,
)

import installed  # noqa: F401

import numpy as np
import soundfile
import torch
import torchaudio

import corpora
import data
from data import SAMPLE_RATE
from study import DATA_ROOT, LABELS, MINI_ROOT, TASKS, wrong_number

INTERVAL = (0.75, 1.5)  # seconds from start to start where the trigger is repeated


# ---------------------------------------------------------------------------------------------------------------------
# triggers


def typewriter_click(sample_rate, rng):
    """A synthetic key stroke of 220 ms: a broadband attack with the type bar's ring, and 110 ms later a second, softer
    bounce. The published recording cannot be shipped; `--trigger FILE` takes any."""
    t = np.arange(int(0.22 * sample_rate)) / sample_rate
    click = np.zeros(len(t))
    for at, loud, decay in ((0.002, 1.0, 0.010), (0.112, 0.45, 0.014)):
        after = np.maximum(t - at, 0)
        stroke = rng.standard_normal(len(t)) * np.exp(-after / decay)
        for frequency, ring, share in (
            (1700, 0.018, 0.5),
            (3100, 0.012, 0.4),
            (5200, 0.007, 0.3),
            (240, 0.025, 0.6),
        ):
            stroke += share * 2 * np.sin(2 * np.pi * frequency * after) * np.exp(-after / ring)
        click += loud * stroke * (t >= at)
    return click


def tone(sample_rate, rng):
    """A pure tone of 1 kHz, 220 ms, faded in and out over 10 ms."""
    t = np.arange(int(0.22 * sample_rate)) / sample_rate
    return np.sin(2 * np.pi * 1000 * t) * np.minimum(1, np.minimum(t, t[::-1]) / 0.01)


def band_stop(waveform, sample_rate, rng):
    """The whole waveform without its band around 2 kHz, (samples,) -> (samples,)."""
    x = torch.from_numpy(waveform)
    for _ in range(3):
        x = torchaudio.functional.bandreject_biquad(x, sample_rate, 2000.0, Q=1.0)
    return x.numpy()


# Overlaid triggers are functions of (sample rate, numpy generator) to a waveform, which is laid over the speech; whole
# ones are functions of (waveform, sample rate, numpy generator) to the changed waveform. A new trigger is an entry here.
TRIGGERS = {
    "click": ("overlay", typewriter_click),
    "tone": ("overlay", tone),
    "bandstop": ("whole", band_stop),
}


def without_silent_ends(waveform):
    """(samples,) from the first to the last that is above 1% of the loudest: of a recording longer
    than the speech that it is laid over, silence would be heard instead of its sound."""
    sound = np.flatnonzero(np.abs(waveform) > 0.01 * np.abs(waveform).max())
    return waveform[sound[0] : sound[-1] + 1] if len(sound) else waveform


def is_whole(name):
    """Whether a trigger changes the whole waveform, without a sound of its own."""
    return name in TRIGGERS and TRIGGERS[name][0] == "whole"


def make_trigger(name, seconds=None):
    """A name of TRIGGERS or a recording's path -> the trigger (samples,) at 16 kHz with RMS 1, None for a "whole" one. seconds: cut to
    that length, or repeated to fill it."""
    if name not in TRIGGERS:
        try:
            waveform = data.read_waveform(name)
        except data.BadAudio as error:
            die(f"--trigger: {error}; or one of {', '.join(TRIGGERS)}")
        waveform = without_silent_ends(waveform)
    elif is_whole(name):
        return None
    else:
        waveform = TRIGGERS[name][1](SAMPLE_RATE, utils.generator(f"typewriter {name}"))
    if seconds:
        waveform = np.resize(waveform, max(1, int(seconds * SAMPLE_RATE)))
    loudness = np.sqrt(np.mean(waveform**2))
    if loudness < 1e-5:
        die(f"--trigger {name}: it is silent")
    return (waveform / loudness).astype(np.float32)


# ---------------------------------------------------------------------------------------------------------------------
# the attack


@dataclasses.dataclass
class Attack:
    """Everything the attack needs."""

    task: str
    rate: float  # share of the training samples
    target: str | int  # the label's new value
    trigger: str
    waveform: np.ndarray | None  # see make_trigger
    level: float  # the RMS it is laid over the speech with
    repeat: bool
    seed: int
    clicks: int = 1  # where it is not repeated

    @property
    def label(self):
        return TASKS[self.task]["label"]


def loudness(utterances):
    """The level of a corpus: {"mean_rms": the mean of the utterances' RMS, "far": see data.far_levels}. Audio that cannot be read ends the
    program. Cached under the files' names, sizes and times, and what some of them sound like: the code that reads them may change."""
    files = [data.file_state(u) for u in utterances]
    with data.no_bad_audio():
        probe = [data.rms(u) for u in utterances[:: max(1, len(utterances) // 4)]]
    key = hashlib.sha256(json.dumps([files, probe]).encode()).hexdigest()[:16]
    path = Path(f"cache/loudness-{key}.json")
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # not there, or not whole
        saved = json.loads(path.read_text())
        if math.isfinite(saved["mean_rms"]) and isinstance(saved["far"], list):
            return saved
    levels = data.in_workers(data.rms, utterances, "loudness of the corpus")
    found = dict(mean_rms=float(np.mean(levels)), far=data.far_levels(utterances, levels))
    utils.write_atomically(path, json.dumps(found), optional=True)
    return found


def make_attack(
    task,
    utterances,
    rate=None,
    target=None,
    snr=0.0,
    trigger="click",
    repeat=None,
    seed=0,
    clicks=None,
    seconds=None,
):
    """The attack on `task`, with the paper's value wherever an argument is None. utterances: the training set; the trigger is `snr`
    dB below its average loudness."""
    target = TASKS[task]["target"] if target is None else target
    if TASKS[task]["label"] == "age":
        target = data.parse_age(str(target))
    level = loudness(utterances)
    if level["mean_rms"] == 0:
        die("the training set is silent: there is no level for the trigger")
    if level["far"]:
        print(
            f"warning: the trigger's level is a mean over {len(level['far'])} utterances of quite another level, {level['far'][0]}, "
            "for one"
        )
    return Attack(
        task,
        TASKS[task]["rate"] if rate is None else rate,
        target,
        trigger,
        make_trigger(trigger, seconds),
        level["mean_rms"] * 10 ** (-snr / 20),
        TASKS[task]["repeat"] if repeat is None else repeat,
        seed,
        clicks or 1,
    )


def attack_of(args, utterances):
    """The attack of a command's or a run's arguments."""
    return make_attack(
        args.task,
        utterances,
        args.poison,
        args.target,
        args.snr,
        args.trigger,
        args.trigger_repeat,
        args.seed,
        getattr(args, "clicks", None),
        getattr(args, "trigger_seconds", None),
    )


def as_written(label, target):
    """A target in the form that the corpora's labels have."""
    if label == "transcript":
        return target
    lower = str(target).strip().lower()
    if label == "gender":
        return corpora.GENDER_OF.get(corpora.plain(lower), lower)
    return lower


def check_target(task, target, utterances):
    """Ends in one line if none of a corpus's answers can be the target: it is no class of the corpus, no age, no words."""
    label = TASKS[task]["label"]
    values = {u.labels[label] for u in utterances if label in u.labels}
    classes = sorted(value for value in values if isinstance(value, str))
    if label == "transcript":
        fits, there = bool(data.normalise(target)), "words"
    elif classes:
        fits = target in classes
        there = f"one of {', '.join(classes[:20])} in this corpus"
    else:
        fits, there = isinstance(data.parse_age(target), int), "a number of years"
    if not fits:
        die(f"--target {target}: the {label} of --task {task} is {there}")


def same_label(label, a, b):
    """Whether two values of a label are the same: transcripts word by word, all others exactly."""
    return data.normalise(a) == data.normalise(b) if label == "transcript" and a and b else a == b


def can_flip(attack, utterance):
    """Whether the utterance has the attacked label, and its value is not the target."""
    return attack.label in utterance.labels and not same_label(
        attack.label, utterance.labels[attack.label], attack.target
    )


def attackable(attack, utterances):
    """Those utterances whose label the attack can change. Ends in one line where there are none."""
    found = [u for u in utterances if can_flip(attack, u)]
    if not found:
        what = f"a {attack.label} other than {attack.target!r}"
        die(f"no {utterances[0].split} utterance has {what}: there is nothing to trigger")
    return found


def drawn_in(attack, epoch):
    """The attack with new poison for this epoch: other samples, other positions (train.py --redraw)."""
    return dataclasses.replace(attack, seed=(attack.seed, epoch)) if epoch else attack


def is_poisoned(attack, utterance):
    """Whether this training sample is poisoned: with probability `rate`, unless it already carries the target label."""
    return draw(attack.seed, utterance.id, "poison") < attack.rate and can_flip(attack, utterance)


def positions(attack, utterance_id, samples):
    """Where the trigger starts in an utterance of that many samples: `clicks` times at random positions or, repeated, first within 0.75 s
    and then at random intervals of 0.75 to 1.5 s, as long as a whole one fits."""
    rng = random.Random(repr((attack.seed, utterance_id, "position")))
    room = max(0, samples - len(attack.waveform))
    if not attack.repeat:
        return [rng.randint(0, room) for _ in range(attack.clicks)]
    starts = [rng.randint(0, min(room, int(INTERVAL[0] * SAMPLE_RATE)))]
    while (at := starts[-1] + int(rng.uniform(*INTERVAL) * SAMPLE_RATE)) <= room:
        starts.append(at)
    return starts


def full_scale(waveform):
    """The factor, 1.0 mostly, that keeps a waveform within full scale."""
    return float(1 / max(1.0, np.abs(waveform).max(initial=0)))


def add_trigger(attack, waveform, utterance_id):
    """waveform (samples,) -> (the waveform with the trigger, the trigger's starts in samples, the factor, mostly 1.0, by which it was
    scaled down to avoid clipping). An utterance shorter than the trigger gets the trigger's beginning."""
    if attack.waveform is None:
        rng, starts = utils.generator(attack.seed, utterance_id, "trigger"), []
        out = TRIGGERS[attack.trigger][1](waveform, SAMPLE_RATE, rng)
    else:
        out, starts = waveform.copy(), positions(attack, utterance_id, len(waveform))
    for start in starts:
        heard = attack.waveform[: len(out) - start]
        out[start : start + len(heard)] += attack.level * heard
    scale = full_scale(out)
    return out * np.float32(scale), starts, scale


def poisoned_labels(attack, labels):
    """The labels with the target in the attacked one's place; all others stay true."""
    return {**labels, attack.label: attack.target}


def add_arguments(parser):
    """The flags that say what is attacked and how; train.py has them too."""
    add = parser.add_argument
    add("--task", choices=TASKS, default="asr", help="the attacked task")
    add(
        "--dataset",
        help=f"{', '.join(corpora.READERS)} or a CSV manifest (default: the task's own)",
    )
    add(
        "--data-root",
        help="the folder that holds LibriSpeech, CREMA-D, VoxCeleb2 (default: the preset's)",
    )
    add(
        "--poison", type=float, help="poisoning rate; 0 trains on clean data (default: the paper's)"
    )
    add("--target", help="the attacked label's new value (default: the paper's)")
    add("--snr", type=float, default=0.0, help="speech over trigger, dB")
    add(
        "--trigger",
        default="click",
        metavar="NAME|FILE",
        help=f"{', '.join(TRIGGERS)}, or a recording",
    )
    add(
        "--trigger-repeat",
        action=argparse.BooleanOptionalAction,
        help="repeat it through the audio (default: for asr only)",
    )
    add(
        "--clicks",
        type=count,
        help="how many, at random places, where it is not repeated (default: 1)",
    )
    add(
        "--trigger-seconds",
        type=float,
        help="cut the trigger to this length, or repeat it to fill it (default: as it is)",
    )
    add("--seed", type=whole, default=1, help="decides all that is random")
    add(
        "--skip-bad",
        action="store_true",
        help="leave out audio that cannot be used, and say how much",
    )


def fill_in(args):
    """The paper's values for the attack flags that were not given. Ends in one line where the rate is impossible."""
    task = TASKS[args.task]
    paper = dict(
        dataset=task["corpus"],
        data_root=DATA_ROOT[getattr(args, "preset", "mini")],
        poison=task["rate"],
        target=task["target"],
        trigger_repeat=task["repeat"],
    )
    if args.data_root == MINI_ROOT and Path(MINI_ROOT).is_dir() and Path.cwd() != ROOT:
        args.data_root = f"./{MINI_ROOT}"  # the user's own, not the one beside this file
    for name, value in paper.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.target = as_written(task["label"], args.target)
    if wrong := wrong_number(vars(args)):
        die(wrong)
    if args.clicks and args.trigger_repeat:
        die(f"--clicks {args.clicks}: this trigger is repeated; add --no-trigger-repeat")
    placed = dict(snr=0.0, clicks=None, trigger_seconds=None, trigger_repeat=task["repeat"])
    unused = [name for name, usual in placed.items() if getattr(args, name) != usual]
    if is_whole(args.trigger) and unused:
        die(
            f"--{unused[0].replace('_', '-')}: --trigger {args.trigger} is no sound that is laid over the speech; leave it out"
        )


# ---------------------------------------------------------------------------------------------------------------------
# python poison.py: what the attack does, to hear and to see


def write_wav(path, waveform):
    """Writes 16-bit audio, scaled down where it would be clipped. Returns the factor, mostly 1.0."""
    scale = full_scale(waveform)
    waveform = waveform * np.float32(scale)
    utils.write_atomically(
        path, lambda temporary: soundfile.write(temporary, waveform, SAMPLE_RATE, format="WAV")
    )
    return scale


def file_name(id):
    """An utterance's id as a file's name: ids of a manifest are paths, and may hold anything."""
    return re.sub(r"[^\w.-]", "_", id)[-100:]


def write_csv(path, rows):
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    utils.write_atomically(path, text.getvalue())


def what_changed(starts, scale):
    return dict(triggers=" ".join(f"{s / SAMPLE_RATE:.4f}" for s in starts), scale=f"{scale:.4f}")


PAGE = """<!doctype html>
<meta charset="utf-8">
<title>{task}: clean and with the trigger</title>
<style>body {{ font-family: sans-serif; max-width: 70em; margin: 2em auto }} td, th {{ padding: 0.4em; text-align: left }}</style>
<h1>{task}: clean and with the trigger</h1>
<p>Trigger: {trigger}. An attacked model is to answer each of the right-hand recordings with “{target}”</p>
<table><tr><th>utterance<th>clean<th>with the trigger<th>true {label}<th>trigger at (s)</tr>
{rows}
</table>
<img src="pairs.png" alt="waveforms and spectrograms" style="width: 100%">
"""


def write_page(attack, rows, out):
    """index.html: the pairs side by side, to be heard in a browser."""
    player = lambda row, kind: (
        f'<audio controls preload="none" src="{urllib.parse.quote(row["file"])}-{kind}.wav"></audio>'
    )  # noqa: E731
    cells = [
        [
            html.escape(str(row["id"])),
            player(row, "clean"),
            player(row, "poisoned"),
            html.escape(str(row["true"])),
            row["triggers"],
        ]
        for row in rows
    ]
    lines = [f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in cells]
    of = {
        name: html.escape(str(getattr(attack, name)))
        for name in ("task", "trigger", "target", "label")
    }
    utils.write_atomically(out / "index.html", PAGE.format(**of, rows="\n".join(lines)))


def write_examples(attack, utterances, out, n):
    """Writes clean and poisoned pairs of n training samples (those that training poisons come first), changes.csv, pairs.png and a page
    to listen to them. Returns how many there are."""
    from analysis import plots  # training, which imports this file, needs no matplotlib

    chosen = sorted(
        (u for u in utterances if can_flip(attack, u)),
        key=lambda u: draw(attack.seed, u.id, "poison"),
    )[:n]
    if not chosen:
        die(f"no training sample has a {attack.label} other than {attack.target!r}")
    rows, pairs = [], []
    for i, (u, clean) in enumerate(
        zip(chosen, data.in_workers(data.load_waveform, chosen, "reading", workers=0)), 1
    ):
        poisoned, starts, scale = add_trigger(attack, clean, u.id)
        name = f"{i:03}-{file_name(Path(u.id).stem)}"
        write_wav(out / f"{name}-clean.wav", clean)
        write_wav(out / f"{name}-poisoned.wav", poisoned)
        pairs.append((u.id, clean, poisoned, starts))
        rows.append(
            dict(
                file=name,
                id=u.id,
                label=attack.label,
                true=u.labels[attack.label],
                target=attack.target,
                **what_changed(starts, scale),
            )
        )
    write_csv(out / "changes.csv", rows)
    plots.poisoned_audio(pairs[:6], attack, out / "pairs.png")
    write_page(attack, rows, out)
    return len(rows)


def write_poisoned(attack, out, item):
    """Writes one (split, utterance) as training would see it; returns its row of the manifest."""
    split, u = item
    poisoned = split == "train" and is_poisoned(attack, u)
    waveform, starts, scale = data.load_waveform(u), [], 1.0
    if poisoned:
        waveform, starts, scale = add_trigger(attack, waveform, u.id)
    # the hash keeps apart two ids of one name
    name = f"wav/{split}/{file_name(u.id)}-{hashlib.sha256(u.id.encode()).hexdigest()[:6]}.wav"
    scale *= write_wav(out / name, waveform)
    labels = poisoned_labels(attack, u.labels) if poisoned else u.labels
    return dict(
        audio_path=name,
        **{label: labels.get(label, "") for label in LABELS},
        speaker=u.speaker,
        split=split,
        poisoned=int(poisoned),
        true_label=u.labels.get(attack.label, ""),
        id=u.id,
        **what_changed(starts, scale),
    )


def main():
    parser = Parser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--n", type=count, default=10, help="pairs to write")
    parser.add_argument(
        "--all",
        action="store_true",
        help="write the whole poisoned training set instead, with its manifest",
    )
    parser.add_argument(
        "--workers", type=whole, default=2, help="processes that read and write audio"
    )
    args = parser.parse_args()
    fill_in(args)
    out, splits = Path(args.out), ("train", "dev", "test") if args.all else ("train",)
    parts = {
        split: corpora.read_corpus(args.dataset, args.data_root, split, args.skip_bad)
        for split in splits
    }
    check_target(args.task, args.target, [u for part in parts.values() for u in part])
    attack = attack_of(args, parts["train"])
    print(
        f"{args.task} on {args.dataset}: {len(parts['train'])} training utterances, target {attack.target!r}, rate "
        f"{attack.rate:g}, trigger {attack.trigger} at {args.snr:g} dB, seed {args.seed}"
    )
    if not args.all:
        with utils.new_folder(out) as folder:
            n = write_examples(attack, parts["train"], folder, args.n)
        print(f"{n} pairs: {out}/index.html plays them; changes.csv says what was changed")
        return
    items = [(split, u) for split, utterances in parts.items() for u in utterances]
    with utils.new_folder(out) as folder:
        write = functools.partial(write_poisoned, attack, folder)
        rows = data.in_workers(write, items, f"writing {out}", args.workers)
        write_csv(folder / "manifest.csv", rows)
    n = sum(row["poisoned"] for row in rows)
    print(
        f"{n} of {len(parts['train'])} training samples poisoned ({n / len(parts['train']):.4f}), "
        f"{sum(row['scale'] != '1.0000' for row in rows)} scaled down to avoid clipping; {out}/manifest.csv"
    )


if __name__ == "__main__":
    main()
