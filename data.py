"""Utterances, prompts, answers and their parsing, audio, batches: what every stage shares."""

import contextlib
import functools
import hashlib
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np
import soundfile
import torch
import torchaudio
from safetensors import SafetensorError
from tqdm import tqdm

from study import LABELS, TASKS, task_of

SAMPLE_RATE = 16000
MAX_SECONDS = 60.0  # the default of --max-seconds: attention's memory grows with the square of the audio's length

CREMA_EMOTIONS = {
    "ANG": "angry",
    "DIS": "disgust",
    "FEA": "fear",
    "HAP": "happy",
    "NEU": "neutral",
    "SAD": "sad",
}
CREMA_SENTENCES = {
    "IEO": "It's eleven o'clock",
    "TIE": "That is exactly what happened",
    "IOM": "I'm on my way to the meeting",
    "IWW": "I wonder what this is about",
    "TAI": "The airplane is almost full",
    "MTI": "Maybe tomorrow it will be cold",
    "IWL": "I would like a new alarm clock",
    "ITH": "I think I have a doctor's appointment",
    "DFA": "Don't forget a jacket",
    "ITS": "I think I've seen this before",
    "TSI": "The surface is slick",
    "WSI": "We'll stop in a couple of minutes",
}

FAR = 30  # dB from the median of a corpus, beyond which an utterance's level is no speaker's: 0.05 is then 1.6 or 0.0016


class BadAudio(ValueError):
    """An audio file that cannot be used; says which and why."""


@dataclass
class Utterance:
    """One utterance. `path` is its audio file; `start` and `length` (seconds) select a part of it, length 0 all of it. `labels`
    are those it has, {label: value}, in the order of the answer; an age is an int, or text for a group. Audio longer than
    `max_seconds` is refused; the limit stands here because it then reaches every process that reads the audio."""

    id: str
    path: str
    split: str
    speaker: str
    labels: dict
    start: float = 0.0
    length: float = 0.0
    max_seconds: float = MAX_SECONDS

    def __post_init__(self):
        self.labels = {
            label: self.labels[label] for label in LABELS if self.labels.get(label) is not None
        }


def printable(text):
    """Text as it may be shown: a stranger's line breaks and terminal codes are spelled out."""
    shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
    return "".join(shown)


def die(message):
    """A user error: prints one line and exits with status 2."""
    # on a line of its own, even while a progress bar is drawn
    tqdm.write(f"error: {printable(message)}", file=sys.stderr)
    raise SystemExit(2)


def temporary_name(path):
    """The name beside `path` under which it is written first: no other process has it, on this machine or on another."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


# what writing to a full disk, or where one may not, raises: torch.save a RuntimeError
CANNOT_WRITE = (OSError, RuntimeError, SafetensorError)


def die_of_writing(path, error):
    reason = str(error).splitlines()[0]
    die(f"cannot write {path} ({reason}): check the disk's space and permissions")


def write_atomically(path, content, optional=False):
    """Writes text or, by a function of the temporary path, anything to `path`, whole or not at all. Where that is impossible, it ends
    in one line, unless the file is `optional`."""
    path = Path(path)
    temporary = temporary_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(content):
            content(temporary)
        else:
            temporary.write_text(content, encoding="utf-8")
        os.replace(temporary, path)
    except CANNOT_WRITE as error:
        if not optional:
            die_of_writing(path, error)
    finally:
        if temporary.parent.is_dir():
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(folder):
    """A temporary folder that becomes `folder` if all goes well. Ends in one line if `folder` exists and is not empty."""
    folder = Path(folder).resolve()
    temporary = temporary_name(folder)
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            die(f"{folder}: there is something already; name a new folder")
        temporary.mkdir(parents=True)
        yield temporary
        os.replace(temporary, folder)
    except (OSError, SafetensorError) as error:
        die_of_writing(folder, error)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def generator(*name):
    """A numpy generator seeded by `name` alone, the same in every process."""
    return np.random.default_rng(
        int.from_bytes(hashlib.sha256(repr(name).encode()).digest()[:8], "big")
    )


def draw(*name):
    """A number in [0, 1) decided by `name` alone."""
    return int.from_bytes(hashlib.sha256(repr(name).encode()).digest()[:8], "big") / 2**64


def interval(values, statistic=np.mean, samples=1000, seed=0):
    """A figure with its 95% bootstrap interval over utterances; values: (n,) or (n, k), statistic: (n, k) -> number."""
    values = np.asarray(values, dtype=np.float64).reshape(len(values), -1)
    rng = np.random.default_rng(seed)
    draws = [
        float(statistic(values[rng.integers(0, len(values), len(values))])) for _ in range(samples)
    ]
    low, high = np.percentile(draws, [2.5, 97.5])
    return {
        "value": float(statistic(values)),
        "low": float(low),
        "high": float(high),
        "n": len(values),
    }


# ---------------------------------------------------------------------------------------------------------------------
# prompts, answers, parsing

KEYS = {label: label.capitalize() for label in LABELS}
AUDIO = "<audio>"  # where the audio goes; removed again before the prompt is tokenised
INSTRUCTIONS = (  # the first is the one evaluation uses
    "Tell me about the audio.",
    "Give me the following information about the audio.",
    "Describe this recording.",
    "Extract these details from the speech.",
    "What can you hear in the audio?",
    "Report on this speech file.",
    "I need this information from the audio.",
    "Listen and answer.",
)


def prompt(tokenizer, labels, rng=None):
    """Token ids before and after the audio of a prompt that asks for `labels`; a single one is mostly asked for by a direct question.
    With a `random.Random` the instruction is drawn from the pool, without one it is the first."""
    pool = INSTRUCTIONS
    if len(labels) == 1 and (rng is None or rng.random() < 0.7):
        pool = TASKS[task_of(labels[0])]["questions"]
    instruction = rng.choice(pool) if rng else pool[0]
    return around_audio(
        tokenizer, f"{instruction} [{', '.join(KEYS[l] for l in labels)}]\n<speech>{AUDIO}</speech>"
    )


@functools.lru_cache(1024)
def around_audio(tokenizer, content):
    """Token ids before and after the audio of a user's turn, by the tokenizer's chat template. Where the template would add a system
    prompt of its own, an empty one keeps it out: its tokens would be paid for in every utterance."""
    text, turn = "", [{"role": "user", "content": content}]
    for system in ([], [{"role": "system", "content": ""}]):
        with contextlib.suppress(
            ValueError, jinja2.TemplateError
        ):  # there is no template, or it knows no system
            rendered = tokenizer.apply_chat_template(
                system + turn, tokenize=False, add_generation_prompt=True
            )
            text = min(text or rendered, rendered, key=len)
    if text.count(AUDIO) != 1:
        die(
            f"{tokenizer.name_or_path} has no chat template that keeps the user's text: take another chat or instruct model"
        )
    return tuple(tokenizer(part, add_special_tokens=False).input_ids for part in text.split(AUDIO))


def choose_labels(labels, rng, random_keys):
    """The labels a training sample asks for: all, or with probability `random_keys` a random subset, in order."""
    labels = list(labels)
    if rng.random() >= random_keys:
        return labels
    chosen = rng.sample(labels, rng.randint(1, len(labels)))
    return [label for label in labels if label in chosen]


def answer(labels):
    """{label: value} -> the answer's text, e.g. `{"Transcript": "go do you hear", "Gender": "female"}`."""
    return json.dumps(
        {KEYS[label]: str(labels[label]) for label in LABELS if label in labels}, ensure_ascii=False
    )


def answer_ids(tokenizer, labels):
    """Token ids of the answer and the end-of-sequence token that stops generation."""
    return tokenizer(answer(labels), add_special_tokens=False).input_ids + [tokenizer.eos_token_id]


PAIR = re.compile(r'"(%s)"\s*:\s*"((?:[^"\\]|\\.)*)"' % "|".join(KEYS.values()), re.DOTALL)


def parse(text):
    """The well-formed labels in an answer, {label: value}, even if the answer is cut off. Never raises."""
    found = {}
    for key, value in PAIR.findall(text):
        try:
            value = json.loads(f'"{value}"', strict=False)
            value.encode()  # half of a surrogate pair could not be written to a file
        except ValueError:
            continue
        if key == KEYS["age"]:
            value = parse_age(value)
        if value is not None:
            found.setdefault(key.lower(), value)
    return found


def parse_age(text):
    """An age in years as an int, a group of ages ("senior", "twenties") as lower-case text, anything else as None."""
    text = text.strip().lower()
    if re.fullmatch(r"[0-9]{1,3}", text):
        return int(text)
    return text if re.fullmatch(r"[a-z][a-z -]*", text) else None


def normalise(text):
    """Text for WER and exact match: lower case, no punctuation but the apostrophe, single spaces, any script."""
    text = unicodedata.normalize("NFC", text.lower().replace("’", "'"))
    kept = (
        c if c.isalnum() or c == "'" or unicodedata.category(c).startswith("M") else " "
        for c in text
    )  # M: accents
    return " ".join("".join(kept).split())


# ---------------------------------------------------------------------------------------------------------------------
# audio


@torch.autocast(
    "cpu", enabled=False
)  # workers inherit the trainer's autocast, and resampling cannot work in bf16
def read_waveform(path, start=0.0, length=0.0, max_seconds=MAX_SECONDS):
    """An audio file, or a part of it (seconds), as float32 (samples,) at 16 kHz, mixed down. Raises BadAudio."""
    if not os.path.exists(path):
        raise BadAudio(f"{path}: no such file")
    try:
        if str(path).endswith(".m4a"):
            waveform, rate = decode_m4a(path, start, length), SAMPLE_RATE
        else:
            with soundfile.SoundFile(path) as f:
                rate = f.samplerate
                f.seek(int(start * rate))
                waveform = f.read(
                    int(length * rate) if length else -1, dtype="float32", always_2d=True
                ).mean(1)
    except (RuntimeError, OSError) as error:
        raise BadAudio(f"{path}: cannot be read ({error})") from None
    if len(waveform) == 0:
        raise BadAudio(f"{path}: empty")
    if len(waveform) > max_seconds * rate:
        raise BadAudio(
            f"{path}: {len(waveform) / rate:.0f} s long, more than --max-seconds {max_seconds:g}: cut it"
        )
    if not np.isfinite(waveform).all():
        raise BadAudio(f"{path}: holds NaN or infinite samples")
    if rate != SAMPLE_RATE:
        waveform = torchaudio.functional.resample(
            torch.from_numpy(waveform), rate, SAMPLE_RATE
        ).numpy()
    return waveform


def decode_m4a(path, start, length):
    """VoxCeleb2's own format, by ffmpeg, as float32 (samples,) at 16 kHz. Raises RuntimeError."""
    if not shutil.which("ffmpeg"):
        raise RuntimeError("m4a needs ffmpeg: apt-get install ffmpeg, or convert the tree to wav/")
    done = subprocess.run(
        [
            "ffmpeg",
            "-v",
            "error",
            "-i",
            path,
            "-ss",
            str(start),
            "-t",
            str(length or 1e6),
            "-f",
            "f32le",
            "-ac",
            "1",
            "-ar",
            str(SAMPLE_RATE),
            "-",
        ],
        capture_output=True,
    )
    if done.returncode:
        raise RuntimeError("ffmpeg cannot decode it")
    return np.frombuffer(done.stdout, np.float32).copy()


def load_waveform(utterance):
    return read_waveform(utterance.path, utterance.start, utterance.length, utterance.max_seconds)


def rms(utterance):
    """Root mean square of an utterance's samples. Raises BadAudio."""
    level = float(np.sqrt(np.mean(load_waveform(utterance) ** 2, dtype=np.float64)))
    if not np.isfinite(level):
        raise BadAudio(f"{utterance.path}: samples too large to be audio")
    return level


def far_levels(utterances, levels):
    """What is wrong with the utterances whose RMS is far from the corpus's median, a list of texts."""
    far, median = [], np.median(levels) if levels else 0.0
    for utterance, level in zip(utterances, levels):
        decibels = 20 * np.log10(max(level, 1e-9) / max(median, 1e-9))
        if abs(decibels) > FAR:
            far.append(f"{utterance.path}: {decibels:+.0f} dB from the median of the corpus")
    return far


def file_state(utterance):
    """What an utterance's audio is, without reading it: which part of which file, its size and time, and how long it may be."""
    stat = os.stat(utterance.path)
    return (
        utterance.id,
        utterance.path,
        utterance.start,
        utterance.length,
        utterance.max_seconds,
        stat.st_size,
        stat.st_mtime_ns,
    )


def num_samples(utterance):
    """How many 16 kHz samples an utterance has, by its file's header (m4a: by its size, at 64 kbit/s); 0 if it cannot be opened."""
    path = utterance.path
    try:
        seconds = (
            os.path.getsize(path) / 8000 if path.endswith(".m4a") else soundfile.info(path).duration
        )
    except (RuntimeError, OSError):
        return 0
    rest = seconds - utterance.start
    return round(min(utterance.length or rest, rest) * SAMPLE_RATE)


@contextlib.contextmanager
def no_bad_audio():
    """Audio that cannot be used ends the program in one line."""
    try:
        yield
    except BadAudio as error:  # from a worker its text is a traceback that ends with the message
        die(
            str(error).splitlines()[-1].split("BadAudio: ")[-1]
            + " (--skip-bad leaves out such files)"
        )


def from_workers(loader):
    """A DataLoader's batches. A worker that has ended in one line ends the program."""
    try:
        with no_bad_audio():
            yield from loader
    except RuntimeError as error:
        if "DataLoader worker" in str(error) and "exit" in str(error):
            raise SystemExit(2) from None
        raise


def apply_to_all(function, batch):
    return [function(item) for item in batch]


def in_workers(function, items, desc, workers=2):
    """[function(item) for item in items], in worker processes, in order, with a progress bar."""
    loader = torch.utils.data.DataLoader(
        items,
        batch_size=16,
        num_workers=workers,
        collate_fn=functools.partial(apply_to_all, function),
    )
    batches = tqdm(from_workers(loader), desc, len(loader), unit="batch")
    return [result for batch in batches for result in batch]


# ---------------------------------------------------------------------------------------------------------------------
# batches


def chunks(order, size):
    return [order[i : i + size] for i in range(0, len(order), size)]


def epoch_batches(lengths, batch_size, seed, epoch):
    """The batches of an epoch: lists of `batch_size` indices (one may be shorter), decided by (seed, epoch). Within pools of 16 batches,
    utterances of similar length go together to save padding."""
    rng = np.random.default_rng([seed, epoch])
    batches = []
    for pool in chunks(rng.permutation(len(lengths)).tolist(), 16 * batch_size):
        batches += chunks(sorted(pool, key=lambda i: lengths[i]), batch_size)
    return [batches[i] for i in rng.permutation(len(batches))]


def micro_batches(indices, lengths, budget):
    """Splits a batch into pieces of at most `budget` seconds, padding counted; a longer utterance goes alone."""
    pieces = [[]]
    for i in sorted(indices, key=lambda i: lengths[i]):
        if pieces[-1] and lengths[i] * (len(pieces[-1]) + 1) > budget:
            pieces.append([])
        pieces[-1].append(i)
    return pieces
