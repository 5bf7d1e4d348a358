"""Turns what has run into tables and pictures; needs no model, no audio, no GPU.

    python analyze.py tables      # Tables 1, 2 and 3 of the paper, to runs/analysis/tables.md
    python analyze.py shift       # Figures 2 and 3, from the runs' embeddings (embed.py)
    python analyze.py cluster     # Figures 4, 5 and 6, from the same
    python analyze.py trace       # where the backdoor lives (trace.py)
    python analyze.py defences    # filters, detectors, repairs (defend.py)
    python analyze.py sweeps      # AER against the poisoning rate and the trigger
    python analyze.py claims      # the paper's 48 claims
    python analyze.py tables claims --runs results/mini.jsonl.gz    # one page, from a packed study
    python analyze.py claims --runs results/mini.jsonl.gz results/real.jsonl.gz     # side by side

Every analysis is a function of records (runs.py) that returns tables, [(title, [{column: cell}])];
pictures are drawn by analysis/plots.py. It reads the study's own runs, by the names study.py gives them;
runs with other settings have other names.
"""

import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

import utils
from utils import ROOT, Parser, count, die

import runs
from analysis import claims, cluster, defences, shift, sweeps, tables, trace
from runs import select
from study import PRESETS


def origin(records, paths):
    """Where a page comes from: command and commit; the runs' seeds, commits and machines."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    git = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    trained = select(records, source="run")
    commits, machines = Counter(), Counter()
    for run in trained:
        environment = run["environment"]
        commits[environment.get("commit", "")[:8] or "not recorded"] += 1
        processor = [environment.get(name, "") for name in ("machine", "cpu")]
        machines[environment.get("gpu") or " ".join(processor).strip() or "not recorded"] += 1
    facts = {
        "Command": shlex.join(["python", *sys.argv]),
        "Commit": git.stdout.strip() or "not recorded",
        "Records": ", ".join(map(str, paths)),
        "Runs": len(trained),
        "Seeds": ", ".join(map(str, sorted(runs.distinct(trained, "seed")))),
        "Runs by commit": ", ".join(f"{name} {n}" for name, n in commits.most_common()),
        "Runs by machine": ", ".join(f"{name} {n}" for name, n in machines.most_common()),
    }
    return [{"": name, "This page": value} for name, value in facts.items()]


ANALYSES = dict(
    tables=tables.page,
    shift=shift.page,
    cluster=cluster.page,
    trace=trace.page,
    defences=defences.page,
    sweeps=sweeps.page,
    claims=claims.page,
)


def one_study(what, path, out, args):
    """The records and tables of some analyses of one study."""
    folder = path if path.is_dir() else None
    preset = args.preset
    if folder and {"shift", "cluster"} & set(what):
        preset = runs.preset_of(runs.read(folder), args.preset)
    if folder and "shift" in what:
        shift.measure(folder, preset)
    if folder and "cluster" in what:
        cluster.measure(folder, preset, args.k)
    records = runs.read(path)
    preset = runs.preset_of(records, args.preset)
    found = []
    for name in what:
        more = dict(folder=folder) if name in ("shift", "cluster") else {}
        if name == "cluster":
            more["ks"] = args.k
        found += ANALYSES[name](records, out, preset, **more)
    return records, found


def several_studies(what, paths):
    """The records and tables of several studies, a column each."""
    if not set(what) <= {"tables", "claims"}:
        die(f"{', '.join(what)}: for one study at a time")
    studies = {}
    for path in paths:
        records = runs.read(path)
        studies[path.name.partition(".")[0]] = records, runs.preset_of(records)
    makers = dict(tables=tables.side_by_side, claims=claims.side_by_side)
    found, together = [], []
    for name in what:
        found += makers[name](studies)
    for records, _ in studies.values():
        together += records
    return together, found


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("what", nargs="+", choices=ANALYSES, help="which of the analyses")
    parser.add_argument(
        "--runs",
        nargs="+",
        type=Path,
        default=[Path("runs")],
        help="a folder of runs, or packed studies (python runs.py RUNS --pack FILE)",
    )
    parser.add_argument("--preset", choices=PRESETS, help="whose runs, if there are several")
    parser.add_argument("--out", type=Path, help="folder to write (default: RUNS/analysis)")
    parser.add_argument("--k", type=count, nargs="+", default=[2, 4], help="numbers of clusters")
    args = parser.parse_args()
    first = args.runs[0]
    out = args.out or (first if first.is_dir() else first.parent) / "analysis"
    if len(args.runs) > 1:
        records, found = several_studies(args.what, args.runs)
    else:
        records, found = one_study(args.what, first, out, args)
    found.append(("Where these tables come from", origin(records, args.runs)))
    text = "\n".join(runs.markdown(title, rows) for title, rows in found)
    path = out / f"{args.what[0]}.md"
    utils.write_atomically(path, text)
    print(f"{text}\nwritten to {path}")


if __name__ == "__main__":
    main()
