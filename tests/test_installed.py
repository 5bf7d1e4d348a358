"""Libraries that are missing or do not fit, and the versions that are named for users."""

import os
import re
import subprocess
import sys

import pytest

from conftest import ROOT

UNDEFINED = 'raise OSError("libtorchaudio.so: undefined symbol: torch_new")'
OLD_TORCH = "class utils:\n    is_torch_available = staticmethod(lambda: False)\n"
MISSING = "import a_library_that_is_not_there"


def install(folder, name, version, source=""):
    """A library of one file, as an installer leaves it."""
    (folder / f"{name}.py").write_text(source)
    metadata = folder / f"{name}-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.mark.parametrize(
    "name, source, words",
    [
        ("torchaudio", UNDEFINED, ["torchaudio 2.2", "torch 1.1", "undefined symbol"]),
        ("transformers", OLD_TORCH, ["transformers 2.2", "torch 1.1"]),
        ("soundfile", MISSING, ["a_library_that_is_not_there", "activate"]),
    ],
)
def test_a_misfit_ends_in_one_line(tmp_path, name, source, words):
    install(tmp_path, "numpy", "1.1")
    install(tmp_path, "torch", "1.1")
    for other in ("torchaudio", "transformers", "soundfile"):
        available = OLD_TORCH.replace("False", "True")
        install(tmp_path, other, "2.2", source if other == name else available)
    environment = dict(os.environ, PYTHONPATH=str(tmp_path))
    command = [sys.executable, str(ROOT / "train.py"), "--help"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    for word in [*words, "requirements.txt"]:
        assert word in done.stderr


def locked(path):
    """{library: versions} of a locked file, one version for each range of Pythons."""
    versions = {}
    for name, version in re.findall(r"^([\w.-]+)==([\w.]+)", path.read_text(), re.M):
        versions.setdefault(name, set()).add(version)
    return versions


def test_the_tests_lock_the_program_s_versions():
    program = locked(ROOT / "requirements.txt")
    for name, versions in locked(ROOT / "tests/requirements.txt").items():
        assert program.get(name, versions) == versions, name


@pytest.mark.parametrize("name", ["requirements.txt", "tests/requirements.txt"])
def test_every_line_is_locked(name):
    for line in (ROOT / name).read_text().splitlines():
        requirement = line.partition("#")[0].strip()
        assert not requirement or "==" in requirement


def test_the_locked_file_is_compiled_from_the_ranges():
    names = set(re.findall(r"^([\w-]+)[>=]=", (ROOT / "requirements.in").read_text(), re.M))
    assert names > {"torch", "torchaudio", "transformers"}
    assert names <= set(locked(ROOT / "requirements.txt"))
