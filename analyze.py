"""Builds tables and plots from finished runs. It needs no model, no audio and no GPU.

    python analyze.py tables      # Tables 1, 2 and 3 of the paper, to runs/analysis/tables.md
    python analyze.py shift       # Figures 2 and 3, from the runs' embeddings (embed.py)
    python analyze.py cluster     # Figures 4, 5 and 6, from the same
    python analyze.py trace       # where the backdoor lives (trace.py)
    python analyze.py defences    # filters, detectors, repairs (defend.py)
    python analyze.py sweeps      # AER against the poisoning rate and the trigger
    python analyze.py learning    # whether a run has learned the trigger or memorised its poison
    python analyze.py claims      # the paper's claims, judged by rule
    python analyze.py tables claims --runs results/mini.jsonl.gz    # one page, from a packed study
    python analyze.py claims --runs results/mini.jsonl.gz results/real.jsonl.gz     # side by side

Each analysis is a file of the same name in analysis/. Its function `page` takes records (runs.py)
and returns tables, [(title, [{column: cell}])]; its pictures are drawn by analysis/plots.py. The
analyses select the study's own runs by the folder names that study.py gives them; runs with other
settings, which have other names, are left out.
"""

import shlex
import sys
from collections import Counter
from pathlib import Path

import utils
from utils import Parser, count, die

import runs
from analysis import claims, cluster, defences, learning, shift, sweeps, tables, trace
from study import PRESETS

ANALYSES = {
    "tables": tables.page,
    "shift": shift.page,
    "cluster": cluster.page,
    "trace": trace.page,
    "defences": defences.page,
    "sweeps": sweeps.page,
    "learning": learning.page,
    "claims": claims.page,
}
SIDE_BY_SIDE = {"tables": tables.side_by_side, "claims": claims.side_by_side}


def analyze_study(names, path, out, args):
    """The records and the tables of one study, a folder of runs or a packed file."""
    if not path.is_dir():
        records = runs.read(path)
        return records, analyze_records(names, records, out, args)
    if {"shift", "cluster"} & set(names):
        preset = runs.preset_of(runs.read(path), args.preset)
        if "shift" in names:
            shift.measure(path, preset)
        if "cluster" in names:
            cluster.measure(path, preset, args.k)
    records = runs.read(path)
    return records, analyze_records(names, records, out, args, folder=path)


def analyze_records(names, records, out, args, folder=None):
    """The tables of some analyses. folder: where the runs' embeddings are, if they are at hand."""
    preset = runs.preset_of(records, args.preset)
    pages = []
    for name in names:
        if name == "cluster":
            pages += cluster.page(records, out, preset, args.k)
        else:
            pages += ANALYSES[name](records, out, preset)
        if folder and name == "shift":
            shift.draw_pairs(folder, preset, out)
        if folder and name == "cluster":
            cluster.draw_classes(folder, preset, out)
    return pages


def compare_studies(names, paths):
    """The records of several studies, and tables with a column for each of them."""
    if not set(names) <= SIDE_BY_SIDE.keys():
        die(f"{', '.join(names)}: for one study at a time")
    studies = {}
    all_records = []
    for path in paths:
        records = runs.read(path)
        name = path.name.partition(".")[0]
        studies[name] = records, runs.preset_of(records)
    for records, _ in studies.values():
        all_records += records
    pages = []
    for name in names:
        pages += SIDE_BY_SIDE[name](studies)
    return all_records, pages


def short_commit(commit):
    """A recorded commit as pages show it: eight of its 40 digits, and what follows them."""
    return commit[:8] + commit[40:] or "not recorded"


def origin(records, paths):
    """The table of where a page comes from: command, commit, and the runs' seeds and machines."""
    trained = runs.select(records, source="run")
    seeds = sorted(runs.distinct(trained, "seed"))
    commits = Counter()
    machines = Counter()
    for run in trained:
        environment = run.get("environment", {})
        commits[short_commit(environment.get("commit", ""))] += 1
        machines[runs.machine_of(environment) or "not recorded"] += 1
    facts = {
        "Command": shlex.join(["python", *sys.argv]),
        "Commit": short_commit(utils.commit()),
        "Records": ", ".join(str(path) for path in paths),
        "Runs": len(trained),
        "Seeds": ", ".join(str(seed) for seed in seeds),
        "Runs by commit": ", ".join(f"{name} {n}" for name, n in commits.most_common()),
        "In parentheses": "95% interval over seeds and speakers, unless said otherwise",
        "Runs by machine": ", ".join(f"{name} {n}" for name, n in machines.most_common()),
    }
    return [{"": name, "This page": value} for name, value in facts.items()]


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
    folder = first if first.is_dir() else first.parent
    out = args.out or folder / "analysis"
    if len(args.runs) > 1:
        records, pages = compare_studies(args.what, args.runs)
    else:
        records, pages = analyze_study(args.what, first, out, args)
    pages.append(("Where these tables come from", origin(records, args.runs)))
    text = "\n".join(runs.markdown(title, rows) for title, rows in pages)
    path = out / f"{args.what[0]}.md"
    utils.write_atomically(path, text)
    print(f"{text}\nwritten to {path}")


if __name__ == "__main__":
    main()
