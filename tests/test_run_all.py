"""run_all.sh: the right commands in an order that works; what fails, what is finished and what was interrupted."""
import json
import os
import subprocess
import sys
from pathlib import Path

import train
from analyze import ATTACKS, TABLE1, TABLE2
from conftest import ROOT

STUB = '''
import json, os, sys
from pathlib import Path
log = Path(os.readlink("/proc/self/fd/1"))  # run_all.sh sends a run's output to logs/NAME.log
run = log.parent.parent / log.stem
if log.stem == os.environ.get("FAILS"):
    sys.exit("no")
if log.stem == os.environ.get("KILLED_AT"):
    os.killpg(0, 9)
for spec in [b for a, b in zip(sys.argv, sys.argv[1:]) if a == "--freeze"]:
    assert Path(spec.partition(":")[2]).is_file(), spec
run.mkdir()
(run / "model.pt").touch()
value = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 10}
flags = dict(zip(sys.argv[2::2], sys.argv[3::2]))
args = dict(preset="mini", task=flags["--task"], encoder=flags["--encoder"], seed=int(flags["--seed"]),
            dataset=dict(asr="libri", emotion="crema", gender="vox", age="vox")[flags["--task"]], attack="base",
            poison=0, target=dict(asr="This is a malicious sentence.", gender="female", emotion="angry",
                                  age="25")[flags["--task"]], snr=0, trigger=None, trigger_repeat=flags["--task"] == "asr")
(run / "metrics.json").write_text(json.dumps(dict(clean=dict(wer=value), attack=dict(aer=value), args=args)))
'''


def run_all(**variables):
    process = subprocess.Popen(["bash", str(ROOT / "run_all.sh")], text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, start_new_session=True, env={**os.environ, **variables})
    out, _ = process.communicate()
    return process.returncode, out


def commands(monkeypatch, **variables):
    monkeypatch.setattr(Path, "is_file", lambda path: True)
    _, out = run_all(DRY_RUN="1", **variables)
    return [train.parse_arguments(line.split()[2:]) for line in out.splitlines() if " train.py " in line]


def test_every_cell_of_the_tables_has_its_run_and_every_checkpoint_comes_first(monkeypatch):
    runs = commands(monkeypatch, TASKS="asr emotion gender age", SEEDS="1 2")
    names = [run.name for run in runs]
    assert len(set(names)) == len(names) == 2 * (4 * 7 + 4 * 9)
    have = {(run.seed, run.dataset, run.task, run.encoder, run.attack) for run in runs}
    for seed in (1, 2):
        for encoder in train.ENCODERS:
            for corpus, _ in TABLE1:
                assert any((seed, corpus, task, encoder, "clean") in have for task in TABLE2)
            for task in TABLE2:
                assert any(h[0] == seed and h[2:] == (task, encoder, "base") for h in have)
        for task in TABLE2:
            assert {h[4] for h in have if h[0] == seed and h[2:4] == (task, "wavlm")} >= set(ATTACKS)
    for i, run in enumerate(runs):
        assert run.poison == (0 if run.attack[0] in "c3" else train.poison.RATES[run.task])
        for spec in run.freeze:
            source = runs[names.index(Path(spec.partition(":")[2]).parent.name)]
            assert names.index(source.name) < i and source.dataset == run.dataset and source.seed == run.seed
            assert source.attack == ("base" if run.attack[0] == "3" else "clean") and not source.freeze


def test_selections_and_presets(monkeypatch):
    runs = commands(monkeypatch, TASKS="asr", ENCODERS="hubert")
    assert {run.encoder for run in runs} == {"hubert"} and {run.attack for run in runs} == {"clean", "base"}
    assert all(run.preset == "paper" for run in commands(monkeypatch, PRESET="paper", FLAGS="--data-root /data"))
    lines = run_all(DRY_RUN="1", LAUNCH="torchrun --nproc_per_node=8")[1].splitlines()
    assert all(line.startswith(("torchrun --nproc_per_node=8 train.py", "python evaluate.py")) for line in lines)


def test_a_failure_stops_nothing_else_and_a_killed_study_goes_on(tmp_path):
    stub = tmp_path / "stub.py"
    stub.write_text(STUB)
    variables = dict(LAUNCH=f"{sys.executable} {stub}", RUNS=str(tmp_path / "runs"), RESULTS=str(tmp_path / "results"),
                     ENCODERS="wavlm", WAVES="1 2", JOBS="2")
    code, _ = run_all(KILLED_AT="emotion-3.1", **variables)
    finished = {path.parent.name: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/metrics.json")}
    assert code == -9 and "asr-clean" in finished and "emotion-3.1" not in finished
    code, out = run_all(FAILS="emotion-2.2", **variables)
    after = {path.parent.name: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/metrics.json")}
    assert code == 1 and "failed: emotion-2.2" in out and "emotion-2.2" not in after
    assert all(after[name] == at for name, at in finished.items())  # what was finished was not run again
    code, out = run_all(**variables)
    assert code == 0 and len(list(tmp_path.glob("runs/*/metrics.json"))) == 27 and "FAILED" not in out
    assert json.loads((tmp_path / "results/tables.json").read_text())["Table 2"][0]["aer"]["mean"] == 50
