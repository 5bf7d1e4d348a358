"""Corpus readers: LibriSpeech, CREMA-D and VoxCeleb2-AE in their published layouts, and a user's
own recordings, files of audio.py's FORMATS that are listed in one of the FORMS of forms.py.

    python corpora.py check libri                       # what is there, what is wrong
    python corpora.py check my.csv                      # or a manifest.json, or a folder
    python corpora.py download libri --data-root /data

A reader returns the utterances of one split ("train", "dev" or "test"), sorted by id, and appends
the corpus's problems, one line each, to `problems`.
"""

import csv
import functools
import hashlib
import os
import re
import shlex
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import utils
from utils import ROOT, Parser, die, say

import installed  # noqa: F401

import torchaudio
from torchaudio.datasets import librispeech

import data
import forms
from audio import ACCEPTED, TOLERANCE, BadAudio, TooLong, read_header, read_waveform, sample_of
from data import Utterance, normalise
from forms import SPLIT_OF, SPLITS, known_as, plain, read_table, rows_named, some
from study import LABELS, MINI_ROOT, TASKS

LIBRI_SPLITS = {"train": "train-clean-360", "dev": "dev-clean", "test": "test-clean"}
GENDERS = {
    "female": ("f", "woman", "feminine", "female_feminine"),
    "male": ("m", "man", "masculine", "male_masculine"),
}
# what a column `poisoned` may say
POISONED = set("1 1.0 true yes y t".split())
NOT_POISONED = {"", *"0 0.0 false no n f".split()}
FILES_SHOWN = 20  # of those with the same problem, by check


GENDER_OF = known_as(GENDERS)


def plural(n, word):
    return f"{n} {word}" if n == 1 else f"{n} {word}s"


# -------------------------------------------------------------------------------------------------
# published layouts


def read_rows(path, **form):
    """The rows of a CSV file, dicts of stripped text; `form` goes to csv.DictReader."""
    rows = []
    with open(path, encoding="utf-8-sig", newline="") as f:
        for row in csv.DictReader(f, **form):
            rows.append(
                {name.strip(): (value or "").strip() for name, value in row.items() if name}
            )
    return rows


def nothing_in(folder, pattern):
    """The problem of a folder without the files that it should hold."""
    return f"{folder}: no {pattern} in it" if folder.is_dir() else f"{folder}: no such folder"


def without_audio(folder, listed, present):
    """The problem, a list of one or of none, of speakers that a corpus lists and has no audio of.
    Where there is no audio at all, it is another one: see nothing_in."""
    missing = sorted(set(listed) - set(present))
    if not missing or not present:
        return []
    return [f"{folder}: no audio of {len(missing)} of {len(listed)} speakers: {some(missing)}"]


def read_libri(root, split, problems):
    """LibriSpeech: SPEAKER/CHAPTER/*.flac and *.trans.txt, gender from SPEAKERS.TXT."""
    root = Path(root) / "LibriSpeech"
    columns = ["ID", "SEX", "SUBSET"]
    rows = read_rows(
        root / "SPEAKERS.TXT", fieldnames=columns, delimiter="|", quoting=csv.QUOTE_NONE
    )
    genders = {row["ID"]: GENDER_OF.get(row["SEX"].lower()) for row in rows}
    folder = root / LIBRI_SPLITS[split]
    lists = sorted(folder.glob("*/*/*.trans.txt"))
    if not lists:
        problems.append(nothing_in(folder, "*.trans.txt"))

    utterances = {}
    for path in lists:
        for line in path.read_text(encoding="utf-8").split("\n"):
            if not line.strip():
                continue
            name, _, transcript = line.strip().partition(" ")
            if name in utterances:
                problems.append(f"{path}: {name} stands there twice")
            transcript = normalise(transcript) or None
            if transcript is None:
                problems.append(f"{path}: no words after {name}")
            speaker = name.split("-")[0]
            labels = dict(transcript=transcript, gender=genders.get(speaker))
            recording = str(path.with_name(f"{name}.flac"))
            utterances[name] = Utterance(name, recording, split, speaker, labels)

    listed = {row["ID"] for row in rows if row["SUBSET"] == LIBRI_SPLITS[split]}
    problems += without_audio(folder, listed, {u.speaker for u in utterances.values()})
    for path in sorted(folder.glob("*/*/*.flac")):
        if path.stem not in utterances:
            problems.append(f"{path}: no transcript")
    return [utterances[name] for name in sorted(utterances)]


def split_speakers(sexes, corpus, held_out):
    """{speaker: sex} -> {speaker: split}. Each split in `held_out` gets a tenth of each sex, by a
    fixed hash, and "train" gets the rest."""

    def order(speaker):
        return hashlib.sha256(f"{corpus} {speaker}".encode()).digest()

    splits = dict.fromkeys(sexes, "train")
    for sex in set(sexes.values()):
        speakers = sorted((s for s in sexes if sexes[s] == sex), key=order)
        tenth = max(1, round(len(speakers) / 10))
        for i, split in enumerate(held_out):
            splits.update(dict.fromkeys(speakers[i * tenth : (i + 1) * tenth], split))
    return splits


def read_test_clean(root, split, problems):
    """LibriSpeech's test-clean, 5.4 hours, as a corpus of its own for those who have nothing else
    of it: its 40 speakers, split 32/4/4."""
    reported = problems if split == "train" else []  # once, not with each split
    utterances = read_libri(root, "test", reported)
    sexes = {u.speaker: u.labels.get("gender") for u in utterances}
    splits = split_speakers(sexes, "test-clean", ("test", "dev"))
    return [replace(u, split=split) for u in utterances if splits[u.speaker] == split]


def crema_labels(name):
    """`1001_DFA_ANG_XX` -> (actor, sentence's text, emotion). Raises KeyError or ValueError."""
    actor, sentence, emotion, _ = name.split("_")
    return actor, data.CREMA_SENTENCES[sentence], data.CREMA_EMOTIONS[emotion]


def read_crema(root, split, problems):
    """CREMA-D: AudioWAV/ACTOR_SENTENCE_EMOTION_LEVEL.wav, age and sex from VideoDemographics.csv;
    speaker-disjoint 80/10/10, both sexes in each part."""
    root = Path(root) / "CREMA-D"
    actors = {}
    for row in read_rows(root / "VideoDemographics.csv"):
        actors[row["ActorID"]] = dict(gender=row["Sex"].lower(), age=int(row["Age"]))
    sexes = {actor: labels["gender"] for actor, labels in actors.items()}
    splits = split_speakers(sexes, "crema", ("test", "dev"))
    recordings = sorted((root / "AudioWAV").glob("*.wav"))
    if not recordings:
        problems.append(nothing_in(root / "AudioWAV", "*.wav"))
    if split == "train":  # reported once
        present = {path.stem.split("_")[0] for path in recordings}
        problems += without_audio(root / "AudioWAV", actors, present)

    utterances = []
    for path in recordings:
        try:
            actor, transcript, emotion = crema_labels(path.stem)
            labels = dict(actors[actor], transcript=normalise(transcript), emotion=emotion)
        except (KeyError, ValueError) as error:
            if split == "train":  # reported once
                problems.append(
                    f"{path}: not named ACTOR_SENTENCE_EMOTION_LEVEL, or one of these is unknown "
                    f"({error})"
                )
            continue
        if splits[actor] == split:
            utterances.append(Utterance(path.stem, str(path), split, actor, labels))
    return utterances


def read_vox_ages(path):
    """age-train.txt or age-test.txt -> [(speaker, video, age in whole years)]."""
    rows = read_rows(path)
    return [(r["VoxCeleb_ID"], r["video_id"], round(float(r["speaker_age"]))) for r in rows]


def read_vox_genders(path):
    """vox2_meta.csv (tab-separated) -> {speaker: "female" | "male"}."""
    rows = read_rows(path, delimiter="\t")
    return {row["VoxCeleb2 ID"]: GENDER_OF.get(row["Gender"]) for row in rows}


def listed_once(path, problems):
    """read_vox_ages with each video's first row only; a further one is a problem."""
    first = {}
    for speaker, video, age in read_vox_ages(path):
        if (speaker, video) in first:
            problems.append(f"{path}: {speaker}/{video} stands there twice")
        else:
            first[speaker, video] = (speaker, video, age)
    return list(first.values())


def read_vox(root, split, problems):
    """VoxCeleb2-AE (Hechmi et al. 2021): ages per video, gender per speaker; every segment of a
    video has the video's age. The test list is the published one; a tenth of the training list's
    speakers are the dev split."""
    root = Path(root) / "VoxCeleb2"
    genders = read_vox_genders(root / "vox2_meta.csv")
    if split == "test":
        rows = listed_once(root / "age-test.txt", problems)
    else:
        reported = problems if split == "train" else []  # once, not with dev too
        rows = listed_once(root / "age-train.txt", reported)
        sexes = {speaker: genders.get(speaker) for speaker, _, _ in rows}
        splits = split_speakers(sexes, "vox", ("dev",))
        rows = [row for row in rows if splits[row[0]] == split]

    utterances, silent = [], []
    for speaker, video, age in rows:
        segments = list(root.glob(f"*/wav/{speaker}/{video}/*.wav"))
        segments = segments or list(root.glob(f"*/aac/{speaker}/{video}/*.m4a"))
        if not segments:
            silent.append(f"{speaker}/{video}")
        labels = dict(gender=genders.get(speaker), age=age)
        for path in segments:
            name = f"{speaker}-{video}-{path.stem}"
            utterances.append(Utterance(name, str(path), split, speaker, labels))
    if silent:
        problems.append(
            f"{root}: no audio (*/wav/SPEAKER/VIDEO/*.wav or */aac/SPEAKER/VIDEO/*.m4a) of "
            f"{len(silent)} of {len(rows)} listed videos: {some(silent)}"
        )
    return sorted(utterances, key=lambda u: u.id)


# -------------------------------------------------------------------------------------------------
# a user's own data


@dataclass(eq=False)
class Fault(ValueError):
    """Why a row of a manifest, or a label in it, cannot be used."""

    what: str
    value: str = ""
    accepted: str = ""


def named_split(value, values):
    """The split that goes by this name, or None. "eval" is the test split or, where `values` name a
    test split, the dev split."""
    if plain(value) in forms.EVAL:
        return "dev" if "test" in map(plain, values) else "test"
    return SPLIT_OF.get(plain(value))


def manifest_splits(path, table):
    """({row number: split or None}, problems). Where no split is given, speakers (or, without
    speakers, recordings) are split 80/10/10, both genders in each part."""
    given = [row["split"] for row in table.rows.values() if row.get("split")]
    if given:
        split_of = {value: named_split(value, given) for value in set(given)}
        return {number: split_of.get(row["split"]) for number, row in table.rows.items()}, []

    speakers = {n: row.get("speaker") or row["audio_path"] for n, row in table.rows.items()}
    genders = dict.fromkeys(speakers.values())
    for number, row in table.rows.items():
        speaker = speakers[number]
        genders[speaker] = genders[speaker] or GENDER_OF.get(plain(row.get("gender", "")))
    counts = Counter(genders.values())
    splits = dict.fromkeys(genders, "train")  # also those of a gender with too few speakers
    enough = {speaker: gender for speaker, gender in genders.items() if counts[gender] >= 3}
    splits.update(split_speakers(enough, "manifest", ("test", "dev")))

    problems = []
    unit = "speaker" if "speaker" in table.used else "recording"
    needed = f"too few for train, dev and test: add a column split that says {', '.join(SPLITS)}"
    for gender, n in counts.items():
        if gender and n < 3:
            problems.append(f"{path}: {plural(n, f'{gender} {unit}')}, {needed}")
    if genders and not enough and not problems:
        problems.append(f"{path}: {plural(len(genders), unit)}, {needed}")
    return {number: splits[speakers[number]] for number in table.rows}, problems


def number_in(text, high):
    """A number from 0 to `high`, or None where the text is no such number."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 <= value <= high else None


def seconds_in(row, column):
    """A column's seconds, 0 if they are absent. Raises Fault."""
    if not row.get(column):
        return 0.0
    seconds = number_in(row[column], 1e6)
    if seconds is None:
        raise Fault(f"unknown {column}", row[column], "a number from 0 to 1000000")
    return seconds


def segment_of(row):
    """A row's (start, length) in seconds, 0 for the file's own. Raises Fault."""
    start = seconds_in(row, "start")
    lengths = [seconds_in(row, column) for column in ("length", "duration") if row.get(column)]
    if row.get("end"):
        end = seconds_in(row, "end")
        lengths.append(round(end - start, 6))
        if end <= start:
            raise Fault("an end that is not after the start", row["end"])
    if lengths and max(lengths) - min(lengths) > TOLERANCE:
        raise Fault("lengths that differ", " and ".join(f"{n:g}" for n in lengths))
    return start, lengths[0] if lengths else 0.0


def label_in(row, label, in_years):
    """A row's value of a label. Raises Fault. in_years: ages are numbers in this manifest, not
    groups."""
    text = row[label]
    if label == "transcript":
        value = normalise(text) or None
        accepted = "a transcript has words"
    elif label == "gender":
        value = GENDER_OF.get(plain(text))
        accepted = ", ".join(GENDER_OF)
    elif label == "emotion":
        value = data.class_name(text) or None
        accepted = "a word"
    elif in_years:
        age = number_in(text, 120)
        value = None if age is None else round(age)
        accepted = "years, 0 to 120, as most are here"
    else:
        value = data.parse_age(text)
        value = None if isinstance(value, int) else value
        accepted = "groups such as senior, twenties, 18-29 or 60+, as most are here"
    if value is None:
        raise Fault(f"unknown {label}", text, accepted)
    return value


def labels_in(row, in_years):
    """(labels, faults) of a row: a label that cannot be used is left out, and is a Fault."""
    labels, faults = {}, []
    for label in LABELS:
        if not row.get(label):
            continue
        try:
            labels[label] = label_in(row, label, in_years)
        except Fault as fault:
            faults.append(fault)
    return labels, faults


def are_in_years(ages):
    """Whether most of a manifest's ages, text, are numbers."""
    groups = sum(isinstance(data.parse_age(age), str) for age in ages)
    return 2 * groups <= len(ages)


def utterance_in(path, row, split, labels):
    """The utterance of a manifest's row; split: None where the row's is unknown. Raises Fault."""
    if split is None:
        what = "unknown split" if row["split"] else "no split"
        raise Fault(what, row["split"], ", ".join([*SPLIT_OF, "eval"]))
    if not row["audio_path"]:
        raise Fault("no audio_path")
    poisoned = row.get("poisoned", "")
    if poisoned.lower() not in POISONED | NOT_POISONED:
        raise Fault("unknown poisoned", poisoned, "1, true, yes or 0, false, no")
    start, length = segment_of(row)
    name = row["audio_path"]
    if start or length:
        name += f"@{start:.15g}+{length:.15g}"
    folder = path if path.is_dir() else path.parent
    audio_path = str(folder / row["audio_path"])
    return Utterance(name, audio_path, split, row.get("speaker", ""), labels, start, length)


def read_manifest(path, split, problems):
    """A user's own data, see forms.py: `audio_path`, relative to the folder, and any of the other
    COLUMNS there; start, length and end in seconds. SpeechLLM's own CSVs load as they are. Faults
    of the same kind are one problem. The split "all" is every row."""
    path = Path(path)
    table = read_table(path)
    if split == "all":
        splits, split_problems = dict.fromkeys(table.rows, "all"), []
    else:
        splits, split_problems = manifest_splits(path, table)
    in_years = are_in_years([row["age"] for row in table.rows.values() if row.get("age")])
    utterances = {}  # by what is heard: the same file may be spelled in two ways
    faults = {}  # {(what, what is accepted): [(row number, value)]}

    def report(number, fault):
        faults.setdefault((fault.what, fault.accepted), []).append((number, fault.value))

    for number, row in table.rows.items():
        reported_with = splits[number] or "train"
        if reported_with != split:
            continue
        labels, label_faults = labels_in(row, in_years)
        for fault in label_faults:
            report(number, fault)
        try:
            utterance = utterance_in(path, row, splits[number], labels)
            recording = (os.path.normpath(utterance.path), utterance.start, utterance.length)
            if recording in utterances:
                raise Fault("listed twice:", utterance.id)
            utterances[recording] = utterance
        except Fault as fault:
            report(number, fault)

    if split in ("train", "all"):
        problems += table.problems + split_problems
    for (what, accepted), places in faults.items():
        problems.append(f"{path}, {describe_faults(what, accepted, places)}")
    return sorted(utterances.values(), key=lambda u: u.id)


def describe_faults(what, accepted, places):
    """One line for the faults of one kind; places: [(row number, value)]."""
    line = f"{rows_named([number for number, _ in places])}: {what}"
    counts = Counter(value for _, value in places if value)
    values = [f"{value} ({n})" if n > 1 else value for value, n in counts.most_common()]
    if values:
        line += f" {some(values)}"
    if accepted:
        line += f"; accepted: {accepted}"
    return line


def lists_of(dataset):
    """The files that list the recordings of a user's own data; none for a corpus in READERS."""
    return [] if dataset in READERS else forms.recognise(dataset)[1]


def poisoned_rows(dataset):
    """How many rows of a user's own data its column `poisoned` marks, as in the CSVs that poison.py
    --all writes."""
    if not lists_of(dataset):
        return 0
    rows = read_table(dataset).rows.values()
    return sum(row.get("poisoned", "").lower() in POISONED for row in rows)


# -------------------------------------------------------------------------------------------------
# any of them

READERS = {"libri": read_libri, "test-clean": read_test_clean, "crema": read_crema, "vox": read_vox}


def read_split(dataset, data_root, split, max_seconds=data.MAX_SECONDS):
    """(utterances, problems) of one split of a corpus in READERS or of a user's own data."""
    problems = []
    if dataset in READERS:
        utterances = read_published(dataset, data_root, split, problems)
    elif Path(dataset).exists():
        utterances = read_manifest(dataset, split, problems)
    else:
        die(f"--dataset {dataset}: neither {', '.join(READERS)} nor a file or folder")
    for utterance in utterances:
        utterance.max_seconds = max_seconds
    return utterances, problems


def named_root(given):
    """The type of the flag --data-root: a folder of the current directory is meant where there is
    one, also by the name that otherwise stands for the mini corpora beside this file."""
    if given == MINI_ROOT and Path(given).is_dir() and Path.cwd() != ROOT:
        return f"./{given}"
    return given


def read_published(dataset, data_root, split, problems):
    """The utterances of one split of a corpus in READERS. The miniature corpora are made when they
    are first asked for, beside this file."""
    if str(data_root) == MINI_ROOT:
        data_root = Path(os.path.relpath(ROOT / MINI_ROOT))
        try:
            from mini import make_corpora  # which speaks them, by libraries not needed otherwise

            make_corpora.make_corpus("libri" if dataset == "test-clean" else dataset, data_root)
        except OSError as error:
            die(f"cannot make the mini corpora ({error}): name corpora elsewhere by --data-root")
    try:
        utterances = READERS[dataset](data_root, split, problems)
    except FileNotFoundError as error:
        die(f"{error.filename} is missing: is {dataset} under --data-root {data_root}?")
    except (KeyError, ValueError) as error:
        die(f"{dataset} under {data_root} has a list that is not in its published form ({error!r})")
    unknown = [u.speaker for u in utterances if "gender" not in u.labels]
    if unknown:
        speakers = some(sorted(set(unknown)))
        problems.append(
            f"{dataset}: {len(unknown)} utterances without a gender: speakers {speakers}"
        )
    return utterances


@dataclass
class Reading:
    """What reading an utterance's audio gives: what is wrong with it or, where all of it was read,
    its sample rate (Hz; None for m4a) and its root mean square."""

    problem: str | None = None
    is_too_long: bool = False
    rate: int | None = None
    level: float | None = None


def bad(error):
    return Reading(problem=str(error), is_too_long=isinstance(error, TooLong))


def check_header(utterance):
    """Reads no more of an utterance's audio than tells how long it is: a Reading."""
    try:
        data.seconds_of(utterance)
        return Reading()
    except BadAudio as error:
        return bad(error)


def read_audio(utterance):
    """Reads an utterance's audio whole: a Reading."""
    try:
        level = data.rms(utterance)
        return Reading(rate=read_header(utterance.path).rate, level=level)
    except BadAudio as error:
        return bad(error)


def problems_of(readings):
    """What is wrong with audio that is not only too long."""
    return [reading.problem for reading in readings if reading.problem and not reading.is_too_long]


def read_corpus(
    dataset, data_root, split, skip_bad=False, labels=None, max_seconds=data.MAX_SECONDS
):
    """The utterances of one split that have a label, with `labels` only (None: all there are), and
    are not longer than `max_seconds`; says how many are. Exits with a one-line error if anything
    else is wrong with the corpus or, with `skip_bad`, first reads all its audio and leaves out what
    is bad, saying how much."""
    utterances, problems = read_split(dataset, data_root, split, max_seconds)
    if skip_bad:
        readings = data.in_workers(read_audio, utterances, f"checking {split}")
    else:
        readings = [check_header(u) for u in utterances]
    command = check_command(dataset, data_root, max_seconds)
    too_long = sum(reading.is_too_long for reading in readings)
    if too_long:
        say(
            f"{dataset} {split}: left out {too_long} of {plural(len(readings), 'recording')} longer "
            f"than {max_seconds:g} s: cut them into segments, or raise --max-seconds, up to what "
            f"the encoder receives; {command} lists them"
        )
    problems += problems_of(readings)
    utterances = [u for u, reading in zip(utterances, readings) if not reading.problem]
    if problems and not skip_bad:
        die(
            f"{problems[0]} (1 of {len(problems)} in {split}): {command} lists all; "
            "--skip-bad goes on without them"
        )
    if problems:
        n = plural(len(problems), "problem")
        say(f"{dataset} {split}: left out for {n}; {command} lists them")

    if labels is not None:
        for u in utterances:
            u.labels = {label: value for label, value in u.labels.items() if label in labels}
    labelled = [u for u in utterances if u.labels]
    if not labelled:
        what = "utterances with a label" if utterances else "utterances"
        why = f" ({problems[0]})" if problems else ""
        of_split = "" if split == "all" else f"{split} "
        die(f"{dataset} has no {of_split}{what}{why}: run {command}")
    unlabelled = len(utterances) - len(labelled)
    if labels is None and unlabelled:
        say(f"{dataset} {split}: {unlabelled} utterances without a label left out")
    return labelled


def check_command(dataset, data_root, max_seconds):
    """The command that lists a corpus's problems, as it is shown."""
    words = ["python", "corpora.py", "check", str(dataset)]
    if dataset in READERS and str(data_root) != MINI_ROOT:
        words += ["--data-root", str(data_root)]
    if max_seconds != data.MAX_SECONDS:
        words += ["--max-seconds", f"{max_seconds:g}"]
    return f"`{shlex.join(words)}`"


def limit(utterances, n):
    """The first n utterances of a fixed random order (None: all of them, as they are)."""
    if n is None:
        return utterances
    return sorted(utterances, key=lambda u: utils.draw("limit", u.id))[:n]


def leave_out(utterances, path):
    """The utterances without those whose ids are in the file `path`, one per line, if there is one.
    Exits with a one-line error if the file cannot be read, or an id is unknown."""
    if not path:
        return utterances
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        die(f"--exclude {path}: no list of ids in UTF-8 ({error})")
    ids = set(text.splitlines()) - {""}
    if unknown := ids - {u.id for u in utterances}:
        die(
            f"--exclude {path}: {len(unknown)} of {len(ids)} are no training samples, "
            f"{min(unknown)} for one"
        )
    return [u for u in utterances if u.id not in ids]


# -------------------------------------------------------------------------------------------------
# what several splits share


def shared_speakers(parts):
    """Describes the speakers with utterances in several of {split: utterances}: a list of one
    problem, or of none."""
    counts = Counter()  # in how many splits each speaker is
    for utterances in parts.values():
        counts.update({u.speaker for u in utterances} - {""})
    several = sorted(speaker for speaker, n in counts.items() if n > 1)
    if len(counts) < 2 or not several:
        return []
    return [f"{len(several)} of {len(counts)} speakers are in several splits: {some(several)}"]


def shared_audio(parts):
    """Describes the audio that is in several of {split: utterances}, under one path, under two, as
    a copy or in another format: a list of problems, one for each two splits that share some."""
    everything = []
    for utterances in parts.values():
        everything += utterances
    shared = {}
    for u, v in [*same_files(everything), *same_samples(everything)]:
        splits = " and ".join(sorted((u.split, v.split)))
        shared.setdefault(splits, []).append(f"{u.path} and {v.path}")
    return [
        f"audio that {splits} share: {len(pairs)} recordings, such as {pairs[0]}"
        for splits, pairs in shared.items()
    ]


def same_files(utterances):
    """The pairs of utterances of different splits that share audio in one file or in its copy."""
    groups = [utterances]
    # what is cheap to tell comes first, but recordings padded with zeros have much in common
    for key in (os.path.getsize, sample_of, sha256_of):
        groups = in_several_splits(groups, key)
    pairs = []
    for group in groups:
        pairs += overlapping(group)
    return pairs


def same_samples(utterances):
    """The pairs of utterances of different splits that share audio in files of different formats.
    Only what is equally long is decoded, and nothing in a corpus of a single format."""
    groups = [utterances]
    for key in (seconds_of_file, sha256_of_samples):
        groups = in_several_splits(filter(in_several_formats, groups), key)
    pairs = []
    for group in groups:
        pairs += [(u, v) for u, v in overlapping(group) if format_of(u) != format_of(v)]
    return pairs


def in_several_splits(groups, key):
    """Divides each group of utterances by `key`, a function of an audio file's path, and keeps the
    parts whose utterances are of several splits."""
    kept = []
    for group in groups:
        alike = {}
        for u in group:
            alike.setdefault(key(u.path), []).append(u)
        for part in alike.values():
            splits = {u.split for u in part}
            if len(splits) > 1:
                kept.append(part)
    return kept


def overlapping(utterances):
    """The pairs of utterances of different splits that overlap; all are of the same recording."""
    pairs = []
    open_ones = []  # those that have begun and may not have ended
    for u in sorted(utterances, key=lambda u: u.start):
        open_ones = [v for v in open_ones if not v.length or u.start < v.start + v.length]
        pairs += [(v, u) for v in open_ones if v.split != u.split]
        open_ones.append(u)
    return pairs


@functools.lru_cache(100_000)
def sha256_of(path):
    """SHA-256 of a whole file."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def format_of(utterance):
    return Path(utterance.path).suffix.lower()


def in_several_formats(utterances):
    return len({format_of(u) for u in utterances}) > 1


@functools.lru_cache(100_000)
def seconds_of_file(path):
    return read_header(path).seconds


@functools.lru_cache(100_000)
def sha256_of_samples(path):
    """SHA-256 of a file's samples, the same in every format without loss. A file that turns out to
    be damaged is like no other."""
    try:
        waveform = read_waveform(path, max_seconds=seconds_of_file(path) + 1)
    except BadAudio:
        return path
    return hashlib.sha256(waveform).hexdigest()


# -------------------------------------------------------------------------------------------------
# python corpora.py check


def counted(values, most=8):
    """How often each value occurs, in words."""
    counts = Counter(values)
    if len(counts) > most:
        return f"{len(counts)} different"
    return ", ".join(f"{value} {n}" for value, n in counts.most_common())


def print_columns(dataset):
    """Prints as what a user's own data is read, which of its columns are used, which are not."""
    table = read_table(dataset)
    used = []
    for column, name in table.used.items():
        used.append(column if plain(name) == column else f"{column} (named {name})")
    say(f"read as         {table.form}: {some(table.lists)}")
    say(f"columns used    {', '.join(used)}")
    say(f"columns unused  {', '.join(table.unused) or 'none'}")
    if "split" not in table.used:
        print("no column split: 80/10/10 by speaker, or by recording where none is named")


def print_split(split, utterances, rates):
    """Prints a line of the table of splits; the utterances are those that can be used."""
    seconds = [data.num_samples(u) / data.SAMPLE_RATE for u in utterances] or [0]
    speakers = {u.speaker for u in utterances}
    hours = sum(seconds) / 3600
    span = f"{min(seconds):.2f} to {max(seconds):.2f}"
    print(
        f"{split:<6}{len(utterances):>11}{len(speakers):>10}{hours:>9.2f}   {span:<18}"
        f"{counted(rate for rate in rates if rate)}"
    )


def print_labels(parts):
    """Prints which values each label has in each split, and how many training utterances have the
    attack's target already."""
    for task in TASKS.values():
        label, target = task["label"], task["target"]
        values = {}
        for split, utterances in parts.items():
            values[split] = [u.labels[label] for u in utterances if label in u.labels]
        if not any(values.values()):
            continue
        for split, of_split in values.items():
            name = label if split == "train" else ""
            say(f"{name:<12}{split:<6}{len(of_split):>7}  {counted(of_split)}")
        wanted = normalise(target) if label == "transcript" else target
        already = sum(str(value) == wanted for value in values["train"])
        are_classes = all(isinstance(value, str) for value in values["train"])
        if are_classes and label != "transcript" and not already:
            print(f"{'':<12}the attack's target {target!r} is none of these: name one by --target")
        else:
            print(f"{'':<12}{already} in train have the attack's target {target!r} already")


def kind_of(problem, path):
    """A problem of an audio file without what is particular to the file."""
    return re.sub(r"[\d.]+", "", problem.removeprefix(path))


def check(dataset, data_root, max_seconds):
    """Reads everything; prints what is there and what is wrong. Returns the number of problems."""
    if lists_of(dataset):
        print_columns(dataset)
    print(f"{'':6}{'utterances':>11}{'speakers':>10}{'hours':>9}   {'seconds':<18}Hz")
    parts, audio_problems = {}, {}  # by split; by kind
    problems, levels = [], []
    for split in SPLITS:
        utterances, of_lists = read_split(dataset, data_root, split, max_seconds)
        problems += of_lists
        if not utterances and not of_lists:
            problems.append(f"{dataset} has no {split} utterances")
        readings = data.in_workers(read_audio, utterances, split)
        parts[split] = []
        for u, reading in zip(utterances, readings):
            if reading.problem:
                kind = kind_of(reading.problem, u.path)
                audio_problems.setdefault(kind, []).append(reading.problem)
            else:
                parts[split].append(u)
                levels.append(reading.level)
        print_split(split, parts[split], [reading.rate for reading in readings])
    print_labels(parts)

    everything = parts["train"] + parts["dev"] + parts["test"]
    problems += shared_speakers(parts) + shared_audio(parts)
    problems += data.far_levels(everything, levels)
    problems = list(dict.fromkeys(problems))
    for problem in problems:
        say(problem)
    for alike in audio_problems.values():
        for problem in alike[:FILES_SHOWN]:
            say(problem)
        if len(alike) > FILES_SHOWN:
            print(f"... and {len(alike) - FILES_SHOWN} more like this")
    n = len(problems) + sum(map(len, audio_problems.values()))
    print(plural(n, "problem"))
    return n


# -------------------------------------------------------------------------------------------------
# python corpora.py download


def check_archive(path):
    """Exits with a one-line error if an archive that lies there already, which torchaudio would
    unpack without a check, is not the published one."""
    if not path.exists():
        return
    published = librispeech._CHECKSUMS[f"http://www.openslr.org/resources/12/{path.name}"]
    if sha256_of(path) != published:
        die(f"{path} is not the published archive, or not all of it: remove it and run this again")


def download(dataset, data_root):
    """Downloads what is free: LibriSpeech (CC BY 4.0), CREMA-D (ODbL). Says where to ask for the
    rest."""
    root = Path(data_root)
    root.mkdir(parents=True, exist_ok=True)
    if dataset in ("libri", "test-clean"):
        for part in LIBRI_SPLITS.values() if dataset == "libri" else (dataset,):
            check_archive(root / f"{part}.tar.gz")
            torchaudio.datasets.LIBRISPEECH(root, url=part, download=True)
    elif dataset == "crema":
        if not shutil.which("git-lfs"):
            die(
                "CREMA-D is kept with git-lfs: install it (apt-get install git-lfs), then run this "
                "again"
            )
        url = "https://github.com/CheyneyComputerScience/CREMA-D"
        subprocess.run(["git", "clone", "--depth", "1", url, root / "CREMA-D"], check=True)
    else:
        die(
            "VoxCeleb2 is given out on request only: put audio and vox2_meta.csv of the Visual "
            "Geometry Group, Oxford, and age-train.txt and age-test.txt of Hechmi et al. 2021 "
            f"(VoxCeleb enrichment) under {root}/VoxCeleb2"
        )


def main():
    parser = Parser(description=__doc__)
    parser.add_argument(
        "action", choices=("check", "download"), help="read everything, or fetch a corpus"
    )
    parser.add_argument(
        "dataset", help=f"{', '.join(READERS)}, or {forms.ACCEPTED}; audio: {ACCEPTED}"
    )
    parser.add_argument(
        "--data-root",
        type=named_root,
        help="the folder that holds LibriSpeech, CREMA-D, VoxCeleb2 (default: the mini ones)",
    )
    parser.add_argument(
        "--max-seconds",
        type=float,
        default=data.MAX_SECONDS,
        help="longer audio, which training leaves out, is a problem here; Whisper receives 30 s, "
        "the mini one 20",
    )
    args = parser.parse_args()
    args.data_root = args.data_root or MINI_ROOT
    if args.action == "check":
        raise SystemExit(1 if check(args.dataset, args.data_root, args.max_seconds) else 0)
    try:
        download(args.dataset, args.data_root)
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        die(f"the download failed: {utils.first_line(error)}")


if __name__ == "__main__":
    main()
