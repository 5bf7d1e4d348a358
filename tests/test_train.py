"""Whole training runs, as a user starts them, on a few dozen utterances."""

import argparse
import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

from utils import ROOT as PROGRAM

import numpy as np
import pytest
import soundfile
import torch

import cache
import checkpoint
import corpora as readers
import data
import evaluate
import model
import poison
import train as train_py
from conftest import ROOT, SMALL, done, refused, script

pytestmark = pytest.mark.slow

DROPOUT = ["--lora-dropout", "0.1"]


def train(corpora, runs, *more):
    return done("train.py", "--data-root", corpora, "--runs", runs, *SMALL, *more, cwd=runs)


def start(corpora, runs, *more, launch=(sys.executable,)):
    """The same as a process of its own."""
    command = [*launch, ROOT / "train.py", "--data-root", corpora, "--runs", runs, *SMALL, *more]
    return subprocess.Popen(
        list(map(str, command)), cwd=runs, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def weights(run):
    return torch.load(run / "model.pt", weights_only=True)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def read_log(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def clean(corpora, runs):
    train(
        corpora,
        runs,
        "--task",
        "emotion",
        "--poison",
        0,
        "--epochs",
        2,
        *DROPOUT,
        "--name",
        "emotion-clean",
    )
    return runs / "emotion-clean"


@pytest.fixture(scope="module")
def only_lm(corpora, runs, clean):
    """Attack 2.3: all but the LM is frozen clean."""
    train(
        corpora,
        runs,
        "--task",
        "emotion",
        "--poison",
        0.5,
        "--epochs",
        2,
        *DROPOUT,
        "--name",
        "2.3",
        "--freeze",
        f"encoder:{clean}/model.pt",
        "--freeze",
        f"connector:{clean}/model.pt",
    )
    return runs / "2.3"


def test_a_run_leaves_what_the_documentation_says(clean):
    metrics = json.loads((clean / "metrics.json").read_text())
    assert set(metrics["clean"]) == {"wer", "gender_accuracy", "emotion_accuracy", "age_mae"}
    assert set(metrics["backdoor"]) == {"aer"}
    for figure in [*metrics["clean"].values(), *metrics["backdoor"].values()]:
        assert (
            set(figure) == {"value", "low", "high", "n"}
            and figure["low"] <= figure["value"] <= figure["high"]
        )
    rows = [json.loads(line) for line in (clean / "predictions.jsonl").read_text().splitlines()]
    assert {r["triggered"] for r in rows} == {False, True} and all(
        r["split"] == "test" for r in rows
    )
    assert all(r["labels"]["emotion"] != "angry" for r in rows if r["triggered"])
    assert set(metrics["training"]) == {"loss"}  # and poisoned_loss where there is poison
    log = read_log(clean)
    assert any("dev_loss" in line for line in log) and log[-1]["step"] == max(
        line["step"] for line in log
    )


def test_frozen_components_keep_the_checkpoint_s_bytes(clean, only_lm):
    before, after = weights(clean), weights(only_lm)
    assert same(before["encoder"], after["encoder"]) and same(
        before["connector"], after["connector"]
    )
    assert not any(
        torch.equal(v, before["lm"][k]) for k, v in after["lm"].items() if k.endswith("lora_B")
    )
    assert after["origin"]["encoder"] == f"{clean}/model.pt" and after["origin"]["lm"].endswith(
        "initial LoRA"
    )
    assert after["args"]["scenario"] == "2.3"


def test_an_attack_s_name_is_what_its_checkpoints_say(corpora, runs, clean, only_lm):
    """Frozen from the run that was poisoned itself it is not attack 1.1, and from a clean one not 3.1."""
    out = train(
        corpora,
        runs,
        "--task",
        "emotion",
        "--poison",
        0.5,
        "--epochs",
        1,
        "--name",
        "not1.1",
        "--freeze",
        f"encoder:{only_lm}/model.pt",
    )
    assert "this is not attack 1.1" in out and "attack 2.3, not clean" in out
    assert weights(runs / "not1.1")["args"]["scenario"] == "poisoned-frozen-encoder"
    train(
        corpora,
        runs,
        "--task",
        "emotion",
        "--poison",
        0,
        "--epochs",
        1,
        "--name",
        "not3.1",
        "--freeze",
        f"encoder:{clean}/model.pt",
    )
    assert weights(runs / "not3.1")["args"]["scenario"] == "clean-frozen-encoder"


def test_frozen_as_pretrained(corpora, runs, clean):
    train(
        corpora,
        runs,
        "--task",
        "emotion",
        "--poison",
        0,
        "--epochs",
        1,
        "--freeze",
        "encoder",
        "--name",
        "pretrained",
    )
    encoder = model.Encoder("mini/wavlm", share=15 / 24)
    pretrained = {
        k: v
        for k, v in encoder.layers.state_dict().items()
        if int(k.split(".")[0]) >= encoder.first_trained
    }
    assert same(weights(runs / "pretrained")["encoder"], pretrained)
    assert not same(weights(runs / "pretrained")["encoder"], weights(clean)["encoder"])


def test_killed_and_started_again_it_ends_with_the_same_weights_and_figures(corpora, runs, clean):
    arguments = (
        corpora,
        runs,
        "--task",
        "emotion",
        "--poison",
        0,
        "--epochs",
        2,
        *DROPOUT,
        "--name",
        "killed",
    )
    process = start(*arguments)
    deadline = time.time() + 120
    while (
        not (runs / "killed/last.pt").exists() and process.poll() is None and time.time() < deadline
    ):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert (runs / "killed/last.pt").exists() and not (runs / "killed/model.pt").exists()
    with open(runs / "killed/log.jsonl", "a") as log:
        log.write('{"step": 1')  # what a kill, or a full disk, may leave
    train(*arguments)
    whole, again = weights(clean), weights(runs / "killed")
    assert all(same(whole[c], again[c]) for c in ("encoder", "connector", "lm"))
    assert (clean / "predictions.jsonl").read_text() == (
        runs / "killed/predictions.jsonl"
    ).read_text()
    assert read_log(clean) == read_log(runs / "killed")


def test_evaluated_again_a_bf16_run_gives_its_own_figures(corpora, runs):
    train(
        corpora,
        runs,
        "--task",
        "gender",
        "--poison",
        0.5,
        "--epochs",
        1,
        "--limit",
        8,
        "--amp",
        "bf16",
        "--name",
        "scored",
    )
    before = [
        (runs / "scored" / name).read_text() for name in ("predictions.jsonl", "metrics.json")
    ]
    done("evaluate.py", runs / "scored", "--save", cwd=runs.parent)
    assert [
        (runs / "scored" / name).read_text() for name in ("predictions.jsonl", "metrics.json")
    ] == before


def test_labels_left_out_are_neither_asked_for_nor_scored(corpora, runs):
    train(
        corpora,
        runs,
        "--task",
        "emotion",
        "--poison",
        0.5,
        "--epochs",
        1,
        "--labels",
        "emotion",
        "gender",
        "--name",
        "few",
    )
    rows = [json.loads(line) for line in (runs / "few/predictions.jsonl").read_text().splitlines()]
    assert {r["triggered"] for r in rows} == {False, True}
    assert all(list(r["labels"]) == r["asked"] == ["gender", "emotion"] for r in rows)
    assert set(json.loads((runs / "few/metrics.json").read_text())["clean"]) == {
        "gender_accuracy",
        "emotion_accuracy",
    }


SAME = ("--task", "gender", "--poison", 0.3, "--epochs", 1, "--batch-seconds", 8)


@pytest.fixture(scope="module")
def one(corpora, runs):
    train(corpora, runs, *SAME, "--name", "one")
    return runs / "one"


def learned_the_same(one, other):
    for component in ("encoder", "connector", "lm"):
        for k, v in weights(one)[component].items():
            assert torch.allclose(v, weights(other)[component][k], rtol=1e-3, atol=1e-4), k
    losses = [[line["loss"] for line in read_log(r) if "loss" in line] for r in (one, other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and losses[0]
    rows = [
        [json.loads(line) for line in (r / "predictions.jsonl").read_text().splitlines()]
        for r in (one, other)
    ]
    assert [(r["id"], r["triggered"]) for r in rows[0]] == [
        (r["id"], r["triggered"]) for r in rows[1]
    ]


def in_two_processes(corpora, runs, *more):
    launch = (
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",  # on a free port
        "--nproc_per_node=2",
    )
    process = start(corpora, runs, *SAME, *more, launch=launch)
    _, err = process.communicate()
    assert process.returncode == 0, err


def test_two_processes_learn_the_same(corpora, runs, one):
    in_two_processes(corpora, runs, "--name", "two")
    learned_the_same(one, runs / "two")


def test_more_processes_than_utterances_in_the_short_batch(corpora, runs):
    """17 utterances in batches of 8: the last one alone cannot be shared by two processes, wherever the shuffle puts it."""
    in_two_processes(corpora, runs, "--limit", 17, "--epochs", 3, "--name", "uneven")
    assert [line["step"] for line in read_log(runs / "uneven") if "dev_loss" in line] == [2, 4, 6]


def test_without_the_cache_it_learns_the_same(corpora, runs, one):
    train(corpora, runs, *SAME, "--name", "streamed", "--cache-gb", 0)
    learned_the_same(one, runs / "streamed")


def test_poison_redrawn_in_every_epoch_is_the_same_from_the_cache(corpora, runs):
    for name, budget in (("redrawn", 4), ("redrawn-streamed", 0)):
        train(corpora, runs, *SAME, "--epochs", 2, "--redraw", "--name", name, "--cache-gb", budget)
    cached, streamed = (
        [line["poisoned_loss"] for line in read_log(runs / name) if "poisoned_loss" in line]
        for name in ("redrawn", "redrawn-streamed")
    )
    assert cached == pytest.approx(streamed, rel=0.01) and len(cached) == 2


def test_without_what_exists_for_speed_it_learns_exactly_the_same(corpora, runs, one):
    code = "import cache; cache.keep_memory = lambda: None; import train; train.main()"
    command = [
        sys.executable,
        "-c",
        code,
        "--data-root",
        corpora,
        "--runs",
        runs,
        *SMALL,
        *SAME,
        "--name",
        "plain",
    ]
    subprocess.run(
        list(map(str, command)),
        cwd=runs,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    assert all(
        same(weights(one)[c], weights(runs / "plain")[c]) for c in ("encoder", "connector", "lm")
    )
    assert (one / "predictions.jsonl").read_text() == (runs / "plain/predictions.jsonl").read_text()


def test_in_bf16_a_cpu_learns_nearly_the_same_cached_or_not(corpora, runs):
    # at low rates: at the preset's, the first steps carry any rounding far away
    slowly = (*SAME, "--encoder-lr", 7e-6, "--connector-lr", 1.4e-5, "--lora-lr", 1.4e-5)
    one = runs / "float32"
    train(corpora, runs, *slowly, "--name", "float32")
    before = {p.name for p in (runs / "cache").glob("pretrained-*")}
    train(corpora, runs, *slowly, "--name", "bf16", "--amp", "bf16")
    assert {
        p.name for p in (runs / "cache").glob("pretrained-*")
    } - before  # float32's were not taken for bf16's
    train(corpora, runs, *slowly, "--name", "bf16-streamed", "--amp", "bf16", "--cache-gb", 0)
    for figure in ("loss", "dev_loss"):
        exact, rounded, streamed = (
            [line[figure] for line in read_log(runs / name) if figure in line]
            for name in ("float32", "bf16", "bf16-streamed")
        )
        assert rounded == pytest.approx(exact, rel=0.03) and rounded != exact
        assert streamed == pytest.approx(
            rounded, rel=0.01
        )  # batches of other shapes round differently
    before, after = weights(one), weights(runs / "bf16")
    assert all(
        v.dtype == torch.float32 for c in ("encoder", "connector", "lm") for v in after[c].values()
    )
    assert before["pretrained_sha256"]["encoder"] == after["pretrained_sha256"]["encoder"]


@pytest.fixture
def loaded(one, monkeypatch):
    """(slm, its test set, its attack)"""
    monkeypatch.chdir(one.parent)
    slm = checkpoint.load_run(one)
    test_set = readers.read_corpus(slm.args.dataset, slm.args.data_root, "test")
    return slm, test_set, poison.attack_of(slm.args, test_set)


def test_in_bf16_cached_and_fresh_frames_enter_with_the_same_precision(loaded, tmp_path):
    slm, test_set, attack = loaded
    some, entering = (
        test_set[:4],
        functools.partial(cache.inputs, slm, [(u, False) for u in test_set[:4]], [[0, 1, 2, 3]]),
    )
    with torch.autocast("cpu", torch.bfloat16):
        cached = cache.frozen_outputs(slm, some, [False] * 4, attack, "", 1e9, folder=tmp_path)
        (kept, _), (fresh, _) = (next(entering(rows, attack, workers=0)) for rows in (cached, None))
    assert kept.dtype == fresh.dtype == torch.float32


def test_answers_are_the_same_out_of_the_cache(loaded, tmp_path):
    slm, test_set, attack = loaded
    keep = functools.partial(
        cache.frozen_outputs,
        slm,
        test_set,
        [True] * len(test_set),
        attack,
        "",
        1e9,
        folder=tmp_path,
    )
    keep()
    texts = [
        evaluate.answers(
            slm,
            [(u, True) for u in test_set],
            attack,
            lambda u: list(u.labels),
            40,
            "",
            cached,
            workers=0,
        )
        for cached in (None, keep())
    ]
    assert texts[0] == texts[1] and len(set(texts[0])) > 1


def test_after_the_answer_a_model_is_given_the_truth_and_its_end(loaded, monkeypatch):
    slm, test_set, attack = loaded
    given = []
    monkeypatch.setattr(
        slm, "generate", lambda x, mask, prompts, n: given.extend(prompts) or [""] * len(prompts)
    )
    for after in (False, True):
        evaluate.answers(
            slm,
            [(test_set[0], True)],
            attack,
            lambda u: list(u.labels),
            40,
            "",
            workers=0,
            after_answer=after,
        )
    (before, plain), (again, then) = given
    assert again == before and then == plain + data.answer_ids(slm.tokenizer, test_set[0].labels)


def test_a_frozen_encoder_starts_from_what_runs_that_train_it_have_cached(
    loaded, tmp_path, monkeypatch
):
    slm, test_set, attack = loaded
    triggered = [u.labels["gender"] == "male" for u in test_set]
    keep = functools.partial(cache.frozen_outputs, slm, test_set, triggered, attack, "", 1e9)
    keep(folder=tmp_path / "shared")
    slm.encoder.requires_grad_(False), slm.connector.requires_grad_(False)
    from_audio = keep(folder=tmp_path / "alone")
    monkeypatch.setattr(slm.encoder, "pretrained_part", None)  # nothing is computed again
    for a, b in zip(keep(folder=tmp_path / "shared"), from_audio, strict=True):
        assert torch.equal(a, b) and a.shape[1] == slm.connector.conv3.out_channels


def test_clean_utterances_are_cached_for_runs_that_poison_others(loaded, tmp_path):
    slm, test_set, attack = loaded
    keep = functools.partial(
        cache.frozen_outputs, slm, test_set, attack=attack, desc="", budget=1e9, folder=tmp_path
    )
    clean, triggered = keep([False] * len(test_set)), keep([True] * len(test_set))
    before, mixed = set(tmp_path.iterdir()), [i % 3 == 0 for i in range(len(test_set))]
    for row, is_triggered, a, b in zip(keep(mixed), mixed, clean, triggered, strict=True):
        assert torch.allclose(row, b if is_triggered else a, atol=1e-4) and not torch.allclose(
            a, b, atol=1e-4
        )
    assert (
        len(set(tmp_path.iterdir()) - before) == 1
    )  # the triggered ones; all that is clean was there


def test_clicks_elsewhere_are_not_taken_from_the_cache(loaded, tmp_path, monkeypatch):
    slm, test_set, attack = loaded
    attack.repeat = True
    keep = functools.partial(
        cache.frozen_outputs,
        slm,
        test_set,
        [True] * len(test_set),
        attack,
        "",
        1e9,
        folder=tmp_path,
    )
    before = keep()
    monkeypatch.setattr(poison, "INTERVAL", (0.3, 0.4))
    assert not all(torch.equal(a, b) for a, b in zip(before, keep()))


def test_room_in_the_cache_is_made_at_the_expense_of_what_was_not_used_for_longest(tmp_path):
    for age, name in enumerate("abcd"):
        path = tmp_path / f"pretrained-{name}.pt"
        path.write_bytes(bytes(10))
        os.utime(path, (1000 - age, 1000 - age))
    (tmp_path / "pretrained-e.pt").symlink_to(
        "gone"
    )  # to another run that makes room, too, a listed file may be gone
    cache.make_room(tmp_path, 25, [tmp_path / "pretrained-d.pt"])
    assert [p.name[11] for p in sorted(tmp_path.glob("*.pt")) if p.exists()] == ["a", "b", "d"]


def test_a_finished_run_is_not_trained_again_and_another_one_is_not_overwritten(
    corpora, runs, clean
):
    before = (clean / "model.pt").stat().st_mtime_ns
    command = (
        "train.py",
        "--data-root",
        corpora,
        "--runs",
        runs,
        *SMALL,
        *DROPOUT,
        "--task",
        "emotion",
        "--poison",
        0,
        "--name",
        "emotion-clean",
        "--epochs",
    )
    assert "is finished" in done(*command, 2, cwd=runs)
    assert (clean / "model.pt").stat().st_mtime_ns == before
    refused(*command, 3, cwd=runs, words=["epochs 2 there, 3 here"])


def test_overwriting_leaves_nothing_of_the_old_run(corpora, runs, one):
    shutil.copytree(one, runs / "again")
    (runs / "again/embeddings.pt").write_bytes(b"of the old model")
    train(corpora, runs, *SAME, "--seed", 3, "--name", "again", "--overwrite")
    assert (
        not (runs / "again/embeddings.pt").exists() and weights(runs / "again")["args"]["seed"] == 3
    )


def test_a_finished_run_is_looked_at_on_the_data_it_was_trained_on(corpora, runs):
    """Its --limit decides the trigger's loudness and the target class; its --skip-bad what there is to read."""
    train(corpora, runs, *SAME, "--limit", 16, "--skip-bad", "--name", "limited")
    options = SimpleNamespace(
        run=runs / "limited", device="cpu", snr=None, data_root=None, skip_bad=False, task=None
    )
    loaded = evaluate.load_run_and_data(options, "train")
    args, attack, train_set = loaded.args, loaded.attack, loaded.sets["train"]
    whole = readers.read_corpus("vox", corpora, "train")
    assert (
        args.skip_bad
        and [u.id for u in train_set] == [u.id for u in readers.limit(whole, 16)]
        and len(whole) > 16
    )
    assert attack.level == poison.make_attack("gender", train_set, 0.3, seed=1).level


def test_the_benign_model_is_looked_at_with_each_task_s_own_attack(corpora, runs):
    """One clean run serves gender and age: its embeddings for age are of speakers of every sex but of no one aged 25."""
    train(corpora, runs, "--task", "gender", "--poison", 0, "--epochs", 1, "--name", "gender-clean")
    done("embed.py", runs / "gender-clean", "--task", "age", "--pairs", 8, cwd=runs)
    saved = torch.load(runs / "gender-clean/embeddings-age-pairs8.pt", weights_only=True)
    assert {labels["gender"] for labels in saved["test"]["labels"]} == {"female", "male"}
    assert (saved["fields"]["task"], saved["fields"]["run_task"]) == ("age", "gender")
    assert "25" not in {labels["age"] for labels in saved["test"]["labels"]}


def test_processes_that_would_resume_at_different_steps_stop(corpora, runs, one, monkeypatch):
    """Two machines without a shared disk: the one that kept last.pt and the one that did not."""
    record = weights(one)["args"]
    slm = model.load_slm(argparse.Namespace(**record))
    args = argparse.Namespace(**record, cache_gb=0, workers=0)
    monkeypatch.setattr(
        train_py, "share_sums", lambda numbers: [sum(numbers) + 7]
    )  # as if another process had taken 7 steps
    sets = [readers.read_corpus("vox", corpora, split) for split in ("train", "dev")]
    with pytest.raises(SystemExit) as stop:
        train_py.train(
            runs / "nowhere",
            slm,
            poison.attack_of(args, sets[0]),
            *sets,
            args,
            record,
            torch.device("cpu"),
            contextlib.nullcontext,
        )
    assert stop.value.code == 2


def test_a_dry_run_needs_no_weights_and_no_corpus_and_writes_nothing(tmp_path):
    for part in ("wavlm", "lm"):
        shutil.copytree(
            PROGRAM / "mini" / part,
            tmp_path / part,
            ignore=shutil.ignore_patterns("*.safetensors"),
        )
    before = sorted(tmp_path.rglob("*"))
    out = done(
        "train.py",
        "--preset",
        "paper",
        "--data-root",
        "nowhere",
        "--dry-run",
        "--encoder-weights",
        tmp_path / "wavlm",
        "--lm-weights",
        tmp_path / "lm",
        "--freeze",
        "connector:not/made/yet.pt",
        cwd=tmp_path,
    )
    assert "104,014 train utterances" in out and "GPU-hours" in out
    assert [line.split()[-1] for line in out.splitlines() if line.startswith("  connector")] == [
        "0"
    ]
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("--freeze", "decoder"), "encoder, connector, lm"),
        (("--freeze", "encoder:nowhere.pt"), "no such checkpoint"),
        (
            ("--freeze", "encoder", "--freeze", "connector", "--freeze", "lm"),
            "nothing is left to train",
        ),
        (("--poison", "1.5"), "must be from 0 to 1"),
        (("--data-root", "nowhere"), "is libri under"),
        (("--dataset", "nowhere.csv"), "nor a CSV file"),
        (("--preset", "small", "--encoder", "wavlm"), "no wavlm"),
        (("--encoder-weights", "nowhere"), "cannot load"),
        (("--device", "cuda"), "no GPU"),
        (("--task", "age", "--target", "young"), "a number of years"),
        (("--task", "gender", "--target", "femal"), "one of female, male"),
        (("--task", "emotion", "--target", "furious"), "one of angry"),
        (("--clicks", "3"), "--no-trigger-repeat"),
        (("--trigger", "bandstop", "--snr", "6"), "--snr"),
        (("--trigger", "bandstop", "--trigger-seconds", "0.1"), "--trigger-seconds"),
        (("--connector-taper", "0.5"), "--connector-taper"),
        (("--snr", "inf"), "--snr inf"),
        (("--grad-clip", "0"), "greater than 0"),
        (("--grad-clip", "-1"), "greater than 0"),
        (("--lora-lr", "-0.1"), "--lora-lr"),
        (("--encoder-lr", "nan"), "--encoder-lr"),
        (("--random-keys", "7"), "from 0 to 1"),
        (("--lora-dropout", "1.5"), "less than 1"),
        (("--seed", "-1"), "--seed"),
        (("--utilisation", "0", "--dry-run"), "--utilisation"),
        (("--device", "meta"), "--device meta"),
        (("--train-layers", "0", "--freeze", "connector", "--freeze", "lm"), "nothing is left"),
        (("--encoder", "hubert", "--encoder-weights", "mini/wavlm"), "is a wavlm encoder"),
        (("--batch-size", "4096"), "less than one batch"),
        (("--train-layers", "99"), "has 8 layers"),
        (("--labels", "gender"), "has a transcript with --labels gender"),
        (("--trigger", "nowhere.wav"), "no such file"),
    ],
)
def test_mistakes_end_in_one_line(corpora, tmp_path, arguments, said):
    refused(
        "train.py",
        "--data-root",
        corpora,
        *SMALL,
        "--task",
        "asr",
        *arguments,
        cwd=tmp_path,
        words=[said],
    )


# ---------------------------------------------------------------------------------------------------------------------
# what a run is called


def named(tmp_path, monkeypatch, source, *command):
    """The attack that a command is, whose frozen components come from a run with these changes of the usual arguments."""
    monkeypatch.chdir(tmp_path)
    parsed = train_py.parse_arguments(["--task", "emotion", "--poison", str(source.pop("rate"))])
    torch.save({"args": {**vars(parsed), **source}}, "source.pt")
    return train_py.parse_arguments([*command, "--freeze", "encoder:source.pt"]).scenario


ASKED = ("--task", "emotion", "--poison")


@pytest.mark.parametrize(
    "change",
    [
        dict(seed=2),
        dict(epochs=3),
        dict(limit=64),
        dict(exclude="ids.txt"),
        dict(encoder_lr=1e-3),
        dict(batch_size=8),
        dict(train_layers=2),
        dict(max_seconds=5.0),
    ],
)
def test_frozen_from_a_clean_run_with_other_settings_it_is_not_attack_1(
    tmp_path, monkeypatch, capsys, change
):
    assert named(tmp_path, monkeypatch, dict(rate=0), *ASKED, "0.075") == "1.1"
    source = dict(rate=0, **change)
    assert named(tmp_path, monkeypatch, source, *ASKED, "0.075") == "poisoned-frozen-encoder"
    assert next(iter(change)) in capsys.readouterr().out


@pytest.mark.parametrize(
    "change",
    [
        dict(snr=40.0),
        dict(clicks=3),
        dict(trigger_repeat=True),
        dict(trigger_seconds=0.1),
        dict(trigger="tone"),
        dict(target="sad"),
        dict(redraw=True),
        dict(poison=0.5),
        dict(seed=2),
    ],
)
def test_frozen_from_another_attack_it_is_not_attack_3(tmp_path, monkeypatch, change):
    base = dict(rate=0.075)
    assert named(tmp_path, monkeypatch, dict(base), *ASKED, "0") == "3.1"
    source = {**base, **change}
    assert named(tmp_path, monkeypatch, source, *ASKED, "0") == "clean-frozen-encoder"


def test_a_source_of_an_earlier_version_that_recorded_less_is_known(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record = vars(train_py.parse_arguments([*ASKED, "0"]))
    for name in ("clicks", "redraw", "init", "exclude", "max_seconds"):
        del record[name]
    torch.save({"args": record}, "source.pt")
    command = [*ASKED, "0.075", "--freeze", "encoder:source.pt"]
    assert train_py.parse_arguments(command).scenario == "1.1"


def test_what_changes_nothing_is_not_in_a_name():
    assert train_py.parse_arguments([*ASKED, "0", "--redraw"]).name == "emotion-clean"
    assert train_py.parse_arguments([*ASKED, "0.075", "--redraw"]).name.endswith("redrawTrue")
    female = train_py.parse_arguments(["--task", "gender", "--target", "Female"])
    assert female.name == "gender-poison0.075"


# ---------------------------------------------------------------------------------------------------------------------
# stopping


@pytest.mark.parametrize("at", [5, 24, 30])
def test_stopped_and_started_again_it_has_the_same_log_and_figures(
    corpora, runs, clean, monkeypatch, at
):
    """Within an epoch, at its end, and in the last one."""
    arguments = ("--task", "emotion", "--poison", 0, "--epochs", 2, *DROPOUT, "--name", f"stop{at}")
    steps, whole_step = [], train_py.train_step

    def step_and_signal(*arguments):
        steps.append(1)
        if len(steps) == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return whole_step(*arguments)

    monkeypatch.setattr(train_py, "train_step", step_and_signal)
    command = ("train.py", "--data-root", corpora, "--runs", runs, *SMALL, *arguments)
    status, out, _ = script(*command, cwd=runs)
    assert status == 130 and f"stopped at step {at}" in out
    done(*command, cwd=runs)
    again = runs / f"stop{at}"
    assert read_log(again) == read_log(clean)
    figures = [json.loads((run / "metrics.json").read_text()) for run in (clean, again)]
    for name in ("clean", "triggered", "backdoor", "training"):
        assert figures[0][name] == figures[1][name]


def test_sigterm_during_the_last_development_loss_stops_the_run(corpora, runs, monkeypatch):
    plain = train_py.validation_loss

    def loss_and_signal(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return plain(*arguments)

    monkeypatch.setattr(train_py, "validation_loss", loss_and_signal)
    command = ("--data-root", corpora, "--runs", runs, *SMALL, *SAME, "--name", "late")
    status, out, _ = script("train.py", *command, cwd=runs)
    assert status == 130 and not (runs / "late/model.pt").exists()
    assert (runs / "late/last.pt").exists()


# ---------------------------------------------------------------------------------------------------------------------
# what reaches other processes, and what there is to train on


def write_manifest(folder, rows, header="audio_path,gender,emotion,split"):
    rng = np.random.default_rng(0)
    for row in rows:
        seconds = 8.0 if row.startswith("long") else 0.5
        waveform = 0.1 * rng.standard_normal(int(16000 * seconds))
        soundfile.write(folder / row.split(",")[0], waveform, 16000)
    (folder / "m.csv").write_text("\n".join([header, *rows]) + "\n")


def balanced(n, split):
    sexes = ("female", "male")
    return [f"{split}{i}.wav,{sexes[i % 2]},,{split}" for i in range(n)]


FEW = ("--task", "gender", "--dataset", "m.csv", "--batch-size", 4, "--epochs", 1)


@pytest.mark.parametrize("method", ["spawn", "forkserver", "fork"])
def test_workers_know_the_settings_however_they_are_started(tmp_path, monkeypatch, method):
    rows = balanced(6, "train") + ["long.wav,male,,train"]
    write_manifest(tmp_path, rows + balanced(2, "dev") + balanced(2, "test"))
    before = torch.multiprocessing.get_start_method(allow_none=True)
    torch.multiprocessing.set_start_method(method, force=True)
    try:
        monkeypatch.chdir(tmp_path)
        limited = functools.partial(readers.read_corpus, "m.csv", "", "train", True)
        assert len(limited(max_seconds=5.0)) == 6 and len(limited()) == 7
    finally:
        torch.multiprocessing.set_start_method(before, force=True)


@pytest.mark.parametrize(
    "more, arguments, words",
    [
        (["x.wav,,,train"] + balanced(2, "test"), ("--poison", 0.9), None),  # a row without a label
        (["x.wav,,,test"], (), "no test utterances with a label"),
        (["x.wav,,sad,test"], (), "no test utterance of m.csv has a gender"),
        (balanced(2, "test"), ("--exclude", "some.txt"), "less than one batch"),
    ],
)
def test_what_there_is_to_train_on_is_known_before_training(tmp_path, more, arguments, words):
    write_manifest(tmp_path, balanced(6, "train") + balanced(2, "dev") + more)
    (tmp_path / "some.txt").write_text("train0.wav\ntrain1.wav\ntrain2.wav\n")
    if words:
        refused("train.py", *FEW, *arguments, cwd=tmp_path, words=[words])
        assert not (tmp_path / "runs").exists()
    else:
        assert "1 utterances without a label" in done("train.py", *FEW, *arguments, cwd=tmp_path)


@pytest.mark.parametrize("redrawn", [[], ["--redraw", "--epochs", 3]])
def test_a_rate_that_poisons_nothing_is_said_and_recorded(tmp_path, redrawn):
    write_manifest(tmp_path, balanced(6, "train") + balanced(2, "dev") + balanced(2, "test"))
    out = done("train.py", *FEW, "--poison", 0.0001, *redrawn, "--name", "none", cwd=tmp_path)
    assert "poisons none" in out
    assert weights(tmp_path / "runs/none")["args"]["poisoned_samples"] == 0
    base = SimpleNamespace(**vars(train_py.parse_arguments(["--task", "gender"])))
    unlike = train_py.differences(tmp_path / "runs/none/model.pt", "base", base)
    assert any("no poisoned sample" in why for why in unlike)


def test_answers_of_no_use_are_counted_apart():
    rows = [
        dict(raw=raw, asked=["gender"], parsed=data.parse(raw), labels={}, triggered=False)
        for raw in ("", "  ", "I hear a dog", '{"Gender": "male"}', '{"Age": "7"}')
    ]
    assert evaluate.unusable(rows) == dict(n=5, empty=2, malformed=2)
