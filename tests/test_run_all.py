"""study.py and run_all.sh: the right commands in an order that works; what fails, what is finished and what was interrupted."""

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

import train
from conftest import ROOT, done
from study import ENCODERS, SCENARIOS, SWEEPS, TABLE1, TABLE2, TASKS, VARIANTS

pytestmark = pytest.mark.slow

STUB = """
import json, os, sys, time
from pathlib import Path
flags = dict(zip(sys.argv[1:], sys.argv[2:]))
run = Path(flags["--runs"]) / flags["--name"]
if run.name == os.environ.get("FAILS"):
    sys.exit("no")
if run.name == os.environ.get("KILLED_AT"):
    os.killpg(0, 9)
if os.environ.get("SLOWLY"):
    run.mkdir(exist_ok=True)
    (run / "pid").write_text(str(os.getpid()))
    time.sleep(100)
for spec in [b for a, b in zip(sys.argv, sys.argv[1:]) if a == "--freeze"]:
    assert Path(spec.partition(":")[2]).is_file(), spec
run.mkdir(exist_ok=True)
if (run / "flags").exists() and (run / "flags").read_text() != repr(sys.argv[1:]):
    sys.exit("other flags")
(run / "flags").write_text(repr(sys.argv[1:]))
(run / "model.pt").touch()
if (run / "metrics.json").exists():
    sys.exit()
value = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 10}
args = dict(preset="mini", task=flags["--task"], encoder=flags["--encoder"], seed=int(flags["--seed"]),
            dataset=dict(asr="libri", emotion="crema", gender="vox", age="vox")[flags["--task"]],
            scenario="base" if float(flags["--poison"]) else "clean", poison=float(flags["--poison"]))
(run / "new").write_text(json.dumps(dict(clean=dict(wer=value), backdoor=dict(aer=value), args=args)))
(run / "new").rename(run / "metrics.json")
"""


def start_all(**variables):
    return subprocess.Popen(
        ["bash", str(ROOT / "run_all.sh")],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env={**os.environ, **variables},
    )


def run_all(**variables):
    process = start_all(**variables)
    out, _ = process.communicate()
    return process.returncode, out


def commands(monkeypatch, *flags):
    """The runs that study.py lists, as train.py understands their commands."""
    monkeypatch.setattr(Path, "is_file", lambda path: True)
    monkeypatch.setattr(train, "differences", lambda *_: [])
    lines = done("study.py", *flags, cwd=ROOT).splitlines()
    return [train.parse_arguments(shlex.split(line)[2:]) for line in lines if " train.py " in line]


def test_every_cell_of_the_tables_has_its_run_and_every_checkpoint_comes_first(monkeypatch):
    runs = [
        run
        for wave in (1, 2)
        for run in commands(monkeypatch, "--tasks", *TASKS, "--seeds", 1, 2, "--wave", wave)
    ]
    names = [run.name for run in runs]
    assert len(set(names)) == len(names) == 2 * (4 * 7 + 4 * 9)
    have = {(run.seed, run.dataset, run.task, run.encoder, run.scenario) for run in runs}
    for seed in (1, 2):
        for encoder in ENCODERS:
            for corpus, _ in TABLE1:
                assert any((seed, corpus, task, encoder, "clean") in have for task in TABLE2)
            for task in TABLE2:
                assert any(h[0] == seed and h[2:] == (task, encoder, "base") for h in have)
        for task in TABLE2:
            assert {h[4] for h in have if h[0] == seed and h[2:4] == (task, "wavlm")} >= set(
                SCENARIOS
            )
    for i, run in enumerate(runs):
        assert run.poison == (0 if run.scenario[0] in "c3" else TASKS[run.task]["rate"])
        for spec in run.freeze:
            source = runs[names.index(Path(spec.partition(":")[2]).parent.name)]
            assert (
                names.index(source.name) < i
                and source.dataset == run.dataset
                and source.seed == run.seed
            )
            assert (
                source.scenario == ("base" if run.scenario[0] == "3" else "clean")
                and not source.freeze
            )


def test_what_is_looked_at_has_been_trained_before():
    """Embeddings, traces and defences, with a second seed for the controls."""
    done_before = set()
    for line in done("study.py", "--tasks", "asr", "--seeds", 1, 2, cwd=ROOT).splitlines():
        words = shlex.split(line)
        if words[1] == "train.py":
            done_before.add(f"runs/{words[words.index('--name') + 1]}")
        else:
            looked_at = {word for word in words if word.startswith("runs/")}
            assert looked_at and looked_at <= done_before, line
    assert len(done_before) == 2 * (4 * 7 + 9 + 3) + 4 * len(VARIANTS)


def test_a_study_s_names_are_train_py_s_own(monkeypatch):
    sweeps = [
        line
        for line in done("study.py", "--seeds", 2, "--wave", 8, cwd=ROOT).splitlines()
        if "train.py" in line
    ]
    assert (
        len({line.split("--name ")[1].split()[0] for line in sweeps})
        == len(sweeps)
        == 1 + sum(map(len, SWEEPS.values()))
    )
    for line in done("study.py", "--seeds", 2, cwd=ROOT).splitlines() + sweeps:
        words = shlex.split(line)
        if "train.py" in words:
            monkeypatch.setattr(Path, "is_file", lambda path: True)
            monkeypatch.setattr(train, "differences", lambda *_: [])
            at = words.index("--name")
            assert train.parse_arguments(words[2:at] + words[at + 2 :]).name == words[at + 1]


def test_selections_and_presets(monkeypatch):
    runs = commands(monkeypatch, "--tasks", "asr", "--encoders", "hubert")
    assert {run.encoder for run in runs} == {"hubert"} and {run.scenario for run in runs} == {
        "clean",
        "base",
    }
    assert all(
        run.preset == "paper"
        for run in commands(monkeypatch, "--preset", "paper", "--flags=--data-root /data")
    )
    assert {run.encoder for run in commands(monkeypatch, "--preset", "small")} == {"whisper"}
    lines = done(
        "study.py",
        "--launch",
        "torchrun --nproc_per_node=8",
        "--flags=--labels transcript",
        cwd=ROOT,
    ).splitlines()
    assert all(
        line.startswith(
            (
                "torchrun --nproc_per_node=8 train.py",
                "python embed.py",
                "python trace.py",
                "python defend.py",
            )
        )
        for line in lines
    )
    assert all("--labels transcript" in line for line in lines if "train.py" in line)


def test_a_study_on_one_corpus_shares_its_clean_run(monkeypatch):
    for task in TASKS:
        monkeypatch.setitem(TASKS, task, dict(TASKS[task]))  # which --corpus changes
    runs = commands(
        monkeypatch,
        "--corpus",
        "crema",
        "--tasks",
        "emotion",
        "--others",
        "gender",
        "--encoders",
        "wavlm",
    )
    assert {run.dataset for run in runs} == {"crema"} and {
        run.name for run in runs if run.task == "emotion"
    } >= {"emotion-clean", "emotion-2.3"}
    assert [run.name for run in runs if run.task != "emotion"] == [
        "gender-poison0.075",
        "gender-3.1",
        "gender-poison0.0375",
    ]


def test_a_csv_without_transcripts_has_a_clean_run_of_a_task_that_it_has(monkeypatch, tmp_path):
    for task in TASKS:
        monkeypatch.setitem(TASKS, task, dict(TASKS[task]))  # which --corpus changes
    (tmp_path / "my.csv").write_text("audio_path,emotion\na.wav,angry\n")
    flags = ["--corpus", "my.csv", "--tasks", "emotion", "--others", "--encoders", "wavlm"]
    lines = done("study.py", *flags, cwd=tmp_path).splitlines()
    assert any("--name emotion-clean" in line for line in lines)
    assert not any("--task asr" in line or "asr-clean" in line for line in lines)


@pytest.fixture
def variables(tmp_path):
    """What run_all.sh is given: runs that are over at once, in a folder with a blank in its name."""
    stub, folder = tmp_path / "stub.py", tmp_path / "with a blank"
    stub.write_text(STUB)
    folder.mkdir()
    return dict(
        LAUNCH=f"{sys.executable} {stub}",
        RUNS=str(folder / "runs"),
        RESULTS=str(folder / "results"),
        ENCODERS="wavlm",
        JOBS="2",
        WAVES="1 2",
    )


@pytest.mark.parametrize(
    "mistake", [dict(TASKS="asr emotoin"), dict(FLAGS="--trigger it's"), dict(WAVES="1 9")]
)
def test_a_mistake_in_what_is_asked_for_starts_nothing(variables, mistake):
    code, out = run_all(**{**variables, **mistake})
    assert code != 0 and "everything in" not in out and not Path(variables["RUNS"]).exists()


def test_sigterm_stops_the_runs_and_starts_no_others(variables):
    study = start_all(SLOWLY="1", **variables)
    running = []
    while len(running) < 2 and study.poll() is None:
        time.sleep(0.05)
        running = list(Path(variables["RUNS"]).glob("*/pid"))
    study.terminate()
    assert study.wait() == 143
    processes = [Path("/proc", path.read_text()) for path in running]
    deadline = time.time() + 60
    while any(process.exists() for process in processes) and time.time() < deadline:
        time.sleep(0.1)
    assert time.time() < deadline and len(list(Path(variables["RUNS"]).glob("*/pid"))) == 2


def test_a_run_whose_folder_is_gone_is_run_again(variables):
    variables = dict(variables, WAVES="1", TASKS="asr", OTHERS="")
    assert run_all(**variables)[0] == 0
    gone = Path(variables["RUNS"], "asr-clean/metrics.json")
    gone.unlink()
    assert run_all(**variables)[0] == 0 and gone.exists()


def test_a_failure_stops_nothing_else_and_a_killed_study_goes_on(variables):
    folder = Path(variables["RUNS"]).parent
    code, _ = run_all(KILLED_AT="emotion-1.1", **variables)
    finished = {
        path.parent.name: path.stat().st_mtime_ns for path in folder.glob("runs/*/metrics.json")
    }
    assert code == -9 and "asr-clean" in finished and "emotion-1.1" not in finished
    code, out = run_all(FAILS="emotion-2.2", **variables)
    after = {
        path.parent.name: path.stat().st_mtime_ns for path in folder.glob("runs/*/metrics.json")
    }
    assert code == 1 and "emotion-2.2" in out.splitlines()[-1] and "emotion-2.2" not in after
    assert all(
        after[name] == at for name, at in finished.items()
    )  # what was finished was not run again
    code, out = run_all(**variables)
    assert code == 0 and len(list(folder.glob("runs/*/metrics.json"))) == 27 and "FAILED" not in out
    assert "| asr (WER) | wavlm | 50.0 / 99.2 |" in (folder / "results/tables.md").read_text()
    assert (folder / "results/claims.md").exists()
    code, out = run_all(FLAGS="--epochs 9", **variables)  # another study is not taken for this one
    assert code == 1 and "FAILED: asr-clean" in out
