"""The corpora's readers: LibriSpeech, CREMA-D and VoxCeleb2-AE in their published layouts, and any CSV manifest.

    python corpora.py check libri                       # what is there, what is wrong
    python corpora.py check my.csv
    python corpora.py download libri --data-root /data

A reader gives the utterances of one split ("train", "dev" or "test"), sorted by id, and appends what is wrong with the
corpus, a line each, to `problems`.
"""
import argparse
import csv
import hashlib
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import torchaudio

import data
import mini
from data import BadAudio, Utterance, die, normalise
from study import LABELS, MINI_ROOT, ROOT

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
        problems += [f"{path}: no transcript" for path in sorted(chapter.glob("*.flac")) if path.stem not in transcripts]
        for id, transcript in sorted(transcripts.items()):
            speaker = id.split("-")[0]
            out.append(Utterance(id, str(chapter / f"{id}.flac"), split, speaker,
                                 dict(transcript=normalise(transcript), gender=genders.get(speaker))))
            if genders.get(speaker) is None:
                problems.append(f"{out[-1].path}: speaker {speaker} has no sex in SPEAKERS.TXT")
    return out


def split_speakers(sexes, corpus, held):
    """{speaker: sex} -> {speaker: split}: a tenth of each sex, by a fixed hash, for each split in `held`, the rest "train"."""
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
    if sentence not in data.CREMA_SENTENCES or emotion not in data.CREMA_EMOTIONS:
        raise ValueError(f"unknown label {sentence if sentence not in data.CREMA_SENTENCES else emotion}")
    return actor, data.CREMA_SENTENCES[sentence], data.CREMA_EMOTIONS[emotion]


def read_crema(root, split, problems):
    """CREMA-D: AudioWAV/ACTOR_SENTENCE_EMOTION_LEVEL.wav, age and sex from VideoDemographics.csv; speaker-disjoint
    80/10/10, both sexes in each part."""
    root = Path(root) / "CREMA-D"
    with open(root / "VideoDemographics.csv", encoding="utf-8-sig", newline="") as f:
        actors = {row["ActorID"].strip(): dict(gender=row["Sex"].strip().lower(), age=int(row["Age"]))
                  for row in csv.DictReader(f)}
    splits = split_speakers({actor: labels["gender"] for actor, labels in actors.items()}, "crema", ("test", "dev"))
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
            labels = dict(actors[actor], transcript=normalise(transcript), emotion=emotion)
            out.append(Utterance(path.stem, str(path), split, actor, labels))
    return out


def read_vox_ages(path):
    """age-train.txt or age-test.txt -> [(speaker, video, age in whole years)]."""
    with open(path, encoding="utf-8", newline="") as f:
        return [(row["VoxCeleb_ID"].strip(), row["video_id"].strip(), round(float(row["speaker_age"])))
                for row in csv.DictReader(f)]


def read_vox_genders(path):
    """vox2_meta.csv (tab-separated, trailing blanks in the fields) -> {speaker: "female" | "male"}."""
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
        out += [Utterance(f"{speaker}-{video}-{path.stem}", str(path), split, speaker,
                          dict(gender=genders.get(speaker), age=age)) for path in segments]
    return sorted(out, key=lambda u: u.id)


ABSENT = {"", "__unknown__", "unknown", "nan", "none", "na", "n/a"}
GENDERS = {"female": "female", "f": "female", "male": "male", "m": "male"}
SPLITS = {"train": "train", "training": "train", "dev": "dev", "val": "dev", "valid": "dev", "validation": "dev",
          "test": "test"}


def number_in(row, column, low, high):
    """The column's number, None where it is absent. Raises ValueError where it is none from `low` to `high`."""
    if not row.get(column):
        return None
    try:
        value = float(row[column])
    except ValueError:
        value = low - 1
    if not low <= value <= high:
        raise ValueError(f"unknown {column} {row[column]}")
    return value


def manifest_split(row):
    """A row's split. Where none is given, a hash of the speaker (or, without speakers, of the path) makes it 80/10/10."""
    if row.get("split"):
        if row["split"].lower() not in SPLITS:
            raise ValueError(f"unknown split {row['split']}")
        return SPLITS[row["split"].lower()]
    share = hashlib.sha256(f"manifest {row.get('speaker') or row['audio_path']}".encode()).digest()[0] / 256
    return "test" if share < 0.1 else "dev" if share < 0.2 else "train"


def manifest_labels(row, numbers):
    """The labels that a row has; `numbers`: whether ages are numbers in this manifest, or groups ("senior", "twenties"), which
    are classes. Raises ValueError naming a value that is unknown."""
    labels = {label: row[label].lower() for label in LABELS if row.get(label)}
    if "transcript" in labels:
        labels["transcript"] = normalise(row["transcript"]) or None
    if labels.get("gender", "f") not in GENDERS:
        raise ValueError(f"unknown gender {row['gender']}")
    if "gender" in labels:
        labels["gender"] = GENDERS[labels["gender"]]
    if "age" in labels and not numbers:
        labels["age"] = data.parse_age(row["age"])
    elif "age" in labels:
        labels["age"] = round(number_in(row, "age", 0, 120))
    return labels


def clean_row(row):
    """A row without surrounding blanks, and without the placeholders that other tools write where a label is absent; a
    transcript may well be the word "none"."""
    absent = lambda k, v: v.lower() in (ABSENT if k != "transcript" else {"", "__unknown__"})  # noqa: E731
    return {k: "" if v is None or absent(k, v.strip()) else v.strip() for k, v in row.items() if k}


def read_manifest(path, split, problems):
    """A CSV manifest: `audio_path` (relative to the file) and any of the labels, speaker, split, start, length (seconds).
    SpeechLLM's own CSVs load as they are."""
    path, out, seen = Path(path), [], set()
    try:
        with open(path, encoding="utf-8-sig", newline="") as f:
            rows = list(csv.DictReader(f, strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        die(f"{path} is no CSV file in UTF-8 ({error}): save it as one")
    if not rows or "audio_path" not in rows[0]:
        die(f"{path}: " + ("no row" if not rows else f"no column audio_path among {', '.join(map(str, rows[0]))}"))
    rows = [clean_row(row) for row in rows]
    # ages are groups where every one is; else each that is no number is reported
    numbers = not all(isinstance(data.parse_age(row.get("age") or "none"), str) for row in rows)
    for number, row in enumerate(rows, 2):
        id, chosen = row["audio_path"], "train"  # a row without a split is reported once, with the training set
        try:
            if not id:
                raise ValueError("no audio_path")
            chosen = manifest_split(row)
            start, length = number_in(row, "start", 0, 1e6) or 0.0, number_in(row, "length", 0, 1e6) or 0.0
            id += f"@{start:g}+{length:g}" if start or length else ""
            labels = manifest_labels(row, numbers)
            if (chosen, id) in seen:
                raise ValueError("duplicate id")
        except ValueError as error:
            if chosen == split:
                problems.append(f"{path}, row {number}, {id}: {error}")
            continue
        seen.add((chosen, id))
        if chosen == split:
            out.append(Utterance(id, str(path.parent / row["audio_path"]), split, row.get("speaker", ""), labels, start, length))
    return sorted(out, key=lambda u: u.id)


READERS = {"libri": read_libri, "crema": read_crema, "vox": read_vox}


def read_split(dataset, data_root, split):
    """(utterances, problems) of one split of `libri`, `crema`, `vox` or a CSV manifest's path."""
    problems = []
    if dataset not in READERS:
        if not Path(dataset).is_file():
            die(f"--dataset {dataset}: neither {', '.join(READERS)} nor a CSV file")
        return read_manifest(dataset, split, problems), problems
    if str(data_root) == MINI_ROOT:  # the miniature corpora are made when they are first asked for, beside this file
        data_root = Path(os.path.relpath(ROOT / MINI_ROOT))
        mini.make_corpus(dataset, data_root)
    try:
        return READERS[dataset](data_root, split, problems), problems
    except FileNotFoundError as error:
        die(f"{error.filename} is missing: is {dataset} under --data-root {data_root}?")
    except (KeyError, ValueError, UnicodeDecodeError) as error:
        die(f"{dataset} under {data_root} has a list that is not in its published form ({error!r})")


def read_corpus(dataset, data_root, split, skip_bad=False, labels=None):
    """The utterances of one split, with `labels` alone (None: all there are). Ends in one line where something is wrong
    with the corpus, or, with `skip_bad`, reads all its audio first and leaves out what is wrong, saying how much."""
    out, problems = read_split(dataset, data_root, split)
    found = data.in_workers(audio_problem, out, f"checking {split}") if skip_bad else [file_problem(u) for u in out]
    problems += [p for p in found if p]
    out = [u for u, p in zip(out, found) if not p]
    if problems and not skip_bad:
        more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
        die(f"{problems[0]}{more} in {split}: `python corpora.py check {dataset} --data-root {data_root}` lists all; "
            "--skip-bad goes on without them")
    if problems:
        print(f"{dataset} {split}: left out for {len(problems)} problem{'s' * (len(problems) != 1)}; "
              "`python corpora.py check` lists them")
    if labels is not None:
        out = [replace(u, labels={k: v for k, v in u.labels.items() if k in labels}) for u in out]
        out = [u for u in out if u.labels]
    if not out:
        die(f"{dataset} has no {split} utterances: run `python corpora.py check {dataset} --data-root {data_root}`")
    return out


def limit(utterances, n):
    """The first n utterances of a fixed random order (None: all of them, in theirs)."""
    return utterances if n is None else sorted(utterances, key=lambda u: data.draw("limit", u.id))[:n]


def file_problem(utterance):
    """What can be seen to be wrong with an utterance's file without opening it, or None."""
    try:
        return None if os.path.getsize(utterance.path) else f"{utterance.path}: empty"
    except OSError:
        return f"{utterance.path}: no such file"


def audio_problem(utterance):
    """What is wrong with an utterance's audio, read whole, or None."""
    return seconds_or_problem(utterance)[1]


# ---------------------------------------------------------------------------------------------------------------------
# python corpora.py check | download

def seconds_or_problem(utterance):
    """(length in seconds, None) or (None, what is wrong)."""
    try:
        return len(data.load_waveform(utterance)) / data.SAMPLE_RATE, None
    except BadAudio as error:
        return None, str(error)


def describe(label, values):
    """How many utterances have a label, and which values."""
    count = {v: values.count(v) for v in sorted(set(values), key=str)}
    few = ", ".join(f"{v} {n}" for v, n in count.items()) if len(count) <= 8 else f"{len(count)} different"
    return f"{label} {len(values)} ({few})"


def check(dataset, data_root):
    """Reads everything; prints what there is and what is wrong. Returns the number of problems."""
    total = []
    print(f"{'split':7}{'utterances':>11}{'hours':>8}{'speakers':>10}   length in s: least, median, most   labels")
    for split in ("train", "dev", "test"):
        utterances, problems = read_split(dataset, data_root, split)
        read = data.in_workers(seconds_or_problem, utterances, split)
        total += problems + [problem for _, problem in read if problem]
        lengths = sorted(seconds for seconds, _ in read if seconds) or [0.0]
        values = {label: [u.labels[label] for u in utterances if label in u.labels] for label in LABELS}
        print(f"{split:7}{len(utterances):>11}{sum(lengths) / 3600:>8.2f}{len({u.speaker for u in utterances}):>10}   "
              + f"{lengths[0]:.2f}, {lengths[len(lengths) // 2]:.2f}, {lengths[-1]:.2f}".ljust(35)
              + "; ".join(describe(label, v) for label, v in values.items() if v))
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
    parser.add_argument("action", choices=("check", "download"), help="read everything, or fetch a corpus")
    parser.add_argument("dataset", help="libri, crema, vox or a CSV manifest")
    parser.add_argument("--data-root", default=MINI_ROOT, help="the folder that holds LibriSpeech, CREMA-D, VoxCeleb2")
    args = parser.parse_args()
    if args.action == "check":
        raise SystemExit(1 if check(args.dataset, args.data_root) else 0)
    try:
        download(args.dataset, args.data_root)
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        die(f"the download failed: {str(error).splitlines()[0]}")


if __name__ == "__main__":
    main()
