"""Utterances, prompts, answers and their parsing, audio, batches: what every stage shares."""

import contextlib
import datetime
import functools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import utils
from utils import die

import numpy as np
import soundfile
import torch
from scipy.signal import resample_poly
from tqdm import tqdm

from study import LABELS, TASKS, task_of

SAMPLE_RATE = 16000
# the default of --max-seconds: attention's memory grows with the square of the audio's length
MAX_SECONDS = 60.0
CUT_OFF = 0.1  # seconds that may be missing at the end: MP3 pads, and lists of segments round
RATES = (1000, 400000)  # Hz; a header that says otherwise is wrong
CUT = "cut off: its header promises more than the file holds"
BLOCK = 1 << 22  # frames read at once
RESIZED = re.compile(r"(\d+) \(should be (\d+)\)")  # libsndfile's log on a size that it corrected

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


# templates that ask for today's date get the one that Llama 3's falls back to: a prompt depends on
# the run alone. In the template's own language, as the sandbox it runs in takes no functions.
TODAY = datetime.datetime(2024, 7, 26)
CODES = "aAbBdeHIjmMpSUwWyYZ"
CALENDAR = "".join(f"|replace('%{code}', '{TODAY.strftime('%' + code)}')" for code in CODES)
CLOCK = "{% macro strftime_now(format) %}{{ format" + CALENDAR + " }}{% endmacro %}\n"


def render(tokenizer, turns):
    """A conversation by the tokenizer's chat template, the same on every day. Raises what the
    template raises; ValueError where there is none or where it draws at random."""
    template = tokenizer.get_chat_template()
    if re.search(r"\|\s*random\b|\blipsum\b", template):
        raise ValueError("it draws at random")
    if "strftime_now" in template:
        template = CLOCK + template
    return tokenizer.apply_chat_template(
        turns, chat_template=template, tokenize=False, add_generation_prompt=True
    )


@functools.lru_cache(1024)
def around_audio(tokenizer, content):
    """Token ids before and after the audio of a user's turn, by the tokenizer's chat template. Where the template would add a system
    prompt of its own, an empty one keeps it out: its tokens would be paid for in every utterance."""
    text, turn, failed = "", [{"role": "user", "content": content}], ""
    for system in ([], [{"role": "system", "content": ""}]):
        try:  # a template may know no system, and can raise anything
            rendered = render(tokenizer, system + turn)
            text = min(text or rendered, rendered, key=len)
        except Exception as error:
            failed = failed or f" ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})"
    if text.count(AUDIO) != 1:
        die(
            f"{tokenizer.name_or_path} has no chat template that keeps the user's text{failed}: take "
            "another chat or instruct model"
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


AGE_GROUP = re.compile(
    r"[a-z][a-z -]*"  # senior, twenties
    r"|(?:<|>|<=|>=|under|over|below|above) ?[0-9]{1,3}"
    r"|[0-9]{1,3}(?:\+|s| ?(?:-|to) ?[0-9]{1,3})"  # 60+, 20s, 18-29
    r"|[0-9]{1,3} (?:and|or) (?:over|older|above|under|younger|below|more|less)"
)


def parse_age(text):
    """An age in years as an int, a group of ages ("senior", "twenties", "18-29", "60+") as
    lower-case text, anything else as None."""
    text = re.sub("[–—]", "-", text.strip().lower())
    if re.fullmatch(r"[0-9]{1,3}", text):
        return int(text)
    return text if AGE_GROUP.fullmatch(text) else None


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


def is_m4a(path):
    """Whether ffmpeg has to read a file, as VoxCeleb2's own."""
    return str(path).lower().endswith(".m4a")


def file_problem(path):
    """What is wrong with an audio file, as far as its first bytes tell, or None."""
    try:
        if Path(path).is_fifo():  # nobody may ever write to it
            return f"{path}: a pipe, not a file"
        with open(path, "rb") as f:
            beginning = f.read(64)
    except FileNotFoundError:
        return f"{path}: no such file"
    except (OSError, ValueError) as error:  # a folder, no permission, a name with a NUL
        return f"{path}: cannot be read ({error})"
    if not beginning:
        return f"{path}: empty"
    if beginning.startswith(b"version https://git-lfs"):
        return f"{path}: a git-lfs pointer, not audio: run `git lfs pull` in its repository"


def read_waveform(path, start=0.0, length=0.0, max_seconds=MAX_SECONDS):
    """An audio file, or a part of it (seconds), as float32 (samples,) at 16 kHz, mixed down. Raises
    BadAudio, whatever is wrong with the file."""
    if problem := file_problem(path):
        raise BadAudio(problem)
    decode = decode_m4a if is_m4a(path) else decode_with_libsndfile
    try:
        channels, rate = decode(path, start, length, max_seconds)
    except BadAudio:
        raise
    except Exception as error:  # a damaged file raises errors of many kinds
        raise BadAudio(f"{path}: cannot be read ({utils.first_line(error)})") from None
    seconds = len(channels) / rate
    if len(channels) == 0:
        where = f"from {start:g} s on" if start else "by its header"
        raise BadAudio(f"{path}: empty {where}")
    if len(channels) > max_seconds * rate:
        whole = by_header(path)[0] - start
        raise BadAudio(
            f"{path}: {min(length or whole, whole):.0f} s long, more than {max_seconds:g} s "
            "(--max-seconds, or all that the encoder receives): cut it"
        )
    if seconds < length - CUT_OFF:
        raise BadAudio(f"{path}: has {seconds:.2f} of the {length:.2f} s from {start:g} s on")
    if not np.isfinite(channels).all():
        raise BadAudio(f"{path}: holds NaN or infinite samples")
    waveform = channels.mean(1)
    if cancel_out(channels, waveform):
        raise BadAudio(f"{path}: its channels cancel each other out when mixed: keep one of them")
    return waveform if rate == SAMPLE_RATE else resample(waveform, rate)


def decode_with_libsndfile(path, start, length, max_seconds):
    """(samples (n, channels) float32, rate) of an audio file from `start` on, for `length` seconds
    (0: to its end), but hardly more than `max_seconds`, whatever the header says. Raises BadAudio,
    and what soundfile raises."""
    with soundfile.SoundFile(path) as f:
        rate, in_header = f.samplerate, f.frames
        check_rate(path, rate)
        if in_header > 2**62:  # a stream's header does not know; libsndfile fails at its end
            raise BadAudio(f"{path}: a header without a length: convert it (ffmpeg -i OLD NEW)")
        skipped, most = int(start * rate), int(max_seconds * rate) + 1
        wanted = min(int(length * rate), most) if length else most
        if f.seekable():
            f.seek(min(skipped, in_header))
        else:  # GSM 6.10
            read_blocks(f, skipped)
        samples = read_blocks(f, wanted)
        promised = min(wanted, in_header - skipped)
        if has_no_length(path, f.format):
            promised = 0
        if promised - len(samples) > CUT_OFF * rate:
            raise BadAudio(f"{path}: {CUT}")
        check_sizes(path, f)
    return samples, rate


def check_rate(path, rate):
    if not RATES[0] <= rate <= RATES[1]:
        raise BadAudio(f"{path}: a header that says {rate} Hz: convert it to 16000 Hz")


def read_blocks(f, frames):
    """Up to that many frames of an open SoundFile, (n, channels) float32. No more memory is asked
    for than one block beyond what is there."""
    blocks = []
    while frames > 0 and (not blocks or len(blocks[-1])):
        blocks.append(f.read(min(frames, BLOCK), dtype="float32", always_2d=True))
        frames -= len(blocks[-1])
    if len(blocks) == 1:
        return blocks[0]
    return np.concatenate(blocks) if blocks else np.zeros((0, f.channels), np.float32)


def has_no_length(path, container):
    """Whether the number of samples that libsndfile gives is only an estimate: an MP3 without a
    Xing or Info header."""
    if container not in ("MP3", "MPEG"):
        return False
    with open(path, "rb") as f:
        tag = f.read(10)  # ID3, which may hold a cover picture and any words
        size = functools.reduce(lambda size, byte: size << 7 | byte, tag[6:], 0)
        f.seek(10 + size if tag.startswith(b"ID3") else 0)
        beginning = f.read(1 << 12)
    return b"Xing" not in beginning and b"Info" not in beginning


def check_sizes(path, header):
    """Raises BadAudio where a file was cut off, by its container's sizes: libsndfile corrects those
    that say too much, and notes it in its log. One that was written to a pipe says about 2 or 4 GB.
    An Ogg file is cut off if its last page is. header: a SoundFile, or soundfile.info."""
    if header.format == "OGG":
        with open(path, "rb") as f:
            f.seek(max(0, os.path.getsize(path) - (1 << 17)))  # a page has at most 64 KB
            page = f.read()
        page = page[max(0, page.rfind(b"OggS")) :]
        segments = page[26] if len(page) > 26 else 0
        whole = len(page) >= 27 + segments + sum(page[27 : 27 + segments])
    elif header.format == "NIST":  # SPHERE, which libsndfile does not compare
        with open(path, "rb") as f:
            says = re.search(rb"^sample_count -i (\d+)", f.read(1024), re.MULTILINE)
        whole = not says or header.frames >= int(says[1])
    else:
        sizes = [(int(says), int(holds)) for says, holds in RESIZED.findall(header.extra_info)]
        whole = not any(holds + 64 < says < 0x7FFF0000 for says, holds in sizes)
    if not whole:
        raise BadAudio(f"{path}: {CUT}")


def cancel_out(channels, waveform):
    """Whether mixing the channels (n, channels) down to (n,) loses nearly all sound, as it does
    where they are in opposite phase."""
    if channels.shape[1] == 1:
        return False
    loudness = np.sqrt(np.mean(channels**2, 0, dtype=np.float64)).mean()
    return np.sqrt(np.mean(waveform**2, dtype=np.float64)) < 0.1 * loudness


def resample(waveform, rate):
    """(samples,) at `rate` Hz -> (samples,) float32 at 16 kHz, polyphase: memory in proportion to
    the rates, also where they share no factor."""
    common = math.gcd(rate, SAMPLE_RATE)
    return resample_poly(waveform, SAMPLE_RATE // common, rate // common).astype(np.float32)


def decode_m4a(path, start, length, max_seconds):
    """The same for VoxCeleb2's own format, by ffmpeg, mixed down and at 16 kHz."""
    if not shutil.which("ffmpeg"):
        raise RuntimeError("m4a needs ffmpeg: apt-get install ffmpeg, or convert the tree to wav/")
    most = max_seconds + 1
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
            str(min(length, most) if length else most),
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
    return np.frombuffer(done.stdout, np.float32)[:, None].copy(), SAMPLE_RATE


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


def by_header(path):
    """(seconds, whether that is only a guess) of an audio file, by its header (m4a: by its size, at 64
    kbit/s). Raises BadAudio."""
    if problem := file_problem(path):
        raise BadAudio(problem)
    try:
        if is_m4a(path):
            return os.path.getsize(path) / 8000, False
        header = soundfile.info(path)
        check_rate(path, header.samplerate)
        check_sizes(path, header)
        return header.duration, has_no_length(path, header.format)
    except BadAudio:
        raise
    except Exception as error:  # see read_waveform
        raise BadAudio(f"{path}: cannot be read ({utils.first_line(error)})") from None


def seconds_of(utterance):
    """How long an utterance is, by its file's header, in seconds. Where that is a guess, or cannot
    be, or is too long, the audio itself decides. Raises BadAudio."""
    whole, guessed = by_header(utterance.path)
    rest = whole - utterance.start
    seconds = min(utterance.length or rest, rest)
    possible = 0 < seconds <= utterance.max_seconds and seconds >= utterance.length - CUT_OFF
    if guessed or not possible:
        seconds = len(load_waveform(utterance)) / SAMPLE_RATE
    return seconds


def num_samples(utterance):
    """How many 16 kHz samples an utterance has, by `seconds_of`; 0 if it cannot be used."""
    try:
        return round(seconds_of(utterance) * SAMPLE_RATE)
    except BadAudio:
        return 0


@contextlib.contextmanager
def no_bad_audio():
    """A context in which audio that cannot be used ends the program in one line."""
    try:
        yield
    except BadAudio as error:  # from a worker its text is a traceback that ends with the message
        message = str(error).splitlines()[-1].split("BadAudio: ")[-1]
        die(f"{message} (--skip-bad leaves out such files)")


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


def ignore_interrupts(worker):
    """Ctrl-C reaches every process of a command; the first one ends the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def in_workers(function, items, desc, workers=2):
    """[function(item) for item in items], in worker processes, in order, with a progress bar."""
    loader = torch.utils.data.DataLoader(
        items,
        batch_size=16,
        num_workers=workers,
        collate_fn=functools.partial(apply_to_all, function),
        worker_init_fn=ignore_interrupts,
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
