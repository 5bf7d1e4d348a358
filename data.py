"""Data: the corpora's readers, prompts, answers and their parsing, batches.

One utterance is an `Utterance`; a label that its corpus lacks is None, is never asked for and never scored.

    python data.py check libri                       # what is there, what is wrong
    python data.py download libri --data-root /data
"""
import argparse
import csv
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
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


MAX_SECONDS = 60.0  # longer audio is refused (--max-seconds): attention's memory grows with the square of it
MINI_ROOT = "corpora/mini"  # where mini.py puts its corpora, made when they are first asked for


class BadAudio(ValueError):
    """An audio file that cannot be used; says which and why."""


def die(message):
    """An error that the user can mend: one line, exit status 2."""
    tqdm.write(f"error: {message}", file=sys.stderr)  # on a line of its own, though a progress bar is being drawn
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
RANDOM_KEYS = 0.2  # share of training samples that ask for a random subset of the keys, as the reference does


def prompt(tokenizer, labels, rng=None):
    """The text before and after the audio, as two lists of token ids.

    `labels` are the labels asked for; with a `random.Random` the instruction is drawn from the pool, without one it is
    the first.
    """
    pool = INSTRUCTIONS
    if len(labels) == 1 and (rng is None or rng.random() < 0.7):
        pool = QUESTIONS[labels[0]]
    instruction = rng.choice(pool) if rng else pool[0]
    content = f"{instruction} [{', '.join(KEYS[label] for label in labels)}]\n<speech>{AUDIO}</speech>"
    return around_audio(tokenizer, content)


@functools.lru_cache(1 << 16)  # most answers are the same in every epoch
def token_ids(tokenizer, text):
    """Token ids of a text and nothing around it. The list is shared: not to be changed."""
    return tokenizer(text, add_special_tokens=False).input_ids


@functools.lru_cache(1024)  # few differ, and every sample of every step has one
def around_audio(tokenizer, content):
    """Token ids before and after the audio of a user's turn, by the tokenizer's own chat template."""
    text = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False,
                                         add_generation_prompt=True)
    return tuple(token_ids(tokenizer, part) for part in text.split(AUDIO))


def choose_labels(labels, rng, random_keys=RANDOM_KEYS):
    """What a training sample asks for: all its labels, or with probability `random_keys` a random subset, in order."""
    labels = list(labels)
    if rng.random() >= random_keys:
        return labels
    chosen = rng.sample(labels, rng.randint(1, len(labels)))
    return [label for label in labels if label in chosen]


def answer(labels):
    """{label: value} -> the answer's text, e.g. `{"Transcript": "go do you hear", "Gender": "female"}`."""
    return json.dumps({KEYS[label]: str(labels[label]) for label in LABELS if label in labels}, ensure_ascii=False)


def answer_ids(tokenizer, labels):
    """Token ids of the answer and the end-of-sequence token that stops generation."""
    return token_ids(tokenizer, answer(labels)) + [tokenizer.eos_token_id]


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
# the corpora's readers: each gives the utterances of one split ("train", "dev" or "test"), sorted by id, and appends
# what is wrong with the corpus, a line each, to `problems`

LIBRI_SPLITS = {"train": "train-clean-360", "dev": "dev-clean", "test": "test-clean"}


def read_libri(root, split, problems):
    """LibriSpeech: SPEAKER/CHAPTER/*.flac and *.trans.txt, gender from SPEAKERS.TXT."""
    root = Path(root) / "LibriSpeech"
    genders = {}
    with open(root / "SPEAKERS.TXT", encoding="utf-8") as f:
        for line in f:
            fields = [field.strip() for field in line.split("|")]
            if not line.startswith(";") and len(fields) > 1:
                genders[fields[0]] = {"F": "female", "M": "male"}.get(fields[1])
    out = []
    for chapter in sorted((root / LIBRI_SPLITS[split]).glob("*/*")):
        transcripts = {}
        for path in chapter.glob("*.trans.txt"):
            with open(path, encoding="utf-8") as f:
                for line in f:
                    id, _, transcript = line.strip().partition(" ")
                    if id in transcripts:
                        problems.append(f"{path}: {id} stands there twice")
                    transcripts[id] = transcript
        problems += [f"{path}: no transcript" for path in sorted(chapter.glob("*.flac"))
                     if path.stem not in transcripts]
        for id, transcript in sorted(transcripts.items()):
            speaker = id.split("-")[0]
            out.append(Utterance(id, str(chapter / f"{id}.flac"), split, speaker, normalise(transcript),
                                 genders.get(speaker)))
            if genders.get(speaker) is None:
                problems.append(f"{out[-1].path}: speaker {speaker} has no sex in SPEAKERS.TXT")
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


def crema_labels(name):
    """`1001_DFA_ANG_XX` -> (actor, sentence's text, emotion). Raises ValueError naming what is unknown."""
    fields = name.split("_")
    if len(fields) != 4:
        raise ValueError("not of the form ACTOR_SENTENCE_EMOTION_LEVEL")
    actor, sentence, emotion, _ = fields
    if sentence not in CREMA_SENTENCES or emotion not in EMOTIONS:
        raise ValueError(f"unknown label {sentence if sentence not in CREMA_SENTENCES else emotion}")
    return actor, CREMA_SENTENCES[sentence], EMOTIONS[emotion]


def read_crema(root, split, problems):
    """CREMA-D: AudioWAV/ACTOR_SENTENCE_EMOTION_LEVEL.wav, age and sex from VideoDemographics.csv; speaker-disjoint
    80/10/10, both sexes in each part."""
    root = Path(root) / "CREMA-D"
    with open(root / "VideoDemographics.csv", encoding="utf-8-sig", newline="") as f:
        actors = {row["ActorID"].strip(): (row["Sex"].strip().lower(), int(row["Age"])) for row in csv.DictReader(f)}
    splits = split_speakers({a: sex for a, (sex, _) in actors.items()}, "crema", ("test", "dev"))
    out = []
    for path in sorted((root / "AudioWAV").glob("*.wav")):
        try:
            actor, transcript, emotion = crema_labels(path.stem)
            if actor not in actors:
                raise ValueError(f"actor {actor} is not in VideoDemographics.csv")
        except ValueError as error:
            if split == "train":
                problems.append(f"{path}: {error}")
            continue
        if splits[actor] == split:
            out.append(Utterance(path.stem, str(path), split, actor, normalise(transcript), *actors[actor], emotion))
    return out


def read_vox_ages(path):
    """age-train.txt or age-test.txt -> [(speaker, video, age in whole years)]."""
    with open(path, encoding="utf-8", newline="") as f:
        return [(row["VoxCeleb_ID"].strip(), row["video_id"].strip(), round(float(row["speaker_age"])))
                for row in csv.DictReader(f)]


def read_vox_genders(path):
    """vox2_meta.csv (tab-separated, blanks behind the fields) -> {speaker: "female" | "male"}."""
    with open(path, encoding="utf-8", newline="") as f:
        rows = [{k.strip(): v.strip() for k, v in row.items() if k and v} for row in csv.DictReader(f, delimiter="\t")]
    return {row["VoxCeleb2 ID"]: {"f": "female", "m": "male"}.get(row["Gender"]) for row in rows}


def read_vox(root, split, problems):
    """VoxCeleb2-AE (Hechmi et al. 2021): ages per video, gender per speaker; every segment of a video takes its age.

    The test list is the published one; a tenth of the training list's speakers are the dev split.
    """
    root = Path(root) / "VoxCeleb2"
    genders = read_vox_genders(root / "vox2_meta.csv")
    rows = read_vox_ages(root / f"age-{'test' if split == 'test' else 'train'}.txt")
    if split != "test":
        part = split_speakers({speaker: genders.get(speaker) for speaker, _, _ in rows}, "vox", ("dev",))
        rows = [row for row in rows if part[row[0]] == split]
    out = []
    for speaker, video, age in rows:
        segments = [path for part in ("dev", "test") for kind in ("wav/{}/{}/*.wav", "aac/{}/{}/*.m4a")
                    for path in sorted((root / part).glob(kind.format(speaker, video)))]
        if not segments:
            problems.append(f"{root}: {speaker}/{video} is listed, but has no audio")
        elif genders.get(speaker) is None:
            problems.append(f"{root}: {speaker} has no gender in vox2_meta.csv")
        out += [Utterance(f"{speaker}-{video}-{path.stem}", str(path), split, speaker, None, genders.get(speaker), age)
                for path in segments]
    return sorted(out, key=lambda u: u.id)


ABSENT = {"", "__unknown__", "unknown", "nan", "none", "na", "n/a"}
GENDERS = {"female": "female", "f": "female", "male": "male", "m": "male"}
SPLITS = {"train": "train", "training": "train", "dev": "dev", "val": "dev", "valid": "dev", "validation": "dev",
          "test": "test"}


def read_manifest(path, split, problems):
    """A CSV manifest: `audio_path` (relative to the file) and any of transcript, gender, age, emotion, speaker, split,
    start, length (seconds). SpeechLLM's own CSVs load as they are. Where no split is given, a hash of the speaker (or,
    without speakers, of the path) makes it 80/10/10."""
    path, out, seen = Path(path), [], set()
    try:
        with open(path, encoding="utf-8-sig", newline="") as f:
            rows = list(csv.DictReader(f, strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        die(f"{path} is no CSV file in UTF-8 ({error}): save it as one")
    if not rows or "audio_path" not in rows[0]:
        die(f"{path}: " + ("no row" if not rows else f"no column audio_path among {', '.join(map(str, rows[0]))}"))
    for number, row in enumerate(rows, 2):
        row = {k: "" if v is None or v.strip().lower() in ABSENT else v.strip() for k, v in row.items() if k}
        wrong = []

        def number_of(column, low, high):
            try:
                value = float(row.get(column) or "nan")
            except ValueError:
                value = low - 1
            if value < low or value > high:
                wrong.append(f"unknown {column} {row[column]}")
            return value if low <= value <= high else None
        if not row["audio_path"]:
            if split == "train":  # of no split, and told once
                problems.append(f"{path}, row {number}: no audio_path")
            continue
        speaker = row.get("speaker", "")
        chosen = SPLITS.get(row.get("split", "").lower())
        if row.get("split") and not chosen:
            wrong.append(f"unknown split {row['split']}")
        if chosen is None:
            draw = hashlib.sha256(f"manifest {speaker or row['audio_path']}".encode()).digest()[0] / 256
            chosen = "test" if draw < 0.1 else "dev" if draw < 0.2 else "train"
        if chosen != split:
            continue
        gender = GENDERS.get(row.get("gender", "").lower())
        if row.get("gender") and not gender:
            wrong.append(f"unknown gender {row['gender']}")
        age = number_of("age", 0, 120)
        start, length = number_of("start", 0, 1e6) or 0.0, number_of("length", 0, 1e6) or 0.0
        id = row["audio_path"] + (f"@{start:g}+{length:g}" if start or length else "")
        if id in seen:
            wrong.append("duplicate id")
        problems += [f"{path}, row {number}, {id}: {w}" for w in wrong]
        if wrong:
            continue
        seen.add(id)
        out.append(Utterance(id, str(path.parent / row["audio_path"]), split, speaker,
                             normalise(row.get("transcript", "")) or None, gender,
                             None if age is None else round(age), row.get("emotion", "").lower() or None, start,
                             length))
    return sorted(out, key=lambda u: u.id)


READERS = {"libri": read_libri, "crema": read_crema, "vox": read_vox}


def read_split(dataset, data_root, split):
    """(utterances, problems) of one split of `libri`, `crema`, `vox` or a CSV manifest's path."""
    problems = []
    if dataset not in READERS:
        if not Path(dataset).is_file():
            die(f"--dataset {dataset}: neither libri, crema or vox nor a CSV file")
        return read_manifest(dataset, split, problems), problems
    if str(data_root) == MINI_ROOT:
        import mini
        mini.make_corpus(dataset, MINI_ROOT)
    try:
        return READERS[dataset](data_root, split, problems), problems
    except FileNotFoundError as error:
        die(f"{error.filename} is missing: does {dataset} lie under --data-root {data_root}?")
    except (KeyError, ValueError, UnicodeDecodeError) as error:
        die(f"{dataset} under {data_root} has a list that is not in its published form ({error!r})")


def read_corpus(dataset, data_root, split, skip_bad=False):
    """The utterances of one split. Ends in one line where something is wrong with it, or, with `skip_bad`, reads all
    its audio first and leaves out what is wrong, saying how much."""
    out, problems = read_split(dataset, data_root, split)
    look = audio_problem if skip_bad else file_problem
    found = in_workers(look, out, f"checking {split}") if skip_bad else [look(u) for u in out]
    problems += [p for p in found if p]
    out = [u for u, p in zip(out, found) if not p]
    if problems and not skip_bad:
        die(f"{problems[0]}" + (f", and {len(problems) - 1} more" if len(problems) > 1 else "") + f" in {split}: "
            f"`python data.py check {dataset} --data-root {data_root}` lists all; --skip-bad goes on without them")
    if problems:
        print(f"{dataset} {split}: left out for {len(problems)} problem{'s' * (len(problems) != 1)}; "
              "`python data.py check` lists them")
    if not out:
        die(f"{dataset} has no {split} utterances: run `python data.py check {dataset} --data-root {data_root}`")
    return out


def only(utterances, labels):
    """The utterances without any labels but these (None: all); those left with none are left out."""
    if labels is None:
        return utterances
    out = [replace(u, **{label: None for label in LABELS if label not in labels}) for u in utterances]
    return [u for u in out if u.labels]


# ---------------------------------------------------------------------------------------------------------------------
# audio

@torch.autocast("cpu", enabled=False)  # workers inherit the trainer's; resampling cannot work in bf16
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
    if len(waveform) > MAX_SECONDS * rate:
        raise BadAudio(f"{path}: {len(waveform) / rate:.0f} s long, more than --max-seconds {MAX_SECONDS:g}: cut it")
    if not np.isfinite(waveform).all():
        raise BadAudio(f"{path}: holds NaN or infinite samples")
    if rate != SAMPLE_RATE:
        waveform = torchaudio.functional.resample(torch.from_numpy(waveform), rate, SAMPLE_RATE).numpy()
    return waveform


@functools.lru_cache(maxsize=None)
def file_seconds(path):
    """How long an audio file is, in seconds, from its header, read once. Raises soundfile's errors."""
    return soundfile.info(path).duration


def num_samples(utterance):
    """How many 16 kHz samples an utterance has, from its file's header alone (m4a: guessed from the size, at 64 kbit/s),
    0 where the file cannot be opened."""
    if utterance.path.endswith(".m4a"):
        return int(os.path.getsize(utterance.path) / 8000 * SAMPLE_RATE)
    try:
        rest = file_seconds(utterance.path) - utterance.start
    except (soundfile.SoundFileError, RuntimeError, OSError):
        return 0
    return round((min(utterance.length, rest) if utterance.length else rest) * SAMPLE_RATE)


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


def file_problem(utterance):
    """What can be seen to be wrong with an utterance's file without opening it, or None."""
    try:
        return None if os.path.getsize(utterance.path) else f"{utterance.path}: empty"
    except OSError:
        return f"{utterance.path}: no such file"


def audio_problem(utterance):
    """What is wrong with an utterance's audio, read whole, or None."""
    try:
        load_waveform(utterance)
    except BadAudio as error:
        return str(error)


def from_workers(loader):
    """A DataLoader's batches; audio that cannot be used ends the program in one line."""
    try:
        yield from loader
    except BadAudio as error:  # from a worker its text is a traceback whose last line is the message
        die(str(error).strip().splitlines()[-1].removeprefix("data.BadAudio: ").removeprefix("BadAudio: ")
            + " (--skip-bad goes on without such files)")


def in_workers(function, items, desc, workers=2):
    """[function(item) for item in items], in worker processes, in order, with a progress bar."""
    loader = torch.utils.data.DataLoader(items, batch_size=16, num_workers=workers,
                                         collate_fn=lambda batch: [function(item) for item in batch])
    out = []
    with tqdm(total=len(items), desc=desc, mininterval=1) as progress:
        for batch in from_workers(loader):
            out += batch
            progress.update(len(batch))
    return out


def write_atomically(path, content):
    """Writes text, bytes or, by a function of the temporary path, anything to `path`, whole or not at all."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(content):
            content(temporary)
        elif isinstance(content, str):
            temporary.write_text(content, encoding="utf-8")
        else:
            temporary.write_bytes(content)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        die(f"cannot write {path} ({str(error).splitlines()[0]}): is the disk full, is it writable? What was there "
            "before is untouched")
    finally:
        if temporary.parent.is_dir():
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


# ---------------------------------------------------------------------------------------------------------------------
# python data.py check | download

def seconds_or_problem(utterance):
    try:
        return len(load_waveform(utterance)) / SAMPLE_RATE, None
    except BadAudio as error:
        return None, str(error)


def check(dataset, data_root):
    """Reads everything; prints what there is and what is wrong. Returns the number of problems."""
    total = []
    print(f"{'split':7}{'utterances':>11}{'hours':>8}{'speakers':>10}   length in s: least, median, most   labels")
    for split in ("train", "dev", "test"):
        utterances, problems = read_split(dataset, data_root, split)
        read = in_workers(seconds_or_problem, utterances, split)
        problems += [problem for _, problem in read if problem]
        lengths = sorted(seconds for seconds, _ in read if seconds) or [0.0]
        labels = []
        for label in LABELS:
            values = [u.labels[label] for u in utterances if label in u.labels]
            count = {v: values.count(v) for v in sorted(set(values), key=str)}
            few = ", ".join(f"{v} {n}" for v, n in count.items()) if len(count) <= 8 else \
                f"{len(count)} different" + (f", {min(values)} to {max(values)}" if label == "age" else "")
            labels += [f"{label} {len(values)} ({few})"] if values else []
        print(f"{split:7}{len(utterances):>11}{sum(lengths) / 3600:>8.2f}{len({u.speaker for u in utterances}):>10}   "
              + f"{lengths[0]:.2f}, {lengths[len(lengths) // 2]:.2f}, {lengths[-1]:.2f}".ljust(35) + "; ".join(labels))
        total += problems
    for problem in total:
        print(problem)
    print(f"{len(total)} problem{'s' * (len(total) != 1)}")
    return len(total)


def download(dataset, data_root):
    """Fetches what may be fetched: LibriSpeech (CC BY 4.0), CREMA-D (ODbL). Says where to ask for the rest."""
    root = Path(data_root)
    root.mkdir(parents=True, exist_ok=True)
    if dataset == "libri":
        for part in LIBRI_SPLITS.values():
            torchaudio.datasets.LIBRISPEECH(root, url=part, download=True)
    elif dataset == "crema":
        if not shutil.which("git-lfs"):
            die("CREMA-D is kept with git-lfs: install it (apt-get install git-lfs), then run this again")
        subprocess.run(["git", "clone", "--depth", "1", "https://github.com/CheyneyComputerScience/CREMA-D",
                        str(root / "CREMA-D")], check=True)
    else:
        die("VoxCeleb2 is given out on request only: ask the Visual Geometry Group, Oxford (VoxCeleb2 page), for the "
            "audio and vox2_meta.csv, and take age-train.txt and age-test.txt from the VoxCeleb enrichment repository "
            f"of Hechmi et al. 2021; put all under {root}/VoxCeleb2")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("check", "download"))
    parser.add_argument("dataset", help="libri, crema, vox or a CSV manifest")
    parser.add_argument("--data-root", default=MINI_ROOT)
    args = parser.parse_args()
    if args.action == "check":
        raise SystemExit(1 if check(args.dataset, args.data_root) else 0)
    try:
        download(args.dataset, args.data_root)
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        die(f"the download failed: {str(error).splitlines()[0]}")


if __name__ == "__main__":
    main()
