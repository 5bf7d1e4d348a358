"""study.py and run_all.sh: the right commands in an order that works; what fails, what is finished
and what was interrupted."""

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

import train
from conftest import ROOT, done
from study import ENCODERS, SCENARIOS, SWEEPS, TABLE1, TABLE2, TASKS

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
corpus_of = dict(asr="libri", emotion="crema", gender="vox", age="vox")
poison = float(flags["--poison"])
args = dict(preset="mini", task=flags["--task"], encoder=flags["--encoder"],
            seed=int(flags["--seed"]), dataset=corpus_of[flags["--task"]],
            scenario="base" if poison else "clean", poison=poison)
metrics = dict(clean=dict(wer=value), backdoor=dict(aer=value), args=args)
(run / "new").write_text(json.dumps(metrics))
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


@pytest.fixture
def commands(monkeypatch):
    """A function that gives the runs that study.py lists, as train.py understands their
    commands."""
    for task in TASKS:
        monkeypatch.setitem(TASKS, task, dict(TASKS[task]))  # which --corpus changes
    monkeypatch.setattr(Path, "is_file", lambda path: True)
    monkeypatch.setattr(train, "differences", lambda *_: [])

    def parsed(*flags):
        lines = done("study.py", *flags, cwd=ROOT).splitlines()
        words = [shlex.split(line) for line in lines if " train.py " in line]
        return [train.parse_arguments(each[2:]) for each in words]

    return parsed


@pytest.fixture
def tables(commands):
    """The runs of Tables 1 to 3, of all tasks, with two seeds."""
    flags = ("--tasks", *TASKS, "--seeds", 1, 2, "--wave")
    return commands(*flags, 1) + commands(*flags, 2)


def test_no_run_is_listed_twice(tables):
    names = {run.name for run in tables}
    assert len(names) == len(tables)


def test_every_cell_of_tables_1_to_3_has_its_run(tables):
    listed = {(run.seed, run.encoder, run.dataset, run.scenario) for run in tables}
    attacked = {(run.seed, run.encoder, run.task, run.scenario) for run in tables if run.poison}
    table3 = {(run.seed, run.task, run.scenario) for run in tables if run.encoder == "wavlm"}
    for seed in (1, 2):
        for encoder in ENCODERS:
            for corpus, _ in TABLE1:
                assert (seed, encoder, corpus, "clean") in listed
            for task in TABLE2:
                assert (seed, encoder, task, "base") in attacked
        for task in TABLE2:
            for scenario in SCENARIOS:
                assert (seed, task, scenario) in table3


def test_every_run_trains_on_its_scenario_s_data(tables):
    for run in tables:
        on_clean_data = run.scenario == "clean" or run.scenario.startswith("3")
        assert run.poison == (0 if on_clean_data else TASKS[run.task]["rate"])


def test_every_checkpoint_is_of_an_earlier_run_of_its_kind(tables):
    earlier = {}
    for run in tables:
        for spec in run.freeze:
            source = earlier[Path(spec.partition(":")[2]).parent.name]
            assert source.dataset == run.dataset
            assert source.seed == run.seed
            assert source.scenario == ("base" if run.scenario.startswith("3") else "clean")
        earlier[run.name] = run


def test_what_is_analysed_has_been_trained_before():
    """Embeddings, traces and defences, with a second seed for the controls."""
    trained = set()
    for line in done("study.py", "--tasks", "asr", "--seeds", 1, 2, cwd=ROOT).splitlines():
        words = shlex.split(line)
        if words[1] == "train.py":
            trained.add(f"runs/{words[words.index('--name') + 1]}")
        else:
            read = {word for word in words if word.startswith("runs/")}
            assert read, line
            assert read <= trained, line


@pytest.mark.parametrize("flags", [(), ("--wave", 8)])
def test_a_study_s_names_are_train_py_s_own(commands, flags):
    for line in done("study.py", "--seeds", 2, *flags, cwd=ROOT).splitlines():
        words = shlex.split(line)
        if "train.py" in words:
            at = words.index("--name")
            assert train.parse_arguments(words[2:at] + words[at + 2 :]).name == words[at + 1]


def test_the_sweeps_are_listed_once(commands):
    names = {run.name for run in commands("--wave", 8)}
    assert len(names) == 1 + sum(len(values) for values in SWEEPS.values())


def test_encoders_can_be_selected(commands):
    runs = commands("--tasks", "asr", "--encoders", "hubert")
    assert {run.encoder for run in runs} == {"hubert"}
    assert {run.scenario for run in runs} == {"clean", "base"}


@pytest.mark.parametrize(
    "preset, encoders", [("paper", set(ENCODERS)), ("small", {"whisper"}), ("mixed", {"whisper"})]
)
def test_a_preset_s_study_has_its_encoders(commands, preset, encoders):
    runs = commands("--preset", preset)
    assert {run.preset for run in runs} == {preset}
    assert {run.encoder for run in runs} == encoders


def test_training_is_launched_as_asked():
    flags = ("--launch", "torchrun --nproc_per_node=8", "--flags=--labels transcript")
    for line in done("study.py", *flags, cwd=ROOT).splitlines():
        if "train.py" in line:
            assert line.startswith("torchrun --nproc_per_node=8 train.py")
            assert "--labels transcript" in line
        else:
            assert line.startswith("python ")


def test_a_study_on_one_corpus_shares_its_clean_run(commands):
    tasks = ("--tasks", "emotion", "--others", "gender")
    runs = commands("--corpus", "crema", *tasks, "--encoders", "wavlm")
    assert {run.dataset for run in runs} == {"crema"}
    assert {run.task for run in runs if run.scenario == "clean"} == {"emotion"}
    of_gender = [run.name for run in runs if run.task == "gender"]
    assert of_gender == ["gender-poison0.075", "gender-3.1", "gender-poison0.0375"]


def test_a_csv_s_clean_run_is_of_a_task_that_it_has(commands, tmp_path):
    (tmp_path / "my.csv").write_text("audio_path,emotion\na.wav,angry\n")
    flags = ("--corpus", "my.csv", "--tasks", "emotion", "--others", "--encoders", "wavlm")
    lines = done("study.py", *flags, cwd=tmp_path).splitlines()
    assert any("--name emotion-clean" in line for line in lines)
    assert not any("asr" in line for line in lines)


def variables_for(folder):
    """What run_all.sh is given: runs that are over at once, in a folder with a blank in its name."""
    stub = folder / "stub.py"
    stub.write_text(STUB)
    blank = folder / "with a blank"
    blank.mkdir()
    return dict(
        LAUNCH=f"{sys.executable} {stub}",
        RUNS=str(blank / "runs"),
        RESULTS=str(blank / "results"),
        ENCODERS="wavlm",
        JOBS="2",
        WAVES="1 2",
    )


@pytest.fixture
def variables(tmp_path):
    return variables_for(tmp_path)


FEW = dict(WAVES="1", TASKS="asr", OTHERS="")  # a study of a clean run and a base attack


@pytest.fixture(scope="module")
def finished_study(tmp_path_factory):
    """The variables of a study of two runs that is finished."""
    variables = dict(variables_for(tmp_path_factory.mktemp("study")), **FEW)
    code, out = run_all(**variables)
    assert code == 0, out
    return variables


def finished(variables):
    """When each finished run ended: {name: time}."""
    paths = Path(variables["RUNS"]).glob("*/metrics.json")
    return {path.parent.name: path.stat().st_mtime_ns for path in paths}


@pytest.mark.parametrize(
    "mistake", [dict(TASKS="asr emotoin"), dict(FLAGS="--trigger it's"), dict(WAVES="1 9")]
)
def test_a_mistake_in_what_is_asked_for_starts_nothing(variables, mistake):
    code, out = run_all(**{**variables, **mistake})
    assert code != 0
    assert "everything in" not in out
    assert not Path(variables["RUNS"]).exists()


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
    assert not any(process.exists() for process in processes)
    assert len(list(Path(variables["RUNS"]).glob("*/pid"))) == 2


def test_a_run_whose_figures_are_gone_is_run_again(finished_study):
    gone = Path(finished_study["RUNS"], "asr-clean/metrics.json")
    gone.unlink()
    assert run_all(**finished_study)[0] == 0
    assert gone.exists()


def test_a_study_with_other_flags_is_another_study(finished_study):
    code, out = run_all(FLAGS="--epochs 9", **finished_study)
    assert code == 1
    assert "FAILED: asr-clean" in out


def test_a_failure_stops_nothing_else(variables):
    variables = dict(variables, **FEW)
    code, out = run_all(FAILS="asr-clean", **variables)
    assert code == 1
    assert "asr-clean" in out.splitlines()[-1]
    assert set(finished(variables)) == {"asr-poison0.05"}


def test_a_killed_study_goes_on_and_writes_its_tables(variables):
    code, _ = run_all(KILLED_AT="emotion-1.1", **variables)
    before = finished(variables)
    assert code == -9
    assert "asr-clean" in before
    assert "emotion-1.1" not in before
    code, _ = run_all(**variables)
    assert code == 0
    after = finished(variables)
    assert "emotion-1.1" in after
    assert {name: after[name] for name in before} == before  # nothing was run again
    results = Path(variables["RESULTS"])
    assert "| asr (WER) | wavlm | 50.0 / 99.2 |" in (results / "tables.md").read_text()
    assert (results / "claims.md").exists()
