"""What all stages share: utterances, prompts, answers and their parsing, audio, batches."""

import contextlib
import datetime
import functools
import json
import os
import re
import signal
import unicodedata
from dataclasses import dataclass

import utils
from utils import die

import numpy as np
import torch
from tqdm import tqdm

import audio
from audio import (  # the constants for those who import data
    SAMPLE_RATE,
    TOLERANCE,
    BadAudio,
    read_header,
    read_waveform,
    sample_of,
)
from study import LABELS, MAX_SECONDS, TASKS, task_of

# here, not in corpora.py, for the maker of the miniature corpora, which corpora.py imports
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


@dataclass
class Utterance:
    """One utterance. `path` is its audio file; `start` and `length` (seconds) select a part of it,
    and a length of 0 stands for the rest. `labels` holds the labels that it has, {label: value}, in
    the order of the answer; an age is an int, or text for a group of ages. Audio longer than
    `max_seconds` is refused; the limit stands here to reach every process that reads the audio."""

    id: str
    path: str
    split: str
    speaker: str
    labels: dict
    start: float = 0.0
    length: float = 0.0
    max_seconds: float = MAX_SECONDS

    def __post_init__(self):
        present = [label for label in LABELS if self.labels.get(label) is not None]
        self.labels = {label: self.labels[label] for label in present}


# -------------------------------------------------------------------------------------------------
# prompts

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


def choose_labels(labels, rng, random_keys):
    """The labels that a training sample asks for: all of them or, with probability `random_keys`, a
    random subset in the same order."""
    labels = list(labels)
    if rng.random() >= random_keys:
        return labels
    chosen = rng.sample(labels, rng.randint(1, len(labels)))
    return [label for label in labels if label in chosen]


def prompt(tokenizer, labels, rng=None):
    """The token ids before and after the audio of a prompt that asks for `labels`. A
    `random.Random` draws the instruction from a pool; without one it is the pool's first. A prompt
    for a single label mostly asks a direct question instead."""
    pool = INSTRUCTIONS
    if len(labels) == 1 and (rng is None or rng.random() < 0.7):
        pool = TASKS[task_of(labels[0])]["questions"]
    instruction = rng.choice(pool) if rng else pool[0]
    keys = ", ".join(KEYS[label] for label in labels)
    return around_audio(tokenizer, f"{instruction} [{keys}]\n<speech>{AUDIO}</speech>")


@functools.lru_cache(1024)
def around_audio(tokenizer, content):
    """The token ids before and after the audio in a user's turn, by the tokenizer's chat template.
    An empty system prompt keeps out one that the template would add itself: every utterance would
    pay for its tokens."""
    user = {"role": "user", "content": content}
    texts, errors = [], []
    for turns in ([user], [{"role": "system", "content": ""}, user]):
        try:
            texts.append(render(tokenizer, turns))
        except Exception as error:  # a template may allow no system prompt, and can raise anything
            errors.append(error)
    text = min(texts, key=len, default="")
    if text.count(AUDIO) != 1:
        reason = ""
        if errors:
            reason = f" ({type(errors[0]).__name__}: {utils.first_line(errors[0])})"
        die(
            f"{tokenizer.name_or_path} has no chat template that keeps the user's text{reason}: "
            "take another chat or instruct model"
        )
    before, after = text.split(AUDIO)
    return (
        tokenizer(before, add_special_tokens=False).input_ids,
        tokenizer(after, add_special_tokens=False).input_ids,
    )


# A prompt must depend on the run alone. Templates that ask for today's date get the one that Llama
# 3's falls back to, through a macro: the sandbox that a template runs in takes no functions.
TODAY = datetime.datetime(2024, 7, 26)
DATE_CODES = "aAbBdeHIjmMpSUwWyYZ"
REPLACEMENTS = [f"|replace('%{code}', '{TODAY.strftime('%' + code)}')" for code in DATE_CODES]
CLOCK = "{% macro strftime_now(format) %}{{ format" + "".join(REPLACEMENTS) + " }}{% endmacro %}\n"


def render(tokenizer, turns):
    """A conversation by the tokenizer's chat template, the same on every day. Raises what the
    template raises, and ValueError where there is none or where it draws at random."""
    template = tokenizer.get_chat_template()
    if re.search(r"\|\s*random\b|\blipsum\b", template):
        raise ValueError("it draws at random")
    if "strftime_now" in template:
        template = CLOCK + template
    return tokenizer.apply_chat_template(
        turns, chat_template=template, tokenize=False, add_generation_prompt=True
    )


# -------------------------------------------------------------------------------------------------
# answers


def answer(labels):
    """{label: value} -> the answer, e.g. `{"Transcript": "go do you hear", "Gender": "female"}`."""
    values = {KEYS[label]: str(labels[label]) for label in LABELS if label in labels}
    return json.dumps(values, ensure_ascii=False)


def answer_ids(tokenizer, labels):
    """The token ids of the answer and of the end-of-sequence token that stops generation."""
    return tokenizer(answer(labels), add_special_tokens=False).input_ids + [tokenizer.eos_token_id]


def value_tokens(tokenizer, labels, label):
    """Which tokens of `answer_ids` hold a label's value, a slice. The rare tokenizer that does not
    know where its tokens stand in the text has the whole answer instead."""
    text = answer(labels)
    key = f'"{KEYS[label]}": "'  # nowhere inside a value, whose quotation marks are escaped
    start = text.index(key) + len(key)
    end = start + len(json.dumps(str(labels[label]), ensure_ascii=False)) - 2
    try:
        tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    except NotImplementedError:
        return slice(None)
    inside = []
    for i, (first, after) in enumerate(tokens.offset_mapping):
        if first < end and after > start:
            inside.append(i)
    return slice(inside[0], inside[-1] + 1) if inside else slice(None)


PAIR = re.compile(r'"(%s)"\s*:\s*"((?:[^"\\]|\\.)*)"' % "|".join(KEYS.values()), re.DOTALL)


def parse(text):
    """The well-formed labels in an answer, {label: value}, even where the answer is cut off. If a
    label stands there twice, the first counts. Never raises."""
    labels = {}
    for key, value in PAIR.findall(text):
        try:
            value = json.loads(f'"{value}"', strict=False)
            value.encode()  # half of a surrogate pair could not be written to a file
        except ValueError:
            continue
        if key == KEYS["age"]:
            value = parse_age(value)
        if value is not None:
            labels.setdefault(key.lower(), value)
    return labels


def class_name(text):
    """The name of a class, such as an emotion, in one spelling: lower case, single spaces, and one
    form of each accented letter."""
    composed = unicodedata.normalize("NFC", text.lower())
    return re.sub(r"[\s_]+", " ", composed).strip()


AGE_GROUP = re.compile(
    r"[a-z][a-z -]*"  # senior, twenties
    r"|(?:<|>|<=|>=|under|over|below|above) ?[0-9]{1,3}"
    r"|[0-9]{1,3}(?:\+|s| ?(?:-|to) ?[0-9]{1,3})"  # 60+, 20s, 18-29
    r"|[0-9]{1,3} (?:and|or) (?:over|older|above|under|younger|below|more|less)"
)


def parse_age(text):
    """An age in years as an int, a group of ages ("senior", "twenties", "18-29", "60+") as
    lower-case text, and anything else as None."""
    text = re.sub(" ?[-–—] ?", "-", class_name(text))
    if re.fullmatch(r"[0-9]{1,3}", text):
        return int(text)
    return text if AGE_GROUP.fullmatch(text) else None


def normalise(text):
    """Text as WER and exact match compare it, in any script: lower case, single spaces, and no
    punctuation but the apostrophe."""
    characters = []
    for c in unicodedata.normalize("NFC", text.lower().replace("’", "'")):
        is_accent = unicodedata.category(c).startswith("M")
        characters.append(c if c.isalnum() or c == "'" or is_accent else " ")
    return " ".join("".join(characters).split())


# -------------------------------------------------------------------------------------------------
# an utterance's audio

# dB; an utterance whose level is further from its corpus's median is no recording of a speaker
FAR_LEVEL = 30


def load_waveform(utterance):
    """An utterance's audio as float32 (samples,) at 16 kHz. Raises BadAudio."""
    return read_waveform(utterance.path, utterance.start, utterance.length, utterance.max_seconds)


def seconds_of(utterance):
    """How long an utterance is, in seconds, by its file's header. Where the header only guesses, or
    what it says cannot be or is too long, the audio itself decides. Raises BadAudio."""
    header = read_header(utterance.path)
    rest = header.seconds - utterance.start
    seconds = min(utterance.length or rest, rest)
    is_possible = 0 < seconds <= utterance.max_seconds and seconds >= utterance.length - TOLERANCE
    if is_possible and not header.is_estimated:
        return seconds
    return len(load_waveform(utterance)) / SAMPLE_RATE


def num_samples(utterance):
    """How many 16 kHz samples an utterance has, by `seconds_of`; 0 where it cannot be used."""
    try:
        return round(seconds_of(utterance) * SAMPLE_RATE)
    except BadAudio:
        return 0


def rms(utterance):
    """The root mean square of an utterance's samples. Raises BadAudio."""
    waveform = load_waveform(utterance)
    level = audio.rms(waveform)
    if not np.isfinite(level):
        raise BadAudio(f"{utterance.path}: samples too large to be audio")
    return level


def far_levels(utterances, levels):
    """Describes, one line each, the utterances whose RMS is far from the median of `levels`."""
    far = []
    median = np.median(levels) if levels else 0.0
    for utterance, level in zip(utterances, levels):
        decibels = 20 * np.log10(max(level, 1e-9) / max(median, 1e-9))
        if abs(decibels) > FAR_LEVEL:
            far.append(f"{utterance.path}: {decibels:+.0f} dB from the median of the corpus")
    return far


def file_state(utterance):
    """Identifies an utterance's audio without reading all of it: which part of which file, the
    file's time and some of its content, and how long the audio may be. Archives and copies keep
    times, and recordings of another corpus may well have the same sizes."""
    return (
        utterance.id,
        utterance.path,
        utterance.start,
        utterance.length,
        utterance.max_seconds,
        os.stat(utterance.path).st_mtime_ns,
        sample_of(utterance.path),
    )


@contextlib.contextmanager
def no_bad_audio():
    """A context in which audio that cannot be used ends the program in one line."""
    try:
        yield
    except BadAudio as error:  # from a worker its text is a traceback that ends with the message
        message = str(error).splitlines()[-1].split("BadAudio: ")[-1]
        die(f"{message} (--skip-bad leaves out such files)")


# -------------------------------------------------------------------------------------------------
# worker processes


def in_workers(function, items, desc, workers=2):
    """[function(item) for item in items], in worker processes, in order, with a progress bar."""
    loader = torch.utils.data.DataLoader(
        items,
        batch_size=16,
        num_workers=workers,
        collate_fn=functools.partial(apply_to_all, function),
        worker_init_fn=leave_stopping_to_parent,
    )
    results = []
    for batch in tqdm(from_workers(loader), desc, len(loader), unit="batch"):
        results += batch
    return results


def apply_to_all(function, batch):
    return [function(item) for item in batch]


def leave_stopping_to_parent(worker):
    """A DataLoader's worker_init_fn. Ctrl-C and, from a job scheduler, SIGTERM reach every process
    of a command: the parent, which may need its workers until it has stopped, ends them. It does
    so by SIGTERM too, where a worker does not end by itself, so only the first is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def ignore_once(signum, frame):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, ignore_once)


def from_workers(loader):
    """A DataLoader's batches. A worker that has ended in one line, or was killed, ends the
    program."""
    try:
        with no_bad_audio():
            yield from loader
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        if "killed by signal" in str(error):
            die(f"a process that reads audio has ended: {utils.first_line(error)}")
        if "exit" in str(error):
            raise SystemExit(2) from None
        raise


# -------------------------------------------------------------------------------------------------
# batches


def in_drawn_order(utterances):
    """The utterances in an order that does not depend on how many there are."""
    return sorted(utterances, key=lambda u: utils.draw("embeddings", u.id))


def chunks(order, size):
    return [order[i : i + size] for i in range(0, len(order), size)]


def epoch_batches(lengths, batch_size, seed, epoch):
    """The batches of an epoch, lists of `batch_size` indices (one may be shorter), decided by
    (seed, epoch). Within pools of 16 batches, utterances of similar length go together to save
    padding."""
    rng = np.random.default_rng([seed, epoch])
    batches = []
    for pool in chunks(rng.permutation(len(lengths)).tolist(), 16 * batch_size):
        by_length = sorted(pool, key=lambda i: lengths[i])
        batches += chunks(by_length, batch_size)
    return [batches[i] for i in rng.permutation(len(batches))]


def micro_batches(indices, lengths, budget):
    """Splits a batch into pieces of at most `budget` seconds, padding counted; a longer utterance
    goes alone."""
    pieces = [[]]
    for i in sorted(indices, key=lambda i: lengths[i]):
        padded = lengths[i] * (len(pieces[-1]) + 1)  # the last one in is the longest
        if pieces[-1] and padded > budget:
            pieces.append([])
        pieces[-1].append(i)
    return pieces
