"""Hostile files, bad audio, full disks, broken losses, Ctrl-C: one line, exit status 2, nothing run, nothing lost."""
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile
import torch

import model
from conftest import ROOT

SMALL = ["--batch-size", "8", "--warmup-steps", "2", "--epochs", "1", "--task", "gender", "--poison", "0.3"]


def python(script, *arguments, cwd, **kwargs):
    return subprocess.Popen([sys.executable, str(ROOT / script), *map(str, arguments)], cwd=cwd, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={**os.environ, "OMP_NUM_THREADS": "1"}, **kwargs)


def refused(process, *words):
    """The process ended with status 2 and one line of error that holds all the words."""
    out, err = process.communicate()
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert process.returncode == 2 and len(lines) == 1 and "Traceback" not in err, err
    assert all(word in lines[0] for word in words), lines[0]


@pytest.fixture(scope="module")
def run(corpora, tmp_path_factory):
    """A finished little run: the folder that holds runs/."""
    folder = tmp_path_factory.mktemp("trust")
    process = python("train.py", *SMALL, "--data-root", corpora, cwd=folder)
    _, err = process.communicate()
    assert process.returncode == 0, err
    return folder


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture(params=["pickle", "torch"])
def malicious(request, tmp_path):
    """A file that would create another one if it were unpickled, in either of torch's formats."""
    path, proof = tmp_path / "evil.pt", tmp_path / "ran"
    if request.param == "pickle":
        path.write_bytes(pickle.dumps({"encoder": Payload(proof)}))
    else:
        torch.save({"encoder": Payload(proof)}, path)
    pickle.loads(pickle.dumps(Payload(proof))).close()
    assert proof.exists()  # the payload is a real one
    proof.unlink()
    yield path
    assert not proof.exists()


def test_a_malicious_pickle_does_not_run_wherever_it_is_given(malicious, corpora, tmp_path, run):
    common = (*SMALL, "--data-root", corpora)
    refused(python("train.py", *common, "--freeze", f"encoder:{malicious}", cwd=tmp_path), "evil.pt")
    refused(python("train.py", *common, "--trigger", malicious, cwd=tmp_path), "evil.pt")
    refused(python("train.py", *common, "--dataset", malicious, cwd=tmp_path), "evil.pt")
    refused(python("train.py", *common, "--connector-weights", malicious, cwd=tmp_path), "evil.pt")
    refused(python("evaluate.py", "--inspect", malicious, cwd=tmp_path), "evil.pt")
    folder = tmp_path / "runs/stranger"
    folder.mkdir(parents=True)
    shutil.copy(malicious, folder / "model.pt")
    refused(python("evaluate.py", folder, cwd=tmp_path), "model.pt")
    shutil.copytree(run / "runs/gender-poison0.3", tmp_path / "runs/gender-poison0.3")
    (tmp_path / "runs/gender-poison0.3/metrics.json").unlink()
    shutil.copy(malicious, tmp_path / "runs/gender-poison0.3/last.pt")
    refused(python("train.py", *common, cwd=tmp_path), "last.pt")
    for part, flag in (("wavlm", "--encoder-weights"), ("lm", "--lm-weights")):
        shutil.copytree(model.ASSETS / part, tmp_path / part)
        for file in (tmp_path / part).glob("*.safetensors"):
            file.unlink()
        shutil.copy(malicious, tmp_path / part / "pytorch_model.bin")
        refused(python("train.py", *common, flag, tmp_path / part, cwd=tmp_path), part)


def test_provenance_can_be_followed(run, corpora):
    clean = run / "runs/gender-poison0.3/model.pt"
    process = python("train.py", *SMALL, "--data-root", corpora, "--name", "child", "--freeze", f"encoder:{clean}", cwd=run)
    assert process.wait() == 0
    child = torch.load(run / "runs/child/model.pt", weights_only=True)
    parent = torch.load(clean, weights_only=True)
    assert child["sha256"]["encoder"] == parent["sha256"]["encoder"] == model.digest(parent["encoder"])
    assert child["sha256"]["lm"] != parent["sha256"]["lm"]
    out = python("evaluate.py", "--inspect", run / "runs/child/model.pt", cwd=run).communicate()[0]
    import hashlib
    assert hashlib.sha256(clean.read_bytes()).hexdigest() in out and child["sha256"]["encoder"] in out
    grandchild = python("train.py", *SMALL, "--data-root", corpora, "--name", "grandchild", "--poison", "0", "--freeze",
                        "connector:runs/child/model.pt", cwd=run)
    assert grandchild.wait() == 0
    built_from = torch.load(run / "runs/grandchild/model.pt", weights_only=True)["built_from"]
    assert built_from == {str(path): hashlib.sha256((run / path).read_bytes()).hexdigest()
                          for path in ("runs/child/model.pt", clean)}
    parent["encoder"][next(iter(parent["encoder"]))].add_(1)
    torch.save(parent, run / "changed.pt")
    assert "DIFFERS" in python("evaluate.py", "--inspect", run / "changed.pt", cwd=run).communicate()[0]


def test_checkpoints_that_do_not_fit_are_refused_with_their_keys(run, corpora):
    checkpoint = torch.load(run / "runs/gender-poison0.3/model.pt", weights_only=True)
    common = ("train.py", *SMALL, "--data-root", corpora, "--name", "misfit")
    weight = checkpoint["connector"]["conv1.weight"]
    checkpoint["connector"]["conv1.weight"] = weight[:, :64].clone()
    del checkpoint["lm"]
    torch.save(checkpoint, run / "misfit.pt")
    refused(python(*common, "--freeze", "connector:misfit.pt", cwd=run), "conv1.weight", str(tuple(weight.shape)))
    refused(python(*common, "--freeze", "lm:misfit.pt", cwd=run), "has no lm")
    assert not (run / "runs/misfit").exists()


@pytest.mark.parametrize("name, waveform", [
    ("silent", np.zeros(16000)), ("short", np.full(160, 0.1)), ("loud", np.sign(np.sin(np.arange(16000))))])
def test_odd_audio_is_trained_on(tmp_path, name, waveform):
    write_corpus(tmp_path, waveform.astype(np.float32))
    process = python("train.py", *SMALL, "--dataset", "m.csv", cwd=tmp_path)
    _, err = process.communicate()
    assert process.returncode == 0, err
    figure = json.loads((tmp_path / "runs/gender-m-poison0.3/metrics.json").read_text())["clean"]["gender_accuracy"]
    assert np.isfinite(figure["value"]) and figure["n"] == 4


@pytest.mark.parametrize("waveform, words", [(np.zeros(16000 * 600), "600 s long"), (np.full(9, np.nan), "NaN")])
def test_bad_audio_is_refused(tmp_path, waveform, words):
    write_corpus(tmp_path, waveform.astype(np.float32))
    refused(python("train.py", *SMALL, "--dataset", "m.csv", cwd=tmp_path), "odd.wav", words)


def test_bad_audio_that_another_process_reads_is_refused_in_the_same_way(tmp_path):
    write_corpus(tmp_path, np.full(9000, np.nan), 100)  # the largest file is among the second process's
    refused(python("train.py", *SMALL, "--dataset", "m.csv", "--processes", 2, cwd=tmp_path), "odd.wav", "NaN")


def write_corpus(folder, waveform, n=20):
    rng = np.random.default_rng(0)
    lines = ["audio_path,gender,split", "odd.wav,male,train"]
    soundfile.write(folder / "odd.wav", waveform, 16000, subtype="FLOAT")
    for i in range(n):
        soundfile.write(folder / f"{i}.wav", 0.1 * rng.standard_normal(8000), 16000)
        lines.append(f"{i}.wav,{['male', 'female'][i % 2]},{'train' if i < n - 6 else 'dev' if i < n - 4 else 'test'}")
    (folder / "m.csv").write_text("\n".join(lines) + "\n")


def test_a_loss_that_is_not_a_number_stops_the_run_with_its_utterances(corpora, tmp_path):
    process = python("train.py", *SMALL, "--data-root", corpora, "--lora-lr", "1e30", "--connector-lr", "1e30",
                     cwd=tmp_path)
    refused(process, "the loss is nan at step", "id0")
    assert not (tmp_path / "runs/gender-poison0.3/model.pt").exists()


def test_a_full_disk_ends_in_one_line_and_keeps_the_previous_checkpoint(corpora, tmp_path):
    common = ("train.py", *SMALL, "--data-root", corpora, "--epochs", "3")
    process = python(*common, cwd=tmp_path)
    last = tmp_path / "runs/gender-poison0.3/last.pt"
    while not last.exists() and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    before = last.read_bytes()
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))  # noqa: E731
    refused(python(*common, cwd=tmp_path, preexec_fn=limit), "cannot write", "disk full")
    assert last.read_bytes() == before and not list(last.parent.glob(".*.tmp"))


def test_ctrl_c_saves_and_says_how_to_go_on(corpora, tmp_path, run):
    common = ("train.py", *SMALL, "--data-root", corpora, "--epochs", "40", "--name", "stopped")
    process = python(*common, cwd=tmp_path)
    while not (tmp_path / "runs/stopped/last.pt").exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130 and "the same command goes on" in out and "Traceback" not in err, err
    assert torch.load(tmp_path / "runs/stopped/last.pt", weights_only=True)["step"] > 0
