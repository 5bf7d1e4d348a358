"""Data: the corpora's readers, prompts, answers and their parsing, batches.

One utterance is an `Utterance`; a label that its corpus lacks is None, is never asked for and never scored.

    python data.py check libri --data-root data/mini      # what is there, what is wrong
"""
import csv
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
import torchaudio
from tqdm import tqdm

SAMPLE_RATE = 16000
LABELS = ("transcript", "gender", "age", "emotion")  # in the order of the answer
KEYS = {label: label.capitalize() for label in LABELS}
TASK_LABEL = {"asr": "transcript", "gender": "gender", "emotion": "emotion", "age": "age"}
TASK_CORPUS = {"asr": "libri", "emotion": "crema", "gender": "vox", "age": "vox"}
EMOTIONS = {"ANG": "angry", "DIS": "disgust", "FEA": "fear", "HAP": "happy", "NEU": "neutral", "SAD": "sad"}
CREMA_SENTENCES = {
    "IEO": "It's eleven o'clock", "TIE": "That is exactly what happened", "IOM": "I'm on my way to the meeting",
    "IWW": "I wonder what this is about", "TAI": "The airplane is almost full", "MTI": "Maybe tomorrow it will be cold",
    "IWL": "I would like a new alarm clock", "ITH": "I think I have a doctor's appointment",
    "DFA": "Don't forget a jacket", "ITS": "I think I've seen this before", "TSI": "The surface is slick",
    "WSI": "We'll stop in a couple of minutes"}


MINI_ROOT = "corpora/mini"  # where mini.py puts its corpora, made when they are first asked for


class BadAudio(ValueError):
    """An audio file that cannot be used; says which and why."""


def die(message):
    """An error that the user can mend: one line, exit status 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


@dataclass
class Utterance:
    """One utterance. `path` is its audio file; `start` and `length` (seconds) cut a part out of it, length 0 is all."""
    id: str
    path: str
    split: str
    speaker: str
    transcript: str | None = None
    gender: str | None = None
    age: int | None = None
    emotion: str | None = None
    start: float = 0.0
    length: float = 0.0

    @property
    def labels(self):
        """The labels that this utterance has, in the answer's order: {label: value}."""
        return {label: getattr(self, label) for label in LABELS if getattr(self, label) is not None}


# ---------------------------------------------------------------------------------------------------------------------
# prompts, answers, parsing

AUDIO = "<audio>"  # where the audio goes; cut out of the prompt again before it is tokenised
INSTRUCTIONS = (  # the first is the one evaluation uses
    "Tell me about the audio.", "Give me the following information about the audio.", "Describe this recording.",
    "Extract these details from the speech.", "What can you hear in the audio?", "Report on this speech file.",
    "I need this information from the audio.", "Listen and answer.")
QUESTIONS = {  # direct prompts, asked when only this key is wanted; the first is the one evaluation uses
    "transcript": ("What is said in the audio?", "Transcribe the speech."),
    "gender": ("What is the gender of the speaker in the audio?", "Is the speaker female or male?"),
    "age": ("What is the age of the speaker in the audio?", "How old is the speaker?"),
    "emotion": ("What is the emotion of the speaker in the audio?", "How does the speaker feel?")}
RANDOM_KEYS_PROB = 0.2  # share of training samples that ask for a random subset of the keys, as the reference does


def prompt(tokenizer, labels, rng=None):
    """The text before and after the audio, as two lists of token ids.

    `labels` are the labels asked for; with a `random.Random` the instruction is drawn from the pool, without one it is
    the first. The chat template is the tokenizer's own.
    """
    pool = INSTRUCTIONS
    if len(labels) == 1 and (rng is None or rng.random() < 0.7):
        pool = QUESTIONS[labels[0]]
    instruction = rng.choice(pool) if rng else pool[0]
    content = f"{instruction} [{', '.join(KEYS[label] for label in labels)}]\n<speech>{AUDIO}</speech>"
    text = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False,
                                         add_generation_prompt=True)
    before, after = text.split(AUDIO)
    return [tokenizer(part, add_special_tokens=False).input_ids for part in (before, after)]


def choose_labels(labels, rng):
    """What a training sample asks for: all its labels, or with `RANDOM_KEYS_PROB` a random subset, in order."""
    labels = list(labels)
    if rng.random() >= RANDOM_KEYS_PROB:
        return labels
    chosen = rng.sample(labels, rng.randint(1, len(labels)))
    return [label for label in labels if label in chosen]


def answer(labels):
    """{label: value} -> the answer's text, e.g. `{"Transcript": "go do you hear", "Gender": "female"}`."""
    return json.dumps({KEYS[label]: str(labels[label]) for label in LABELS if label in labels}, ensure_ascii=False)


def answer_ids(tokenizer, labels):
    """Token ids of the answer and the end-of-sequence token that stops generation."""
    return tokenizer(answer(labels), add_special_tokens=False).input_ids + [tokenizer.eos_token_id]


PAIR = re.compile(r'"(%s)"\s*:\s*"((?:[^"\\]|\\.)*)"' % "|".join(KEYS.values()), re.DOTALL)


def parse(text):
    """An answer's labels: {label: value}, age as int. Never raises: what is malformed or absent is left out.

    Pairs are read one by one, so that an answer cut short keeps the labels that it did give; of a key given twice the
    first counts.
    """
    found = {}
    for key, value in PAIR.findall(text):
        try:
            value = json.loads(f'"{value}"', strict=False)
        except ValueError:
            continue
        label = key.lower()
        if label == "age":
            if not re.fullmatch(r"[0-9]{1,3}", value.strip()):
                continue
            value = int(value)
        found.setdefault(label, value)
    return found


def normalise(text):
    """Text for WER and exact match: lower case, no punctuation but the apostrophe, single blanks."""
    text = text.lower().replace("’", "'")
    return " ".join(re.sub(r"[^\w' ]|_", " ", text).split())


# ---------------------------------------------------------------------------------------------------------------------
# the corpora's readers: each gives the utterances of one split ("train", "dev" or "test"), sorted by id

LIBRI_SPLITS = {"train": "train-clean-360", "dev": "dev-clean", "test": "test-clean"}


def read_libri(root, split):
    """LibriSpeech: SPEAKER/CHAPTER/*.flac and *.trans.txt, gender from SPEAKERS.TXT."""
    root = Path(root) / "LibriSpeech"
    genders = {}
    for line in open(root / "SPEAKERS.TXT", encoding="utf-8"):
        if not line.startswith(";"):
            speaker, sex = [field.strip() for field in line.split("|")[:2]]
            genders[speaker] = {"F": "female", "M": "male"}[sex]
    out = []
    for path in sorted((root / LIBRI_SPLITS[split]).glob("*/*/*.trans.txt")):
        for line in open(path, encoding="utf-8"):
            id, _, transcript = line.strip().partition(" ")
            speaker = id.split("-")[0]
            out.append(Utterance(id, str(path.parent / f"{id}.flac"), split, speaker, normalise(transcript),
                                 genders.get(speaker)))
    return out


def split_speakers(sexes, corpus, held):
    """{speaker: sex} -> {speaker: split}: a tenth of each sex, by a fixed hash, for each split in `held`, the rest
    "train"."""
    split = {}
    for sex in set(sexes.values()):
        speakers = sorted((s for s in sexes if sexes[s] == sex),
                          key=lambda s: hashlib.sha256(f"{corpus} {s}".encode()).digest())
        tenth = max(1, round(len(speakers) / 10))
        split.update({s: held[i // tenth] if i < tenth * len(held) else "train" for i, s in enumerate(speakers)})
    return split


def read_crema(root, split):
    """CREMA-D: AudioWAV/ACTOR_SENTENCE_EMOTION_LEVEL.wav, age and sex from VideoDemographics.csv; speaker-disjoint
    80/10/10, both sexes in each part."""
    root = Path(root) / "CREMA-D"
    with open(root / "VideoDemographics.csv", encoding="utf-8-sig", newline="") as f:
        actors = {row["ActorID"]: row for row in csv.DictReader(f)}
    splits = split_speakers({a: row["Sex"].strip().lower() for a, row in actors.items()}, "crema", ("test", "dev"))
    out = []
    for path in sorted((root / "AudioWAV").glob("*.wav")):
        actor, sentence, emotion, _ = path.stem.split("_")
        if splits[actor] == split:
            out.append(Utterance(path.stem, str(path), split, actor, normalise(CREMA_SENTENCES[sentence]),
                                 actors[actor]["Sex"].strip().lower(), int(actors[actor]["Age"]), EMOTIONS[emotion]))
    return out


def read_vox(root, split):
    """VoxCeleb2-AE (Hechmi et al. 2021): ages per video, gender per speaker; every segment of a video takes its age.

    The test list is the published one; a tenth of the training list's speakers are the dev split.
    """
    root = Path(root) / "VoxCeleb2"
    genders = {}
    with open(root / "vox2_meta.csv", encoding="utf-8", newline="") as f:
        for row in csv.DictReader(f, delimiter="\t", skipinitialspace=True):
            row = {k.strip(): v.strip() for k, v in row.items() if k and v}
            genders[row["VoxCeleb2 ID"]] = {"f": "female", "m": "male"}[row["Gender"]]
    with open(root / f"age-{'test' if split == 'test' else 'train'}.txt", encoding="utf-8", newline="") as f:
        rows = [(row["VoxCeleb_ID"].strip(), row["video_id"].strip(), round(float(row["speaker_age"])))
                for row in csv.DictReader(f)]
    if split != "test":
        part = split_speakers({speaker: genders.get(speaker) for speaker, _, _ in rows}, "vox", ("dev",))
        rows = [row for row in rows if part[row[0]] == split]
    out, missing = [], 0
    for speaker, video, age in rows:
        segments = [path for part in ("dev", "test") for kind in ("wav/{}/{}/*.wav", "aac/{}/{}/*.m4a")
                    for path in sorted((root / part).glob(kind.format(speaker, video)))]
        missing += not segments
        out += [Utterance(f"{speaker}-{video}-{path.stem}", str(path), split, speaker, None, genders.get(speaker), age)
                for path in segments]
    if missing:
        print(f"vox {split}: {missing} of {len(rows)} listed videos have no audio under {root} and are left out")
    return sorted(out, key=lambda u: u.id)


READERS = {"libri": read_libri, "crema": read_crema, "vox": read_vox}


def read_corpus(dataset, data_root, split):
    """The utterances of one split of a corpus (`libri`, `crema`, `vox`, or a CSV manifest's path)."""
    if str(data_root) == MINI_ROOT and dataset in READERS:
        import mini
        mini.make_corpus(dataset, MINI_ROOT)
    try:
        out = READERS[dataset](data_root, split)
    except FileNotFoundError as error:
        die(f"{error.filename} is missing: is --data-root {data_root} where {dataset} lies?")
    if not out:
        die(f"{dataset} has no {split} utterances under {data_root}: run `python data.py check {dataset} "
            f"--data-root {data_root}`")
    return out


# ---------------------------------------------------------------------------------------------------------------------
# audio

def read_waveform(path, start=0.0, length=0.0):
    """An audio file, or a part of it (seconds), as float32 (samples,) at 16 kHz, mixed down. Raises BadAudio."""
    if not os.path.exists(path):
        raise BadAudio(f"{path}: no such file")
    if str(path).endswith(".m4a"):
        return read_m4a(path)
    try:
        with soundfile.SoundFile(path) as f:
            f.seek(int(start * f.samplerate))
            waveform = f.read(int(length * f.samplerate) if length else -1, dtype="float32", always_2d=True).mean(1)
            rate = f.samplerate
    except (soundfile.SoundFileError, RuntimeError, OSError) as error:
        raise BadAudio(f"{path}: cannot be read ({error})") from None
    if len(waveform) == 0:
        raise BadAudio(f"{path}: empty")
    if not np.isfinite(waveform).all():
        raise BadAudio(f"{path}: holds NaN or infinite samples")
    if rate != SAMPLE_RATE:
        waveform = torchaudio.functional.resample(torch.from_numpy(waveform), rate, SAMPLE_RATE).numpy()
    return waveform


def read_m4a(path):
    """VoxCeleb2's own format, decoded by ffmpeg if it is installed."""
    if not shutil.which("ffmpeg"):
        raise BadAudio(f"{path}: m4a needs ffmpeg (apt-get install ffmpeg), or convert the tree to wav/")
    done = subprocess.run(["ffmpeg", "-v", "error", "-i", str(path), "-f", "f32le", "-ac", "1", "-ar",
                           str(SAMPLE_RATE), "-"], capture_output=True)
    if done.returncode or not done.stdout:
        raise BadAudio(f"{path}: ffmpeg cannot decode it")
    return np.frombuffer(done.stdout, np.float32).copy()


def load_waveform(utterance):
    return read_waveform(utterance.path, utterance.start, utterance.length)


def in_workers(function, items, desc, workers=2):
    """[function(item) for item in items], in worker processes, in order, with a progress bar."""
    loader = torch.utils.data.DataLoader(items, batch_size=16, num_workers=workers,
                                         collate_fn=lambda batch: [function(item) for item in batch])
    out = []
    with tqdm(total=len(items), desc=desc, mininterval=1) as progress:
        for batch in loader:
            out += batch
            progress.update(len(batch))
    return out


def write_atomically(path, content):
    """Writes text, bytes or, by a function of the temporary path, anything to `path`, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if callable(content):
            content(temporary)
        elif isinstance(content, str):
            temporary.write_text(content, encoding="utf-8")
        else:
            temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------------
# batches

def epoch_batches(lengths, batch_size, seed, epoch):
    """The optimiser steps of an epoch: lists of `batch_size` indices (the last may be shorter), decided by (seed,
    epoch). Within pools of 16 batches utterances of like length go together, so that little is padded."""
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    batches = []
    for start in range(0, len(order), 16 * batch_size):
        pool = sorted(order[start:start + 16 * batch_size].tolist(), key=lambda i: lengths[i])
        batches += [pool[i:i + batch_size] for i in range(0, len(pool), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def micro_batches(indices, lengths, budget):
    """One step's utterances cut into pieces of at most `budget` seconds, padding counted; an utterance longer than
    that goes alone."""
    pieces = [[]]
    for i in sorted(indices, key=lambda i: lengths[i]):
        if pieces[-1] and lengths[i] * (len(pieces[-1]) + 1) > budget:
            pieces.append([])
        pieces[-1].append(i)
    return pieces
