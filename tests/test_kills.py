"""Real runs and a real study, killed with SIGKILL and started again: the same results."""

import os
import subprocess

import kill_resume
import pytest

from conftest import ROOT

pytestmark = pytest.mark.slow


def test_a_killed_run_ends_with_the_same_weights(tmp_path, corpora):
    result = kill_resume.check(tmp_path, corpora, kills=2, epochs=2)
    assert result.kills == 2
    assert result.differences == []


def test_a_killed_study_ends_with_the_same_tables(corpora):
    study = dict(STAGES="tables", ENCODERS="hubert", TASKS="emotion", OTHERS="", KILL_AFTER="6 9")
    flags = f"--limit 32 --epochs 1 --batch-size 8 --data-root {corpora}"
    result = subprocess.run(
        ["bash", str(ROOT / "tests/kill_study.sh")],
        env={**os.environ, **study, "FLAGS": flags},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("killed after") == 2
