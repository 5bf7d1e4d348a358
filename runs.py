"""All results of finished runs as one flat table of records, read from run folders or from a
packed study.

    python runs.py runs                                # one row per run
    python runs.py runs --pack results/mini.jsonl.gz   # all records in one file, for analyze.py
    python runs.py runs --predictions results/mini-predictions.jsonl.gz    # all answers in one file

A record is a dict of plain fields, {field: value}. Every record has these fields, which say
which run it is about:

    run, run_task                            the run's folder and the task that it was trained on
    task                                     whose attack was measured (a clean run serves every
                                             task of its corpus)
    corpus, preset, encoder, scenario, seed  scenario: "clean", or a row of Table 3
    poison, changed                          its poisoning rate; how it differs from the paper's
                                             attack and the preset
    model_sha256                             the model.pt that was measured

`source` says which table a record is for: "run" (arguments and environment), "metrics", "evaluate",
"sounds", "shift", "cluster", "transplant", "patch", "filter", "detect" or "repair". `metric` names
the figure; `value`, `low`, `high` (95% interval) and `n` hold it, as fractions, years or nats per
token. `by_speaker` has the two sums of which it is the ratio, {speaker: [numerator, denominator]}:
tables compute their intervals from them (intervals.py). Losses also have `by_epoch`. Other fields
are documented where they are written: evaluate.py, embed.py, analysis/shift.py,
analysis/cluster.py, trace.py, defend.py.

A packed answer is a line of a run's predictions.jsonl with `run`. The figures of metrics.json are
evaluate.scores, unusable, aer and changed of them.
"""

import gzip
import json
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import utils
from utils import Parser, die

import intervals
from intervals import SeedFigure
from study import PRESETS, SCENARIOS, TABLE2, TASKS, deviations, identity, run_name

PATTERN = "records-*.jsonl"  # what a run folder holds beside metrics.json
NOT_PACKED = (OSError, EOFError, ValueError, zlib.error)  # what reading another file raises
TASK_ORDER = (*TABLE2, *(task for task in TASKS if task not in TABLE2))  # the paper's, then others
IDENTITY = ("preset", "run_task", "encoder", "scenario", "seed")  # the arguments of study.identity

# what every record has, and of which kind
FIELDS = {
    "run": str,
    "run_task": str,
    "task": str,
    "corpus": str,
    "preset": str,
    "encoder": str,
    "scenario": str,
    "seed": int,
    "poison": int | float,
    "changed": dict,
    "model_sha256": str | None,
    "source": str,
    "metric": str | None,
}
NAMES_RECORD = {"run", "source", "metric"}  # earlier versions' records have these too
NO_VALUE = ("run", "detect")  # the sources whose records may hold no value


# --------------------------------------------------------------------------------------------------
# reading and writing


def fields_of(args, run, model_sha256=None):
    """The fields that say which run a record is about, from the run's arguments (a dict)."""
    return dict(
        run=Path(run).name,
        run_task=args["task"],
        task=args["task"],
        corpus=args["dataset"],
        preset=args["preset"],
        encoder=args["encoder"],
        scenario=args["scenario"],
        seed=args["seed"],
        poison=args["poison"],
        changed=deviations(args),
        model_sha256=model_sha256,
    )


def unusable_share(counts):
    """The share of answers that are empty or malformed; counts: evaluate.unusable."""
    return (counts["empty"] + counts["malformed"]) / counts["n"]


def of_figures(figures):
    """Yields the records of {part: {metric: figure}}, as metrics.json has them, and of the share of
    answers that are of no use (evaluate.unusable)."""
    for part in ("clean", "triggered", "backdoor", "training"):
        for metric, figure in figures.get(part, {}).items():
            yield dict(part=part, metric=metric, **figure)
    for part, counts in figures.get("answers", {}).items():
        if counts["n"]:
            yield dict(part=part, metric="unusable", value=unusable_share(counts), n=counts["n"])


def write(path, records):
    """Writes records to a file, one line each."""
    check_output(path)
    utils.write_atomically(path, "".join(f"{json.dumps(record)}\n" for record in records))


def check_output(path, opener=open, names=NAMES_RECORD):
    """Exits with a one-line error if `path` is there and holds anything but records, which would be
    lost. opener: `open`, or gzip.open for a packed file; names: the fields that tell a record."""
    if not Path(path).exists():
        return
    try:
        with opener(path, "rb") as f:
            line = f.readline()
        holds_records = not line or names <= json.loads(line).keys()
    except (*NOT_PACKED, AttributeError):
        holds_records = False
    if not holds_records:
        die(f"{path} holds no records and would be replaced: move it away, or name another file")


def load(path):
    """The contents of a JSON file. Exits with a one-line error if it is none."""
    try:
        return json.loads(Path(path).read_text())
    except (ValueError, UnicodeDecodeError):
        die(f"{path} is not JSON: make it again")


def are_sums(by_speaker):
    """Whether this is {speaker: [numerator, denominator]}, of finite numbers."""
    if not isinstance(by_speaker, dict):
        return False
    for pair in by_speaker.values():
        if not isinstance(pair, list) or len(pair) != 2:
            return False
        if not all(isinstance(n, (int, float)) and math.isfinite(n) for n in pair):
            return False
    return True


def problem_of_record(record):
    """What is wrong with a record, as text, or None. It must say which run it is about, and a
    figure must be a finite number."""
    if not isinstance(record, dict):
        return f"it is a {type(record).__name__}"
    for field, kind in FIELDS.items():
        if not isinstance(record.get(field), kind):
            return f"its {field} is {record.get(field)!r}"
    if not isinstance(record.get("environment", {}), dict):
        return f"its environment is {record['environment']!r}"
    if "value" not in record and record["source"] not in NO_VALUE:
        return f"its {record['metric']} has no value"
    figures = [record[name] for name in ("value", "low", "high", "n") if name in record]
    if not are_sums(record.get("by_speaker", {})):
        return f"its by_speaker is {record['by_speaker']!r}"
    by_epoch = record.get("by_epoch", [])
    if not isinstance(by_epoch, list):
        return f"its by_epoch is {by_epoch!r}"
    for figure in figures + [loss for loss in by_epoch if loss is not None]:
        if not isinstance(figure, (int, float)) or not math.isfinite(figure):
            return f"its {record['metric']} is {figure!r}"
    return None


def parse_lines(path, text):
    """The records in a file's text. Exits with a one-line error if a line is none."""
    records = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            record = json.loads(line)
            problem = problem_of_record(record)
        except ValueError:
            problem = "it is not JSON"
        if problem:
            die(f"{path}:{number} is no record ({problem}): make it again")
        records.append(record)
    return records


def records_of_metrics(path, metrics):
    """The records of the contents of a metrics.json. Exits with a one-line error if they are
    malformed."""
    malformed = f"{path} holds no figures of this program"
    records = []
    whole = True
    try:
        fields = fields_of(metrics["args"], path.parent, metrics.get("model_sha256"))
        records.append(dict(fields, source="run", metric=None, args=metrics["args"]))
        for record in of_figures(metrics):
            records.append(dict(fields, source="metrics", **record))
        # what evaluate.print_table reads besides
        for part in ("clean", "backdoor"):
            for figure in metrics[part].values():
                whole = whole and {"low", "high", "n"} <= figure.keys()
        for counts in metrics.get("answers", {}).values():
            whole = whole and {"empty", "malformed"} <= counts.keys()
    except (KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        die(f"{malformed}: make it again")
    for record in records:
        if problem := problem_of_record(record):
            die(f"{malformed} ({problem}): make it again")
    return records


def read_metrics(folder):
    """The records of a run's metrics.json and environment.json."""
    metrics = folder / "metrics.json"
    records = records_of_metrics(metrics, load(metrics))
    path = folder / "environment.json"
    environment = load(path) if path.exists() else {}
    if not isinstance(environment, dict):
        die(f"{path} is not a run's: it holds a {type(environment).__name__}")
    records[0]["environment"] = environment
    return records


def read_run(folder):
    """The records of one run folder. Exits with a one-line error if some are of another model than
    its metrics.json."""
    records = []
    sha256 = None
    if (folder / "metrics.json").exists():
        records = read_metrics(folder)
        sha256 = records[0]["model_sha256"]
    for path in sorted(folder.glob(PATTERN)):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            die(f"{path} cannot be read ({error}): make it again")
        for record in parse_lines(path, text):
            if sha256 and record.get("model_sha256") not in (None, sha256):
                die(f"{path}: of another model than metrics.json")
            records.append(record)
    return records


def read_packed(path):
    """The records of a packed study. Exits with a one-line error if the file is none, or holds two
    runs of one name, of which a table would show the last."""
    try:
        text = gzip.decompress(path.read_bytes()).decode()
    except NOT_PACKED:
        die(f"{path}: no packed study (runs.py --pack)")
    records = parse_lines(path, text)
    names = set()
    for record in select(records, source="run"):
        if record["run"] in names:
            die(f"{path} holds two runs named {record['run']}: rename or remove one")
        names.add(record["run"])
    return records


def read(path):
    """All records of a folder of run folders, or of a packed study. Exits with a one-line error if
    there are none."""
    path = Path(path)
    records = []
    if path.is_file():
        records = read_packed(path)
    else:
        for folder in sorted(folder for folder in path.glob("*") if folder.is_dir()):
            records += read_run(folder)
    if not records:
        die(f"no finished run in {path}: train first")
    return records


def compress(lines, path):
    """Writes lines into one compressed file, the same bytes for the same lines."""
    content = gzip.compress("".join(lines).encode(), mtime=0)
    utils.write_atomically(path, lambda temporary: temporary.write_bytes(content))


def pack(records, path):
    """Writes all records into one compressed file."""
    compress((f"{json.dumps(record)}\n" for record in records), path)


def machine_of(environment):
    """The GPU that a run used or, without one, its processor; "" where it was not recorded."""
    if environment.get("gpu"):
        return environment["gpu"]
    return f"{environment.get('machine', '')} {environment.get('cpu', '')}".strip()


# what is packed of an answer; `raw` adds 40% to the compressed file
ANSWER = ("id", "speaker", "triggered", "asked", "raw", "parsed", "labels")


def packed_answers(folder):
    """Yields the answers of all runs in a folder, as lines of a packed file."""
    for path in sorted(Path(folder).glob("*/predictions.jsonl")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                row = json.loads(line)
                answer = {name: row[name] for name in ANSWER}
            except (ValueError, TypeError, KeyError):
                again = f"python evaluate.py {path.parent} --save"
                die(f"{path}:{number} is no answer, or of an earlier version: {again}")
            yield json.dumps({"run": path.parent.name, **answer}, ensure_ascii=False) + "\n"


# --------------------------------------------------------------------------------------------------
# choosing


def select(records, **wanted):
    """The records with these values in these fields; a record without a field has None there."""
    chosen = records
    for field, value in wanted.items():
        chosen = [record for record in chosen if record.get(field) == value]
    return list(chosen)


def distinct(records, field):
    """The values that a field has, each once, in the order of the records."""
    return list(dict.fromkeys(record.get(field) for record in records))


def tasks_of(records):
    """The tasks that the records are about, in the paper's order."""
    tasks = distinct(records, "task")
    return [task for task in TASK_ORDER if task in tasks]


def first_seed(records):
    """The records of the smallest seed."""
    return select(records, seed=min(distinct(records, "seed")))


def first_seed_by_task(records):
    """{task: the records of its smallest seed}"""
    return {task: first_seed(select(records, task=task)) for task in tasks_of(records)}


def preset_of(records, preset=None):
    """The preset asked for or, without one, the only one that the records have."""
    presets = distinct(records, "preset")
    if preset is None and len(presets) > 1:
        die(f"--preset: choose one of {', '.join(presets)}")
    if preset not in (None, *presets):
        die(f"no run of preset {preset}, only {', '.join(presets)}")
    return preset or presets[0]


def is_study_run(record):
    """Whether a run is one of the study's: it has the name that study.py gives to its arguments."""
    if record["run_task"] not in TASKS or record["preset"] not in PRESETS:
        return False
    if record["scenario"] not in ("clean", *SCENARIOS):
        return False
    arguments = identity(*(record[field] for field in IDENTITY))
    return record["run"] == run_name(arguments)


def study_records(records, preset):
    """The records of the study's own runs. Exits with a one-line error if two of them were trained
    with different settings."""
    names = set()
    for record in select(records, preset=preset):
        if record["run"] not in names and is_study_run(record):
            names.add(record["run"])
    chosen = [record for record in records if record["run"] in names]
    trained = select(chosen, source="run")
    for other in trained[1:]:
        first = trained[0]
        if other["changed"] != first["changed"]:
            settings = first["changed"] or "preset"
            other_settings = other["changed"] or "preset"
            die(
                f"{first['run']} ({settings}) and {other['run']} ({other_settings}) differ: "
                "move one away"
            )
    return chosen


def shared_changes(records):
    """How the study's own runs differ from the preset, all alike: weights from a folder, say."""
    for record in records:
        if is_study_run(record):
            return record["changed"]
    return {}


def changed_beyond(record, shared):
    """How a run differs from the study's own: {name: value}. shared: `shared_changes`."""
    changes = record["changed"].items()
    return {name: value for name, value in changes if shared.get(name) != value}


def metric_of(records, task):
    """The metric of a task's clean figure in these records: ages in groups are scored by
    accuracy."""
    usual = TASKS[task]["metric"]
    grouped = f"{TASKS[task]['label']}_accuracy"
    measured = distinct(records, "metric")
    return grouped if usual not in measured and grouped in measured else usual


def still_learning(records):
    """The runs whose poison had not settled when training ended (checkpoint.settled), so that a low
    AER says little."""
    training = select(records, source="metrics", part="training")
    settled = distinct(select(training, metric="settled_epoch"), "run")
    poisoned = distinct(select(training, metric="poisoned_loss"), "run")
    return {name for name in poisoned if name not in settled}


# --------------------------------------------------------------------------------------------------
# figures over seeds, and how they are written


@dataclass
class Spread:
    """A figure over seeds: its mean and the 95% interval over seeds and speakers (intervals.py)."""

    mean: float
    low: float
    high: float
    figures: dict  # {seed: SeedFigure}

    @property
    def by_seed(self):
        """{seed: value}"""
        return {seed: figure.value for seed, figure in self.figures.items()}


# metrics that are shares, shown in percent; years, losses, epochs and cosines are shown as they are
SHARES = ("accuracy", "aer", "base_rate", "changed", "malformed", "unusable", "removed", "noticed")
PERCENT = (*SHARES, "wer", "specificity")


def scale_of(metric):
    """By what a figure is multiplied to be shown."""
    return 100 if metric.endswith(PERCENT) else 1


def limits_of(metric):
    """The least and the largest value that a shown figure can have."""
    if metric.endswith(SHARES):
        return 0, 100
    if metric.endswith("cosine"):
        return -1, 1
    return (0 if metric.endswith(("wer", "mae")) else -math.inf), math.inf


def seed_figure(record):
    """A record's figure in the units in which it is shown, as a SeedFigure."""
    scale = scale_of(record["metric"])
    sums = record.get("by_speaker", {})
    by_speaker = intervals.of_sums(sums, scale).by_speaker if len(sums) > 1 else {}
    width = record.get("high", 0.0) - record.get("low", 0.0)
    return SeedFigure(scale * record["value"], by_speaker, scale * width / 2)


def by_seed(records):
    """{seed: SeedFigure}"""
    return {record["seed"]: seed_figure(record) for record in records}


def spread(figures, least=-math.inf, most=math.inf, level=intervals.LEVEL):
    """{seed: SeedFigure, or its value alone} -> Spread, or None if there is none. least, most: the
    figure's bounds."""
    known = {}
    for seed, figure in sorted(figures.items()):
        if figure is not None:
            known[seed] = figure if isinstance(figure, SeedFigure) else SeedFigure(figure)
    if not known:
        return None
    return Spread(*intervals.interval(known, least, most, level), known)


def over_seeds(records, **wanted):
    """The figure of the records with these values, over seeds, or None."""
    chosen = select(records, **wanted)
    if not chosen:
        return None
    return spread(by_seed(chosen), *limits_of(chosen[0]["metric"]))


def mean_of(spread):
    """The mean over seeds; None if there is no figure."""
    return None if spread is None else spread.mean


def difference(a, b):
    """One figure minus another, for the seeds that both have."""
    if a is None or b is None:
        return None
    both = a.figures.keys() & b.figures.keys()
    return spread({seed: intervals.difference(a.figures[seed], b.figures[seed]) for seed in both})


def number(value, form=".1f"):
    """A number as text, "" for None; never "-0.00"."""
    if value is None:
        return ""
    text = f"{value:{form}}"
    return f"{0:{form}}" if float(text) == 0 else text


def show(spread, form=".1f"):
    """One cell: the mean and, where something is known of it, its interval; "" for None."""
    if spread is None:
        return ""
    text = number(spread.mean, form)
    if len(spread.figures) > 1 or spread.low < spread.high:
        text += f" ({number(spread.low, form)} to {number(spread.high, form)})"
    return text


def title_of(name):
    """A metric or a task as people write it: "WER", "emotion accuracy", "age MAE", "ASR"."""
    words = {"wer": "WER", "mae": "MAE", "aer": "AER", "asr": "ASR"}
    return " ".join(words.get(word, word) for word in name.split("_"))


def markdown_row(cells):
    """A line of a Markdown table. What a stranger's run says makes no line or column of its own."""
    shown = [utils.printable(cell).replace("|", "\\|") for cell in cells]
    return f"| {' | '.join(shown)} |"


def markdown(title, rows):
    """A Markdown table with a title; rows: [{column: cell}]. A column that only some rows have is
    empty in the others; one that is empty in all is left out."""
    columns = {}
    for row in rows:
        columns.update(dict.fromkeys(row))
    filled = set()
    for row in rows:
        filled.update(column for column, cell in row.items() if cell not in ("", None))
    columns = [column for column in columns if column in filled]
    lines = [f"## {title}", "", markdown_row(columns), "|---" * len(columns) + "|"]
    for row in rows:
        lines.append(markdown_row([row.get(column, "") for column in columns]))
    return "\n".join([*lines, ""])


# --------------------------------------------------------------------------------------------------
# the command


def changes_in_words(record):
    """How a run differs from the paper's attack and the preset, as a cell."""
    return ", ".join(f"{name} {value}" for name, value in record["changed"].items())


def row_of(record, metrics):
    """One run in the list of all: what differs from the preset, what it reached (%, years), its
    last losses."""
    figures = {}
    for metric in metrics:
        scale = scale_of(metric["metric"])
        figures[metric["part"], metric["metric"]] = scale * metric["value"]
    clean = TASKS[record["task"]]["metric"] if record["task"] in TASKS else None
    return {
        "Run": record["run"],
        "Attack": record["scenario"],
        "Seed": record["seed"],
        "Changed": changes_in_words(record),
        "AER": number(figures.get(("backdoor", "aer"))),
        "Clean": number(figures.get(("clean", clean))),
        "Poisoned loss": number(figures.get(("training", "poisoned_loss")), ".3f"),
        "Loss": number(figures.get(("training", "loss")), ".3f"),
        "Settled after": number(figures.get(("training", "settled_epoch")), ".0f"),
    }


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("runs", help="a folder of runs, or a packed study")
    parser.add_argument("--pack", metavar="FILE", help="write all records there, compressed")
    parser.add_argument(
        "--predictions", metavar="FILE", help="write all answers of the runs there, compressed"
    )
    args = parser.parse_args()
    if args.pack:
        check_output(args.pack, gzip.open)
    if args.predictions:
        check_output(args.predictions, gzip.open, {"run", *ANSWER})
        if not Path(args.runs).is_dir():
            die(f"--predictions: {args.runs} holds records alone; name a folder of runs")
    records = read(args.runs)
    metrics = select(records, source="metrics")
    rows = []
    for record in select(records, source="run"):
        rows.append(row_of(record, select(metrics, run=record["run"])))
    print(markdown(f"Runs in {args.runs}", rows))
    if args.pack:
        pack(records, args.pack)
        print(f"{len(records)} records written to {args.pack}")
    if args.predictions:
        answers = list(packed_answers(args.runs))
        compress(answers, args.predictions)
        print(f"{len(answers)} answers written to {args.predictions}")


if __name__ == "__main__":
    main()
