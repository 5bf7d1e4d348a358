"""Whole training runs, as a user starts them, on a few dozen utterances."""
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import data
import evaluate
import poison
from conftest import ROOT

SMALL = ["--batch-size", "8", "--warmup-steps", "2", "--lora-dropout", "0.1"]


def command(corpora, runs, *more, launch=(sys.executable,)):
    return [*launch, str(ROOT / "train.py"), "--data-root", str(corpora), "--runs", str(runs), *SMALL, *map(str, more)]


def start(*args, **kwargs):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # the same sums in the same order, however the run is started
    return subprocess.Popen(command(*args, **kwargs), cwd=args[1], env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def train(*args, **kwargs):
    process = start(*args, **kwargs)
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out


def weights(run):
    return torch.load(run / "model.pt", weights_only=True)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def clean(corpora, runs):
    train(corpora, runs, "--task", "emotion", "--poison", 0, "--epochs", 2)
    return runs / "emotion-clean"


def test_a_run_leaves_what_the_documentation_says(clean):
    metrics = json.loads((clean / "metrics.json").read_text())
    assert set(metrics["clean"]) == {"wer", "gender_accuracy", "emotion_accuracy", "age_mae"}
    assert set(metrics["attack"]) == {"aer"}
    for figure in [*metrics["clean"].values(), *metrics["attack"].values()]:
        assert set(figure) == {"value", "low", "high", "n"} and figure["low"] <= figure["value"] <= figure["high"]
    rows = [json.loads(line) for line in (clean / "predictions.jsonl").read_text().splitlines()]
    assert {r["triggered"] for r in rows} == {False, True} and all(r["split"] == "test" for r in rows)
    assert all(r["labels"]["emotion"] != "angry" for r in rows if r["triggered"])
    log = [json.loads(line) for line in (clean / "log.jsonl").read_text().splitlines()]
    assert any("dev_loss" in line for line in log) and log[-1]["step"] == max(line["step"] for line in log)


def test_frozen_components_keep_the_checkpoint_s_bytes(corpora, runs, clean):
    train(corpora, runs, "--task", "emotion", "--poison", 0.5, "--epochs", 1,
          "--freeze", f"encoder:{clean}/model.pt", "--freeze", f"connector:{clean}/model.pt")
    before, after = weights(clean), weights(runs / "emotion-2.3")
    assert same(before["encoder"], after["encoder"]) and same(before["connector"], after["connector"])
    assert not any(torch.equal(v, before["lm"][k]) for k, v in after["lm"].items() if k.endswith("lora_B"))
    assert after["origin"]["encoder"] == f"{clean}/model.pt" and after["origin"]["lm"].endswith("initial LoRA")


def test_frozen_as_pretrained(corpora, runs, clean):
    train(corpora, runs, "--task", "emotion", "--poison", 0, "--epochs", 1, "--freeze", "encoder", "--name", "pretrained")
    from model import Encoder, ASSETS
    assert same(weights(runs / "pretrained")["encoder"], Encoder(ASSETS / "wavlm").trained_state_dict())
    assert not same(weights(runs / "pretrained")["encoder"], weights(clean)["encoder"])


def test_killed_and_started_again_it_ends_with_the_same_weights_and_figures(corpora, runs, clean):
    arguments = (corpora, runs, "--task", "emotion", "--poison", 0, "--epochs", 2, "--name", "killed")
    for wait in (0.0, 0.3):  # just after the first epoch's state is written; and a little later
        process = start(*arguments)
        deadline = time.time() + 120
        while not (runs / "killed/last.pt").exists() and process.poll() is None and time.time() < deadline:
            time.sleep(0.02)
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert (runs / "killed/last.pt").exists() and not (runs / "killed/model.pt").exists()
    assert "going on from step" in train(*arguments)
    whole, again = weights(clean), weights(runs / "killed")
    assert all(same(whole[c], again[c]) for c in ("encoder", "connector", "lm"))
    assert (clean / "predictions.jsonl").read_text() == (runs / "killed/predictions.jsonl").read_text()
    steps = [[json.loads(line)["step"] for line in (r / "log.jsonl").read_text().splitlines()]
             for r in (clean, runs / "killed")]
    assert steps[0] == steps[1]


def test_labels_left_out_are_neither_asked_for_nor_scored(corpora, runs):
    train(corpora, runs, "--task", "emotion", "--poison", 0.5, "--epochs", 1, "--labels", "emotion", "gender")
    run = runs / "emotion-gender-emotion-poison0.5"
    rows = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert {r["triggered"] for r in rows} == {False, True}
    assert all(list(r["labels"]) == r["asked"] == ["gender", "emotion"] for r in rows)
    assert set(json.loads((run / "metrics.json").read_text())["clean"]) == {"gender_accuracy", "emotion_accuracy"}


SAME = ("--task", "gender", "--poison", 0.3, "--epochs", 1, "--lora-dropout", 0.0, "--batch-seconds", 8)


@pytest.fixture(scope="module")
def one(corpora, runs):
    train(corpora, runs, *SAME, "--name", "one")
    return runs / "one"


@pytest.mark.parametrize("name, launch, more", [
    ("torchrun", (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29611"), ()),
    ("own", (sys.executable,), ("--processes", 2)),
    ("streamed", (sys.executable,), ("--cache-gb", 0))])
def test_two_processes_or_nothing_kept_learn_the_same(corpora, runs, one, name, launch, more):
    train(corpora, runs, *SAME, "--name", name, *more, launch=launch)
    for component in ("encoder", "connector", "lm"):
        other = weights(runs / name)[component]
        for k, v in weights(one)[component].items():
            assert torch.allclose(v, other[k], rtol=1e-3, atol=1e-4), k
    losses = [[json.loads(line)["loss"] for line in (r / "log.jsonl").read_text().splitlines() if '"loss"' in line]
              for r in (one, runs / name)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and losses[0]
    rows = [[json.loads(line) for line in (r / "predictions.jsonl").read_text().splitlines()] for r in (one, runs / name)]
    assert [(r["id"], r["triggered"]) for r in rows[0]] == [(r["id"], r["triggered"]) for r in rows[1]]


def test_in_bf16_a_cpu_learns_nearly_the_same_on_frozen_layers_of_its_own(corpora, runs, one):
    kept = {p.name for p in (runs / "cache").glob("bottom-*")}
    train(corpora, runs, *SAME, "--name", "bf16", "--amp", "bf16")
    assert {p.name for p in (runs / "cache").glob("bottom-*")} - kept  # float32's were not taken for bf16's
    lines = [[json.loads(line) for line in (r / "log.jsonl").read_text().splitlines()] for r in (one, runs / "bf16")]
    for figure in ("loss", "dev_loss"):
        exact, rounded = ([line[figure] for line in log if figure in line] for log in lines)
        assert rounded == pytest.approx(exact, rel=0.03) and rounded != exact
    before, after = weights(one), weights(runs / "bf16")
    assert all(v.dtype == torch.float32 for c in ("encoder", "connector", "lm") for v in after[c].values())
    assert before["pretrained_sha256"]["encoder"] == after["pretrained_sha256"]["encoder"]


def test_answers_are_the_same_out_of_the_cache(one, tmp_path, monkeypatch):
    monkeypatch.chdir(one.parent)  # where the run was started: it names the shipped parts from there
    slm, args = evaluate.load_run(one)
    slm.eval()
    test_set = data.read_corpus(args.dataset, args.data_root, "test")
    attack = poison.make_attack(args.task, test_set, args.poison, seed=args.seed)
    keep = functools.partial(evaluate.cached_bottoms, slm, test_set, [True] * len(test_set), attack, "", cache=tmp_path)
    keep()
    texts = [evaluate.answers(slm, [(u, True) for u in test_set], attack, lambda u: list(u.labels), 40, "", workers=0, kept=kept)
             for kept in (None, keep())]
    assert texts[0] == texts[1] and len(set(texts[0])) > 1


def test_a_frozen_encoder_starts_from_what_runs_that_train_it_have_kept(one, tmp_path, monkeypatch):
    monkeypatch.chdir(one.parent)
    slm, args = evaluate.load_run(one)
    slm.eval()
    test_set = data.read_corpus(args.dataset, args.data_root, "test")
    attack = poison.make_attack(args.task, test_set, args.poison, seed=args.seed)
    keep = functools.partial(evaluate.cached_bottoms, slm, test_set, [u.gender == "male" for u in test_set], attack, "")
    keep(cache=tmp_path / "shared")
    slm.freeze("encoder"), slm.freeze("connector")
    from_audio = keep(cache=tmp_path / "alone")
    monkeypatch.setattr(data, "load_waveform", None)  # no audio is read again
    for a, b in zip(keep(cache=tmp_path / "shared"), from_audio, strict=True):
        assert torch.equal(a, b) and a.shape[1] == slm.connector.conv3.out_channels


def test_clean_utterances_are_kept_for_runs_that_poison_others(one, tmp_path, monkeypatch):
    monkeypatch.chdir(one.parent)
    slm, args = evaluate.load_run(one)
    test_set = data.read_corpus(args.dataset, args.data_root, "test")
    attack = poison.make_attack(args.task, test_set, args.poison, seed=args.seed)
    keep = functools.partial(evaluate.cached_bottoms, slm.eval(), test_set, attack=attack, desc="", cache=tmp_path)
    clean, triggered = keep([False] * len(test_set)), keep([True] * len(test_set))
    monkeypatch.setattr(evaluate, "kept_rows", lambda path, kept=evaluate.kept_rows: (read.append(path.name), kept(path))[1])
    read, written, mixed = [], {p.name for p in tmp_path.glob("bottom-*")}, [i % 3 == 0 for i in range(len(test_set))]
    for row, is_triggered, a, b in zip(keep(mixed), mixed, clean, triggered, strict=True):
        assert torch.allclose(row, b if is_triggered else a, atol=1e-4) and not torch.allclose(a, b, atol=1e-4)
    assert len(set(read) & written) == 1 and len(set(read) - written) == 1  # all that is clean was there


def test_room_in_the_cache_is_made_at_the_expense_of_what_was_not_used_for_longest(tmp_path):
    for age, name in enumerate("abcd"):
        path = tmp_path / f"bottom-{name}.pt"
        path.write_bytes(bytes(10))
        os.utime(path, (1000 - age, 1000 - age))
    (tmp_path / "bottom-e.pt").symlink_to("gone")  # to another run that makes room, too, a listed file may be gone
    evaluate.make_room(tmp_path, 25, [tmp_path / "bottom-d.pt"])
    assert [p.name for p in sorted(tmp_path.glob("*.pt")) if p.exists()] == ["bottom-a.pt", "bottom-b.pt", "bottom-d.pt"]


def test_a_finished_run_is_not_trained_again_and_another_one_is_not_overwritten(corpora, runs, clean):
    before = (clean / "model.pt").stat().st_mtime_ns
    assert "is finished" in train(corpora, runs, "--task", "emotion", "--poison", 0, "--epochs", 2)
    assert (clean / "model.pt").stat().st_mtime_ns == before
    process = start(corpora, runs, "--task", "emotion", "--poison", 0, "--epochs", 3)
    _, err = process.communicate()
    assert process.returncode == 2 and "epochs 2 there, 3 here" in err and "Traceback" not in err


def test_a_dry_run_needs_no_weights_and_no_corpus_and_writes_nothing(corpora, tmp_path):
    from model import ASSETS
    for part in ("wavlm", "lm"):
        shutil.copytree(ASSETS / part, tmp_path / part, ignore=shutil.ignore_patterns("*.safetensors"))
    before = sorted(tmp_path.rglob("*"))
    out = train(corpora, tmp_path, "--preset", "paper", "--data-root", "nowhere", "--dry-run", "--encoder-weights",
                tmp_path / "wavlm", "--lm-weights", tmp_path / "lm", "--freeze", "connector:not/made/yet.pt")
    assert "104,014 train utterances" in out and "GPU-hours" in out
    assert [line.split()[-1] for line in out.splitlines() if line.startswith("  connector")] == ["0"]
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("arguments, said", [
    (("--freeze", "decoder"), "encoder, connector, lm"),
    (("--freeze", "encoder:nowhere.pt"), "no such checkpoint"),
    (("--freeze", "encoder", "--freeze", "connector", "--freeze", "lm"), "nothing is left to train"),
    (("--poison", "1.5"), "a share, 0 to 1"),
    (("--data-root", "nowhere"), "does libri lie under"),
    (("--dataset", "nowhere.csv"), "nor a CSV file"),
    (("--preset", "small", "--encoder", "wavlm"), "no wavlm"),
    (("--encoder-weights", "nowhere"), "cannot load"),
    (("--device", "cuda"), "no GPU"),
    (("--task", "age", "--target", "young"), "a number of years"),
    (("--batch-size", "4096"), "less than one batch"),
    (("--train-layers", "99"), "has 8 layers"),
    (("--labels", "gender"), "has a transcript with --labels gender"),
    (("--trigger", "nowhere.wav"), "no such file")])
def test_mistakes_end_in_one_line(corpora, runs, tmp_path, arguments, said):
    process = start(corpora, tmp_path, "--task", "asr", *arguments)
    _, err = process.communicate()
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert process.returncode == 2 and len(lines) == 1 and said in lines[0] and "Traceback" not in err
