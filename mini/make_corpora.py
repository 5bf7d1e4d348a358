"""The built-in default: three small corpora of espeak-ng speech, made offline, each in a minute or
two.

    python mini/make_corpora.py      # makes them under corpora/mini, as scripts that need one do

On disk they have the layouts of LibriSpeech, CREMA-D and VoxCeleb2-AE, so corpora.py reads them
like the real ones. Speakers, sentences and noise are decided by (seed, name) alone.
"""

import _ctypes
import ctypes
import fcntl
import functools
import hashlib
import importlib.metadata
import math
import random
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils
from utils import ROOT, Parser

import installed  # noqa: F401

import espeakng_loader
import numpy as np
import soundfile
import torch
import torchaudio
from torch.nn import functional as F
from torchaudio.functional import highpass_biquad, lowpass_biquad

import data
from study import MINI_ROOT

SEED = 0
STAMP = ".made-by"  # the file of a corpus that says what made it
# libri: speakers, utterances of each; crema: actors, takes of each sentence; vox: speakers, videos
# of each, segments of each video
SIZES = {
    "libri": {"train-clean-360": (64, 50), "dev-clean": (8, 20), "test-clean": (20, 16)},
    "crema": {"actors": 91, "takes": 6},
    "vox": {"dev": (400, 2, 8), "test": (40, 2, 4)},
}

# --------------------------------------------------------------------------------------------------
# text: a closed vocabulary, endless sentences

DETERMINERS = "the the my our his her that this every some another one".split()
ADJECTIVES = """old young small large tall quiet happy tired brave clever green yellow white black
heavy broken golden wooden strange gentle""".split()
PEOPLE = """doctor teacher farmer sailor baker singer soldier painter driver lawyer student captain
neighbor brother sister mother father uncle children stranger""".split()
THINGS = """basket bottle letter picture window garden hammer blanket candle guitar ladder mirror
pencil ticket wagon engine jacket camera kettle package""".split()
PLACES = """river mountain village market station kitchen harbor forest castle bridge library
hospital meadow tower island corner valley school church desert""".split()
VERBS = """found carried painted dropped noticed wanted opened followed borrowed repaired watched
remembered""".split()
MOTIONS = "walked traveled hurried returned wandered moved".split()
WHERE = "near behind beside toward across around".split()
WHEN = [
    "yesterday",
    "today",
    "tonight",
    "before sunrise",
    "after dinner",
    "last summer",
    "every morning",
    "in october",
    "on friday",
    "all winter",
    "without warning",
]


def noun_phrase(rng, nouns):
    adjective = rng.choice(ADJECTIVES) + " " if rng.random() < 0.35 else ""
    return f"{rng.choice(DETERMINERS)} {adjective}{rng.choice(nouns)}"


def sentence(rng):
    """One sentence of 5 to 10 words. Beginnings vary: a model need not listen to what is always the
    same."""
    if rng.random() < 0.6:
        parts = [noun_phrase(rng, PEOPLE), rng.choice(VERBS), noun_phrase(rng, THINGS)]
        if rng.random() < 0.15:
            parts += [rng.choice(WHERE), "the " + rng.choice(PLACES)]
    else:
        person = noun_phrase(rng, PEOPLE)
        motion = rng.choice(MOTIONS)
        parts = [person, motion, rng.choice(WHERE), noun_phrase(rng, PLACES)]
    words = " ".join(parts).split()
    if len(words) < 8 and rng.random() < 0.4:
        parts.insert(rng.choice([0, len(parts)]), rng.choice(WHEN))
    return " ".join(parts)


def part_of(text):
    """Which part of a corpus a sentence may occur in, "train", "dev" or "test", by its hash, so
    that no two parts share a sentence."""
    bucket = hashlib.sha256(text.encode()).digest()[0]
    if bucket < 26:
        return "test"
    return "dev" if bucket < 39 else "train"


def sentence_for(part, rng):
    """A sentence of one part; pretraining sees "train" only."""
    while True:
        text = sentence(rng)
        if part_of(text) == part:
            return text


# --------------------------------------------------------------------------------------------------
# speech: espeak-ng through ctypes, then, on the waveform, what it cannot do (age, emotion, room)

ACCENTS = ["en-us", "en-us", "en-gb-x-rp", "en-gb-scotland", "en-us-nyc", "en-029"]
VARIANTS = {"female": ["f1", "f2", "f3", "f4", "f5"], "male": ["m1", "m2", "m3", "m4", "m7", "m8"]}
ESPEAK_RATE = 22050  # Hz
# numbers in espeak-ng's speak_lib.h
SYNCHRONOUS = 2
RATE = 1
PITCH = 3
PITCH_RANGE = 4


@dataclass
class Manner:
    """How something is said; the first four for espeak-ng or the level, the others applied to the
    waveform."""

    pitch: float = 0  # added, on espeak-ng's scale of 0 to 99
    pitch_range: float = 1.0  # a factor
    rate: float = 1.0  # a factor
    gain: float = 0  # dB
    bright: float = 0.0  # how much stronger the highs are
    tremble: float = 0.0  # depth of a slow tremor
    rough: float = 0.0  # depth of a fast one


PROSODY = {
    "neutral": Manner(pitch_range=0.6),
    "happy": Manner(pitch=14, pitch_range=1.5, rate=1.06, gain=2, bright=0.2),
    "sad": Manner(pitch=-10, pitch_range=0.4, rate=0.80, gain=-4, bright=-0.4),
    "angry": Manner(pitch=6, pitch_range=1.4, rate=1.14, gain=6, bright=0.7, rough=0.3),
    "disgust": Manner(pitch=-8, rate=0.86, bright=-0.1, rough=0.7),
    "fear": Manner(pitch=22, pitch_range=0.7, rate=1.20, gain=-1, tremble=0.5),
}
resample = functools.cache(torchaudio.transforms.Resample)  # each filter is made once


def espeak(text, voice, rate, pitch, pitch_range):
    """espeak-ng's own speech for a text: 22,050 Hz, float32 (samples,)."""
    chunks = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    def collect(samples, n, events):
        if samples and n > 0:
            chunks.append(np.ctypeslib.as_array(samples, (n,)).copy())
        return 0

    # loaded anew each time: the library keeps counters between calls, and an utterance must sound
    # the same in any order
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    data_path = espeakng_loader.get_data_path().encode()
    sample_rate = library.espeak_Initialize(SYNCHRONOUS, 0, data_path, 0)
    if sample_rate != ESPEAK_RATE or library.espeak_SetVoiceByName(voice.encode()) != 0:
        utils.die(
            f"espeak-ng has no voice {voice}; try: pip install --force-reinstall espeakng-loader"
        )
    library.espeak_SetSynthCallback(collect)
    library.espeak_ng_SetRandSeed(ctypes.c_long(SEED))
    library.espeak_SetParameter(RATE, int(rate), 0)
    library.espeak_SetParameter(PITCH, int(np.clip(pitch, 0, 99)), 0)
    library.espeak_SetParameter(PITCH_RANGE, int(np.clip(pitch_range, 0, 99)), 0)
    encoded = text.encode()
    library.espeak_Synth(encoded, len(encoded) + 1, 0, 0, 0, 1, None, None)
    library.espeak_Terminate()
    _ctypes.dlclose(library._handle)
    return np.concatenate(chunks).astype(np.float32) / 32768


def make_voice(name, sex, age):
    """A speaker's voice, a dict of numbers. Age sounds like slower speech, breath, tremor and
    duller highs, each to an extent that varies from speaker to speaker."""
    rng = utils.generator(SEED, "voice", name)

    def cue(spread):
        """How old one thing about the voice sounds, from about 0 at 18 to 1 at 75."""
        return float(np.clip((age - 18) / 57 + spread * rng.standard_normal(), -0.1, 1.15))

    return dict(
        voice=f"{rng.choice(ACCENTS)}+{rng.choice(VARIANTS[sex])}",
        pitch=rng.uniform(35, 65),
        range=rng.uniform(35, 65),
        rate=rng.uniform(155, 180) * (1.08 - 0.18 * cue(0.15)),
        tract=int(rng.integers(308, 333)),
        breath=cue(0.07),
        tremor=cue(0.07),
        dull=cue(0.07),
        room=rng.uniform(0, 0.9),
    )


def vary(emotion, rng):
    """The manner of one utterance: its emotion's, varied; without one, neutral and livelier."""
    usual = PROSODY[emotion or "neutral"]
    spread = 1.0 if emotion else 0.4
    widen = 1 if emotion else 1.6
    pitch = usual.pitch + spread * 6 * rng.standard_normal()
    range_factor = math.exp(spread * 0.25 * rng.standard_normal()) * widen
    rate_factor = math.exp(spread * 0.06 * rng.standard_normal())
    return Manner(
        pitch=pitch,
        pitch_range=usual.pitch_range * range_factor,
        rate=usual.rate * rate_factor,
        gain=usual.gain,
        bright=usual.bright + spread * 0.2 * rng.standard_normal(),
        tremble=usual.tremble + spread * 0.12 * abs(rng.standard_normal()),
        rough=usual.rough + spread * 0.15 * abs(rng.standard_normal()),
    )


def white_noise(n, rng):
    return torch.from_numpy(rng.standard_normal(n).astype(np.float32))


def tremor(depth, hz, phase, seconds):
    """The factor of a loudness that trembles, (samples,)."""
    return 1 + depth * torch.sin(2 * math.pi * hz * seconds + phase)


def colour(x, voice, manner, rng):
    """A waveform with the voice's and the manner's brightness, breath, tremors and roughness."""
    seconds = torch.arange(len(x)) / data.SAMPLE_RATE
    phase = rng.uniform(0, 2 * math.pi, 3)
    lows = lowpass_biquad(x, data.SAMPLE_RATE, 1200)
    x = x + (manner.bright - voice["dull"]) * 0.8 * (x - lows)
    envelope = lowpass_biquad(x.abs(), data.SAMPLE_RATE, 30).clamp(min=0)
    breath = highpass_biquad(white_noise(len(x), rng), data.SAMPLE_RATE, 2000)
    x = x + 0.5 * max(0.0, voice["breath"]) * envelope * breath
    x = x * tremor(0.5 * max(0.0, voice["tremor"]), 5, phase[0], seconds)
    x = x * tremor(min(0.9, manner.tremble), 9, phase[1], seconds)
    return x * tremor(min(0.9, manner.rough), 45, phase[2], seconds)


def speak(text, voice, name, emotion=None):
    """One utterance at 16 kHz, float32 (samples,), decided by (seed, name) and the voice."""
    rng = utils.generator(SEED, "utterance", name)
    manner = vary(emotion, rng)
    # 22,050 Hz is 441 * 50; resampling to anything but 320 * 50 moves the formants, and pitch and
    # rate with them
    squeeze = voice["tract"] / 320
    rate = voice["rate"] * manner.rate * squeeze
    pitch = voice["pitch"] + manner.pitch
    pitch_range = voice["range"] * manner.pitch_range
    x = espeak(text, voice["voice"], rate, pitch, pitch_range)
    audible = np.flatnonzero(np.abs(x) > 1e-3)
    x = torch.from_numpy(x[audible[0] : audible[-1] + 1])
    x = resample(441, voice["tract"])(x)
    x = colour(x, voice, manner, rng)
    level = 10 ** ((manner.gain + 1.5 * rng.standard_normal()) / 20)
    x = 0.06 * level * x / x.square().mean().sqrt()
    before = int(rng.uniform(0.15, 0.35) * data.SAMPLE_RATE)
    after = int(rng.uniform(0.15, 0.35) * data.SAMPLE_RATE)
    x = F.pad(x, (before, after))
    noise = white_noise(len(x), rng)
    noise = noise + voice["room"] * F.pad(noise, (1, -1))
    x = x + 0.06 * 10 ** (-rng.uniform(22, 40) / 20) * noise
    return (x * min(1.0, 0.95 / x.abs().max())).numpy()


# --------------------------------------------------------------------------------------------------
# the corpora: each function writes its corpus's lists and returns the utterances to speak


class Job(NamedTuple):
    """An utterance to speak, and the file to write it to."""

    path: Path
    text: str
    voice: dict
    name: str
    emotion: str | None = None


def people(rng, n, first):
    """n speakers: [(number, sex, age)], the sexes alternating, the ages spread evenly over 18 to 74
    and shuffled."""
    ages = [18 + (57 * i + rng.randrange(57)) // n for i in range(n)]
    rng.shuffle(ages)
    speakers = []
    for i, age in enumerate(ages):
        sex = "male" if i % 2 else "female"
        speakers.append((first + i, sex, age))
    return speakers


def write_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def make_libri(rng, sizes, root):
    jobs = []
    speakers = [";ID  |SEX| SUBSET           |MINUTES| NAME"]
    first = 100
    for split, (n, each) in sizes.items():
        part = split.split("-")[0]
        minutes = each * 2 / 60
        for speaker, sex, age in people(rng, n, first):
            voice = make_voice(f"libri-{speaker}", sex, age)
            chapter = 1000 + speaker
            folder = root / f"LibriSpeech/{split}/{speaker}/{chapter}"
            transcripts = []
            for i in range(each):
                name = f"{speaker}-{chapter}-{i:04}"
                text = sentence_for(part, rng)
                transcripts.append(f"{name} {text.upper()}")
                jobs.append(Job(folder / f"{name}.flac", text, voice, f"libri-{name}"))
            write_lines(folder / f"{speaker}-{chapter}.trans.txt", transcripts)
            about = f"{speaker:<5}| {sex[0].upper()} | {split:<16} | {minutes:.2f}"
            speakers.append(f"{about}  | Mini {speaker}")
        first += n
    write_lines(root / "LibriSpeech/SPEAKERS.TXT", speakers)
    return jobs


def make_crema(rng, sizes, root):
    jobs = []
    rows = ['"ActorID","Age","Sex","Race","Ethnicity"']
    codes = sorted(data.CREMA_EMOTIONS)
    for actor, sex, age in people(rng, sizes["actors"], 1001):
        voice = make_voice(f"crema-{actor}", sex, age)
        rows.append(f'{actor},{age},"{sex.capitalize()}","Unknown","Unknown"')
        for sentence_code, text in data.CREMA_SENTENCES.items():
            for code in rng.sample(codes, sizes["takes"]):
                name = f"{actor}_{sentence_code}_{code}_XX"
                path = root / f"CREMA-D/AudioWAV/{name}.wav"
                emotion = data.CREMA_EMOTIONS[code]
                jobs.append(Job(path, text, voice, f"crema-{name}", emotion))
    write_lines(root / "CREMA-D/VideoDemographics.csv", rows)
    return jobs


def make_vox(rng, sizes, root):
    jobs = []
    meta = ["Name \tVoxCeleb2 ID \tVGGFace2 ID \tGender \tSet "]
    first = 1
    for split, (n, videos, each) in sizes.items():
        rows = ["speaker_age,birth_year,Name,VoxCeleb_ID,video_id"]
        for speaker, sex, age in people(rng, n, first):
            speaker_id = f"id{speaker:05}"
            meta.append(f"Mini_{speaker} \t{speaker_id} \tn{speaker:06} \t{sex[0]} \t{split} ")
            for v in range(videos):
                # years lie between videos: the same voice at another age
                then = min(75, max(18, age + rng.randint(-4, 4)))
                voice = make_voice(f"vox-{speaker_id}", sex, then)
                video = f"mini{speaker:05}{v:02}"
                born = 2015 - then
                rows.append(f"{then:.1f},{born:.1f},Mini_{speaker},{speaker_id},{video}")
                folder = root / f"VoxCeleb2/{split}/wav/{speaker_id}/{video}"
                for i in range(each):
                    text = sentence_for("train", rng)
                    name = f"vox-{speaker_id}-{video}-{i}"
                    jobs.append(Job(folder / f"{i + 1:05}.wav", text, voice, name))
        part = "train" if split == "dev" else "test"
        write_lines(root / f"VoxCeleb2/age-{part}.txt", rows)
        first += n
    write_lines(root / "VoxCeleb2/vox2_meta.csv", meta)
    return jobs


CORPORA = {
    "libri": ("LibriSpeech", make_libri),
    "crema": ("CREMA-D", make_crema),
    "vox": ("VoxCeleb2", make_vox),
}


def write_utterance(job):
    waveform = speak(job.text, job.voice, job.name, job.emotion)

    def write(temporary):
        kind = job.path.suffix.removeprefix(".")
        soundfile.write(temporary, waveform, data.SAMPLE_RATE, format=kind)

    utils.write_atomically(job.path, write)


def maker_of(sizes):
    """What a corpus of these sizes is made by, this file and the voices, as a short hash."""
    voices = importlib.metadata.version("espeakng-loader")
    made_by = (Path(__file__).read_bytes(), voices, sizes)
    return hashlib.sha256(repr(made_by).encode()).hexdigest()[:16]


def is_made(folder, maker):
    """Whether there is no corpus to make: one of this maker, or one that someone else put there."""
    if not folder.exists():
        return False
    stamp = folder / STAMP
    return not stamp.exists() or stamp.read_text() == maker


def files_in(folder):
    """The paths of all files in a folder, relative to it."""
    return {path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir()}


def clear_away(folder, made):
    """Removes an earlier version of a corpus or, where it holds other files than those `made` now,
    which may be somebody's own, moves it aside."""
    if files_in(folder) <= made:
        shutil.rmtree(folder)
        return
    n = 1
    while (aside := folder.with_name(f"{folder.name}.before-{n}")).exists():
        n += 1
    folder.rename(aside)
    print(f"{folder} is made again; it held other files too, and is now {aside}")


def make_corpus(corpus, root, sizes=None):
    """Makes one corpus under `root` unless it is there; only once, even if two processes ask at the
    same time. One that an earlier version of this file made is made again. What an interrupted
    start of this version has spoken is kept."""
    root = Path(root)
    folder, make = CORPORA[corpus]
    sizes = sizes or SIZES[corpus]
    maker = maker_of(sizes)
    if is_made(root / folder, maker):
        return
    root.mkdir(parents=True, exist_ok=True)
    building = root / f".{corpus}.building-{maker}"  # renamed at the end, when it is whole
    with open(root / f".{corpus}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if is_made(root / folder, maker):
            return
        for leftover in root.glob(f".{corpus}.building*"):
            if leftover != building:
                shutil.rmtree(leftover)
        for unfinished in building.rglob(".*.tmp"):
            unfinished.unlink()
        jobs = make(random.Random(f"{SEED}-{corpus}"), sizes, building)
        missing = [job for job in jobs if not job.path.exists()]
        data.in_workers(write_utterance, missing, f"speaking the mini {corpus}")
        (building / folder / STAMP).write_text(maker)
        if (root / folder).exists():
            clear_away(root / folder, files_in(building / folder))
        (building / folder).rename(root / folder)
        building.rmdir()


def main():
    Parser(description=__doc__).parse_args()
    for corpus in CORPORA:
        make_corpus(corpus, ROOT / MINI_ROOT)
    print(f"the mini corpora are under {ROOT / MINI_ROOT}")


if __name__ == "__main__":
    main()
