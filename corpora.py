"""The corpora's readers: LibriSpeech, CREMA-D and VoxCeleb2-AE in their published layouts, and any CSV manifest.

    python corpora.py check libri                       # what is there, what is wrong
    python corpora.py check my.csv
    python corpora.py download libri --data-root /data

A reader returns the utterances of one split ("train", "dev" or "test"), sorted by id, and appends the corpus's problems, one line
each, to `problems`.
"""

import argparse
import csv
import functools
import hashlib
import os
import shutil
import subprocess
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torchaudio

import data
import mini
from data import BadAudio, Utterance, die, normalise
from study import LABELS, MINI_ROOT, ROOT

LIBRI_SPLITS = {"train": "train-clean-360", "dev": "dev-clean", "test": "test-clean"}
GENDERS = {"female": "female", "f": "female", "male": "male", "m": "male"}
SPLITS = {
    "train": "train",
    "training": "train",
    "dev": "dev",
    "val": "dev",
    "validation": "dev",
    "test": "test",
}
ABSENT = {
    "__unknown__",
    "unknown",
    "nan",
    "none",
    "na",
    "n/a",
}  # what other tools write where a CSV has no label


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
    genders = {row["ID"]: GENDERS.get(row["SEX"].lower()) for row in rows}
    folder = root / LIBRI_SPLITS[split]
    for path in sorted(folder.glob("*/*/*.trans.txt")):
        with open(path, encoding="utf-8") as f:
            for line in f:
                id, _, transcript = line.strip().partition(" ")
                if id in out:
                    problems.append(f"{path}: {id} stands there twice")
                speaker = id.split("-")[0]
                labels = dict(transcript=normalise(transcript), gender=genders.get(speaker))
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
    for path in sorted((root / "AudioWAV").glob("*.wav")):
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
        row["VoxCeleb2 ID"]: GENDERS.get(row["Gender"]) for row in read_rows(path, delimiter="\t")
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
    for speaker, video, age in rows:
        segments = [*root.glob(f"*/wav/{speaker}/{video}/*.wav")] or [
            *root.glob(f"*/aac/{speaker}/{video}/*.m4a")
        ]
        if not segments:
            problems.append(f"{root}: {speaker}/{video} is listed, but has no audio")
        labels = dict(gender=genders.get(speaker), age=age)
        out += [
            Utterance(f"{speaker}-{video}-{path.stem}", str(path), split, speaker, labels)
            for path in segments
        ]
    return sorted(out, key=lambda u: u.id)


def present(column, value):
    """A manifest's value, "" for a word of ABSENT; a transcript, though, may well be the word "none"."""
    absent = {"__unknown__"} if column == "transcript" else ABSENT
    return "" if value.lower() in absent else value


def number_in(row, column, high):
    """The column's number, 0 if it is absent. Raises ValueError if it is not a number from 0 to `high`."""
    try:
        value = float(row.get(column) or 0)
    except ValueError:
        value = -1
    if not 0 <= value <= high:
        raise ValueError(f"unknown {column} {row[column]}")
    return value


def manifest_split(row):
    """A row's split. Where none is given, a hash of the speaker (or, without speakers, of the path) splits 80/10/10."""
    if row.get("split"):
        return SPLITS.get(
            row["split"].lower(), "train"
        )  # an unknown one is reported with the training set
    share = (
        hashlib.sha256(f"manifest {row.get('speaker') or row['audio_path']}".encode()).digest()[0]
        / 256
    )
    return "test" if share < 0.1 else "dev" if share < 0.2 else "train"


def manifest_utterance(row, folder, split, in_years):
    """A row's utterance; `in_years`: ages are numbers in this manifest, not classes ("senior"). Raises ValueError."""
    if not row["audio_path"]:
        raise ValueError("no audio_path")
    if row.get("split") and row["split"].lower() not in SPLITS:
        raise ValueError(f"unknown split {row['split']}")
    labels = {label: row[label].lower() for label in LABELS if row.get(label)}
    if "transcript" in labels:
        labels["transcript"] = normalise(row["transcript"]) or None
    if "gender" in labels:
        if labels["gender"] not in GENDERS:
            raise ValueError(f"unknown gender {row['gender']}")
        labels["gender"] = GENDERS[labels["gender"]]
    if "age" in labels and in_years:
        labels["age"] = round(number_in(row, "age", 120))
    start, length = number_in(row, "start", 1e6), number_in(row, "length", 1e6)
    id = row["audio_path"] + (f"@{start:g}+{length:g}" if start or length else "")
    return Utterance(
        id, str(folder / row["audio_path"]), split, row.get("speaker", ""), labels, start, length
    )


def read_manifest(path, split, problems):
    """A CSV manifest: `audio_path` (relative to the file) and any of the labels, speaker, split, start, length (seconds).
    SpeechLLM's own CSVs load as they are."""
    path, out = Path(path), {}
    try:
        rows = [{k: present(k, v) for k, v in row.items()} for row in read_rows(path, strict=True)]
    except (UnicodeDecodeError, csv.Error) as error:
        die(f"{path} is no CSV file in UTF-8 ({error}): save it as one")
    if not rows or "audio_path" not in rows[0]:
        die(f"{path} has no row, or no column audio_path")
    # ages are classes if every one of them is a word; otherwise each one that is not a number is reported
    in_years = not all(
        isinstance(data.parse_age(row["age"]), str) for row in rows if row.get("age")
    )
    for number, row in enumerate(rows, 2):
        if manifest_split(row) != split:
            continue
        try:
            utterance = manifest_utterance(row, path.parent, split, in_years)
            if utterance.id in out:
                raise ValueError("duplicate id")
            out[utterance.id] = utterance
        except ValueError as error:
            problems.append(f"{path}, row {number}, {row['audio_path']}: {error}")
    return [out[id] for id in sorted(out)]


READERS = {"libri": read_libri, "test-clean": read_test_clean, "crema": read_crema, "vox": read_vox}


def read_split(dataset, data_root, split):
    """(utterances, problems) of one split of a corpus in READERS or of a CSV manifest."""
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
            mini.make_corpus("libri" if dataset == "test-clean" else dataset, data_root)
        except OSError as error:
            die(f"cannot make the mini corpora ({error}): name corpora elsewhere by --data-root")
    try:
        utterances = READERS[dataset](data_root, split, problems)
    except FileNotFoundError as error:
        die(f"{error.filename} is missing: is {dataset} under --data-root {data_root}?")
    except (KeyError, ValueError) as error:
        die(f"{dataset} under {data_root} has a list that is not in its published form ({error!r})")
    problems += [
        f"{u.path}: speaker {u.speaker} has no gender"
        for u in utterances
        if "gender" not in u.labels
    ]
    return utterances, problems


def file_problem(utterance):
    """What is wrong with an utterance's file, as far as can be told without opening it, or None."""
    try:
        return None if os.path.getsize(utterance.path) else f"{utterance.path}: empty"
    except OSError:
        return f"{utterance.path}: no such file"


def audio_problem(utterance):
    """What is wrong with an utterance's audio, read whole, or None."""
    try:
        data.load_waveform(utterance)
    except BadAudio as error:
        return str(error)


def heard(utterance):
    """(what is wrong with an utterance's audio, read whole, or None; its RMS or None)."""
    try:
        return None, data.rms(utterance)
    except BadAudio as error:
        return str(error), None


@functools.lru_cache(100_000)
def sample_of(path):
    """SHA-256 of some of a file's bytes: enough to tell apart two recordings of the same size."""
    size, sha = os.path.getsize(path), hashlib.sha256()
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


def shared_audio(parts):
    """Audio that is in several of {split: utterances}, under one path, under two, or as a copy: a list of problems, one for each two
    splits that share some."""
    alike = {}
    for split, utterances in parts.items():
        for u in utterances:
            alike.setdefault(os.path.getsize(u.path), []).append((split, u))
    recordings = {}
    for size, found in alike.items():
        if len({split for split, _ in found}) > 1:
            for split, u in found:
                recordings.setdefault((size, sample_of(u.path)), []).append((split, u))
    shared = {}
    for found in recordings.values():
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
    out, problems = read_split(dataset, data_root, split)
    for u in out:
        u.max_seconds = max_seconds
    found = (
        data.in_workers(audio_problem, out, f"checking {split}")
        if skip_bad
        else [file_problem(u) for u in out]
    )
    problems += [p for p in found if p]
    out = [u for u, p in zip(out, found) if not p]
    command = f"`python corpora.py check {dataset} --data-root {data_root}`"
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
        die(f"{dataset} has no {split} {what}: run {command}")
    if labels is None and len(labelled) < len(out):
        print(f"{dataset} {split}: {len(out) - len(labelled)} utterances without a label left out")
    return labelled


def limit(utterances, n):
    """The first n utterances of a fixed random order (None: all of them, as they are)."""
    return (
        utterances if n is None else sorted(utterances, key=lambda u: data.draw("limit", u.id))[:n]
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


def check(dataset, data_root):
    """Reads everything; prints what is there and what is wrong. Returns the number of problems."""
    problems, parts, levels = [], {}, []
    for split in ("train", "dev", "test"):
        utterances, wrong = read_split(dataset, data_root, split)
        found = data.in_workers(heard, utterances, split)
        unreadable = [problem for problem, _ in found]
        problems += wrong + [problem for problem in unreadable if problem]
        parts[split] = [u for u, problem in zip(utterances, unreadable) if not problem]
        levels += [level for problem, level in found if not problem]
        seconds = [
            data.num_samples(u) / data.SAMPLE_RATE
            for u, problem in zip(utterances, unreadable)
            if not problem
        ] or [0]
        print(
            f"{split}: {len(utterances)} utterances of {len({u.speaker for u in utterances})} speakers, "
            f"{sum(seconds) / 3600:.2f} hours, {min(seconds):.2f} to {max(seconds):.2f} s each"
        )
        for label in LABELS:
            counts = Counter(u.labels[label] for u in utterances if label in u.labels)
            few = (
                ", ".join(f"{value} {n}" for value, n in counts.items())
                if len(counts) <= 8
                else f"{len(counts)} different"
            )
            if counts:
                print(f"    {label} {counts.total()} ({few})")
    problems += shared_audio(parts)
    problems += data.far_levels([u for own in parts.values() for u in own], levels)
    for problem in problems:
        print(problem)
    print(f"{len(problems)} problem{'s' * (len(problems) != 1)}")
    return len(problems)


def download(dataset, data_root):
    """Downloads what is free: LibriSpeech (CC BY 4.0), CREMA-D (ODbL). Says where to ask for the rest."""
    root = Path(data_root)
    root.mkdir(parents=True, exist_ok=True)
    if dataset in ("libri", "test-clean"):
        for part in LIBRI_SPLITS.values() if dataset == "libri" else (dataset,):
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "action", choices=("check", "download"), help="read everything, or fetch a corpus"
    )
    parser.add_argument("dataset", help=f"{', '.join(READERS)} or a CSV manifest")
    parser.add_argument(
        "--data-root",
        default=MINI_ROOT,
        help="the folder that holds LibriSpeech, CREMA-D, VoxCeleb2",
    )
    args = parser.parse_args()
    if args.action == "check":
        raise SystemExit(1 if check(args.dataset, args.data_root) else 0)
    try:
        download(args.dataset, args.data_root)
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        die(f"the download failed: {str(error).splitlines()[0]}")


if __name__ == "__main__":
    main()
