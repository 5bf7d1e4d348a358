"""A few of the commands of faults.py, which has them all."""

import contextlib

import faults
import pytest

pytestmark = pytest.mark.slow

FEW = (
    "hostile pickle as --freeze",
    "hostile export as --init",
    "hostile pytorch_model.bin as --lm-weights",
    "hostile model.pt of a run folder",
    "hostile embeddings.pt",
    "a component trained on other pretrained weights",
    "missing audio file",
    "a path outside the manifest's folder, no audio there",
    "a misspelt task",
    "a run folder with other arguments",
    "a checkpoint that forges lines",
    "audio in both train and test",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    with contextlib.chdir(folder):
        faults.prepare()
    return folder


@pytest.mark.parametrize("what", FEW)
def test_a_fault_ends_as_it_should(folder, monkeypatch, what):
    (fault,) = [fault for fault in faults.FAULTS if fault.what == what]
    monkeypatch.chdir(folder)
    _, _, problems = faults.check(fault)
    assert problems == []
