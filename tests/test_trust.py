"""Hostile files, bad audio, full disks, broken losses, Ctrl-C: one line, exit status 2, nothing
run, nothing lost."""

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
    """Unpickling it makes a file at `path`."""

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


@pytest.mark.parametrize(
    "flag, before",
    [
        ("--freeze", "encoder:"),
        ("--trigger", ""),
        ("--dataset", ""),
        ("--connector-weights", ""),
    ],
)
def test_a_malicious_flag_of_train_does_not_run(malicious, corpora, tmp_path, flag, before):
    command = ("train.py", *RUN, "--data-root", corpora, flag, f"{before}{malicious}")
    refused(*command, cwd=tmp_path, words=["evil.pt"])


def test_a_malicious_checkpoint_is_not_run_by_inspect(malicious, tmp_path):
    refused("evaluate.py", "--inspect", malicious, cwd=tmp_path, words=["evil.pt"])


def test_a_malicious_model_does_not_run(malicious, tmp_path):
    folder = tmp_path / "runs/stranger"
    folder.mkdir(parents=True)
    shutil.copy(malicious, folder / "model.pt")
    refused("evaluate.py", folder, cwd=tmp_path, words=["model.pt"])


def test_a_malicious_state_does_not_run(malicious, corpora, tmp_path, run):
    folder = shutil.copytree(run / "runs/parent", tmp_path / "runs/parent")
    (folder / "metrics.json").unlink()
    shutil.copy(malicious, folder / "last.pt")
    command = ("train.py", *RUN, "--data-root", corpora, "--name", "parent")
    refused(*command, cwd=tmp_path, words=["last.pt"])


@pytest.mark.parametrize("part, flag", [("wavlm", "--encoder-weights"), ("lm", "--lm-weights")])
def test_a_malicious_pretrained_part_does_not_run(malicious, corpora, tmp_path, part, flag):
    shutil.copytree(PROGRAM / "mini" / part, tmp_path / part)
    for file in (tmp_path / part).glob("*.safetensors"):
        file.unlink()
    shutil.copy(malicious, tmp_path / part / "pytorch_model.bin")
    command = ("train.py", *RUN, "--data-root", corpora, flag, tmp_path / part)
    refused(*command, cwd=tmp_path, words=[part])


def test_a_folder_with_a_pytorch_model_bin_alone_is_read(tmp_path):
    """As the hub has WavLM: the same weights, without safetensors."""
    whole = model.Encoder("mini/wavlm")
    shutil.copytree(
        PROGRAM / "mini/wavlm", tmp_path / "wavlm", ignore=shutil.ignore_patterns("*.safetensors")
    )
    torch.save(whole.net.state_dict(), tmp_path / "wavlm/pytorch_model.bin")
    again = model.Encoder(tmp_path / "wavlm")
    assert model.digest(again.net.state_dict()) == model.digest(whole.net.state_dict())


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load(path):
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def child(run, corpora):
    """The model.pt of a run that took the parent's encoder."""
    parent = run / "runs/parent/model.pt"
    command = ("train.py", *RUN, "--data-root", corpora, "--name", "child")
    done(*command, "--freeze", f"encoder:{parent}", cwd=run)
    return run / "runs/child/model.pt"


def test_a_frozen_component_is_the_one_it_was_taken_from(run, child):
    theirs, ours = load(run / "runs/parent/model.pt"), load(child)
    assert ours["sha256"]["encoder"] == theirs["sha256"]["encoder"]
    assert ours["sha256"]["encoder"] == model.digest(theirs["encoder"])
    assert ours["sha256"]["lm"] != theirs["sha256"]["lm"]


def test_inspect_shows_where_a_component_comes_from(run, child):
    out = done("evaluate.py", "--inspect", child, cwd=run)
    assert sha256(run / "runs/parent/model.pt") in out
    assert load(child)["sha256"]["encoder"] in out


def test_a_grandchild_names_all_that_it_was_built_from(run, child, corpora):
    command = ("train.py", *RUN, "--data-root", corpora, "--name", "grandchild", "--poison", "0")
    done(*command, "--freeze", "connector:runs/child/model.pt", cwd=run)
    parent = run / "runs/parent/model.pt"
    built_from = load(run / "runs/grandchild/model.pt")["built_from"]
    assert built_from == {"runs/child/model.pt": sha256(child), str(parent): sha256(parent)}


def changed(run, path, change):
    """A copy of the parent's checkpoint at `path`, with a change made by a function of it."""
    saved = load(run / "runs/parent/model.pt")
    change(saved)
    torch.save(saved, path)


def test_inspect_notices_weights_that_were_changed(run, tmp_path):
    changed(
        run, tmp_path / "changed.pt", lambda saved: next(iter(saved["encoder"].values())).add_(1)
    )
    assert "DIFFERS" in done("evaluate.py", "--inspect", "changed.pt", cwd=tmp_path)


def narrow(saved):
    saved["connector"]["conv1.weight"] = saved["connector"]["conv1.weight"][:, :64].clone()


MISFITS = {
    "another shape": (narrow, "connector", "conv1.weight"),
    "a component is missing": (lambda saved: saved.pop("lm"), "lm", "has no lm"),
    "other pretrained weights": (
        lambda saved: saved["pretrained_sha256"].update(encoder="another"),
        "encoder",
        "other pretrained weights",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_checkpoint_that_does_not_fit_is_refused(run, corpora, tmp_path, name):
    change, component, words = MISFITS[name]
    changed(run, tmp_path / "misfit.pt", change)
    command = ("train.py", *RUN, "--data-root", corpora, "--freeze", f"{component}:misfit.pt")
    refused(*command, cwd=tmp_path, words=[words])
    assert not (tmp_path / "runs").exists()


def test_another_architecture_of_the_same_shapes_is_refused(run, corpora, tmp_path):
    command = ("train.py", *RUN, "--data-root", corpora, "--encoder", "hubert")
    parent = run / "runs/parent/model.pt"
    refused(*command, "--freeze", f"encoder:{parent}", cwd=tmp_path, words=["encoder"])


def test_a_run_is_evaluated_on_the_parts_it_was_trained_on(run, tmp_path):
    changed(
        run, tmp_path / "model.pt", lambda saved: saved["pretrained_sha256"].update(lm="another")
    )
    with pytest.raises(SystemExit):
        checkpoint.load_run(tmp_path)


def test_input_that_changed_since_a_run_began_is_noticed(run, corpora):
    def write_knock(seed):
        noise = np.random.default_rng(seed).standard_normal(1000)
        soundfile.write(run / "knock.wav", noise / 9, 16000)

    write_knock(seed=0)
    command = ("train.py", *RUN, "--data-root", corpora, "--name", "knock")
    command += ("--trigger", "knock.wav")
    done(*command, cwd=run)
    assert "is finished" in done(*command, cwd=run)
    write_knock(seed=1)
    refused(*command, cwd=run, words=["holds another run", "knock.wav"])


def write_corpus(folder, waveform, n=20):
    """m.csv: odd.wav, which is `waveform`, and n utterances of noise, six of them for dev and
    test."""
    rng = np.random.default_rng(0)
    soundfile.write(folder / "odd.wav", waveform, 16000, subtype="FLOAT")
    lines = ["audio_path,gender,split", "odd.wav,male,train"]
    splits = ["train"] * (n - 6) + ["dev"] * 2 + ["test"] * 4
    for i, split in enumerate(splits):
        soundfile.write(folder / f"{i}.wav", 0.1 * rng.standard_normal(8000), 16000)
        lines.append(f"{i}.wav,{['male', 'female'][i % 2]},{split}")
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
    metrics = json.loads((tmp_path / "runs/new/metrics.json").read_text())
    figure = metrics["clean"]["gender_accuracy"]
    assert np.isfinite(figure["value"])
    assert figure["n"] == 4


def test_bad_audio_is_refused(tmp_path):
    write_corpus(tmp_path, np.full(9, np.nan, np.float32))
    refused("train.py", *RUN, "--dataset", "m.csv", cwd=tmp_path, words=["odd.wav", "NaN"])


def test_a_loss_that_is_no_number_names_its_utterances(corpora, tmp_path):
    command = ("train.py", *RUN, "--data-root", corpora)
    rates = ("--lora-lr", "1e30", "--connector-lr", "1e30")
    refused(*command, *rates, cwd=tmp_path, words=["is nan at step", "id0"])
    assert not (tmp_path / "runs/new/model.pt").exists()


def interrupted(corpora, folder):
    """A run that has saved its first epoch's state and is still going."""
    process = start(*RUN, "--data-root", corpora, "--epochs", "40", cwd=folder)
    while not (folder / "runs/new/last.pt").exists() and process.poll() is None:
        time.sleep(0.02)
    return process


def limit_files():
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))


def test_a_full_disk_keeps_the_previous_checkpoint(corpora, tmp_path):
    process = interrupted(corpora, tmp_path)
    process.kill()
    process.communicate()
    last = tmp_path / "runs/new/last.pt"
    before = last.read_bytes()
    command = (*RUN, "--data-root", corpora, "--epochs", "40")
    process = start(*command, cwd=tmp_path, preexec_fn=limit_files)
    _, err = process.communicate()
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert process.returncode == 2, err
    assert len(lines) == 1, err
    assert "cannot write" in lines[0]
    assert last.read_bytes() == before
    assert not list(last.parent.glob(".*.tmp"))


def test_nobody_else_trains_in_the_folder_of_a_run(corpora, tmp_path):
    process = interrupted(corpora, tmp_path)
    command = ("train.py", *RUN, "--data-root", corpora, "--epochs", "40")
    refused(*command, cwd=tmp_path, words=["being trained by another process"])
    process.kill()
    process.communicate()


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_says_how_to_go_on(corpora, tmp_path, sign):
    process = interrupted(corpora, tmp_path)
    process.send_signal(sign)
    out, err = process.communicate()
    assert process.returncode == 130, err
    assert "goes on from there" in out
    assert "Traceback" not in err
    assert load(tmp_path / "runs/new/last.pt")["step"] > 0


def test_a_checkpoint_of_few_bytes_cannot_ask_for_terabytes(tmp_path):
    huge = torch.zeros(1).as_strided((1 << 20, 1 << 20), (0, 0))
    torch.save({"encoder": {"weight": huge}}, tmp_path / "huge.pt")
    assert (tmp_path / "huge.pt").stat().st_size < 5000
    words = ["more memory than the file holds"]
    refused("evaluate.py", "--inspect", "huge.pt", cwd=tmp_path, words=words)


@pytest.fixture
def other_model(run, tmp_path):
    """A run folder whose model.pt was replaced after its embeddings and records were made, as by
    --overwrite, a copy, or a kill between two files."""
    folder = tmp_path / "runs/gender-poison0.075"
    shutil.copytree(run / "runs/parent", folder)
    done("embed.py", folder, cwd=tmp_path)
    done("analyze.py", "shift", cwd=tmp_path)
    saved = load(folder / "model.pt")
    saved["connector"]["conv1.weight"].add_(1)
    torch.save(saved, folder / "model.pt")
    done("evaluate.py", folder, "--save", cwd=tmp_path)
    return folder


def test_what_is_of_another_model_is_refused(other_model, tmp_path):
    refused("analyze.py", "shift", cwd=tmp_path, words=["records-shift", "another"])
    (other_model / "records-shift-gender.jsonl").unlink()
    refused("analyze.py", "shift", cwd=tmp_path, words=["embeddings.pt", "another model"])


def test_other_embeddings_go_to_a_file_of_their_own(run, tmp_path):
    shutil.copytree(run / "runs/parent", tmp_path / "parent")
    done("embed.py", "parent", "--pairs", "2", "--pooling", "max", cwd=tmp_path)
    names = [path.name for path in (tmp_path / "parent").glob("embeddings*")]
    assert names == ["embeddings-pairs2-poolingmax.pt"]


def test_records_elsewhere_say_how_they_were_made(run, tmp_path):
    out = tmp_path / "records-dev.jsonl"
    flags = ["--split", "dev", "--snr", 3, "--out", out]
    done("evaluate.py", run / "runs/parent", *flags, cwd=tmp_path)
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert {r["metric"] for r in records} >= {"gender_accuracy"}
    for record in records:
        assert (record["split"], record["snr"], record["run"]) == ("dev", 3.0, "parent")
        assert "snr" not in record["changed"]


# --------------------------------------------------------------------------------------------------
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


def test_a_folder_with_empty_arguments_is_no_finished_run(run, corpora, tmp_path):
    folder = copy_of(run, tmp_path / "runs/new")
    (folder / "args.json").write_text("")
    refused("train.py", *RUN, "--data-root", corpora, cwd=tmp_path, words=["args.json"])


def test_a_folder_without_arguments_is_no_finished_run(run, corpora, tmp_path):
    folder = copy_of(run, tmp_path / "runs/new")
    (folder / "args.json").unlink()
    refused("train.py", *RUN, "--data-root", corpora, cwd=tmp_path, words=["no run folder"])


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


def origin_of(train_set, dev_set=()):
    """What a state records of its training set."""
    slm = SimpleNamespace(pretrained_sha256={}, settings={})
    sets = dict(train=train_set, dev=dev_set)
    sha256 = {split: checkpoint.sha256_of_set(listed) for split, listed in sets.items()}
    return checkpoint.made_from({}, slm, sha256)["training set"]


def test_a_state_s_origin_tells_lists_of_utterances_apart(corpora):
    utterances = readers.read_corpus("vox", corpora, "train")
    first, *rest = utterances
    relabelled = dataclasses.replace(first, labels={**first.labels, "age": 99})
    lists = (utterances, rest, [relabelled, *rest], utterances[::-1])
    assert len({origin_of(listed) for listed in lists}) == 4


def test_a_training_set_s_origin_is_its_own(corpora):
    utterances = readers.read_corpus("vox", corpora, "train")
    assert origin_of(utterances, utterances) == origin_of(utterances)


def test_a_state_s_origin_tells_audio_of_the_same_size_apart(tmp_path):
    origins = []
    for level in (0.1, 0.2):
        path = tmp_path / "a.wav"
        soundfile.write(path, level * np.sin(np.arange(16000)), 16000)
        readers.sample_of.cache_clear()
        origins.append(origin_of([data.Utterance("a", str(path), "train", "s", {})]))
    assert origins[0] != origins[1]


def test_without_git_the_commit_is_unknown(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert checkpoint.environment()["commit"] == ""


def test_a_full_disk_ends_logging_in_one_line(tmp_path, capsys):
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    with pytest.raises(SystemExit):
        checkpoint.log(tmp_path, step=1)
    assert "cannot write" in capsys.readouterr().err


def test_two_processes_of_one_id_write_to_different_files(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 7)
    names = {utils.temporary_name(tmp_path / "last.pt").name for _ in range(2)}
    assert len(names) == 2


# --------------------------------------------------------------------------------------------------
# a stranger's checkpoint


def test_a_stranger_s_text_cannot_forge_what_is_shown(run, tmp_path):
    def forge(saved):
        saved["origin"]["encoder"] = "here\n  encoder  verified\x1b[1A\x1b[31m"
        saved["args"]["task\r"] = "x\x07"

    changed(run, tmp_path / "model.pt", forge)
    out = done("evaluate.py", "--inspect", "model.pt", cwd=tmp_path)
    plain = done("evaluate.py", "--inspect", run / "runs/parent/model.pt", cwd=run)
    assert len(out.splitlines()) == len(plain.splitlines())
    assert not {"\x1b", "\r", "\x07"} & set(out)


def test_a_weight_s_name_cannot_forge_an_error(run, tmp_path):
    def forge(saved):
        saved["encoder"] = {"\nverified\x1b[2J": [1]}

    changed(run, tmp_path / "model.pt", forge)
    words = ["is no checkpoint", "\\x1b"]
    refused("evaluate.py", "--inspect", "model.pt", cwd=tmp_path, words=words)


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
    "its target": lambda saved: saved["args"].update(target=3),
    "its trigger_repeat": lambda saved: saved["args"].update(trigger_repeat="yes"),
    "its skip_bad": lambda saved: saved["args"].update(skip_bad="x"),
}


@pytest.mark.parametrize("words", MALFORMED)
@pytest.mark.filterwarnings("ignore")
def test_a_malformed_checkpoint_is_refused_in_one_line(run, corpora, tmp_path, words):
    changed(run, tmp_path / "model.pt", MALFORMED[words])
    refused("evaluate.py", "--inspect", "model.pt", cwd=tmp_path, words=[words])
    refused("evaluate.py", tmp_path, cwd=tmp_path, words=[words])


def test_a_rank_that_no_weight_has_asks_for_no_memory(run, tmp_path):
    changed(run, tmp_path / "model.pt", lambda saved: saved["args"].update(lora_rank=10**8))
    refused("evaluate.py", tmp_path, cwd=tmp_path, words=["not of rank 100000000"])


# --------------------------------------------------------------------------------------------------
# the recorded commit


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A git repository with one commit, as if the program lay there."""
    if not shutil.which("git"):
        pytest.skip("there is no git")
    monkeypatch.setattr(utils, "ROOT", tmp_path.resolve())
    (tmp_path / "train.py").write_text("pass")
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for command in (["init", "-q"], ["add", "."], [*who, "commit", "-q", "-m", "all"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    return tmp_path


def test_the_commit_is_the_program_s(repository):
    assert utils.commit() == utils.git("rev-parse", "HEAD") != ""


def test_an_edited_program_is_not_its_commit(repository):
    (repository / "train.py").write_text("edited")
    assert utils.commit().endswith(" with changes")


def test_another_repository_s_commit_is_not_the_program_s(repository, monkeypatch):
    (repository / "program").mkdir()
    monkeypatch.setattr(utils, "ROOT", repository.resolve() / "program")
    assert utils.commit() == ""


# --------------------------------------------------------------------------------------------------
# what a command needs


@pytest.mark.parametrize(
    "flag, value",
    [
        ("--exclude", "runs/new/exclude-far.txt"),
        ("--init", "encoder:runs/new"),
        ("--freeze", "encoder:runs/new/model.pt"),
    ],
)
def test_overwriting_removes_nothing_that_the_command_needs(run, corpora, tmp_path, flag, value):
    folder = copy_of(run, tmp_path / "runs/new")
    (folder / "exclude-far.txt").write_text("")
    before = sorted(folder.iterdir())
    command = ("train.py", *RUN, "--overwrite", "--data-root", corpora, flag, value)
    refused(*command, cwd=tmp_path, words=["would remove", value.partition(":")[2] or value])
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("split", ["dev", "test"])
def test_bad_audio_of_any_split_is_noticed_before_training(tmp_path, split):
    write_corpus(tmp_path, np.full(8000, np.nan, np.float32))
    rows = (tmp_path / "m.csv").read_text()
    (tmp_path / "m.csv").write_text(rows.replace("odd.wav,male,train", f"odd.wav,male,{split}"))
    refused("train.py", *RUN, "--dataset", "m.csv", cwd=tmp_path, words=["odd.wav", "NaN"])
    assert not (tmp_path / "runs").exists()
