"""The forms that a user's own recordings come in, each read into the same Table: a CSV, a JSON-lines
manifest as NeMo has it, a Hugging Face audiofolder, a Kaldi data folder, a Common Voice release.

Each form is two functions. lists_of_FORM(path) returns the files there that list the recordings, []
where there is none of them. rows_of_FORM(path, texts) takes their contents, {file: text}, and
returns the names of the columns and the rows, (place, cells, fault): where a row stands, {column:
text} or None, and why it cannot be read or None. Columns keep their names; paths are relative to
the folder, and what a form says elsewhere, such as in a folder's name, becomes a column.
"""

import csv
import difflib
import functools
import io
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from utils import die

from study import LABELS

SPLITS = {
    "train": ("training",),
    "dev": ("development", "devel", "val", "valid", "validation"),
    "test": ("testing",),
}
EVAL = ("eval", "evaluation")  # see corpora.named_split
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
# words in the names that other tools give to the times of a segment, in units of their own
TIME_WORDS = set("start begin onset offset end stop xmin xmax tmin tmax".split())
LENGTH_WORDS = set("length duration dur".split())
UNIT_WORDS = set("s sec secs second seconds ms samples".split())
DELIMITERS = ",;\t|"
VALUES_SHOWN = 5  # rows or values, in one line of problems


def plain(text):
    """A column's name or a class, however it is written: `Speaker ID` -> `speaker_id`."""
    return re.sub(r"[\s_-]+", "_", text.strip().lower()).strip("_") or text.strip()


def known_as(names):
    """{"female": ("f", ...), ...} -> {"female": "female", "f": "female", ...}."""
    known = {}
    for name, others in names.items():
        known[name] = name
        known.update(dict.fromkeys(others, name))
    return known


SPLIT_OF = known_as(SPLITS)


def some(things):
    """The first few of many things, in words."""
    shown = ", ".join(str(thing) for thing in things[:VALUES_SHOWN])
    if len(things) > VALUES_SHOWN:
        shown += f", ... ({len(things)} in all)"
    return shown


def rows_named(numbers):
    return f"row{'s' * (len(numbers) > 1)} {some(numbers)}"


# -------------------------------------------------------------------------------------------------
# a CSV


def lists_of_csv(path):
    return [os.fspath(path)] if os.path.isfile(path) else []


def rows_of_csv(path, texts):
    [text] = texts.values()
    return parse_csv(path, text)


def parse_csv(path, text):
    """The columns' names and the rows of a CSV, or of a semicolon- or tab-separated file; a row
    stands in the line that it begins in."""
    lines = io.StringIO(text, newline="")
    delimiter, header = parse_header(path, lines.readline())
    rows = []
    for number, fields, fault in numbered_fields(lines, delimiter, len(header)):
        cells = None if fault else dict(zip(header, map(unquoted, fields)))
        rows.append((number, cells, fault))
    return header, rows


def parse_header(path, line):
    """(delimiter, column names) of a manifest's first line. Exits with a one-line error where no
    delimiter gives a column of audio paths."""
    audio = {"audio_path", *COLUMNS["audio_path"].split()}
    for delimiter in DELIMITERS:
        header = next(csv.reader([line], delimiter=delimiter), [])
        if audio & set(map(plain, header)):
            return delimiter, header
    die(f"{path} has no column audio_path: its first row is {line.strip()[:80]!r}")


def numbered_fields(lines, delimiter, width):
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
        if not any(field.strip() for field in fields):
            continue  # a blank line
        if len(fields) != width:
            fault = (
                f"{len(fields)} fields where the header has {width} "
                "(a transcript that holds the separator needs quotation marks)"
            )
            yield number, None, fault
        elif any("\n" in field and field.count(delimiter) >= width - 1 for field in fields):
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


# -------------------------------------------------------------------------------------------------
# JSON lines

JSON_LINES = (".json", ".jsonl")
JSON_EXAMPLE = '{"audio_filepath": "a.wav", "text": "good morning"}'


def lists_of_json(path):
    return [os.fspath(path)] if os.path.isfile(path) and Path(path).suffix in JSON_LINES else []


def rows_of_json(path, texts):
    """A NeMo manifest, whose `offset` is where a segment starts."""
    [text] = texts.values()
    names, rows = parse_json_lines(path, text)
    for _, cells, _ in rows:
        if cells and "offset" in cells:
            cells["start"] = cells.pop("offset")
    return ["start" if name == "offset" else name for name in names], rows


def parse_json_lines(path, text):
    """As parse_csv: each line is an object. Exits with a one-line error where none is."""
    names = {}
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, dict):
            rows.append((number, None, "no JSON object"))
            continue
        cells = {name.strip(): cell_of(value) for name, value in values.items()}
        names.update(dict.fromkeys(cells))
        rows.append((number, cells, None))
    if not names:
        die(f"{path} has no line with a JSON object, such as {JSON_EXAMPLE}")
    return list(names), rows


def cell_of(value):
    """A JSON value as the text of a CSV's cell; a list or an object is no label."""
    if value is None or isinstance(value, (list, dict)):
        return ""
    # JSON can spell half of a surrogate pair, which could not be written to a file
    return str(value).encode("utf-8", "replace").decode().strip()


# -------------------------------------------------------------------------------------------------
# folders


def names_split(name):
    """Whether a folder of this name holds a split."""
    return plain(name) in {*SPLIT_OF, *EVAL}


def folders_with(path, names):
    """The folder `path` if it has one of the files `names`, else those in it that hold a split and
    have one."""
    if not os.path.isdir(path):
        return []
    try:
        inside = [os.path.join(path, name) for name in sorted(os.listdir(path))]
    except OSError as error:
        die(f"{path} cannot be read ({error.strerror})")
    inside = [folder for folder in inside if names_split(os.path.basename(folder))]
    for folders in ([os.fspath(path)], inside):
        chosen = [folder for folder in folders if files_in(folder, names)]
        if chosen:
            return chosen
    return []


def files_in(folder, names):
    """Those of the files `names` that a folder has."""
    files = [os.path.join(folder, name) for name in names]
    return [file for file in files if os.path.isfile(file)]


def files_in_all(folders, names):
    files = []
    for folder in folders:
        files += files_in(folder, names)
    return files


# -------------------------------------------------------------------------------------------------
# a Hugging Face audiofolder

METADATA = ("metadata.csv", "metadata.jsonl")


def lists_of_audiofolder(path):
    return files_in_all(folders_with(path, METADATA), METADATA)


def rows_of_audiofolder(path, texts):
    """A recording in a folder that is called as a split is belongs to that split."""
    names = {}
    rows = []
    for file, text in texts.items():
        parse = parse_json_lines if file.endswith(".jsonl") else parse_csv
        header, of_file = parse(file, text)
        if "file_name" not in header:
            die(f"{file} has no column file_name, which names the recordings of an audiofolder")
        list_name = os.path.relpath(file, path)
        folder = os.path.dirname(list_name)
        for number, cells, fault in of_file:
            if cells and cells.get("file_name"):
                cells["file_name"] = os.path.join(folder, cells["file_name"])
                first_folder = Path(cells["file_name"]).parts[0]
                if names_split(first_folder) and not cells.get("split"):
                    cells["split"] = first_folder
            names.update(dict.fromkeys(cells or ()))
            rows.append((f"{list_name}:{number}", cells, fault))
    return list(names), rows


# -------------------------------------------------------------------------------------------------
# a Kaldi data folder

# Kaldi's lists, and the columns that they are
KALDI_COLUMNS = {"text": "transcript", "utt2spk": "speaker", "spk2gender": "gender"}
KALDI = ("wav.scp", "segments", *KALDI_COLUMNS)


def lists_of_kaldi(path):
    return files_in_all(folders_with(path, ["wav.scp"]), KALDI)


def rows_of_kaldi(path, texts):
    names = {}
    rows = []
    for folder in folders_with(path, ["wav.scp"]):
        lists = {name: parse_kaldi(os.path.join(folder, name), texts) for name in KALDI}
        split = os.path.relpath(folder, path)
        for utterance, cells, fault in kaldi_utterances(folder, lists):
            if cells and split != ".":
                cells["split"] = split
            if cells:
                cells["audio_path"] = kaldi_path(path, folder, cells["audio_path"])
            names.update(dict.fromkeys(cells or ()))
            rows.append((os.path.normpath(os.path.join(split, utterance)), cells, fault))
    return list(names), rows


def parse_kaldi(file, texts):
    """{key: the rest of its line} of one of Kaldi's lists, empty where it is not there. Exits with
    a one-line error where a key stands there twice."""
    values = {}
    for line in texts.get(file, "").split("\n"):
        key, _, value = line.strip().replace("\t", " ").partition(" ")
        if key in values:
            die(f"{file}: {key} stands there twice")
        if key:
            values[key] = value.strip()
    return values


def kaldi_utterances(folder, lists):
    """The rows of one folder, each by its utterance's name, from lists: {file: {key: value}}. Exits
    with a one-line error where the audio is the output of a command."""
    for recording, audio in lists["wav.scp"].items():
        if audio.endswith("|"):
            die(
                f"{folder}/wav.scp: {recording} is the output of a command ({audio[:60]}), not a "
                "file: write the audio out first, and list the files"
            )
    # without segments, a recording is an utterance
    segments = lists["segments"] or {recording: recording for recording in lists["wav.scp"]}
    rows = []
    for utterance, segment in segments.items():
        recording, *times = segment.split() or [""]
        if not lists["wav.scp"].get(recording):
            rows.append((utterance, None, "wav.scp names no file for it"))
            continue
        cells = dict(audio_path=lists["wav.scp"][recording])
        if lists["segments"]:
            if len(times) < 2:
                rows.append((utterance, None, "a segment without start and end"))
                continue
            start, end, *_ = times
            cells.update(start=start, end="" if end == "-1" else end)  # -1: to the end
        rows.append((utterance, {**cells, **kaldi_labels(utterance, lists)}, None))
    for utterance in sorted(lists["text"].keys() - segments.keys()):
        rows.append((utterance, None, "it has a text and no audio"))
    return rows


def kaldi_labels(utterance, lists):
    """{column: text} of those of KALDI_COLUMNS that there is a list of."""
    key_of = dict(text=utterance, utt2spk=utterance, spk2gender=lists["utt2spk"].get(utterance))
    labels = {}
    for name, column in KALDI_COLUMNS.items():
        if lists[name]:
            labels[column] = lists[name].get(key_of[name], "")
    return labels


def kaldi_path(path, folder, audio):
    """A recording's path from `path` on. Kaldi's are relative to where its recipe is run, mostly
    the current directory; relative to the folder is understood too."""
    in_folder = os.path.join(os.path.relpath(folder, path), audio)
    if os.path.exists(audio) and not os.path.exists(os.path.join(path, in_folder)):
        return os.path.abspath(audio)
    return os.path.normpath(in_folder)


# -------------------------------------------------------------------------------------------------
# a Common Voice release

COMMON_VOICE_SPLITS = ("train.tsv", "dev.tsv", "test.tsv")
# what else its column gender says, and no label here does
OTHER_GENDERS = ("other", "transgender", "non_binary", "intersex")


def lists_of_common_voice(path):
    """Its own splits, where all three are there, or what was validated; a path may also name one
    of its lists."""
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    if not os.path.isdir(os.path.join(folder, "clips")):
        return []
    if os.path.isfile(path):
        is_list = os.path.basename(path) in ("validated.tsv", *COMMON_VOICE_SPLITS)
        return [os.fspath(path)] if is_list else []
    splits = files_in(path, COMMON_VOICE_SPLITS)
    if len(splits) == len(COMMON_VOICE_SPLITS):
        return splits
    return files_in(path, ["validated.tsv"])


def rows_of_common_voice(path, texts):
    names = {}
    rows = []
    for file, text in texts.items():
        _, of_file = parse_csv(file, text)
        list_name = os.path.basename(file)
        for number, cells, fault in of_file:
            if cells:
                if not cells.get("path", "").startswith("clips/"):
                    cells["path"] = os.path.join("clips", cells.get("path", ""))
                if len(texts) > 1:
                    cells["split"] = Path(file).stem
                if plain(cells.get("gender", "")) in OTHER_GENDERS:
                    cells["gender"] = ""
            names.update(dict.fromkeys(cells or ()))
            rows.append((f"{list_name}:{number}", cells, fault))
    return list(names), rows


# -------------------------------------------------------------------------------------------------
# the table


@dataclass
class Table:
    """A user's own data as it was read: its form and the files that list it; its rows, {column:
    text} by the place that each stands in (the line of a file that it begins in, or the name of a
    Kaldi utterance); which columns are used, {name in COLUMNS: name there}, and which are not; what
    is wrong with it, one line each."""

    form: str
    lists: tuple
    rows: dict
    used: dict
    unused: list
    problems: list


def without_absent(column, value):
    """A manifest's value, "" for a word of ABSENT; a transcript may well be the word "none"."""
    if column == "transcript":
        return "" if value == "__unknown__" else value
    return "" if plain(value) in ABSENT else value


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
        if hint := hint_about(name, used):
            problems.append(f"{path}: the column {name} is not used: {hint}")
    if not set(LABELS) & set(used):
        problems.append(f"{path}: no column of {', '.join(LABELS)}; not used: {some(unused)}")
    return used, unused, problems


def hint_about(name, used):
    """What somebody may have meant by a column that is not used, or None."""
    words = set(re.split(r"[\W_]+", name.lower())) - UNIT_WORDS - {""}
    if words & TIME_WORDS or words == {"from"} or words == {"to"}:
        return "segments have start and end, or length, in seconds"
    if words & LENGTH_WORDS:
        if "start" in used and plain(name) not in COLUMNS:
            return "a segment's length is in seconds, in a column length or duration"
        return None  # that of the whole file
    close = difflib.get_close_matches(plain(name), sorted(COLUMNS.keys() - used.keys()), 1, 0.8)
    if close and plain(name) not in COLUMNS:
        return f"is it {close[0]}?"
    return None


# -------------------------------------------------------------------------------------------------
# any of them

ACCEPTED = (
    "a CSV, a NeMo manifest (.json, .jsonl), or the folder of an audiofolder with metadata, of "
    "Kaldi or of Common Voice"
)
# the order decides where a path holds several: a CSV is any other file
FORMS = {
    "Kaldi": dict(lists=lists_of_kaldi, rows=rows_of_kaldi),
    "Common Voice": dict(lists=lists_of_common_voice, rows=rows_of_common_voice),
    "audiofolder": dict(lists=lists_of_audiofolder, rows=rows_of_audiofolder),
    "JSON lines": dict(lists=lists_of_json, rows=rows_of_json),
    "CSV": dict(lists=lists_of_csv, rows=rows_of_csv),
}
LOOKED_FOR = (
    "wav.scp (Kaldi), metadata.csv or metadata.jsonl (audiofolder), there or in train/, dev/ and "
    "test/, or clips/ with validated.tsv or train.tsv, dev.tsv and test.tsv (Common Voice)"
)


def recognise(path):
    """(form, the files that list its recordings) of a path, (None, []) where it is in none of the
    FORMS."""
    for form, functions in FORMS.items():
        lists = functions["lists"](path)
        if lists:
            return form, lists
    return None, []


def read_table(path):
    """A user's own data as a Table. Exits with a one-line error where it is in none of the FORMS."""
    form, lists = recognise(path)
    if not form and os.path.isdir(path):
        die(f"{path} is a folder without {LOOKED_FOR}")
    if not form:
        die(f"{path}: neither a file nor a folder")
    return parse_table(path, form, tuple(lists), tuple(map(read_text, lists)))


def read_text(path):
    try:
        with open(path, encoding="utf-8-sig", newline="") as f:
            return f.read()
    except UnicodeDecodeError as error:
        die(f"{path} is not text in UTF-8 ({error}): save it as that")
    except OSError as error:
        die(f"{path} cannot be read ({error.strerror})")


@functools.lru_cache(1)  # for the splits, which are read one after the other
def parse_table(path, form, lists, texts):
    header, read_rows = FORMS[form]["rows"](path, dict(zip(lists, texts)))
    if not read_rows:
        die(f"{path} has no row")
    used, unused, problems = columns_of(path, header)
    rows, faulty = {}, {}
    for place, cells, fault in read_rows:
        if fault:
            faulty.setdefault(fault, []).append(place)
            continue
        rows[place] = {
            column: without_absent(column, cells.get(name, "")) for column, name in used.items()
        }
    for fault, places in faulty.items():
        problems.append(f"{path}, {rows_named(places)}: {fault}")
    if rows and "audio_path" not in used:
        die(f"{path} has no column audio_path: its columns are {some(header)}")
    return Table(form, lists, rows, used, unused, problems)
