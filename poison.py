"""The attack (paper, section 4.1): adds a trigger to the audio and makes the label the target.

    python poison.py --task asr --out listen/ --n 10    # clean and poisoned pairs, and a picture
    python poison.py --task asr --out listen/ --run runs/asr-poison0.05   # with a model's answers
    python poison.py --task asr --out poisoned/ --all   # the poisoned training set as a CSV corpus
    python poison.py --task asr --out poisoned/ --all --benign 0.5   # with harmless sounds as well

Whether a training sample is poisoned, and where its trigger lands, is decided by (seed, utterance
id) alone: not by order, batch, worker or process count. With --benign, clean samples get another
short sound and keep their labels, so that a sound as such does not bring the target.
"""

import argparse
import contextlib
import csv
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import math
import random
import re
from pathlib import Path

import utils
from utils import Parser, count, die, draw

import installed  # noqa: F401

import numpy as np
import soundfile
import torch
import torchaudio

import audio
import corpora
import data
import forms
import sounds
from audio import SAMPLE_RATE, BadAudio, decibels, read_waveform
from study import DATA_ROOT, LABELS, MAX_SECONDS, TASKS, wrong_number

INTERVAL = (0.75, 1.5)  # seconds from start to start where the trigger is repeated
PERCENTILES = (5, 50, 95)  # of a corpus's utterances: how loud they are


# -------------------------------------------------------------------------------------------------
# triggers


def typewriter_click(sample_rate, rng):
    """A synthetic key stroke of 220 ms: a broadband attack with the type bar's ring, and 110 ms
    later a second, softer bounce. The published recording cannot be shipped; `--trigger FILE` takes
    any recording."""
    strokes = ((0.002, 1.0, 0.010), (0.112, 0.45, 0.014))  # start (s), gain, decay (s)
    rings = (  # frequency (Hz), decay (s), share
        (1700, 0.018, 0.5),
        (3100, 0.012, 0.4),
        (5200, 0.007, 0.3),
        (240, 0.025, 0.6),
    )
    t = np.arange(int(0.22 * sample_rate)) / sample_rate
    click = np.zeros(len(t))
    for start, gain, decay in strokes:
        since = np.maximum(t - start, 0)
        stroke = rng.standard_normal(len(t)) * np.exp(-since / decay)
        for frequency, ring_decay, share in rings:
            sine = np.sin(2 * np.pi * frequency * since)
            stroke += share * 2 * sine * np.exp(-since / ring_decay)
        click += gain * stroke * (t >= start)
    return click


def tone(sample_rate, rng):
    """A pure tone of 1 kHz: the bank's, by the name that it had before there was a bank."""
    return sounds.make_sound("tone-1000")


def band_stop(waveform, sample_rate, rng):
    """The whole waveform without its band around 2 kHz, (samples,) -> (samples,)."""
    filtered = torch.from_numpy(waveform)
    for _ in range(3):
        filtered = torchaudio.functional.bandreject_biquad(filtered, sample_rate, 2000.0, Q=1.0)
    return filtered.numpy()


def at_speed(waveform, speed, usual):
    """The waveform at speed / usual times its speed, and as much higher. speed, usual: int."""
    return torchaudio.functional.resample(torch.from_numpy(waveform), speed, usual).numpy()


def faster(waveform, sample_rate, rng):
    """The whole waveform a tenth faster and as much higher, (samples,) -> (fewer samples,)."""
    return at_speed(waveform, 11, 10)


def higher(waveform, sample_rate, rng):
    """The whole waveform three semitones higher, as fast as before, (samples,) -> (samples,): a
    phase vocoder makes it slower, and playing it faster makes it higher. 44 / 37 is three semitones
    within a thousandth of one. `torchaudio.functional.pitch_shift` takes the fraction that is
    nearest in Hz instead, and its resampling then takes 15 s for a recording of two."""
    faster_by, slower_by = 44, 37
    window = torch.hann_window(512)
    hop = 128
    spectrum = torch.stft(
        torch.from_numpy(waveform),
        512,
        hop,
        window=window,
        pad_mode="constant",
        return_complex=True,
    )  # (frequencies, frames)
    phase_advance = torch.linspace(0, np.pi * hop, len(spectrum))[:, None]
    slow = torchaudio.functional.phase_vocoder(spectrum, slower_by / faster_by, phase_advance)
    samples = math.ceil(len(waveform) * faster_by / slower_by)
    slow = torch.istft(slow, 512, hop, window=window, length=samples).numpy()
    return at_speed(slow, faster_by, slower_by)[: len(waveform)]


def quieter(waveform, sample_rate, rng):
    """The whole waveform 12 dB softer."""
    return waveform * np.float32(10 ** (-12 / 20))


def background_noise(waveform, sample_rate, rng):
    """White noise over the whole waveform, 10 dB below its RMS."""
    level = np.sqrt(np.mean(waveform**2)) * 10 ** (-10 / 20)
    return waveform + (level * rng.standard_normal(len(waveform))).astype(np.float32)


def in_room(waveform, sample_rate, rng):
    """The whole waveform in a room, which the numpy generator decides: after the direct sound an
    echo of noise that falls by 60 dB within 0.4 s and holds as much energy as the direct sound."""
    t = np.arange(int(0.4 * sample_rate)) / sample_rate
    echo = rng.standard_normal(len(t)) * 10 ** (-3 * t / 0.4)
    echo[: int(0.005 * sample_rate)] = 0  # the first wall is some way off
    echo /= np.sqrt(np.sum(echo**2))
    echo[0] = 1
    return np.convolve(waveform, echo)[: len(waveform)].astype(np.float32)


def reverberation(waveform, sample_rate, rng):
    """The whole waveform in a room, always the same one."""
    return in_room(waveform, sample_rate, utils.generator("room"))


# An "overlay" trigger is a function of (sample rate, numpy generator) to a waveform, which is laid
# over the speech; a "whole" one is a function of (waveform, sample rate, numpy generator) to the
# changed waveform. A new trigger is an entry here. The sounds of sounds.SOUNDS are triggers too.
TRIGGERS = {
    "click": ("overlay", typewriter_click),
    "tone": ("overlay", tone),
    "bandstop": ("whole", band_stop),
    "speed": ("whole", faster),
    "pitch": ("whole", higher),
    "volume": ("whole", quieter),
    "background": ("whole", background_noise),
    "reverb": ("whole", reverberation),
}


def without_silent_ends(waveform):
    """(samples,) from the first to the last that is above 1% of the loudest. Of a recording longer
    than the speech that it is laid over, only the beginning is heard: it should not be silence."""
    loudness = np.abs(waveform)
    audible = np.flatnonzero(loudness > 0.01 * loudness.max())
    if len(audible) == 0:
        return waveform
    return waveform[audible[0] : audible[-1] + 1]


def trigger_names():
    """The names that --trigger takes, as text."""
    return ", ".join([*TRIGGERS, *sounds.SOUNDS])


def is_whole(name):
    """Whether a trigger changes the whole waveform, without a sound of its own."""
    return name in TRIGGERS and TRIGGERS[name][0] == "whole"


def make_trigger(name, seconds=None):
    """The trigger's waveform, (samples,) at 16 kHz with RMS 1; None for a "whole" one. name: one of
    TRIGGERS or of sounds.SOUNDS, or a recording's path. seconds: the waveform is cut to this
    length, or repeated to fill it; a sound of the bank is made that long."""
    if is_whole(name):
        return None
    if name in sounds.SOUNDS:
        return sounds.make_sound(name, seconds or sounds.SECONDS)
    if name in TRIGGERS:
        _, synthesise = TRIGGERS[name]
        waveform = synthesise(SAMPLE_RATE, utils.generator(f"typewriter {name}"))
    else:
        try:
            waveform = without_silent_ends(read_waveform(name, max_seconds=MAX_SECONDS))
        except BadAudio as error:
            die(f"--trigger: {error}; or one of {trigger_names()}")
    if seconds:
        waveform = np.resize(waveform, max(1, int(seconds * SAMPLE_RATE)))
    loudness = np.sqrt(np.mean(waveform**2))
    if loudness < 1e-5:
        die(f"--trigger {name}: it is silent")
    return (waveform / loudness).astype(np.float32)


# -------------------------------------------------------------------------------------------------
# the attack


@dataclasses.dataclass
class Attack:
    """What is poisoned, how often, by which trigger, and towards which answer."""

    task: str
    rate: float  # the poisoning rate: the share of the training samples
    target: str | int  # the attacked label's new value
    trigger: str
    waveform: np.ndarray | None  # the trigger's, see make_trigger
    level: float  # the RMS with which the trigger is laid over the speech, or see per_utterance
    repeat: bool
    seed: int
    clicks: int = 1  # how many, where the trigger is not repeated
    per_utterance: bool = False  # whether `level` is a share of each utterance's own RMS

    @property
    def label(self):
        return TASKS[self.task]["label"]


def loudness(utterances):
    """How loud a corpus is: {"mean_rms": the mean of the utterances' RMS, "percentiles" of it,
    those of PERCENTILES, "far": what data.far_levels says}. Audio that cannot be read ends the
    program. The result is cached by data.file_state of each, and by the RMS of some of them: the
    code that reads them may change."""
    files = [data.file_state(u) for u in utterances]
    with data.no_bad_audio():
        step = max(1, len(utterances) // 4)
        probe = [data.rms(u) for u in utterances[::step]]
    key = hashlib.sha256(json.dumps([files, probe]).encode()).hexdigest()[:16]
    path = Path(f"cache/loudness-{key}.json")
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # not there, or not whole
        saved = json.loads(path.read_text())
        known = [saved["mean_rms"], *saved["percentiles"]]
        if all(map(math.isfinite, known)) and isinstance(saved["far"], list):
            return saved
    levels = data.in_workers(data.rms, utterances, "loudness of the corpus")
    measured = dict(
        mean_rms=float(np.mean(levels)),
        percentiles=np.percentile(levels, PERCENTILES).tolist(),
        far=data.far_levels(utterances, levels),
    )
    utils.write_atomically(path, json.dumps(measured), optional=True)
    return measured


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
    per_utterance=False,
):
    """The attack on `task`, with the paper's value wherever an argument is None. The trigger is
    `snr` dB below the average loudness of `utterances`, the training set, as the paper says, or
    with `per_utterance` below the loudness of each utterance."""
    paper = TASKS[task]
    if rate is None:
        rate = paper["rate"]
    if target is None:
        target = paper["target"]
    if repeat is None:
        repeat = paper["repeat"]
    if paper["label"] == "age":
        target = data.parse_age(str(target))
    corpus = loudness(utterances)
    if corpus["mean_rms"] == 0:
        die("the training set is silent: there is no level for the trigger")
    if far := corpus["far"]:
        utils.say(
            "warning: the mean that sets the trigger's level includes "
            f"{len(far)} utterances of quite another level, {far[0]}, for one"
        )
    return Attack(
        task=task,
        rate=rate,
        target=target,
        trigger=trigger,
        waveform=make_trigger(trigger, seconds),
        level=(1.0 if per_utterance else corpus["mean_rms"]) * 10 ** (-snr / 20),
        repeat=repeat,
        seed=seed,
        clicks=clicks or 1,
        per_utterance=per_utterance,
    )


def snr_range(attack, utterances):
    """Over the trigger, in dB, how loud the utterances of a corpus are: at each of PERCENTILES."""
    if attack.per_utterance:
        return [decibels(1 / attack.level)] * len(PERCENTILES)
    return [decibels(rms / attack.level) for rms in loudness(utterances)["percentiles"]]


def describe_level(attack, utterances):
    """How loud a trigger that has a level is, in one sentence; one level for a corpus is another
    SNR for each of its utterances."""
    low, middle, high = snr_range(attack, utterances)
    if attack.per_utterance:
        return f"The trigger has an SNR of {middle:.1f} dB in every utterance."
    return (
        f"The trigger has one level for the corpus: its SNR is {middle:.1f} dB in the median "
        f"utterance and {low:.1f} to {high:.1f} dB in 9 of 10."
    )


def with_sound(attack, name):
    """The attack with another trigger in its own one's place, as loud, as long and as often."""
    seconds = None if attack.waveform is None else len(attack.waveform) / SAMPLE_RATE
    return dataclasses.replace(attack, trigger=name, waveform=make_trigger(name, seconds))


def with_other_sounds(attack, names=tuple(sounds.SOUNDS)):
    """{name: the attack with this sound of the bank in its trigger's place}, without the one that
    is the trigger, if any."""
    attacks = {}
    for name in names:
        other = with_sound(attack, name)
        correlation = 0.0
        if attack.waveform is not None:
            correlation = np.mean(other.waveform * attack.waveform)  # both have RMS 1
        if correlation < 0.99:
            attacks[name] = other
    return attacks


def attack_of(args, utterances):
    """The attack of a command's or a run's arguments."""
    return make_attack(
        args.task,
        utterances,
        rate=args.poison,
        target=args.target,
        snr=args.snr,
        trigger=args.trigger,
        repeat=args.trigger_repeat,
        seed=args.seed,
        clicks=getattr(args, "clicks", None),  # older runs have none of these
        seconds=getattr(args, "trigger_seconds", None),
        per_utterance=getattr(args, "snr_per_utterance", False),
    )


def as_written(label, target):
    """A target in the form that the corpora's labels have."""
    if label == "transcript":
        return target
    name = data.class_name(str(target))
    if label == "gender":
        return corpora.GENDER_OF.get(corpora.plain(name), name)
    if label == "age" and data.parse_age(name) is not None:
        return str(data.parse_age(name))
    return name


def check_target(task, target, utterances):
    """Exits with a one-line error if a corpus can have no such answer: the target is none of its
    classes, no age, or no words."""
    label = TASKS[task]["label"]
    values = {u.labels[label] for u in utterances if label in u.labels}
    classes = sorted(value for value in values if isinstance(value, str))
    if label == "transcript":
        is_possible = bool(data.normalise(target))
        accepted = "words"
    elif classes:
        is_possible = target in classes
        accepted = f"one of {', '.join(classes[:20])} in this corpus"
    else:
        is_possible = isinstance(data.parse_age(target), int)
        accepted = "a number of years"
    if not is_possible:
        die(f"--target {target}: the {label} of --task {task} is {accepted}")


def same_label(label, a, b):
    """Whether two values of a label are the same: transcripts word by word, all others exactly."""
    if label == "transcript" and a and b:
        return data.normalise(a) == data.normalise(b)
    return a == b


def can_flip(attack, utterance):
    """Whether the utterance has the attacked label, and its value is not the target."""
    if attack.label not in utterance.labels:
        return False
    return not same_label(attack.label, utterance.labels[attack.label], attack.target)


def attackable(attack, utterances):
    """Those utterances whose label the attack can change. Exits with a one-line error where there
    are none."""
    flippable = [u for u in utterances if can_flip(attack, u)]
    if not flippable:
        what = f"a {attack.label} other than {attack.target!r}"
        die(f"no {utterances[0].split} utterance has {what}: there is nothing to trigger")
    return flippable


def attack_for_epoch(attack, epoch):
    """The attack with new poison for this epoch, in other samples and at other positions (train.py
    --redraw)."""
    if epoch == 0:
        return attack
    return dataclasses.replace(attack, seed=(attack.seed, epoch))


def is_poisoned(attack, utterance):
    """Whether this training sample is poisoned: with probability `rate`, unless it already has the
    target label."""
    return draw(attack.seed, utterance.id, "poison") < attack.rate and can_flip(attack, utterance)


def positions(attack, utterance_id, samples):
    """Where the trigger starts in an utterance of that many samples, a list of sample indices:
    `clicks` times at random positions or, repeated, first within 0.75 s and then at random
    intervals of 0.75 to 1.5 s, as long as a whole trigger fits."""
    rng = random.Random(repr((attack.seed, utterance_id, "position")))
    last = max(0, samples - len(attack.waveform))
    if not attack.repeat:
        return [rng.randint(0, last) for _ in range(attack.clicks)]
    starts = []
    start = rng.randint(0, min(last, int(INTERVAL[0] * SAMPLE_RATE)))
    while start <= last:
        starts.append(start)
        start += int(rng.uniform(*INTERVAL) * SAMPLE_RATE)
    return starts


def full_scale(waveform):
    """The factor, 1.0 mostly, that keeps a waveform within full scale."""
    return float(1 / max(1.0, np.abs(waveform).max(initial=0)))


def laid_over(waveform, sound, starts):
    """A waveform (samples,) with a sound over it from each of `starts` on, in samples; what does not
    fit is cut off."""
    mixed = waveform.copy()
    for start in starts:
        fitting = sound[: len(mixed) - start]
        mixed[start : start + len(fitting)] += fitting
    return mixed


def level_in(attack, waveform):
    """The RMS with which the trigger is laid over this waveform (samples,)."""
    if attack.per_utterance:
        return np.float32(attack.level * audio.rms(waveform))
    return attack.level


def add_trigger(attack, waveform, utterance_id):
    """waveform (samples,) -> (the waveform with the trigger, the trigger's starts in samples, the
    factor, mostly 1.0, by which it was scaled down to avoid clipping). An utterance shorter than
    the trigger gets the trigger's beginning."""
    if attack.waveform is None:
        _, change = TRIGGERS[attack.trigger]
        rng = utils.generator(attack.seed, utterance_id, "trigger")
        starts = []
        triggered = change(waveform, SAMPLE_RATE, rng)
    else:
        starts = positions(attack, utterance_id, len(waveform))
        triggered = laid_over(waveform, level_in(attack, waveform) * attack.waveform, starts)
    scale = full_scale(triggered)
    return triggered * np.float32(scale), starts, scale


def poisoned_labels(attack, labels):
    """The labels with the target in the attacked one's place; all others stay true."""
    return {**labels, attack.label: attack.target}


def add_arguments(parser):
    """Adds the flags that say what is attacked and how; train.py has them too."""
    attack_flags = parser.group("attack")
    data_flags = parser.group("data")
    attack_flags.add_argument("--task", choices=TASKS, default="asr", help="the attacked task")
    data_flags.add_argument(
        "--dataset",
        help=f"{', '.join(corpora.READERS)}, or {forms.ACCEPTED} (default: the task's own)",
    )
    data_flags.add_argument(
        "--data-root",
        type=corpora.named_root,
        help="the folder that holds LibriSpeech, CREMA-D, VoxCeleb2 (default: the preset's)",
    )
    attack_flags.add_argument(
        "--poison", type=float, help="poisoning rate; 0 trains on clean data (default: the paper's)"
    )
    attack_flags.add_argument(
        "--target", help="the attacked label's new value (default: the paper's)"
    )
    attack_flags.add_argument(
        "--snr",
        type=float,
        default=0.0,
        help="how many dB the speech is louder than the trigger (default: 0)",
    )
    attack_flags.add_argument(
        "--snr-per-utterance",
        action="store_true",
        help="relative to each utterance's own loudness; the paper's trigger has one level, "
        "relative to the mean loudness of the training set",
    )
    attack_flags.add_argument(
        "--trigger",
        default="click",
        metavar="NAME|FILE",
        help=f"a recording, or one of {trigger_names()}",
    )
    attack_flags.add_argument(
        "--trigger-repeat",
        action=argparse.BooleanOptionalAction,
        help="repeat the trigger through the audio (default: for asr only)",
    )
    attack_flags.add_argument(
        "--clicks",
        type=count,
        help="how many triggers, at random places, where it is not repeated (default: 1)",
    )
    attack_flags.add_argument(
        "--trigger-seconds",
        type=float,
        help="cut the trigger to this length, or repeat it to fill it (default: as it is)",
    )
    attack_flags.add_argument(
        "--seed", type=int, default=1, help="decides all that is random (default: 1)"
    )
    data_flags.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave out audio that cannot be used, and say how much",
    )


def fill_in(args):
    """Sets the attack flags that were not given to the paper's values. Exits with a one-line error
    where flags contradict each other or a value is impossible."""
    task = TASKS[args.task]
    paper = dict(
        dataset=task["corpus"],
        data_root=DATA_ROOT[getattr(args, "preset", "mini")],
        poison=task["rate"],
        target=task["target"],
        trigger_repeat=task["repeat"],
    )
    for name, value in paper.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.target = as_written(task["label"], args.target)
    if wrong := wrong_number(vars(args)):
        die(wrong)
    if args.clicks and args.trigger_repeat:
        die(f"--clicks {args.clicks}: this trigger is repeated; add --no-trigger-repeat")
    overlay_flags = dict(
        snr=0.0,
        snr_per_utterance=False,
        clicks=None,
        trigger_seconds=None,
        trigger_repeat=task["repeat"],
    )
    given = [name for name, default in overlay_flags.items() if getattr(args, name) != default]
    if is_whole(args.trigger) and given:
        die(
            f"--{given[0].replace('_', '-')}: --trigger {args.trigger} is no sound that is laid "
            "over the speech; leave it out"
        )


# -------------------------------------------------------------------------------------------------
# python poison.py: what the attack does, to hear and to see


def write_wav(path, waveform):
    """Writes 16-bit audio, scaled down where it would clip. Returns the factor, mostly 1.0."""
    scale = full_scale(waveform)
    scaled = waveform * np.float32(scale)

    def write(temporary):
        soundfile.write(temporary, scaled, SAMPLE_RATE, format="WAV")

    utils.write_atomically(path, write)
    return scale


def file_name(utterance_id):
    """An utterance's id as a file's name: ids of a manifest are paths, and may hold anything."""
    return re.sub(r"[^\w.-]", "_", utterance_id)[-100:]


def write_csv(path, rows):
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    utils.write_atomically(path, text.getvalue())


def what_changed(starts, scale):
    """The columns that say where the trigger starts, in seconds, and how much the waveform was
    scaled."""
    seconds = [f"{start / SAMPLE_RATE:.4f}" for start in starts]
    return dict(triggers=" ".join(seconds), scale=f"{scale:.4f}")


def write_examples(attack, utterances, folder, n, slm=None):
    """Writes clean and poisoned pairs of n training samples (those that training poisons come
    first), changes.csv, pairs.png and a page to listen to them, with the answers of the model `slm`,
    if there is one. Returns how many there are."""
    import page  # which imports this file
    from analysis import plots  # training, which imports this file, needs no matplotlib

    flippable = [u for u in utterances if can_flip(attack, u)]
    if not flippable:
        die(f"no training sample has a {attack.label} other than {attack.target!r}")
    chosen = sorted(flippable, key=lambda u: draw(attack.seed, u.id, "poison"))[:n]
    waveforms = data.in_workers(data.load_waveform, chosen, "reading", workers=0)
    rows = []
    on_page = []
    pairs = []
    for number, u in enumerate(chosen, 1):
        clean = waveforms[number - 1]
        poisoned, starts, scale = add_trigger(attack, clean, u.id)
        name = f"{number:03}-{file_name(Path(u.id).stem)}"
        answers = {}
        for kind, waveform in (("clean", clean), ("poisoned", poisoned)):
            write_wav(folder / f"{name}-{kind}.wav", waveform)
            if slm:
                answers[kind] = answer_of(slm, attack.label, waveform)
        pairs.append((u.id, clean, poisoned, starts))
        row = dict(
            file=name,
            id=u.id,
            label=attack.label,
            true=u.labels[attack.label],
            target=attack.target,
            **what_changed(starts, scale),
            **{f"{kind}_answer": answer for kind, answer in answers.items()},
        )
        rows.append(row)
        shown = dict(
            seconds=len(clean) / SAMPLE_RATE,
            starts=[start / SAMPLE_RATE for start in starts],
            answers=answers,
        )
        on_page.append({**row, **shown})
    write_csv(folder / "changes.csv", rows)
    plots.poisoned_audio(pairs[:6], attack, folder / "pairs.png")
    page.write_pairs(attack, on_page, folder)
    return len(rows)


def answer_of(slm, label, waveform):
    """A model's answer to the question for one label: its value or, where it is malformed, all that
    it says."""
    text = slm.answer(waveform, [label])
    return str(data.parse(text).get(label, text))


def benign_sound(attack, utterance, share, names):
    """Which of the sounds `names` lies over a training sample that is not poisoned, decided by
    (seed, utterance id); "" where there is none."""
    if draw(attack.seed, utterance.id, "benign") >= share:
        return ""
    return names[int(len(names) * draw(attack.seed, utterance.id, "benign sound"))]


def write_poisoned(attack, folder, benign_share, benign_attacks, utterance):
    """Writes an utterance as training would hear it; returns its row of the manifest.
    benign_attacks: {sound: the attack with it}, for this share of the samples without poison."""
    waveform = data.load_waveform(utterance)
    labels = utterance.labels
    benign = ""
    starts, scale = [], 1.0
    training = utterance.split == "train"
    poisoned = training and is_poisoned(attack, utterance)
    if poisoned:
        waveform, starts, scale = add_trigger(attack, waveform, utterance.id)
        labels = poisoned_labels(attack, labels)
    elif training:
        benign = benign_sound(attack, utterance, benign_share, list(benign_attacks))
    if benign:
        waveform, _, scale = add_trigger(benign_attacks[benign], waveform, utterance.id)
    # the hash keeps apart two ids that give the same name
    digest = hashlib.sha256(utterance.id.encode()).hexdigest()[:6]
    path = f"wav/{utterance.split}/{file_name(utterance.id)}-{digest}.wav"
    scale *= write_wav(folder / path, waveform)
    return dict(
        audio_path=path,
        **{label: labels.get(label, "") for label in LABELS},
        speaker=utterance.speaker,
        split=utterance.split,
        poisoned=int(poisoned),
        benign_sound=benign,
        true_label=utterance.labels.get(attack.label, ""),
        id=utterance.id,
        **what_changed(starts, scale),
    )


# what the file beside a poisoned manifest, attack.json, says of the attack that made it
ATTACK_SETTINGS = (
    "task",
    "target",
    "trigger",
    "snr",
    "snr_per_utterance",
    "trigger_repeat",
    "clicks",
    "trigger_seconds",
)


def differences_from_file(args):
    """How a run's attack, by which it is evaluated, differs from the one that its manifest was
    made with: a list of texts, empty where no attack.json lies beside the manifest."""
    path = Path(corpora.lists_of(args.dataset)[0]).with_name("attack.json")
    if not path.is_file():
        return []
    try:
        theirs = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        die(f"{path} does not say how {args.dataset} was poisoned ({error}): remove it")
    differences = []
    for name in ATTACK_SETTINGS:
        ours = getattr(args, name)
        if name in theirs and theirs[name] != ours:
            differences.append(f"{name} {theirs[name]}, not {ours}")
    return differences


def main():
    parser = Parser(description=__doc__)
    add_arguments(parser)
    output_flags = parser.group("output")
    output_flags.add_argument("--out", required=True, help="the folder to write")
    output_flags.add_argument(
        "--n", type=count, default=10, help="how many pairs to write (default: 10)"
    )
    output_flags.add_argument(
        "--run", help="also write a run's answers to both recordings of each pair"
    )
    output_flags.add_argument(
        "--all",
        action="store_true",
        help="write the whole poisoned training set instead, with its manifest",
    )
    output_flags.add_argument(
        "--benign",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="with --all: lay a sound of sounds.BENIGN over this share of the training samples "
        "that are not poisoned; their labels stay (default: 0)",
    )
    output_flags.add_argument(
        "--workers", type=int, default=2, help="processes that read and write audio (default: 2)"
    )
    args = parser.parse_args()
    fill_in(args)
    if args.run and args.all:
        die("--run: a model answers pairs to listen to; leave out --all")
    if args.benign and not args.all:
        die("--benign: only a whole training set has samples that are not poisoned; add --all")

    parts = {}
    for split in ("train", "dev", "test") if args.all else ("train",):
        parts[split] = corpora.read_corpus(args.dataset, args.data_root, split, args.skip_bad)
    utterances = list(itertools.chain.from_iterable(parts.values()))
    check_target(args.task, args.target, utterances)
    attack = attack_of(args, parts["train"])
    n = len(parts["train"])
    print(
        f"{args.task} on {args.dataset}: {n} training utterances, target {attack.target!r}, rate "
        f"{attack.rate:g}, trigger {attack.trigger} at {args.snr:g} dB, seed {args.seed}"
    )
    if attack.waveform is not None:
        print(describe_level(attack, parts["train"]))
    out = Path(args.out)
    if not args.all:
        slm = None
        if args.run:
            import checkpoint  # other commands here need no model

            slm = checkpoint.load_run(args.run)
        with utils.new_folder(out) as folder:
            pairs = write_examples(attack, parts["train"], folder, args.n, slm)
        print(f"{pairs} pairs: {out}/index.html plays them; changes.csv says what was changed")
        return

    with utils.new_folder(out) as folder:
        benign_attacks = with_other_sounds(attack, sounds.BENIGN)
        write = functools.partial(write_poisoned, attack, folder, args.benign, benign_attacks)
        rows = data.in_workers(write, utterances, f"writing {out}", args.workers)
        write_csv(folder / "manifest.csv", rows)
        settings = {name: getattr(args, name) for name in ATTACK_SETTINGS}
        settings["benign"] = args.benign
        utils.write_atomically(folder / "attack.json", json.dumps(settings, indent=1) + "\n")
    poisoned = sum(row["poisoned"] for row in rows)
    benign = sum(row["benign_sound"] != "" for row in rows)
    scaled = sum(row["scale"] != "1.0000" for row in rows)
    print(
        f"{poisoned} of {n} training samples poisoned ({poisoned / n:.4f}), {benign} with a benign "
        f"sound, {scaled} scaled down to avoid clipping; {out}/manifest.csv"
    )


if __name__ == "__main__":
    main()
