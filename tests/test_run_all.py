"""study.py and run_all.sh: the study's jobs, their order, and what is done again."""

import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

import study
import train
from conftest import ROOT
from study import ENCODERS, SCENARIOS, TASKS

pytestmark = pytest.mark.slow

# a stand-in for train.py, which is over at once
STUB = """
import json, os, sys, time
from pathlib import Path

flags = dict(zip(sys.argv[1:], sys.argv[2:]))
run = Path(flags["--runs"]) / flags["--name"]
if run.name == os.environ.get("FAILS"):
    sys.exit("no")
if run.name == os.environ.get("KILLED_AT"):
    os.killpg(0, 9)
for word, spec in zip(sys.argv, sys.argv[1:]):
    if word == "--freeze":
        assert Path(spec.partition(":")[2]).is_file(), spec
run.mkdir(exist_ok=True)
settings = [word for word in sys.argv[1:] if word != "--overwrite"]
if (run / "args.json").exists() and "--overwrite" not in sys.argv:
    assert json.loads((run / "args.json").read_text()) == settings, "another run"
(run / "args.json").write_text(json.dumps(settings))
with open(run / "starts", "a") as f:
    print(*sys.argv[1:], file=f)
if os.environ.get("SLOWLY"):
    (run / "pid").write_text(str(os.getpid()))
    time.sleep(100)
(run / "model.pt").touch()
poison = float(flags["--poison"])
corpora = dict(asr="libri", emotion="crema", gender="vox", age="vox")
args = dict(preset="mini", task=flags["--task"], encoder=flags["--encoder"], poison=poison)
args.update(seed=int(flags["--seed"]), dataset=corpora[flags["--task"]])
args.update(scenario="base" if poison else "clean")
figure = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 10}
metrics = dict(clean=dict(wer=figure), backdoor=dict(aer=figure), args=args)
(run / "new").write_text(json.dumps(metrics))
(run / "new").rename(run / "metrics.json")
"""


# a stand-in for python: evaluate.py, which finds no model in the stub's runs, is over at once too
PYTHON = """#!/bin/bash
[ "$1" = evaluate.py ] || exec {python} "$@"
[ "$2" = --sounds ] || exit 9
touch "$3/records-sounds${{5:+-$5}}.jsonl"
"""


def start_all(*stages, **variables):
    return subprocess.Popen(
        ["bash", str(ROOT / "run_all.sh"), *stages],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env={**os.environ, **variables},
    )


def run_all(*stages, **variables):
    """(exit status, output) of run_all.sh with these environment variables."""
    process = start_all(*stages, **variables)
    output, _ = process.communicate()
    return process.returncode, output


def jobs_of(*flags):
    """The study's jobs."""
    parsed = study.parse_arguments(flags)
    return study.study_jobs(parsed)


def test_each_cell_of_the_tables_has_its_run():
    jobs = jobs_of("--tasks", *TASKS, "--seeds", "1", "2")
    names = {job.name for job in jobs}
    for seed in (1, 2):
        for encoder in ENCODERS:
            for task in TASKS:
                base = study.identity("mini", task, encoder, "base", seed)
                clean = {**base, "task": study.clean_task(task), "scenario": "clean", "poison": 0}
                assert study.run_name(base) in names
                assert study.run_name(clean) in names
        for task in TASKS:
            for scenario in SCENARIOS:
                run = study.identity("mini", task, "wavlm", scenario, seed)
                assert study.run_name(run) in names


def test_what_a_job_needs_is_made_by_an_earlier_one():
    made = set()
    for job in jobs_of("--tasks", *TASKS, "--seeds", "1", "2"):
        assert made >= set(job.needs), job
        assert job.target not in made
        made.add(job.target)


def test_a_job_needs_every_run_that_its_command_names():
    for job in jobs_of("--seeds", "1", "2"):
        own = Path(job.target).parent.name
        named = set(re.findall(r"runs/([^/ ]+)", shlex.join(job.command))) - {own}
        assert {Path(need).parent.name for need in job.needs} - {own} == named


def test_a_run_has_the_name_that_train_gives_it(monkeypatch):
    monkeypatch.setattr(Path, "is_file", lambda path: True)
    monkeypatch.setattr(train, "differences", lambda *_: [])
    for job in jobs_of("--seeds", "2"):
        if job.kind == "train":
            words = job.command[2:]
            at = words.index("--name")
            assert train.parse_arguments(words[:at] + words[at + 2 :]).name == job.name


def test_other_sounds_are_heard_by_every_base_attack():
    jobs = jobs_of("--seeds", "1", "2")
    targets = {job.target for job in jobs if job.kind == "sounds"}
    for seed in (1, 2):
        for task in TASKS:
            for encoder in ENCODERS:
                base = study.identity("mini", task, encoder, "base", seed)
                assert f"{study.run_name(base)}/records-sounds.jsonl" in targets
            propagated = study.identity("mini", task, "wavlm", "3.1", seed)
            assert f"{study.run_name(propagated)}/records-sounds.jsonl" in targets
    assert "gender-clean/records-sounds-age.jsonl" in targets


def test_seeds_encoders_and_presets_can_be_chosen():
    hubert = jobs_of("--encoders", "hubert")
    assert {job.command[7] for job in hubert if job.kind == "train"} == {"hubert"}
    paper = jobs_of("--preset", "paper", "--flags=--data-root /data")
    for job in paper:
        if job.kind == "train":
            assert job.command[-2:] == ["--data-root", "/data"]
    small = jobs_of("--preset", "small")
    assert {job.command[7] for job in small if job.kind == "train"} == {"whisper"}


def test_only_training_is_launched_by_torchrun():
    for job in jobs_of("--launch", "torchrun --nproc_per_node=8"):
        assert job.command[0] == ("torchrun" if job.kind == "train" else "python")


@pytest.fixture
def own_tasks(monkeypatch):
    """A copy of TASKS, which --corpus changes."""
    for task in TASKS:
        monkeypatch.setitem(TASKS, task, dict(TASKS[task]))


def test_a_study_on_one_corpus_shares_its_clean_run(own_tasks):
    flags = ["--corpus", "crema", "--tasks", "emotion", "--others", "gender"]
    jobs = jobs_of(*flags, "--encoders", "wavlm")
    clean = {job.name for job in jobs if job.kind == "train" and "clean" in job.name}
    assert clean == {"emotion-clean"}


def test_a_csv_s_clean_run_is_of_a_task_that_it_has(own_tasks):
    flags = ["--corpus", "my.csv", "--tasks", "emotion", "--others"]
    tasks = {job.command[5] for job in jobs_of(*flags) if job.kind == "train"}
    assert tasks == {"emotion"}


@pytest.fixture
def variables(tmp_path):
    """What run_all.sh is given: runs that are over at once, in a folder with a blank in its name."""
    stub, folder = tmp_path / "stub.py", tmp_path / "with a blank"
    stub.write_text(STUB)
    folder.mkdir()
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin/python"
    python.write_text(PYTHON.format(python=sys.executable))
    python.chmod(0o755)
    return dict(
        PATH=f"{python.parent}:{os.environ['PATH']}",
        LAUNCH=f"{sys.executable} {stub}",
        RUNS=str(folder / "runs"),
        RESULTS=str(folder / "results"),
        ENCODERS="wavlm",
        TASKS="asr",
        OTHERS="",
        JOBS="2",
        PAGES="",
    )


def starts(variables):
    """{run: how often it was started}"""
    paths = Path(variables["RUNS"]).glob("*/starts")
    return {path.parent.name: len(path.read_text().splitlines()) for path in paths}


@pytest.mark.parametrize(
    "mistake", [dict(TASKS="asr emotoin"), dict(FLAGS="--trigger it's"), dict(JOBS="-1")]
)
def test_a_mistake_in_what_is_asked_for_starts_nothing(variables, mistake):
    code, _ = run_all("tables", **{**variables, **mistake})
    assert code == 2
    assert not Path(variables["RUNS"]).exists()


def test_a_stage_that_does_not_exist_starts_nothing(variables):
    code, _ = run_all("tabels", **variables)
    assert code == 2
    assert not starts(variables)


def test_all_runs_of_the_tables_are_made_once(variables):
    variables["PAGES"] = "tables"
    for _ in range(2):
        code, output = run_all("tables", **variables)
        assert code == 0, output
    assert set(starts(variables).values()) == {1}
    assert len(starts(variables)) == 11
    tables = Path(variables["RESULTS"], "tables.md").read_text()
    assert "| libri | ASR (WER) | 50.0 (" in tables


def test_a_failure_stops_only_what_needs_it(variables):
    code, output = run_all("tables", FAILS="asr-poison0.05", **variables)
    assert code == 1
    assert "asr-poison0.05" in output.splitlines()[-1]
    from_clean = {"asr-1.1", "asr-1.2", "asr-1.3", "asr-2.1", "asr-2.2", "asr-2.3"}
    assert set(starts(variables)) == {"asr-clean", *from_clean}


def test_what_failed_is_run_again(variables):
    run_all("tables", FAILS="asr-2.2", **variables)
    code, _ = run_all("tables", **variables)
    assert code == 0
    assert starts(variables)["asr-2.2"] == 1


def test_a_killed_study_goes_on(variables):
    variables = dict(variables, JOBS="1")
    code, _ = run_all("tables", KILLED_AT="asr-1.2", **variables)
    before = starts(variables)
    assert code != 0
    assert 0 < len(before) < 11
    code, _ = run_all("tables", **variables)
    assert code == 0
    assert set(starts(variables).values()) == {1}


def test_changed_flags_make_all_runs_again(variables):
    run_all("tables", **variables)
    code, output = run_all("tables", FLAGS="--epochs 9", **variables)
    assert code == 0, output
    assert set(starts(variables).values()) == {2}


def test_a_run_made_again_makes_those_that_need_it_again(variables):
    run_all("tables", **variables)
    Path(variables["RUNS"], "asr-poison0.05/metrics.json").unlink()
    run_all("tables", **variables)
    again = {run for run, count in starts(variables).items() if count == 2}
    assert again == {"asr-poison0.05", "asr-3.1", "asr-3.2", "asr-3.3"}


def test_sigterm_stops_the_runs_and_starts_no_others(variables):
    process = start_all("tables", SLOWLY="1", **variables)
    running = []
    while len(running) < 2 and process.poll() is None:
        time.sleep(0.05)
        running = list(Path(variables["RUNS"]).glob("*/pid"))
    process.terminate()
    assert process.wait() == 143
    processes = [Path("/proc", path.read_text()) for path in running]
    deadline = time.time() + 60
    while any(path.exists() for path in processes) and time.time() < deadline:
        time.sleep(0.1)
    assert time.time() < deadline
    assert len(list(Path(variables["RUNS"]).glob("*/pid"))) == 2


def test_a_job_that_srun_kills_for_time_goes_on(variables, tmp_path):
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/bash\n[ "$1" = --time=1 ] || exit 9\nexec timeout 1 "${@:2}"\n')
    srun.chmod(0o755)
    variables = dict(variables, SRUN=f"{srun} --time=1")
    code, output = run_all("tables", SLOWLY="1", **variables)
    assert code == 1
    assert "asr-clean" in output.splitlines()[-1]
    code, output = run_all("tables", **variables)
    assert code == 0, output
