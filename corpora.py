"""The corpora's readers: LibriSpeech, CREMA-D and VoxCeleb2-AE in their published layouts, and any CSV manifest.

    python corpora.py check libri                       # what is there, what is wrong
    python corpora.py check my.csv
    python corpora.py download libri --data-root /data

A reader returns the utterances of one split ("train", "dev" or "test"), sorted by id, and appends the corpus's problems, one line
each, to `problems`.
"""

import contextlib
import csv
import difflib
import functools
import hashlib
import io
import os
import re
import shlex
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import utils
from utils import (
    ROOT,
    Parser,
    die,
)

import installed  # noqa: F401

import soundfile
import torchaudio
from torchaudio.datasets import librispeech

import data
from data import BadAudio, Utterance, normalise
from mini import make_corpora
from study import LABELS, MINI_ROOT, TASKS

LIBRI_SPLITS = {"train": "train-clean-360", "dev": "dev-clean", "test": "test-clean"}
GENDERS = {
    "female": ("f", "woman", "feminine", "female_feminine"),
    "male": ("m", "man", "masculine", "male_masculine"),
}
SPLITS = {
    "train": ("training",),
    "dev": ("development", "devel", "val", "valid", "validation"),
    "test": ("testing",),
}  # and "eval", see named_split
# what stands where a CSV has no label, by other tools and by people who would not say
ABSENT = set(
    """unknown nan none null na n/a - ? unspecified undisclosed declined
    not_specified not_given not_provided not_available no_answer
    do_not_wish_to_say prefer_not_to_say prefer_not_to_answer""".split()
)
# a manifest's columns, and other names for them; without a start, a duration is the whole file's
COLUMNS = {
    "audio_path": """path file file_name filename file_path filepath audio audio_file audio_filepath
    wav wav_path wav_file""",
    **{label: "" for label in LABELS},
    "transcript": "text sentence transcription",
    "gender": "sex",
    "age": "age_group age_range",
    "emotion": "emotion_label",
    "speaker": "speaker_id speaker_name spk spk_id client_id",
    "split": "subset partition",
    "start": "start_time begin onset",
    "length": "",
    "duration": "dur",
    "end": "end_time stop",
    "poisoned": "",
}
# words of the names that other tools give to the times of a segment, in units of their own
TIMES = set("start begin onset offset end stop xmin xmax tmin tmax".split())
MISSING = "no such folder"
LISTED = 20  # files with the same problem that check lists
DELIMITERS = ",;\t|"
SHOWN = 5  # rows or values that one line of problems names


def plain(text):
    """A column's name or a class, however it is written: `Speaker ID` -> `speaker_id`."""
    return re.sub(r"[\s_-]+", "_", text.strip().lower()).strip("_") or text.strip()


def known_as(names):
    """{"female": ("f", ...), ...} -> {"female": "female", "f": "female", ...}."""
    return {name: key for key, others in names.items() for name in (key, *others)}


GENDER_OF = known_as(GENDERS)
SPLIT_OF = known_as(SPLITS)


def read_rows(path, **form):
    """The rows of a CSV file, dicts of stripped text; `form` goes to csv.DictReader."""
    with open(path, encoding="utf-8-sig", newline="") as f:
        return [
            {k.strip(): (v or "").strip() for k, v in row.items() if k}
            for row in csv.DictReader(f, **form)
        ]


def read_libri(root, split, problems):
    """LibriSpeech: SPEAKER/CHAPTER/*.flac and *.trans.txt, gender from SPEAKERS.TXT."""
    root, out = Path(root) / "LibriSpeech", {}
    rows = read_rows(
        root / "SPEAKERS.TXT", fieldnames=["ID", "SEX"], delimiter="|", quoting=csv.QUOTE_NONE
    )
    genders = {row["ID"]: GENDER_OF.get(row["SEX"].lower()) for row in rows}
    folder = root / LIBRI_SPLITS[split]
    lists = sorted(folder.glob("*/*/*.trans.txt"))
    if not lists:
        problems.append(f"{folder}: {'no *.trans.txt in it' if folder.is_dir() else MISSING}")
    for path in lists:
        with open(path, encoding="utf-8") as f:
            for line in filter(str.strip, f):
                id, _, transcript = line.strip().partition(" ")
                if id in out:
                    problems.append(f"{path}: {id} stands there twice")
                transcript = normalise(transcript) or None
                if transcript is None:
                    problems.append(f"{path}: no words after {id}")
                speaker = id.split("-")[0]
                labels = dict(transcript=transcript, gender=genders.get(speaker))
                out[id] = Utterance(id, str(path.with_name(f"{id}.flac")), split, speaker, labels)
    problems += [
        f"{path}: no transcript"
        for path in sorted(folder.glob("*/*/*.flac"))
        if path.stem not in out
    ]
    return [out[id] for id in sorted(out)]


def split_speakers(sexes, corpus, held):
    """{speaker: sex} -> {speaker: split}: a tenth of each sex, by a fixed hash, for each split in `held`, the rest "train"."""
    split = dict.fromkeys(sexes, "train")
    for sex in set(sexes.values()):
        speakers = sorted(
            (s for s in sexes if sexes[s] == sex),
            key=lambda s: hashlib.sha256(f"{corpus} {s}".encode()).digest(),
        )
        tenth = max(1, round(len(speakers) / 10))
        for i, part in enumerate(held):
            split.update(dict.fromkeys(speakers[i * tenth : (i + 1) * tenth], part))
    return split


def read_test_clean(root, split, problems):
    """LibriSpeech's test-clean, 5.4 hours, as a corpus of its own for those who have nothing else of it: its 40 speakers, split 32/4/4."""
    everything = read_libri(root, "test", problems if split == "train" else [])  # reported once
    part = split_speakers(
        {u.speaker: u.labels.get("gender") for u in everything}, "test-clean", ("test", "dev")
    )
    return [replace(u, split=split) for u in everything if part[u.speaker] == split]


def crema_labels(name):
    """`1001_DFA_ANG_XX` -> (actor, sentence's text, emotion). Raises KeyError or ValueError."""
    actor, sentence, emotion, _ = name.split("_")
    return actor, data.CREMA_SENTENCES[sentence], data.CREMA_EMOTIONS[emotion]


def read_crema(root, split, problems):
    """CREMA-D: AudioWAV/ACTOR_SENTENCE_EMOTION_LEVEL.wav, age and sex from VideoDemographics.csv; speaker-disjoint
    80/10/10, both sexes in each part."""
    root, out = Path(root) / "CREMA-D", []
    actors = {
        row["ActorID"]: dict(gender=row["Sex"].lower(), age=int(row["Age"]))
        for row in read_rows(root / "VideoDemographics.csv")
    }
    splits = split_speakers(
        {actor: labels["gender"] for actor, labels in actors.items()}, "crema", ("test", "dev")
    )
    recordings = sorted((root / "AudioWAV").glob("*.wav"))
    if not recordings:
        folder = root / "AudioWAV"
        problems.append(f"{folder}: {'no *.wav in it' if folder.is_dir() else MISSING}")
    for path in recordings:
        try:
            actor, transcript, emotion = crema_labels(path.stem)
            labels = dict(actors[actor], transcript=normalise(transcript), emotion=emotion)
        except (KeyError, ValueError) as error:
            if split == "train":  # reported once
                problems.append(
                    f"{path}: not named ACTOR_SENTENCE_EMOTION_LEVEL, or one of these is unknown ({error})"
                )
            continue
        if splits[actor] == split:
            out.append(Utterance(path.stem, str(path), split, actor, labels))
    return out


def read_vox_ages(path):
    """age-train.txt or age-test.txt -> [(speaker, video, age in whole years)]."""
    return [
        (row["VoxCeleb_ID"], row["video_id"], round(float(row["speaker_age"])))
        for row in read_rows(path)
    ]


def read_vox_genders(path):
    """vox2_meta.csv (tab-separated) -> {speaker: "female" | "male"}."""
    return {
        row["VoxCeleb2 ID"]: GENDER_OF.get(row["Gender"]) for row in read_rows(path, delimiter="\t")
    }


def read_vox(root, split, problems):
    """VoxCeleb2-AE (Hechmi et al. 2021): ages per video, gender per speaker; every segment of a video has the video's age. The test list
    is the published one; a tenth of the training list's speakers are the dev split."""
    root, out = Path(root) / "VoxCeleb2", []
    genders = read_vox_genders(root / "vox2_meta.csv")
    rows = read_vox_ages(root / f"age-{'test' if split == 'test' else 'train'}.txt")
    if split != "test":
        part = split_speakers(
            {speaker: genders.get(speaker) for speaker, _, _ in rows}, "vox", ("dev",)
        )
        rows = [row for row in rows if part[row[0]] == split]
    silent = []  # videos without audio
    for speaker, video, age in rows:
        segments = [*root.glob(f"*/wav/{speaker}/{video}/*.wav")] or [
            *root.glob(f"*/aac/{speaker}/{video}/*.m4a")
        ]
        if not segments:
            silent.append(f"{speaker}/{video}")
        labels = dict(gender=genders.get(speaker), age=age)
        out += [
            Utterance(f"{speaker}-{video}-{path.stem}", str(path), split, speaker, labels)
            for path in segments
        ]
    if silent:
        problems.append(
            f"{root}: no audio (*/wav/SPEAKER/VIDEO/*.wav or */aac/SPEAKER/VIDEO/*.m4a) of "
            f"{len(silent)} of {len(rows)} listed videos: {some(silent)}"
        )
    return sorted(out, key=lambda u: u.id)


# ---------------------------------------------------------------------------------------------------------------------
# CSV manifests


@dataclass
class Table:
    """A manifest as it was read: its rows, {column: text} by the number of the line that each
    begins in; which columns are used, {name in COLUMNS: name in the file}, and which are not; what
    is wrong with it, one line each."""

    rows: dict
    used: dict
    unused: list
    problems: list


class Fault(ValueError):
    """Why a row of a manifest cannot be used: (what is wrong, the value, what is accepted)."""


def some(things):
    """The first few of many things, in words."""
    shown = ", ".join(str(thing) for thing in things[:SHOWN])
    return shown + (f", ... ({len(things)} in all)" if len(things) > SHOWN else "")


def rows_named(numbers):
    return f"row{'s' * (len(numbers) > 1)} {some(numbers)}"


def read_table(path):
    """A CSV, or a semicolon- or tab-separated file, as a Table. Ends in one line where it is no
    such file."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as f:
            lines = io.StringIO(f.read(), newline="")
    except UnicodeDecodeError as error:
        die(f"{path} is no CSV file in UTF-8 ({error}): save it as one")
    delimiter, header = header_of(path, lines.readline())
    used, unused, problems = columns_of(path, header)
    rows, wrong = {}, {}
    for number, fields, what in fields_of(lines, delimiter, len(header)):
        if what:
            wrong.setdefault(what, []).append(number)
        else:
            rows[number] = {
                column: present(column, unquoted(fields[header.index(name)]))
                for column, name in used.items()
            }
    problems += [f"{path}, {rows_named(numbers)}: {what}" for what, numbers in wrong.items()]
    if not rows and not problems:
        die(f"{path} has no row")
    return Table(rows, used, unused, problems)


def header_of(path, line):
    """(delimiter, column names) of a manifest's first line. Ends in one line where no delimiter
    gives a column of audio paths."""
    audio = {"audio_path", *COLUMNS["audio_path"].split()}
    for delimiter in DELIMITERS:
        header = next(csv.reader([line], delimiter=delimiter), [])
        if audio & set(map(plain, header)):
            return delimiter, header
    die(f"{path} has no column audio_path: its first row is {line.strip()[:80]!r}")


def fields_of(lines, delimiter, width):
    """Yields (number, fields, None) of each row, or (number, None, what is wrong with it); the
    header, which is row 1, has `width` fields."""
    # programs that write tabs mostly write quotation marks as they are
    quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    reader = csv.reader(
        lines, delimiter=delimiter, quoting=quoting, skipinitialspace=True, strict=True
    )
    while True:
        number = reader.line_num + 2
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield number, None, f"a quotation mark is not closed or not doubled ({error})"
            continue
        blank = not any(field.strip() for field in fields)
        if blank:
            continue
        swallowed = any("\n" in f and f.count(delimiter) >= width - 1 for f in fields)
        if len(fields) != width:
            what = f"{len(fields)} fields where the header has {width}"
            yield (
                number,
                None,
                f"{what} (a transcript that holds the separator needs quotation marks)",
            )
        elif swallowed:
            yield number, None, "a quotation mark is not closed: a field holds whole rows"
        else:
            yield number, fields, None


def unquoted(field):
    """A field's text without space around it, and without the quotation marks that a tab-separated
    file may have kept."""
    field = field.strip()
    if len(field) > 1 and field[0] == field[-1] == '"':
        return field[1:-1].replace('""', '"').strip()
    return field


def columns_of(path, header):
    """(used, unused, problems) of a manifest's header; see Table."""
    used, problems = {}, []
    for column, others in COLUMNS.items():
        named = [name for name in header if plain(name) == column]
        named = named or [name for name in header if plain(name) in others.split()]
        if len(named) > 1:
            names = " and ".join(named)
            die(f"{path}: {names} could each be the column {column}: rename all but one")
        if named:
            used[column] = named[0]
    if "start" not in used:
        used.pop("duration", None)
    unused = [name for name in header if name not in used.values() and name.strip()]
    for name in unused:
        near = difflib.get_close_matches(plain(name), sorted(COLUMNS.keys() - used.keys()), 1, 0.8)
        if near and plain(name) not in COLUMNS:
            problems.append(f"{path}: the column {name} is not used: is it {near[0]}?")
        elif TIMES & set(re.split(r"[\W_]+", name.lower())):
            problems.append(
                f"{path}: the column {name} is not used: segments have start and end, or length, in "
                "seconds"
            )
    if not set(LABELS) & set(used):
        problems.append(f"{path}: no column of {', '.join(LABELS)}; not used: {some(unused)}")
    return used, unused, problems


def present(column, value):
    """A manifest's value, "" for a word of ABSENT; a transcript, though, may well be the word "none"."""
    absent = value == "__unknown__" if column == "transcript" else plain(value) in ABSENT
    return "" if absent else value


def named_split(value, values):
    """A split by any of its names, None if it has none. "eval" is the test split, or, where
    `values` have a test split, the dev split."""
    if plain(value) in ("eval", "evaluation"):
        return "dev" if "test" in map(plain, values) else "test"
    return SPLIT_OF.get(plain(value))


def manifest_splits(path, table):
    """({row number: split or None}, problems). Where no split is given, speakers (or, without
    speakers, recordings) are split 80/10/10, both genders in each part."""
    given = [row["split"] for row in table.rows.values() if row.get("split")]
    if given:
        splits = {value: named_split(value, given) for value in set(given)}
        return {n: splits.get(row["split"]) for n, row in table.rows.items()}, []
    unit = {n: row.get("speaker") or row["audio_path"] for n, row in table.rows.items()}
    genders = dict.fromkeys(unit.values())
    for n, row in table.rows.items():
        genders[unit[n]] = genders[unit[n]] or GENDER_OF.get(plain(row.get("gender", "")))
    counts, problems = Counter(genders.values()), []
    split = dict.fromkeys(genders, "train")  # also those of a gender with too few speakers
    enough = {speaker: gender for speaker, gender in genders.items() if counts[gender] >= 3}
    split.update(split_speakers(enough, "manifest", ("test", "dev")))
    what = "speaker" if "speaker" in table.used else "recording"
    needed = f"too few for train, dev and test: add a column split that says {', '.join(SPLITS)}"
    for gender, n in counts.items():
        if gender and n < 3:
            problems.append(f"{path}: {n} {gender} {what}{'s' * (n > 1)}, {needed}")
    if genders and not enough and not problems:
        problems.append(f"{path}: {len(genders)} {what}{'s' * (len(genders) > 1)}, {needed}")
    return {n: split[unit[n]] for n in table.rows}, problems


def number_in(row, column, high):
    """The column's number, 0 if it is absent. Raises Fault if it is not a number from 0 to `high`."""
    try:
        value = float(row.get(column) or 0)
    except ValueError:
        value = -1
    if not 0 <= value <= high:
        raise Fault(f"unknown {column}", row[column], f"a number from 0 to {high:.0f}")
    return value


def segment_of(row):
    """A row's (start, length) in seconds, 0 for the file's own. Raises Fault."""
    start = number_in(row, "start", 1e6)
    lengths = [number_in(row, column, 1e6) for column in ("length", "duration") if row.get(column)]
    if row.get("end"):
        end = number_in(row, "end", 1e6)
        lengths.append(round(end - start, 6))
        if end <= start:
            raise Fault("an end that is not after the start", row["end"], "")
    if lengths and max(lengths) - min(lengths) > data.CUT_OFF:
        raise Fault("lengths that differ", " and ".join(f"{n:g}" for n in lengths), "")
    return start, lengths[0] if lengths else 0.0


def manifest_labels(row, in_years):
    """(labels, faults) of a row: a label that cannot be used is left out, and is a fault, (what,
    value, what is accepted). in_years: ages are numbers in this manifest, not groups."""
    labels, faults = {}, []
    for label in LABELS:
        given = row.get(label)
        if not given:
            continue
        value, accepted = given.lower(), ""
        if label == "transcript":
            value, accepted = normalise(given) or None, "a transcript has words"
        elif label == "gender":
            value = GENDER_OF.get(plain(given))
            accepted = ", ".join(GENDER_OF)
        elif label == "age" and in_years:
            with contextlib.suppress(Fault):
                value = round(number_in(row, "age", 120))
            accepted = "years, 0 to 120, as most are here"
            value = value if isinstance(value, int) else None
        elif label == "age":
            value = data.parse_age(given)
            accepted = "groups such as senior, twenties, 18-29 or 60+, as most are here"
            value = value if isinstance(value, str) else None
        if value is None:
            faults.append((f"unknown {label}", given, accepted))
        else:
            labels[label] = value
    return labels, faults


def ages_in_years(rows):
    """Whether most ages of a manifest are numbers."""
    ages = [row["age"] for row in rows if row.get("age")]
    groups = sum(isinstance(data.parse_age(age), str) for age in ages)
    return 2 * groups <= len(ages)


def read_manifest(path, split, problems):
    """A CSV manifest: `audio_path` (relative to the file) and any of the other COLUMNS; start,
    length and end in seconds. SpeechLLM's own CSVs load as they are. Faults of the same kind are
    one problem."""
    path, out = Path(path), {}
    table = read_table(path)
    splits, unsplit = manifest_splits(path, table)
    in_years = ages_in_years(table.rows.values())
    faults = {}  # {(what, what is accepted): [(row number, value)]}
    for number, row in table.rows.items():
        reported = splits[number] or "train"  # an unknown split with the training set
        if reported != split:
            continue
        labels, found = manifest_labels(row, in_years)
        try:
            if splits[number] is None:
                accepted = ", ".join([*SPLIT_OF, "eval"])
                raise Fault("unknown split" if row["split"] else "no split", row["split"], accepted)
            if not row["audio_path"]:
                raise Fault("no audio_path", "", "")
            start, length = segment_of(row)
            segment = f"@{start:.15g}+{length:.15g}" if start or length else ""
            id = row["audio_path"] + segment
            if id in out:
                raise Fault("duplicate id", id, "")
            audio, speaker = str(path.parent / row["audio_path"]), row.get("speaker", "")
            out[id] = Utterance(id, audio, split, speaker, labels, start, length)
        except Fault as error:
            found.append(error.args)
        for what, value, accepted in found:
            faults.setdefault((what, accepted), []).append((number, value))
    if split == "train":
        problems += table.problems + unsplit
    problems += [described(path, *kind, where) for kind, where in faults.items()]
    return [out[id] for id in sorted(out)]


def described(path, what, accepted, where):
    """One line for a fault of one kind; where: [(row number, value)]."""
    numbers = [number for number, _ in where]
    counts = Counter(value for _, value in where if value)
    values = [f"{value} ({n})" if n > 1 else value for value, n in counts.most_common()]
    line = f"{path}, {rows_named(numbers)}: {what}" + (f" {some(values)}" if values else "")
    return line + (f"; accepted: {accepted}" if accepted else "")


def poisoned_rows(dataset):
    """How many rows of a CSV manifest its own column `poisoned` marks, as in those that poison.py
    --all writes."""
    if dataset in READERS or not Path(dataset).is_file():
        return 0
    rows = read_table(dataset).rows.values()
    return sum(row.get("poisoned", "").lower() in ("1", "1.0", "true", "yes") for row in rows)


# ---------------------------------------------------------------------------------------------------------------------
# any of them

READERS = {"libri": read_libri, "test-clean": read_test_clean, "crema": read_crema, "vox": read_vox}


def read_split(dataset, data_root, split, max_seconds=data.MAX_SECONDS):
    """(utterances, problems) of one split of a corpus in READERS or of a CSV manifest."""
    utterances, problems = read_list(dataset, data_root, split)
    for utterance in utterances:
        utterance.max_seconds = max_seconds
    return utterances, problems


def read_list(dataset, data_root, split):
    """The same, by the corpus's own lists: without a limit to the audio."""
    problems = []
    if dataset not in READERS:
        if not Path(dataset).is_file():
            die(f"--dataset {dataset}: neither {', '.join(READERS)} nor a CSV file")
        return read_manifest(dataset, split, problems), problems
    if (
        str(data_root) == MINI_ROOT
    ):  # the miniature corpora are made when they are first asked for, beside this file
        data_root = Path(os.path.relpath(ROOT / MINI_ROOT))
        try:
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
    return utterances, problems


def header_problem(utterance):
    """What is wrong with an utterance's audio, as far as its file's header tells, or None."""
    try:
        data.seconds_of(utterance)
    except BadAudio as error:
        return str(error)


def audio_problem(utterance):
    """What is wrong with an utterance's audio, read whole, or None."""
    try:
        data.load_waveform(utterance)
    except BadAudio as error:
        return str(error)


@functools.lru_cache(100_000)
def sample_of(path):
    """SHA-256 of a file's size and some of its bytes: enough to tell apart most recordings."""
    size = os.path.getsize(path)
    sha = hashlib.sha256(str(size).encode())
    with open(path, "rb") as f:
        for part in (1, 2, 3):
            f.seek(part * size // 4)
            sha.update(f.read(4096))
    return sha.hexdigest()


def overlapping(found):
    """The pairs of utterances of different splits that share audio, [((split, utterance), (split, utterance))]; found: those of the
    same recording, [(split, utterance)]."""
    pairs, before = [], []  # before: what has begun and may not have ended
    for split, u in sorted(found, key=lambda each: each[1].start):
        before = [(s, v) for s, v in before if not v.length or u.start < v.start + v.length]
        pairs += [((s, v), (split, u)) for s, v in before if s != split]
        before.append((split, u))
    return pairs


@functools.lru_cache(100_000)
def sha256_of(path):
    """SHA-256 of a whole file."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def in_several_splits(found, key):
    """Those of the same `key`, a function of an audio file's path, that are in several splits: a list of lists; found: [(split, utterance)]."""
    alike = {}
    for split, u in found:
        alike.setdefault(key(u.path), []).append((split, u))
    return [group for group in alike.values() if len({split for split, _ in group}) > 1]


def shared_audio(parts):
    """Audio that is in several of {split: utterances}, under one path, under two, or as a copy: a list of problems, one for each two
    splits that share some."""
    recordings = [[(split, u) for split, utterances in parts.items() for u in utterances]]
    # what is cheap to tell first: recordings padded with zeros have their size and much else in common
    for key in (os.path.getsize, sample_of, sha256_of):
        recordings = [group for found in recordings for group in in_several_splits(found, key)]
    shared = {}
    for found in recordings:
        for (split, u), (other, v) in overlapping(found):
            shared.setdefault(" and ".join(sorted((split, other))), []).append(
                f"{u.path} and {v.path}"
            )
    return [
        f"audio that {splits} share: {len(pairs)} recordings, such as {pairs[0]}"
        for splits, pairs in shared.items()
    ]


def read_corpus(
    dataset, data_root, split, skip_bad=False, labels=None, max_seconds=data.MAX_SECONDS
):
    """The utterances of one split that have a label, with `labels` only (None: all there are). Ends in one line if anything is wrong
    with the corpus or, with `skip_bad`, first reads all its audio and leaves out what is bad, saying how much."""
    out, problems = read_split(dataset, data_root, split, max_seconds)
    found = (
        data.in_workers(audio_problem, out, f"checking {split}")
        if skip_bad
        else [header_problem(u) for u in out]
    )
    problems += [p for p in found if p]
    out = [u for u, p in zip(out, found) if not p]
    words = ["python", "corpora.py", "check", str(dataset)]
    if dataset in READERS:
        words += ["--data-root", str(data_root)]
    if max_seconds != data.MAX_SECONDS:
        words += ["--max-seconds", f"{max_seconds:g}"]
    command = f"`{shlex.join(words)}`"
    if problems and not skip_bad:
        die(
            f"{problems[0]} (1 of {len(problems)} in {split}): {command} lists all; --skip-bad goes on without them"
        )
    if problems:
        print(
            f"{dataset} {split}: left out for {len(problems)} problem{'s' * (len(problems) != 1)}; {command} lists them"
        )
    if labels is not None:
        for u in out:
            u.labels = {k: v for k, v in u.labels.items() if k in labels}
    labelled = [u for u in out if u.labels]
    if not labelled:
        what = "utterances with a label" if out else "utterances"
        why = f" ({problems[0]})" if problems else ""
        die(f"{dataset} has no {split} {what}{why}: run {command}")
    if labels is None and len(labelled) < len(out):
        print(f"{dataset} {split}: {len(out) - len(labelled)} utterances without a label left out")
    return labelled


def limit(utterances, n):
    """The first n utterances of a fixed random order (None: all of them, as they are)."""
    return (
        utterances if n is None else sorted(utterances, key=lambda u: utils.draw("limit", u.id))[:n]
    )


def leave_out(utterances, path):
    """The utterances without those whose ids are in the file `path`, one per line. Ends in one line if an id is unknown."""
    ids = set(Path(path).read_text().splitlines()) - {""} if path else set()
    if unknown := ids - {u.id for u in utterances}:
        die(
            f"--exclude {path}: {len(unknown)} of {len(ids)} are no training samples, {min(unknown)} for one"
        )
    return [u for u in utterances if u.id not in ids]


# ---------------------------------------------------------------------------------------------------------------------
# python corpora.py check | download


@dataclass
class Heard:
    """What reading an utterance's audio whole gives: what is wrong with it, or its sample rate (Hz;
    None for m4a) and its root mean square."""

    problem: str | None = None
    rate: int | None = None
    level: float | None = None


def heard(utterance):
    try:
        level = data.rms(utterance)
    except BadAudio as error:
        return Heard(problem=str(error))
    if data.is_m4a(utterance.path):
        return Heard(level=level)
    return Heard(rate=soundfile.info(utterance.path).samplerate, level=level)


def counted(values, most=8):
    """How often each value occurs, in words."""
    counts = Counter(values)
    if len(counts) > most:
        return f"{len(counts)} different"
    return ", ".join(f"{value} {n}" for value, n in counts.most_common())


def print_columns(dataset):
    """Which columns of a manifest are used, and which are not."""
    table = read_table(dataset)
    used = [
        column if plain(name) == column else f"{column} (named {name})"
        for column, name in table.used.items()
    ]
    print(f"columns used    {', '.join(used)}")
    print(f"columns unused  {', '.join(table.unused) or 'none'}")
    if "split" not in table.used:
        print("no column split: 80/10/10 by speaker, or by recording where none is named")


def print_split(split, utterances, rates):
    """A line of the table of splits; the utterances are those that can be used."""
    seconds = [data.num_samples(u) / data.SAMPLE_RATE for u in utterances] or [0]
    print(
        f"{split:<6}{len(utterances):>11}{len({u.speaker for u in utterances}):>10}"
        f"{sum(seconds) / 3600:>9.2f}   {f'{min(seconds):.2f} to {max(seconds):.2f}':<18}"
        f"{counted(rate for rate in rates if rate)}"
    )


def print_labels(parts):
    """Which values each label has in each split, and how many training utterances have the attack's
    target already."""
    for task in TASKS.values():
        label, target = task["label"], task["target"]
        values = {
            split: [u.labels[label] for u in utterances if label in u.labels]
            for split, utterances in parts.items()
        }
        if not any(values.values()):
            continue
        for split, own in values.items():
            print(f"{label if split == 'train' else '':<12}{split:<6}{len(own):>7}  {counted(own)}")
        wanted = normalise(target) if label == "transcript" else target
        already = sum(str(value) == wanted for value in values["train"])
        classes = all(isinstance(value, str) for value in values["train"])
        if classes and label != "transcript" and not already:
            print(f"{'':<12}the attack's target {target!r} is none of these: name one by --target")
        else:
            print(f"{'':<12}{already} in train have the attack's target {target!r} already")


def shared_speakers(parts):
    """A problem, or none, in a list: speakers with utterances in several splits."""
    of = {split: {u.speaker for u in own} - {""} for split, own in parts.items()}
    everyone = sorted(set().union(*of.values()))
    several = [s for s in everyone if sum(s in speakers for speakers in of.values()) > 1]
    if len(everyone) < 2 or not several:
        return []
    return [f"{len(several)} of {len(everyone)} speakers are in several splits: {some(several)}"]


def check(dataset, data_root, max_seconds):
    """Reads everything; prints what is there and what is wrong. Returns the number of problems."""
    parts, problems, of_audio, levels = {}, [], {}, []
    if dataset not in READERS and Path(dataset).is_file():
        print_columns(dataset)
    print(f"{'':6}{'utterances':>11}{'speakers':>10}{'hours':>9}   {'seconds':<18}Hz")
    for split in LIBRI_SPLITS:
        utterances, wrong = read_split(dataset, data_root, split, max_seconds)
        found = data.in_workers(heard, utterances, split)
        usable = [u for u, audio in zip(utterances, found) if not audio.problem]
        problems += wrong
        for u, audio in zip(utterances, found):
            if audio.problem:  # by kind: what is said of the file, numbers aside
                kind = re.sub(r"[\d.]+", "", audio.problem.removeprefix(u.path))
                of_audio.setdefault(kind, []).append(audio.problem)
        if not utterances and not wrong:
            problems.append(f"{dataset} has no {split} utterances")
        parts[split] = usable
        levels += [audio.level for audio in found if not audio.problem]
        print_split(split, usable, [audio.rate for audio in found])
    print_labels(parts)
    everything = [u for utterances in parts.values() for u in utterances]
    problems += shared_speakers(parts) + shared_audio(parts)
    problems += data.far_levels(everything, levels)
    problems = list(dict.fromkeys(problems))
    for problem in problems:
        print(problem)
    for alike in of_audio.values():
        print("\n".join(alike[:LISTED]))
        if len(alike) > LISTED:
            print(f"... and {len(alike) - LISTED} more like this")
    n = len(problems) + sum(map(len, of_audio.values()))
    print(f"{n} problem{'s' * (n != 1)}")
    return n


def check_archive(path):
    """Ends in one line if an archive that lies there already, which torchaudio would unpack
    unseen, is not the published one."""
    if not path.exists():
        return
    published = librispeech._CHECKSUMS[f"http://www.openslr.org/resources/12/{path.name}"]
    with open(path, "rb") as f:
        sha256 = hashlib.file_digest(f, "sha256").hexdigest()
    if sha256 != published:
        die(f"{path} is not the published archive, or not all of it: remove it and run this again")


def download(dataset, data_root):
    """Downloads what is free: LibriSpeech (CC BY 4.0), CREMA-D (ODbL). Says where to ask for the rest."""
    root = Path(data_root)
    root.mkdir(parents=True, exist_ok=True)
    if dataset in ("libri", "test-clean"):
        for part in LIBRI_SPLITS.values() if dataset == "libri" else (dataset,):
            check_archive(root / f"{part}.tar.gz")
            torchaudio.datasets.LIBRISPEECH(root, url=part, download=True)
    elif dataset == "crema":
        if not shutil.which("git-lfs"):
            die(
                "CREMA-D is kept with git-lfs: install it (apt-get install git-lfs), then run this again"
            )
        url = "https://github.com/CheyneyComputerScience/CREMA-D"
        subprocess.run(["git", "clone", "--depth", "1", url, root / "CREMA-D"], check=True)
    else:
        die(
            f"VoxCeleb2 is given out on request only: put audio and vox2_meta.csv of the Visual Geometry Group, Oxford, and "
            f"age-train.txt and age-test.txt of Hechmi et al. 2021 (VoxCeleb enrichment) under {root}/VoxCeleb2"
        )


def main():
    parser = Parser(description=__doc__)
    parser.add_argument(
        "action", choices=("check", "download"), help="read everything, or fetch a corpus"
    )
    parser.add_argument("dataset", help=f"{', '.join(READERS)} or a CSV manifest")
    parser.add_argument(
        "--data-root",
        default=MINI_ROOT,
        help="the folder that holds LibriSpeech, CREMA-D, VoxCeleb2",
    )
    parser.add_argument(
        "--max-seconds",
        type=float,
        default=data.MAX_SECONDS,
        help="longer audio is a problem, as in training; Whisper receives 30 s, the mini one 20",
    )
    args = parser.parse_args()
    if args.action == "check":
        raise SystemExit(1 if check(args.dataset, args.data_root, args.max_seconds) else 0)
    try:
        download(args.dataset, args.data_root)
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        die(f"the download failed: {str(error).splitlines()[0]}")


if __name__ == "__main__":
    main()
