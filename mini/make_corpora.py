"""The built-in default: three small corpora of espeak-ng speech, made offline, each in a minute or two.

    python mini/make_corpora.py                       # makes them under corpora/mini (any script that needs one makes it too)

On disk they have the layouts of LibriSpeech, CREMA-D and VoxCeleb2-AE, so corpora.py reads them like the real ones. Speakers,
sentences and noise are decided by (seed, name) alone.
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
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils
from utils import (
    ROOT,
    Parser,
)

import installed  # noqa: F401

import espeakng_loader
import numpy as np
import soundfile
import torch
import torchaudio
from torch.nn import functional as F

import data
from study import MINI_ROOT

SEED = 0
STAMP = ".made-by"  # the file of a corpus that says what made it
# libri: speakers and utterances of each; crema: actors and takes per sentence; vox: speakers, videos, segments
SIZES = {
    "libri": {"train-clean-360": (64, 50), "dev-clean": (8, 20), "test-clean": (20, 16)},
    "crema": {"actors": 91, "takes": 6},
    "vox": {"dev": (400, 2, 8), "test": (40, 2, 4)},
}

# ---------------------------------------------------------------------------------------------------------------------
# text: a closed vocabulary, endless sentences

DETERMINERS = "the the my our his her that this every some another one".split()
ADJECTIVES = """old young small large tall quiet happy tired brave clever green yellow white black heavy broken
golden wooden strange gentle""".split()
PEOPLE = """doctor teacher farmer sailor baker singer soldier painter driver lawyer student captain neighbor brother
sister mother father uncle children stranger""".split()
THINGS = """basket bottle letter picture window garden hammer blanket candle guitar ladder mirror pencil ticket wagon
engine jacket camera kettle package""".split()
PLACES = """river mountain village market station kitchen harbor forest castle bridge library hospital meadow tower
island corner valley school church desert""".split()
VERBS = """found carried painted dropped noticed wanted opened followed borrowed repaired watched remembered""".split()
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


def sentence(rng):
    """One sentence of 5 to 10 words. Beginnings vary: a model need not listen to what is always the same."""

    def noun(words):
        adjective = rng.choice(ADJECTIVES) + " " if rng.random() < 0.35 else ""
        return f"{rng.choice(DETERMINERS)} {adjective}{rng.choice(words)}"

    if rng.random() < 0.6:
        parts = [noun(PEOPLE), rng.choice(VERBS), noun(THINGS)]
        if rng.random() < 0.15:
            parts += [rng.choice(WHERE), "the " + rng.choice(PLACES)]
    else:
        parts = [noun(PEOPLE), rng.choice(MOTIONS), rng.choice(WHERE), noun(PLACES)]
    if len(" ".join(parts).split()) < 8 and rng.random() < 0.4:
        parts.insert(rng.choice([0, len(parts)]), rng.choice(WHEN))
    return " ".join(parts)


def sentence_for(part, rng):
    """A sentence of `part` ("train", "dev" or "test"). A sentence's hash says which part it belongs to, so no two parts share one;
    pretraining sees "train" only."""
    while True:
        text = sentence(rng)
        bucket = hashlib.sha256(text.encode()).digest()[0]
        if part == ("test" if bucket < 26 else "dev" if bucket < 39 else "train"):
            return text


# ---------------------------------------------------------------------------------------------------------------------
# speech: espeak-ng through ctypes, then, on the waveform, what it cannot do (age, emotion, room)

ACCENTS = ["en-us", "en-us", "en-gb-x-rp", "en-gb-scotland", "en-us-nyc", "en-029"]
VARIANTS = {"female": ["f1", "f2", "f3", "f4", "f5"], "male": ["m1", "m2", "m3", "m4", "m7", "m8"]}
# pitch (espeak's 0 to 99), pitch range and rate as factors, level in dB, brightness, tremor depth, roughness
PROSODY = {
    "neutral": (0, 0.6, 1.00, 0, 0.0, 0.0, 0.0),
    "happy": (14, 1.5, 1.06, 2, 0.2, 0.0, 0.0),
    "sad": (-10, 0.4, 0.80, -4, -0.4, 0.0, 0.0),
    "angry": (6, 1.4, 1.14, 6, 0.7, 0.0, 0.3),
    "disgust": (-8, 1.0, 0.86, 0, -0.1, 0.0, 0.7),
    "fear": (22, 0.7, 1.20, -1, 0.0, 0.5, 0.0),
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

    # loaded anew each time: it keeps counters between calls, and an utterance must sound the same in any order
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    sample_rate = library.espeak_Initialize(
        2, 0, espeakng_loader.get_data_path().encode(), 0
    )  # 2: synchronous
    if sample_rate != 22050 or library.espeak_SetVoiceByName(voice.encode()) != 0:
        utils.die(
            f"espeak-ng has no voice {voice}; try: pip install --force-reinstall espeakng-loader"
        )
    library.espeak_SetSynthCallback(collect)
    library.espeak_ng_SetRandSeed(ctypes.c_long(SEED))
    for parameter, value in (
        (1, rate),
        (3, np.clip(pitch, 0, 99)),
        (4, np.clip(pitch_range, 0, 99)),
    ):
        library.espeak_SetParameter(parameter, int(value), 0)
    library.espeak_Synth(text.encode(), len(text.encode()) + 1, 0, 0, 0, 1, None, None)
    library.espeak_Terminate()
    _ctypes.dlclose(library._handle)
    return np.concatenate(chunks).astype(np.float32) / 32768


def make_voice(name, sex, age):
    """A speaker's voice, a dict of numbers. Age sounds like slower speech, breath, tremor and duller highs, each to an extent that varies
    from speaker to speaker."""
    rng = utils.generator(SEED, "voice", name)

    def cue(spread):
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


def speak(text, voice, name, emotion=None):
    """One utterance at 16 kHz, float32 (samples,), decided by (seed, name) and the voice."""
    rng = utils.generator(SEED, "utterance", name)
    pitch, pitch_range, rate, gain, bright, tremble, rough = PROSODY[emotion or "neutral"]
    spread = 1.0 if emotion else 0.4
    pitch += spread * 6 * rng.standard_normal()
    pitch_range *= math.exp(spread * 0.25 * rng.standard_normal()) * (1 if emotion else 1.6)
    rate *= math.exp(spread * 0.06 * rng.standard_normal())
    bright += spread * 0.2 * rng.standard_normal()
    tremble += spread * 0.12 * abs(rng.standard_normal())
    rough += spread * 0.15 * abs(rng.standard_normal())
    squeeze = (
        voice["tract"] / 320
    )  # resampling to anything but 320 moves the formants, and pitch and rate with them
    x = espeak(
        text,
        voice["voice"],
        voice["rate"] * rate * squeeze,
        voice["pitch"] + pitch,
        voice["range"] * pitch_range,
    )
    sound = np.flatnonzero(np.abs(x) > 1e-3)
    x = resample(441, voice["tract"])(
        torch.from_numpy(x[sound[0] : sound[-1] + 1])
    )  # 22,050 Hz is 441 * 50
    t = torch.arange(len(x)) / data.SAMPLE_RATE
    phase = rng.uniform(0, 2 * math.pi, 3)
    lows = torchaudio.functional.lowpass_biquad(x, data.SAMPLE_RATE, 1200)
    x = x + (bright - voice["dull"]) * 0.8 * (x - lows)
    envelope = torchaudio.functional.lowpass_biquad(x.abs(), data.SAMPLE_RATE, 30).clamp(min=0)
    breath = torch.from_numpy(rng.standard_normal(len(x)).astype(np.float32))
    breath = torchaudio.functional.highpass_biquad(breath, data.SAMPLE_RATE, 2000)
    x = x + 0.5 * max(0.0, voice["breath"]) * envelope * breath
    x = x * (1 + 0.5 * max(0.0, voice["tremor"]) * torch.sin(2 * math.pi * 5 * t + phase[0]))
    x = x * (1 + min(0.9, tremble) * torch.sin(2 * math.pi * 9 * t + phase[1]))
    x = x * (1 + min(0.9, rough) * torch.sin(2 * math.pi * 45 * t + phase[2]))
    x = 0.06 * 10 ** ((gain + 1.5 * rng.standard_normal()) / 20) * x / x.square().mean().sqrt()
    x = F.pad(
        x,
        (
            int(rng.uniform(0.15, 0.35) * data.SAMPLE_RATE),
            int(rng.uniform(0.15, 0.35) * data.SAMPLE_RATE),
        ),
    )
    noise = torch.from_numpy(rng.standard_normal(len(x)).astype(np.float32))
    noise = noise + voice["room"] * F.pad(noise, (1, -1))
    x = x + 0.06 * 10 ** (-rng.uniform(22, 40) / 20) * noise
    return (x * min(1.0, 0.95 / x.abs().max())).numpy()


# ---------------------------------------------------------------------------------------------------------------------
# the corpora: each function writes its corpus's lists and returns what to speak, [(path, text, voice, name, emotion)]


def people(rng, n, first):
    """n speakers: [(number, sex, age)], the sexes alternating, the ages spread evenly over 18 to 74 and shuffled."""
    ages = [18 + (57 * i + rng.randrange(57)) // n for i in range(n)]
    rng.shuffle(ages)
    return [(first + i, ["female", "male"][i % 2], age) for i, age in enumerate(ages)]


def write_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def make_libri(rng, sizes, root):
    jobs, speakers, first = [], [";ID  |SEX| SUBSET           |MINUTES| NAME"], 100
    for split, (n, each) in sizes.items():
        for speaker, sex, age in people(rng, n, first):
            voice, lines = make_voice(f"libri-{speaker}", sex, age), []
            chapter = root / f"LibriSpeech/{split}/{speaker}/{1000 + speaker}"
            for i in range(each):
                id, text = (
                    f"{speaker}-{1000 + speaker}-{i:04}",
                    sentence_for(split.split("-")[0], rng),
                )
                lines.append(f"{id} {text.upper()}")
                jobs.append((chapter / f"{id}.flac", text, voice, f"libri-{id}", None))
            write_lines(chapter / f"{speaker}-{1000 + speaker}.trans.txt", lines)
            speakers.append(
                f"{speaker:<5}| {sex[0].upper()} | {split:<16} | {each * 2 / 60:.2f}  | Mini {speaker}"
            )
        first += n
    write_lines(root / "LibriSpeech/SPEAKERS.TXT", speakers)
    return jobs


def make_crema(rng, sizes, root):
    jobs, rows = [], ['"ActorID","Age","Sex","Race","Ethnicity"']
    for actor, sex, age in people(rng, sizes["actors"], 1001):
        voice = make_voice(f"crema-{actor}", sex, age)
        rows.append(f'{actor},{age},"{sex.capitalize()}","Unknown","Unknown"')
        for code, text in data.CREMA_SENTENCES.items():
            for emotion in rng.sample(sorted(data.CREMA_EMOTIONS), sizes["takes"]):
                id = f"{actor}_{code}_{emotion}_XX"
                jobs.append(
                    (
                        root / f"CREMA-D/AudioWAV/{id}.wav",
                        text,
                        voice,
                        f"crema-{id}",
                        data.CREMA_EMOTIONS[emotion],
                    )
                )
    write_lines(root / "CREMA-D/VideoDemographics.csv", rows)
    return jobs


def make_vox(rng, sizes, root):
    jobs, meta, first = [], ["Name \tVoxCeleb2 ID \tVGGFace2 ID \tGender \tSet "], 1
    for split, (n, videos, each) in sizes.items():
        rows = ["speaker_age,birth_year,Name,VoxCeleb_ID,video_id"]
        for speaker, sex, age in people(rng, n, first):
            id = f"id{speaker:05}"
            meta.append(f"Mini_{speaker} \t{id} \tn{speaker:06} \t{sex[0]} \t{split} ")
            for v in range(videos):
                then = min(
                    75, max(18, age + rng.randint(-4, 4))
                )  # years lie between videos: the same voice at another age
                video, voice = f"mini{speaker:05}{v:02}", make_voice(f"vox-{id}", sex, then)
                rows.append(f"{then:.1f},{2015 - then:.1f},Mini_{speaker},{id},{video}")
                for i in range(each):
                    path = root / f"VoxCeleb2/{split}/wav/{id}/{video}/{i + 1:05}.wav"
                    jobs.append(
                        (path, sentence_for("train", rng), voice, f"vox-{id}-{video}-{i}", None)
                    )
        write_lines(root / f"VoxCeleb2/age-{'train' if split == 'dev' else 'test'}.txt", rows)
        first += n
    write_lines(root / "VoxCeleb2/vox2_meta.csv", meta)
    return jobs


CORPORA = {
    "libri": ("LibriSpeech", make_libri),
    "crema": ("CREMA-D", make_crema),
    "vox": ("VoxCeleb2", make_vox),
}


def write_utterance(job):
    path, text, voice, name, emotion = job
    kind = path.suffix.removeprefix(".")
    waveform = speak(text, voice, name, emotion)
    utils.write_atomically(
        path, lambda temporary: soundfile.write(temporary, waveform, data.SAMPLE_RATE, format=kind)
    )


def maker_of(sizes):
    """What a corpus of these sizes is made by: this file and the voices."""
    made_by = Path(__file__).read_bytes(), importlib.metadata.version("espeakng-loader"), sizes
    return hashlib.sha256(repr(made_by).encode()).hexdigest()[:16]


def is_made(folder, maker):
    """Whether there is no corpus to make: one of this maker, or one that someone else put there."""
    if not folder.exists():
        return False
    stamp = folder / STAMP
    return not stamp.exists() or stamp.read_text() == maker


def make_corpus(corpus, root, sizes=None):
    """Makes one corpus under `root` unless it is there; only once, even if two processes ask at the
    same time. One that an earlier version of this file made is made again. What an interrupted
    start of this version has spoken is kept."""
    root, (folder, make) = Path(root), CORPORA[corpus]
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
        for leftover in {*root.glob(f".{corpus}.building*")} - {building}:
            shutil.rmtree(leftover)
        for unfinished in building.rglob(".*.tmp"):
            unfinished.unlink()
        jobs = make(random.Random(f"{SEED}-{corpus}"), sizes, building)
        missing = [job for job in jobs if not job[0].exists()]
        data.in_workers(write_utterance, missing, f"speaking the mini {corpus}")
        (building / folder / STAMP).write_text(maker)
        if (root / folder).exists():
            shutil.rmtree(root / folder)
        (building / folder).rename(root / folder)
        building.rmdir()


def main():
    Parser(description=__doc__).parse_args()
    for corpus in CORPORA:
        make_corpus(corpus, ROOT / MINI_ROOT)
    print(f"the mini corpora are under {ROOT / MINI_ROOT}")


if __name__ == "__main__":
    main()
