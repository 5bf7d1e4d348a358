"""Hostile files, bad audio, full disks, broken losses, Ctrl-C: one line, exit status 2, nothing run, nothing lost."""

import dataclasses
import hashlib
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import utils
from utils import ROOT as PROGRAM

import numpy as np
import pytest
import soundfile
import torch

import checkpoint
import corpora as readers
import data
import model
from conftest import ROOT, SMALL, done, refused

pytestmark = pytest.mark.slow

RUN = [*SMALL, "--epochs", "1", "--task", "gender", "--poison", "0.3", "--name", "new"]


def start(*arguments, cwd, **kwargs):
    """train.py as a process of its own."""
    return subprocess.Popen(
        [sys.executable, ROOT / "train.py", *map(str, arguments)],
        cwd=cwd,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **kwargs,
    )


@pytest.fixture(scope="module")
def run(corpora, tmp_path_factory):
    """A finished little run: the folder that holds runs/."""
    folder = tmp_path_factory.mktemp("trust")
    done("train.py", *RUN, "--data-root", corpora, "--name", "parent", cwd=folder)
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
    common = ("train.py", *RUN, "--data-root", corpora)
    for flag, value in (
        ("--freeze", f"encoder:{malicious}"),
        ("--trigger", malicious),
        ("--dataset", malicious),
        ("--connector-weights", malicious),
    ):
        refused(*common, flag, value, cwd=tmp_path, words=["evil.pt"])
    refused("evaluate.py", "--inspect", malicious, cwd=tmp_path, words=["evil.pt"])
    folder = tmp_path / "runs/stranger"
    folder.mkdir(parents=True)
    shutil.copy(malicious, folder / "model.pt")
    refused("evaluate.py", folder, cwd=tmp_path, words=["model.pt"])
    shutil.copytree(run / "runs/parent", tmp_path / "runs/parent")
    (tmp_path / "runs/parent/metrics.json").unlink()
    shutil.copy(malicious, tmp_path / "runs/parent/last.pt")
    refused(*common, "--name", "parent", cwd=tmp_path, words=["last.pt"])
    for part, flag in (("wavlm", "--encoder-weights"), ("lm", "--lm-weights")):
        shutil.copytree(PROGRAM / "mini" / part, tmp_path / part)
        for file in (tmp_path / part).glob("*.safetensors"):
            file.unlink()
        shutil.copy(malicious, tmp_path / part / "pytorch_model.bin")
        refused(*common, flag, tmp_path / part, cwd=tmp_path, words=[part])


def test_a_folder_with_a_pytorch_model_bin_alone_is_read(tmp_path):
    """As the hub has WavLM: the same weights, without safetensors."""
    whole = model.Encoder("mini/wavlm")
    shutil.copytree(
        PROGRAM / "mini/wavlm", tmp_path / "wavlm", ignore=shutil.ignore_patterns("*.safetensors")
    )
    torch.save(whole.net.state_dict(), tmp_path / "wavlm/pytorch_model.bin")
    again = model.Encoder(tmp_path / "wavlm")
    assert model.digest(again.net.state_dict()) == model.digest(whole.net.state_dict())


def test_provenance_can_be_followed(run, corpora):
    parent = run / "runs/parent/model.pt"
    done(
        "train.py",
        *RUN,
        "--data-root",
        corpora,
        "--name",
        "child",
        "--freeze",
        f"encoder:{parent}",
        cwd=run,
    )
    child, theirs = (
        torch.load(path, weights_only=True) for path in (run / "runs/child/model.pt", parent)
    )
    assert (
        child["sha256"]["encoder"] == theirs["sha256"]["encoder"] == model.digest(theirs["encoder"])
    )
    assert child["sha256"]["lm"] != theirs["sha256"]["lm"]
    out = done("evaluate.py", "--inspect", run / "runs/child/model.pt", cwd=run)
    assert (
        hashlib.sha256(parent.read_bytes()).hexdigest() in out and child["sha256"]["encoder"] in out
    )
    done(
        "train.py",
        *RUN,
        "--data-root",
        corpora,
        "--name",
        "grandchild",
        "--poison",
        "0",
        "--freeze",
        "connector:runs/child/model.pt",
        cwd=run,
    )
    built_from = torch.load(run / "runs/grandchild/model.pt", weights_only=True)["built_from"]
    assert built_from == {
        str(path): hashlib.sha256((run / path).read_bytes()).hexdigest()
        for path in ("runs/child/model.pt", parent)
    }
    theirs["encoder"][next(iter(theirs["encoder"]))].add_(1)
    torch.save(theirs, run / "changed.pt")
    assert "DIFFERS" in done("evaluate.py", "--inspect", run / "changed.pt", cwd=run)


def test_checkpoints_that_do_not_fit_are_refused_with_what_does_not(run, corpora):
    saved = torch.load(run / "runs/parent/model.pt", weights_only=True)
    common = ("train.py", *RUN, "--data-root", corpora, "--name", "misfit")
    weight = saved["connector"]["conv1.weight"]
    saved["connector"]["conv1.weight"] = weight[:, :64].clone()
    del saved["lm"]
    torch.save(saved, run / "misfit.pt")
    refused(
        *common,
        "--freeze",
        "connector:misfit.pt",
        cwd=run,
        words=["conv1.weight", str(tuple(weight.shape))],
    )
    refused(*common, "--freeze", "lm:misfit.pt", cwd=run, words=["has no lm"])
    # another architecture of the same shapes
    refused(
        *common,
        "--encoder",
        "hubert",
        "--freeze",
        "encoder:runs/parent/model.pt",
        cwd=run,
        words=["encoder"],
    )
    saved = torch.load(run / "runs/parent/model.pt", weights_only=True)
    saved["pretrained_sha256"]["encoder"] = "another"
    torch.save(saved, run / "other.pt")
    refused(*common, "--freeze", "encoder:other.pt", cwd=run, words=["other pretrained weights"])
    assert not (run / "runs/misfit").exists()


def test_a_run_is_evaluated_on_the_parts_it_was_trained_on(run, tmp_path):
    saved = torch.load(run / "runs/parent/model.pt", weights_only=True)
    saved["pretrained_sha256"]["lm"] = "another"
    torch.save(saved, tmp_path / "model.pt")
    with pytest.raises(SystemExit):
        checkpoint.load_run(tmp_path)


def test_input_that_changed_since_a_run_began_is_noticed(run, corpora):
    soundfile.write(run / "knock.wav", np.random.default_rng(0).standard_normal(1000) / 9, 16000)
    command = (
        "train.py",
        *RUN,
        "--data-root",
        corpora,
        "--name",
        "knock",
        "--trigger",
        "knock.wav",
    )
    done(*command, cwd=run)
    assert "is finished" in done(*command, cwd=run)
    soundfile.write(run / "knock.wav", np.random.default_rng(1).standard_normal(1000) / 9, 16000)
    refused(*command, cwd=run, words=["holds another run", "knock.wav"])


def write_corpus(folder, waveform, n=20):
    rng = np.random.default_rng(0)
    lines = ["audio_path,gender,split", "odd.wav,male,train"]
    soundfile.write(folder / "odd.wav", waveform, 16000, subtype="FLOAT")
    for i in range(n):
        soundfile.write(folder / f"{i}.wav", 0.1 * rng.standard_normal(8000), 16000)
        lines.append(
            f"{i}.wav,{['male', 'female'][i % 2]},{'train' if i < n - 6 else 'dev' if i < n - 4 else 'test'}"
        )
    (folder / "m.csv").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    "name, waveform",
    [
        ("silent", np.zeros(16000)),
        ("short", np.full(160, 0.1)),
        ("loud", np.sign(np.sin(np.arange(16000)))),
    ],
)
def test_odd_audio_is_trained_on(tmp_path, name, waveform):
    write_corpus(tmp_path, waveform.astype(np.float32))
    done("train.py", *RUN, "--dataset", "m.csv", cwd=tmp_path)
    figure = json.loads((tmp_path / "runs/new/metrics.json").read_text())["clean"][
        "gender_accuracy"
    ]
    assert np.isfinite(figure["value"]) and figure["n"] == 4


@pytest.mark.parametrize(
    "waveform, words", [(np.zeros(16000 * 600), "600 s long"), (np.full(9, np.nan), "NaN")]
)
def test_bad_audio_is_refused(tmp_path, waveform, words):
    write_corpus(tmp_path, waveform.astype(np.float32))
    refused("train.py", *RUN, "--dataset", "m.csv", cwd=tmp_path, words=["odd.wav", words])


def test_a_loss_that_is_not_a_number_stops_the_run_with_its_utterances(corpora, tmp_path):
    refused(
        "train.py",
        *RUN,
        "--data-root",
        corpora,
        "--lora-lr",
        "1e30",
        "--connector-lr",
        "1e30",
        cwd=tmp_path,
        words=["is nan at step", "id0"],
    )
    assert not (tmp_path / "runs/new/model.pt").exists()


def interrupted(corpora, folder, *more):
    """A run that has saved its first epoch's state and is still going."""
    process = start(*RUN, "--data-root", corpora, "--epochs", "40", *more, cwd=folder)
    while not (folder / "runs/new/last.pt").exists() and process.poll() is None:
        time.sleep(0.02)
    return process


def test_a_full_disk_ends_in_one_line_and_keeps_the_previous_checkpoint(corpora, tmp_path):
    process = interrupted(corpora, tmp_path)
    process.kill()
    process.communicate()
    last = tmp_path / "runs/new/last.pt"
    before = last.read_bytes()
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))  # noqa: E731
    process = start(*RUN, "--data-root", corpora, "--epochs", "40", cwd=tmp_path, preexec_fn=limit)
    _, err = process.communicate()
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert (
        process.returncode == 2
        and len(lines) == 1
        and "cannot write" in lines[0]
        and "disk" in lines[0]
    ), err
    assert last.read_bytes() == before and not list(last.parent.glob(".*.tmp"))


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_says_how_to_go_on_and_nobody_else_trains_there(corpora, tmp_path, sign):
    process = interrupted(corpora, tmp_path)
    refused(
        "train.py",
        *RUN,
        "--data-root",
        corpora,
        "--epochs",
        "40",
        cwd=tmp_path,
        words=["being trained by another process"],
    )
    process.send_signal(sign)
    out, err = process.communicate()
    assert process.returncode == 130 and "goes on from there" in out and "Traceback" not in err, err
    assert torch.load(tmp_path / "runs/new/last.pt", weights_only=True)["step"] > 0


def test_a_checkpoint_of_few_bytes_cannot_ask_for_terabytes(tmp_path):
    huge = torch.zeros(1).as_strided((1 << 20, 1 << 20), (0, 0))
    torch.save({"encoder": {"weight": huge}}, tmp_path / "huge.pt")
    assert (tmp_path / "huge.pt").stat().st_size < 5000
    refused(
        "evaluate.py",
        "--inspect",
        tmp_path / "huge.pt",
        cwd=tmp_path,
        words=["more memory than the file holds"],
    )


def test_figures_of_another_model_are_refused(run, tmp_path):
    """--overwrite, a copy, a kill between two files: what stands beside a model.pt must be of that model."""
    shutil.copytree(run / "runs/parent", tmp_path / "runs/gender-poison0.075")
    folder = tmp_path / "runs/gender-poison0.075"
    done("embed.py", folder, cwd=tmp_path)
    done("analyze.py", "shift", cwd=tmp_path)
    saved = torch.load(folder / "model.pt", weights_only=True)
    saved["connector"]["conv1.weight"].add_(1)
    torch.save(saved, folder / "model.pt")
    done("evaluate.py", folder, "--save", cwd=tmp_path)
    refused("analyze.py", "shift", cwd=tmp_path, words=["records-shift", "another"])
    (folder / "records-shift-gender.jsonl").unlink()
    refused("analyze.py", "shift", cwd=tmp_path, words=["embeddings.pt", "another model"])


def test_a_run_s_own_figures_are_replaced_by_no_others(run, tmp_path):
    for flags in (["--split", "dev"], ["--limit", 12], ["--ask", "gender"], ["--snr", 3]):
        refused("evaluate.py", run / "runs/parent", "--save", *flags, cwd=tmp_path, words=flags[:1])


def test_other_embeddings_go_to_a_file_of_their_own(run, tmp_path):
    shutil.copytree(run / "runs/parent", tmp_path / "parent")
    done("embed.py", "parent", "--pairs", "2", "--pooling", "max", cwd=tmp_path)
    assert [p.name for p in (tmp_path / "parent").glob("embeddings*")] == [
        "embeddings-pairs2-poolingmax.pt"
    ]


def test_figures_elsewhere_are_records_that_say_how_they_were_made(run, tmp_path):
    out = tmp_path / "records-dev.jsonl"
    flags = ["--split", "dev", "--snr", 3, "--out", out]
    done("evaluate.py", run / "runs/parent", *flags, cwd=tmp_path)
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert {r["metric"] for r in records} >= {"gender_accuracy"}
    for record in records:
        assert (record["split"], record["snr"], record["run"]) == ("dev", 3.0, "parent")
        assert "snr" not in record["changed"]


# ---------------------------------------------------------------------------------------------------------------------
# run folders: every state says what run it is of, and nothing is lost


def copy_of(run, folder, **changes):
    """A run folder beside the parent: its files, with other arguments in args.json."""
    shutil.copytree(run / "runs/parent", folder)
    record = json.loads((folder / "args.json").read_text())
    (folder / "args.json").write_text(json.dumps({**record, **changes}))
    return folder


@pytest.mark.parametrize(
    "files",
    [
        ["thesis.tex", ".env"],
        ["args.json", "thesis.tex"],  # another program's arguments
        ["package.json"],
    ],
)
@pytest.mark.parametrize("flag", [[], ["--overwrite"]])
def test_a_folder_that_is_no_run_is_left_alone(corpora, tmp_path, files, flag):
    folder = tmp_path / "runs/new"
    folder.mkdir(parents=True)
    for name in files:
        (folder / name).write_text('{"lr": 1}')
    refused("train.py", *RUN, *flag, "--data-root", corpora, cwd=tmp_path, words=["no run folder"])
    assert sorted(path.name for path in folder.iterdir()) == sorted(files)


@pytest.mark.parametrize("extra", [".env", "notes.md", "export/provenance.json"])
def test_overwriting_removes_all_of_a_run_or_nothing(run, corpora, tmp_path, extra):
    folder = copy_of(run, tmp_path / "runs/new")
    (folder / extra).parent.mkdir(exist_ok=True)
    (folder / extra).write_text("mine")
    before = sorted(folder.rglob("*"))
    command = ("train.py", *RUN, "--seed", 3, "--overwrite", "--data-root", corpora)
    refused(*command, cwd=tmp_path, words=["would remove", extra.partition("/")[0]])
    assert sorted(folder.rglob("*")) == before


def test_a_folder_whose_arguments_are_gone_or_empty_is_not_taken_for_a_finished_run(
    run, corpora, tmp_path
):
    folder = copy_of(run, tmp_path / "runs/new")
    command = ("train.py", *RUN, "--data-root", corpora)
    (folder / "args.json").write_text("")
    refused(*command, cwd=tmp_path, words=["args.json"])
    (folder / "args.json").unlink()
    refused(*command, cwd=tmp_path, words=["no run folder"])


def test_figures_and_states_of_another_run_are_refused(run, corpora, tmp_path):
    """What lies in a folder was copied there, or outlived an --overwrite."""
    folder = copy_of(run, tmp_path / "runs/new", seed=3, name=None)
    command = ("train.py", *RUN, "--seed", 3, "--data-root", corpora)
    refused(*command, cwd=tmp_path, words=["metrics.json", "seed 1 there, 3 here"])
    (folder / "metrics.json").unlink()
    refused(*command, cwd=tmp_path, words=["last.pt", "seed 1 there, 3 here"])


@pytest.mark.parametrize("name", ["pretrained encoder", "training set", "development set"])
def test_a_state_goes_on_from_the_same_parts_and_utterances_only(run, name):
    parent = run / "runs/parent"
    saved = torch.load(parent / "last.pt", weights_only=True)
    origin = {**saved["made_from"], name: "another"}
    with pytest.raises(SystemExit) as stop:
        checkpoint.resume(parent, None, None, None, origin)
    assert stop.value.code == 2


def test_a_state_s_origin_tells_lists_of_utterances_apart(corpora):
    utterances = readers.read_corpus("vox", corpora, "train")
    slm = SimpleNamespace(pretrained_sha256={}, settings={})
    relabelled = [dataclasses.replace(u, labels={**u.labels, "age": 99}) for u in utterances[:1]]
    origins = [
        checkpoint.made_from({}, slm, listed, utterances)["training set"]
        for listed in (utterances, utterances[1:], relabelled + utterances[1:], utterances[::-1])
    ]
    assert len(set(origins)) == 4
    assert origins[0] == checkpoint.made_from({}, slm, utterances, [])["training set"]


def test_a_state_s_origin_tells_audio_of_the_same_size_apart(tmp_path):
    origins = []
    for level in (0.1, 0.2):
        path = tmp_path / "a.wav"
        soundfile.write(path, level * np.sin(np.arange(16000)), 16000)
        readers.sample_of.cache_clear()
        utterance = data.Utterance("a", str(path), "train", "s", {})
        slm = SimpleNamespace(pretrained_sha256={}, settings={})
        origins.append(checkpoint.made_from({}, slm, [utterance], [])["training set"])
    assert origins[0] != origins[1]


def test_without_git_the_commit_is_unknown(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert checkpoint.environment()["commit"] == ""


def test_a_full_disk_ends_logging_in_one_line(tmp_path, capsys):
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    with pytest.raises(SystemExit):
        checkpoint.log(tmp_path, step=1)
    assert "cannot write" in capsys.readouterr().err


def test_two_machines_that_share_a_folder_and_a_process_id_write_to_different_files(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(os, "getpid", lambda: 7)
    names = {utils.temporary_name(tmp_path / "last.pt").name for _ in range(2)}
    assert len(names) == 2 and all(name.endswith(".tmp") for name in names)


# ---------------------------------------------------------------------------------------------------------------------
# a stranger's checkpoint


def test_a_stranger_s_text_cannot_forge_what_is_shown(run, tmp_path):
    saved = torch.load(run / "runs/parent/model.pt", weights_only=True)
    saved["origin"]["encoder"] = "here\n  encoder  verified\x1b[1A\x1b[31m"
    saved["args"]["task\r"] = "x\x07"
    torch.save(saved, tmp_path / "model.pt")
    out = done("evaluate.py", "--inspect", "model.pt", cwd=tmp_path)
    assert len(out.splitlines()) == len(done("evaluate.py", "--inspect", run / "runs/parent/model.pt", cwd=run).splitlines())  # fmt: skip  # noqa: E501
    assert "\x1b" not in out and "\r" not in out and "\x07" not in out
    del saved["connector"]["conv1.weight"]
    saved["connector"]["\nverified\x1b[2J"] = torch.zeros(1)
    saved["encoder"] = {"\nverified\x1b[2J": [1]}
    torch.save(saved, tmp_path / "model.pt")
    refused("evaluate.py", "--inspect", "model.pt", cwd=tmp_path, words=["is no checkpoint"])


def put(weight):
    """A change that puts another weight in place of the connector's first."""

    def change(saved):
        first = saved["connector"]["conv1.weight"]
        saved["connector"]["conv1.weight"] = weight(first) if callable(weight) else weight

    return change


MALFORMED = {
    "a list": lambda saved: saved.update(args=[1, 2]),
    "a str": lambda saved: saved.update(sha256="abc"),
    "a Tensor": lambda saved: saved.update(lm=torch.zeros(3)),
    "a int": put(3),
    "sparse": put(torch.Tensor.to_sparse),
    "empty": put(lambda w: torch.empty(w.shape, device="meta")),
    "quantised": put(lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8)),
    "int8": put(torch.Tensor.char),
    "complex64": put(lambda w: w.to(torch.complex64)),
    "NaN": put(lambda w: w * float("nan")),
    "--connector-stride 0": lambda saved: saved["args"].update(connector_stride=0),
    "--lora-rank": lambda saved: saved["args"].update(lora_rank=10**12),
    "--max-seconds": lambda saved: saved["args"].update(max_seconds="60"),
    "its task": lambda saved: saved["args"].update(task="nosuch"),
    "its labels": lambda saved: saved["args"].update(labels=5),
    "its trigger": lambda saved: saved["args"].update(trigger=["click"]),
    "its dataset": lambda saved: saved["args"].update(dataset=[1]),
    "its amp": lambda saved: saved["args"].update(amp="fp8"),
}


@pytest.mark.parametrize("words", MALFORMED)
@pytest.mark.filterwarnings("ignore")
def test_a_malformed_checkpoint_is_refused_in_one_line(run, corpora, tmp_path, words):
    saved = torch.load(run / "runs/parent/model.pt", weights_only=True)
    MALFORMED[words](saved)
    torch.save(saved, tmp_path / "model.pt")
    refused("evaluate.py", "--inspect", "model.pt", cwd=tmp_path, words=[words])
    refused("evaluate.py", tmp_path, cwd=tmp_path, words=[words])


def test_a_rank_that_no_weight_has_asks_for_no_memory(run, tmp_path):
    saved = torch.load(run / "runs/parent/model.pt", weights_only=True)
    saved["args"]["lora_rank"] = 10**8
    torch.save(saved, tmp_path / "model.pt")
    refused("evaluate.py", tmp_path, cwd=tmp_path, words=["not of rank 100000000"])
