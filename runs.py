"""Every finished run's figures as one flat table of records: read from run folders, packed, read
from a packed study.

    python runs.py runs                                # one row a run: what it reached
    python runs.py runs --pack results/mini.jsonl.gz   # all records in one file, for analyze.py

A record is a dict of plain fields, {field: value}. Some fields stand in every record and say which
run it is about:

    run, run_task                            the run's folder and the task that it was trained on
    task                                     whose attack was measured (a clean run serves every
                                             task of its corpus)
    corpus, preset, encoder, attack, seed    attack: "clean", or a row of Table 3
    poison, changed                          its poisoning rate; how it differs from the paper's
                                             attack and the preset
    model_sha256                             the model.pt that was measured

`source` says which table a record is for: "run" (arguments and environment), "metrics", "evaluate",
"shift", "cluster", "transplant", "patch", "filter", "detect" or "repair". `metric` names the
figure; `value`, `low`, `high` (95% interval) and `n` hold it, as fractions, years or nats per
token. Losses also have `by_epoch`. What else a record has is described where it is written:
evaluate.py, embed.py, analyze.py, trace.py, defend.py.
"""

import gzip
import json
from dataclasses import dataclass
from pathlib import Path

import utils
from utils import (
    Parser,
    die,
)

from study import NEARER, PRESETS, SCENARIOS, TABLE2, TASKS, deviations, identity, run_name

PATTERN = "records-*.jsonl"  # what a run folder holds beside metrics.json
TASK_ORDER = (*TABLE2, *(task for task in TASKS if task not in TABLE2))  # the paper's, then others

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


def of_figures(figures):
    """Yields the records of {part: {metric: figure}}, as metrics.json has them."""
    for part in ("clean", "triggered", "backdoor", "training"):
        for metric, figure in figures.get(part, {}).items():
            yield dict(part=part, metric=metric, **figure)


def write(path, records):
    """Writes records to a run folder, one line each."""
    utils.write_atomically(path, "".join(f"{json.dumps(record)}\n" for record in records))


def load(path):
    """The contents of a JSON file. Ends in one line if it is none."""
    try:
        return json.loads(Path(path).read_text())
    except (ValueError, UnicodeDecodeError):
        die(f"{path} is not JSON: make it again")


def lines_of(path, text):
    """The records in a file's text. Ends in one line if a line is none."""
    records = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            record = json.loads(line)
            [record[field] for field in ("run", "source", "metric")]
        except (ValueError, KeyError, TypeError):
            die(f"{path}:{number} is no record: make it again")
        records.append(record)
    return records


def read_run(folder):
    """The records of one run folder. Ends in one line if some are of another model than its
    metrics.json."""
    records, sha256 = [], None
    if (folder / "metrics.json").exists():
        figures = load(folder / "metrics.json")
        try:
            args, sha256 = figures["args"], figures.get("model_sha256")
            fields = fields_of(args, folder, sha256)
        except (KeyError, TypeError, AttributeError):
            die(f"{folder / 'metrics.json'} holds no figures of this program: make it again")
        path = folder / "environment.json"
        environment = load(path) if path.exists() else {}
        records.append(dict(fields, source="run", metric=None, args=args, environment=environment))
        records += [dict(fields, source="metrics", **record) for record in of_figures(figures)]
    for path in sorted(folder.glob(PATTERN)):
        for record in lines_of(path, path.read_text()):
            if sha256 and record.get("model_sha256") not in (None, sha256):
                die(f"{path}: of another model than metrics.json")
            records.append(record)
    return records


def read(path):
    """All records of a folder of run folders, or of a packed study. Ends in one line if there are
    none."""
    path = Path(path)
    if path.is_file():
        try:
            records = lines_of(path, gzip.decompress(path.read_bytes()).decode())
        except (OSError, EOFError, ValueError):
            die(f"{path}: no packed study (runs.py --pack)")
    else:
        folders = sorted(folder for folder in path.glob("*") if folder.is_dir())
        records = []
        for folder in folders:
            records += read_run(folder)
    if not records:
        die(f"no finished run in {path}: train first")
    return records


def pack(records, path):
    """Writes all records into one compressed file, the same bytes for the same records."""
    text = "".join(f"{json.dumps(record)}\n" for record in records)
    content = gzip.compress(text.encode(), mtime=0)
    utils.write_atomically(path, lambda temporary: temporary.write_bytes(content))


# --------------------------------------------------------------------------------------------------
# choosing


def select(records, **wanted):
    """The records with these values in these fields; a record without a field has None there."""
    found = records
    for field, value in wanted.items():
        found = [record for record in found if record.get(field) == value]
    return list(found)


def distinct(records, field):
    """The values that a field has, each once, in the order of the records."""
    return list(dict.fromkeys(record.get(field) for record in records))


def tasks_of(records):
    """The tasks that the records are about, in the paper's order."""
    found = distinct(records, "task")
    return [task for task in TASK_ORDER if task in found]


def preset_of(records, preset=None):
    """The preset asked for or, without one, the only one that the records have."""
    found = distinct(records, "preset")
    if preset is None and len(found) > 1:
        die(f"--preset: choose one of {', '.join(found)}")
    if preset not in (None, *found):
        die(f"no run of preset {preset}, only {', '.join(found)}")
    return preset or found[0]


def is_own(record):
    """Whether a run is one of the study's: it has the name that study.py gives to its arguments."""
    known = record["run_task"] in TASKS and record["preset"] in PRESETS
    if not known or record["scenario"] not in ("clean", *SCENARIOS):
        return False
    who = (record[field] for field in ("preset", "run_task", "encoder", "scenario", "seed"))
    return record["run"] == run_name(identity(*who))


def own(records, preset):
    """The records of the study's own runs. Ends in one line if two of them were trained with
    different settings."""
    names = {r["run"] for r in select(records, source="run", preset=preset) if is_own(r)}
    names |= {
        r["run"] for r in select(records, preset=preset) if r["run"] not in names and is_own(r)
    }
    chosen = [r for r in records if r["run"] in names]
    trained = select(chosen, source="run")
    for other in trained[1:]:
        first = trained[0]
        if other["changed"] != first["changed"]:
            ours, theirs = (r["changed"] or "preset" for r in (first, other))
            die(f"{first['run']} ({ours}) and {other['run']} ({theirs}) differ: move one away")
    return chosen


def metric_of(records, task):
    """The metric that a task's clean figure has in these records: ages in groups are scored by
    accuracy."""
    usual, names = TASKS[task]["metric"], distinct(records, "metric")
    grouped = f"{TASKS[task]['label']}_accuracy"
    return grouped if usual not in names and grouped in names else usual


def still_learning(records):
    """The runs whose loss on poisoned samples was still falling when training ended, so that a low
    AER says little: it had not settled, or it has fallen ever since, too slowly to be noticed from
    one epoch to the next, and is still above that of all."""
    training = select(records, source="metrics", part="training")
    losses = {r["run"]: r for r in select(training, metric="loss")}
    settled = {r["run"]: r["value"] for r in select(training, metric="settled_epoch")}
    found = set()
    for record in select(training, metric="poisoned_loss"):
        name = record["run"]
        if name not in settled:
            found.add(name)
            continue
        pairs = zip(record["by_epoch"], losses[name]["by_epoch"])
        excess = [poisoned - loss for poisoned, loss in pairs]
        fallen = excess[settled[name] - 1] - excess[-1]
        if excess[-1] >= NEARER and fallen >= NEARER:
            found.add(name)
    return found


# --------------------------------------------------------------------------------------------------
# figures over seeds, and how they are written


@dataclass
class Spread:
    """A figure over seeds."""

    mean: float
    low: float
    high: float
    by_seed: dict  # {seed: figure}


def scale_of(metric):
    """Shares are shown in percent; years, losses, epochs and cosines as they are."""
    shares = metric.endswith(("wer", "accuracy", "aer", "removed", "noticed"))
    return 100 if shares else 1


def by_seed(records):
    """{seed: figure} in the units that are shown, percent or years."""
    return {r["seed"]: scale_of(r["metric"]) * r["value"] for r in records}


def spread(values):
    """{seed: figure} -> Spread, or None if there is none."""
    values = {seed: v for seed, v in sorted(values.items()) if v is not None}
    if not values:
        return None
    figures = list(values.values())
    return Spread(sum(figures) / len(figures), min(figures), max(figures), values)


def over_seeds(records, **wanted):
    """The figure of the records with these values, over seeds, or None."""
    return spread(by_seed(select(records, **wanted)))


def difference(a, b):
    """One figure minus another, for the seeds that both have."""
    if a is None or b is None:
        return None
    both = a.by_seed.keys() & b.by_seed.keys()
    return spread({seed: a.by_seed[seed] - b.by_seed[seed] for seed in both})


def number(value, form=".1f"):
    """A number as text, "" for None; never "-0.00"."""
    if value is None:
        return ""
    text = f"{value:{form}}"
    return f"{0:{form}}" if float(text) == 0 else text


def show(found, form=".1f"):
    """One cell: the mean and, if there are several seeds, the range; "" for None."""
    if found is None:
        return ""
    text = number(found.mean, form)
    if len(found.by_seed) > 1:
        text += f" ({number(found.low, form)} to {number(found.high, form)})"
    return text


def title_of(metric):
    """A metric as people write it: "WER", "emotion accuracy", "age MAE"."""
    words = {"wer": "WER", "mae": "MAE", "aer": "AER"}
    return " ".join(words.get(word, word) for word in metric.split("_"))


def markdown(title, rows):
    """A Markdown table with a title; rows: [{column: cell}]. A column that only some rows have is
    empty in the others."""
    columns = {}
    for row in rows:
        columns.update(dict.fromkeys(row))
    lines = [f"## {title}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in rows:
        lines.append(f"| {' | '.join(str(row.get(column, '')) for column in columns)} |")
    return "\n".join([*lines, ""])


# --------------------------------------------------------------------------------------------------


def row_of(record, metrics):
    """One run in the list of all: what differs from the preset, what it reached (%, years), its
    last losses."""
    clean = TASKS[record["task"]]["metric"] if record["task"] in TASKS else None
    figures = {(r["part"], r["metric"]): r["value"] * scale_of(r["metric"]) for r in metrics}
    return {
        "Run": record["run"],
        "Attack": record["scenario"],
        "Seed": record["seed"],
        "Changed": ", ".join(f"{name} {value}" for name, value in record["changed"].items()),
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
    args = parser.parse_args()
    records = read(args.runs)
    metrics = select(records, source="metrics")
    rows = [
        row_of(record, select(metrics, run=record["run"]))
        for record in select(records, source="run")
    ]
    print(markdown(f"Runs in {args.runs}", rows))
    if args.pack:
        pack(records, args.pack)
        print(f"{len(records)} records written to {args.pack}")


if __name__ == "__main__":
    main()
