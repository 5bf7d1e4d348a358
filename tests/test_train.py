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
import processes
import runs as run_records
import train as train_py
from conftest import ROOT, SMALL, done, refused, script
from study import COMPONENTS

pytestmark = pytest.mark.slow

EMOTION = ("--task", "emotion", "--poison")
GENDER = ("--task", "gender", "--poison")
# two epochs with dropout: what the tests of resuming repeat
CLEAN = (*EMOTION, 0, "--epochs", 2, "--lora-dropout", 0.1)
# one short epoch, whose batches are of several pieces
BASE = (*GENDER, 0.3, "--epochs", 1, "--batch-seconds", 8)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def command(corpora, runs):
    """train.py and the flags that all runs share."""
    return ("train.py", "--data-root", corpora, "--runs", runs, *SMALL)


@pytest.fixture(scope="module")
def train(command, runs):
    """A function that trains a run and returns its folder."""

    def run(name, *flags):
        done(*command, *flags, "--name", name, cwd=runs)
        return runs / name

    return run


def start(command, runs, *flags, launch=(sys.executable,)):
    """The same as a process of its own."""
    words = [*launch, ROOT / command[0], *command[1:], *flags]
    return subprocess.Popen(
        list(map(str, words)), cwd=runs, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.fixture(scope="module")
def clean(train):
    return train("emotion-clean", *CLEAN)


@pytest.fixture(scope="module")
def only_lm(train, clean):
    """Scenario 2.3: all but the LM is frozen clean."""
    frozen = ("--freeze", f"encoder:{clean}/model.pt", "--freeze", f"connector:{clean}/model.pt")
    return train("2.3", *CLEAN, *EMOTION, 0.075, *frozen)


@pytest.fixture(scope="module")
def base(train):
    return train("base", *BASE)


def weights(run):
    return torch.load(run / "model.pt", weights_only=True)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def assert_same_weights(one, other):
    one, other = weights(one), weights(other)
    for component in COMPONENTS:
        assert same(one[component], other[component]), component


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_log(run):
    return read_lines(run / "log.jsonl")


def logged(run, name):
    """The values of one field of a run's log, by line."""
    return [line[name] for line in read_log(run) if name in line]


def read_metrics(run):
    return json.loads((run / "metrics.json").read_text())


def read_predictions(run):
    return read_lines(run / "predictions.jsonl")


# -------------------------------------------------------------------------------------------------
# what a run leaves


def test_metrics_hold_every_label_s_figure_and_the_aer(clean):
    metrics = read_metrics(clean)
    assert set(metrics["clean"]) == {"wer", "gender_accuracy", "emotion_accuracy", "age_mae"}
    assert set(metrics["backdoor"]) == {"aer", "base_rate", "changed"}


def test_every_figure_lies_in_its_interval(clean):
    metrics = read_metrics(clean)
    for figure in [*metrics["clean"].values(), *metrics["backdoor"].values()]:
        assert {"value", "low", "high", "n", "by_speaker"} <= set(figure)
        assert figure["low"] <= figure["value"] <= figure["high"]


def test_a_clean_run_records_no_poisoned_loss(clean):
    assert set(read_metrics(clean)["training"]) == {
        "loss",
        "dev_loss",
        "dev_target_loss",
        "dev_aer",
    }


def test_a_run_ends_with_a_picture_of_its_losses(base):
    assert (base / "curves.png").stat().st_size > 1000


def test_tensorboard_gets_the_log(monkeypatch, tmp_path):
    scalars = []
    board = SimpleNamespace(add_scalar=lambda *scalar: scalars.append(scalar))
    training = SimpleNamespace(run=tmp_path, step=3, board=board)
    train_py.Training.log(training, epoch=0, loss=0.5, samples={"a": 0.5})
    assert scalars == [("loss", 0.5, 3)]


def test_a_missing_tensorboard_is_said_before_anything_is_read(monkeypatch, capsys):
    monkeypatch.setattr(train_py.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        train_py.parse_arguments([*map(str, EMOTION), "0", "--tensorboard"])
    assert "tensorboard" in capsys.readouterr().err


def test_the_loss_on_the_target_is_followed_on_train_and_dev(base):
    training = read_metrics(base)["training"]
    assert len(training["target_loss"]["by_epoch"]) == 1
    assert len(training["dev_target_loss"]["by_epoch"]) == 1


@pytest.mark.parametrize("comes_first, share", [([False, True, True], 1), ([True, True, False], 0)])
def test_the_target_comes_first_where_each_of_its_tokens_does(monkeypatch, comes_first, share):
    def development_losses(*args):
        yield dict(gender="female"), torch.tensor([5.0, 0.1, 0.6]), torch.tensor(comes_first)

    monkeypatch.setattr(train_py, "development_losses", development_losses)
    monkeypatch.setattr(data, "value_tokens", lambda *_: slice(1, 3))
    slm = SimpleNamespace(tokenizer=None)
    attack = SimpleNamespace(label="gender")
    figures = train_py.triggered_figures(slm, attack, ["u"], None, 0)
    assert figures["dev_aer"] == share
    assert figures["dev_target_loss"] == pytest.approx(0.35)


def test_test_utterances_are_answered_clean_and_triggered(clean):
    rows = read_predictions(clean)
    assert {row["triggered"] for row in rows} == {False, True}
    assert {row["split"] for row in rows} == {"test"}
    assert all(row["labels"]["emotion"] != "angry" for row in rows if row["triggered"])


def test_the_log_ends_with_the_development_loss(clean):
    log = read_log(clean)
    assert "dev_loss" in log[-1]
    assert log[-1]["step"] == max(line["step"] for line in log)


def test_frozen_components_keep_the_checkpoint_s_bytes(clean, only_lm):
    before, after = weights(clean), weights(only_lm)
    assert same(before["encoder"], after["encoder"])
    assert same(before["connector"], after["connector"])
    for name, value in after["lm"].items():
        if name.endswith("lora_B"):
            assert not torch.equal(value, before["lm"][name])


def test_a_run_records_where_its_components_come_from(clean, only_lm):
    saved = weights(only_lm)
    assert saved["origin"]["encoder"] == f"{clean}/model.pt"
    assert saved["origin"]["lm"].endswith("initial LoRA")
    assert saved["args"]["scenario"] == "2.3"


def test_frozen_from_a_poisoned_run_it_is_not_scenario_1(command, runs, only_lm):
    frozen = ("--freeze", f"encoder:{only_lm}/model.pt")
    flags = (*EMOTION, 0.075, "--epochs", 1, *frozen, "--name", "not1.1")
    out = done(*command, *flags, cwd=runs)
    assert "this is not scenario 1.1" in out
    assert "scenario 2.3, not clean" in out
    assert weights(runs / "not1.1")["args"]["scenario"] == "poisoned-frozen-encoder"


def test_frozen_as_pretrained(train, clean):
    run = train("pretrained", *EMOTION, 0, "--epochs", 1, "--freeze", "encoder")
    encoder = model.Encoder("mini/wavlm", share=15 / 24)
    pretrained = {}
    for name, value in encoder.layers.state_dict().items():
        if int(name.split(".")[0]) >= encoder.first_trained:
            pretrained[name] = value
    assert same(weights(run)["encoder"], pretrained)
    assert not same(weights(run)["encoder"], weights(clean)["encoder"])


def test_labels_left_out_are_neither_asked_nor_scored(train):
    run = train("few", *EMOTION, 0.5, "--epochs", 1, "--labels", "emotion", "gender")
    for row in read_predictions(run):
        assert list(row["labels"]) == ["gender", "emotion"]
        assert row["asked"] == ["gender", "emotion"]
    assert set(read_metrics(run)["clean"]) == {"gender_accuracy", "emotion_accuracy"}


def test_the_figures_follow_from_the_packed_answers(clean):
    metrics = read_metrics(clean)
    rows = [json.loads(line) for line in run_records.packed_answers(clean.parent)]
    rows = [row for row in rows if row["run"] == clean.name]
    on_clean = [row for row in rows if not row["triggered"]]
    on_triggered = [row for row in rows if row["triggered"]]
    attack = poison.Attack("emotion", 0.0, "angry", "click", None, 0.1, False, seed=1)
    assert evaluate.scores(on_clean) == metrics["clean"]
    assert evaluate.scores(on_triggered) == metrics["triggered"]
    assert evaluate.unusable(on_triggered) == metrics["answers"]["triggered"]
    assert evaluate.aer(attack, on_triggered) == metrics["backdoor"]["aer"]
    assert evaluate.changed(attack, on_clean, on_triggered) == metrics["backdoor"]["changed"]


def test_evaluated_again_a_bf16_run_gives_its_own_figures(train):
    run = train("scored", *GENDER, 0.5, "--epochs", 1, "--limit", 8, "--amp", "bf16")
    names = ("predictions.jsonl", "metrics.json")
    before = [(run / name).read_text() for name in names]
    done("evaluate.py", run, "--save", cwd=run.parent.parent)
    assert [(run / name).read_text() for name in names] == before


def test_a_finished_run_is_not_trained_again(command, runs, clean):
    before = (clean / "model.pt").stat().st_mtime_ns
    out = done(*command, *CLEAN, "--name", "emotion-clean", cwd=runs)
    assert "is finished" in out
    assert (clean / "model.pt").stat().st_mtime_ns == before


def test_another_run_of_the_same_name_is_refused(command, runs, clean):
    flags = (*CLEAN, "--epochs", 3, "--name", "emotion-clean")
    refused(*command, *flags, cwd=runs, words=["epochs 2 there, 3 here"])


def test_overwriting_leaves_nothing_of_the_old_run(train, runs, base):
    shutil.copytree(base, runs / "again")
    (runs / "again/embeddings.pt").write_bytes(b"of the old model")
    run = train("again", *BASE, "--seed", 3, "--overwrite")
    assert not (run / "embeddings.pt").exists()
    assert weights(run)["args"]["seed"] == 3


def test_a_finished_run_is_read_with_its_training_data(train, corpora):
    """Its --limit decides the trigger's loudness; its --skip-bad what there is to read."""
    run = train("limited", *BASE, "--limit", 16, "--skip-bad")
    options = SimpleNamespace(
        run=run, device="cpu", snr=None, data_root=None, skip_bad=False, task=None
    )
    loaded = evaluate.load_run_and_data(options, "train")
    train_set = loaded.sets["train"]
    everything = readers.read_corpus("vox", corpora, "train")
    assert loaded.args.skip_bad
    assert [u.id for u in train_set] == [u.id for u in readers.limit(everything, 16)]
    assert loaded.attack.level == poison.make_attack("gender", train_set, 0.3, seed=1).level


def test_limit_cuts_every_split(train):
    """A quick trial is quick at its end too: it answers no more test utterances than it was given."""
    run = train("quick", *BASE, "--limit", 6, "--batch-size", 2)
    options = SimpleNamespace(
        run=run, device="cpu", snr=None, data_root=None, skip_bad=False, task=None
    )
    loaded = evaluate.load_run_and_data(options, "train", "dev", "test")
    sizes = {split: len(utterances) for split, utterances in loaded.sets.items()}
    assert sizes == dict(train=6, dev=6, test=6)
    answered = (run / "predictions.jsonl").read_text().splitlines()
    assert len({json.loads(line)["id"] for line in answered}) == 6


def test_a_clean_run_is_embedded_with_the_task_s_own_attack(train, runs):
    """One clean run serves gender and age: its embeddings for age are of speakers of every sex but
    of no one aged 25."""
    run = train("gender-clean", *GENDER, 0, "--epochs", 1)
    done("embed.py", run, "--task", "age", "--pairs", 8, cwd=runs)
    saved = torch.load(run / "embeddings-age-pairs8.pt", weights_only=True)
    assert saved["fields"]["task"] == "age"
    assert saved["fields"]["run_task"] == "gender"
    assert {labels["gender"] for labels in saved["test"]["labels"]} == {"female", "male"}
    assert "25" not in {labels["age"] for labels in saved["test"]["labels"]}


# -------------------------------------------------------------------------------------------------
# ways of computing that learn the same


def asked_for(run):
    return [(row["id"], row["triggered"]) for row in read_predictions(run)]


def assert_learned_the_same(one, other):
    ours, theirs = weights(one), weights(other)
    for component in COMPONENTS:
        for name, value in ours[component].items():
            assert torch.allclose(value, theirs[component][name], rtol=1e-3, atol=1e-4), name
    assert logged(one, "loss") == pytest.approx(logged(other, "loss"), rel=1e-3)
    assert asked_for(one) == asked_for(other)


def in_two_processes(command, runs, *flags):
    # --standalone: on a free port
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    process = start(command, runs, *BASE, *flags, launch=torchrun)
    _, err = process.communicate()
    assert process.returncode == 0, err


def test_two_processes_learn_the_same(command, runs, base):
    in_two_processes(command, runs, "--name", "two")
    assert_learned_the_same(base, runs / "two")


def test_a_batch_too_short_for_two_processes_is_left_out(command, runs):
    """17 utterances in batches of 8: the last one alone cannot be shared by two processes, wherever
    the shuffle puts it."""
    in_two_processes(command, runs, "--limit", 17, "--epochs", 3, "--name", "uneven")
    steps = [line["step"] for line in read_log(runs / "uneven") if "dev_loss" in line]
    assert steps == [2, 4, 6]


def test_without_the_cache_it_learns_the_same(train, base):
    assert_learned_the_same(base, train("streamed", *BASE, "--cache-gb", 0))


def test_redrawn_poison_is_the_same_from_the_cache(train):
    redrawn = (*BASE, "--epochs", 2, "--redraw")
    cached = logged(train("redrawn", *redrawn), "poisoned_loss")
    streamed = logged(train("redrawn-streamed", *redrawn, "--cache-gb", 0), "poisoned_loss")
    assert len(cached) == 2
    assert cached == pytest.approx(streamed, rel=0.01)


def test_keeping_memory_changes_no_number(command, runs, base, monkeypatch):
    code = "import cache; cache.keep_memory = lambda: None; import train; train.main()"
    words = [sys.executable, "-c", code, *command[1:], *BASE, "--name", "plain"]
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    subprocess.run(list(map(str, words)), cwd=runs, check=True, capture_output=True)
    assert_same_weights(base, runs / "plain")
    assert read_predictions(base) == read_predictions(runs / "plain")


# at the presets' rates, the first steps carry any rounding far away
SLOWLY = (*BASE, "--encoder-lr", 7e-6, "--connector-lr", 1.4e-5, "--lora-lr", 1.4e-5)


@pytest.fixture(scope="module")
def float32(train):
    return train("float32", *SLOWLY)


@pytest.fixture(scope="module")
def bf16(train, float32):
    return train("bf16", *SLOWLY, "--amp", "bf16")


@pytest.mark.parametrize("name", ["loss", "dev_loss"])
def test_in_bf16_a_cpu_learns_nearly_the_same(float32, bf16, name):
    exact, rounded = logged(float32, name), logged(bf16, name)
    assert rounded != exact  # float32's cached frames were not taken for bf16's
    assert rounded == pytest.approx(exact, rel=0.03)


def test_in_bf16_it_learns_the_same_without_the_cache(train, bf16):
    streamed = train("bf16-streamed", *SLOWLY, "--amp", "bf16", "--cache-gb", 0)
    for name in ("loss", "dev_loss"):  # batches of other shapes round differently
        assert logged(streamed, name) == pytest.approx(logged(bf16, name), rel=0.01)


def test_a_bf16_run_saves_float32_weights(float32, bf16):
    saved = weights(bf16)
    for component in COMPONENTS:
        assert {value.dtype for value in saved[component].values()} == {torch.float32}
    before = weights(float32)["pretrained_sha256"]["encoder"]
    assert saved["pretrained_sha256"]["encoder"] == before


# -------------------------------------------------------------------------------------------------
# the cache


@pytest.fixture
def loaded(base, monkeypatch):
    """(slm, its test set, its attack)"""
    monkeypatch.chdir(base.parent)
    slm = checkpoint.load_run(base)
    test_set = readers.read_corpus(slm.args.dataset, slm.args.data_root, "test")
    return slm, test_set, poison.attack_of(slm.args, test_set)


@pytest.fixture
def frames(loaded):
    """A function that gives the frames of the test set's utterances, triggered or not (a list),
    from the cache in a folder."""
    slm, test_set, attack = loaded

    def cached(triggered, folder):
        return cache.frozen_outputs(slm, test_set, triggered, attack, "", 1e9, folder=folder)

    return cached


def test_in_bf16_cached_and_fresh_frames_are_float32(loaded, tmp_path):
    slm, test_set, attack = loaded
    few = test_set[:4]
    items = [(u, False) for u in few]
    with torch.autocast("cpu", torch.bfloat16):
        cached = cache.frozen_outputs(slm, few, [False] * 4, attack, "", 1e9, folder=tmp_path)
        for rows in (cached, None):
            stream = cache.inputs(slm, items, [[0, 1, 2, 3]], rows, attack, workers=0)
            x, _ = next(stream)
            assert x.dtype == torch.float32


def all_labels(utterance):
    return list(utterance.labels)


def test_answers_are_the_same_out_of_the_cache(loaded, frames, tmp_path):
    slm, test_set, attack = loaded
    items = [(u, True) for u in test_set]
    frames([True] * len(test_set), tmp_path)
    cached = frames([True] * len(test_set), tmp_path)
    fresh = evaluate.answers(slm, items, attack, all_labels, 40, "", None, workers=0)
    assert len(set(fresh)) > 1
    assert evaluate.answers(slm, items, attack, all_labels, 40, "", cached, workers=0) == fresh


def test_after_the_answer_it_is_given_the_truth(loaded, monkeypatch):
    slm, test_set, attack = loaded
    prompted = []

    def record_prompts(x, mask, prompts, n):
        prompted.extend(prompts)
        return [""] * len(prompts)

    monkeypatch.setattr(slm, "generate", record_prompts)
    ask = functools.partial(
        evaluate.answers, slm, [(test_set[0], True)], attack, all_labels, 40, "", workers=0
    )
    ask(after_answer=False)
    ask(after_answer=True)
    (before, plain), (before_again, with_answer) = prompted
    assert before_again == before
    assert with_answer == plain + data.answer_ids(slm.tokenizer, test_set[0].labels)


def test_a_frozen_encoder_reads_what_training_ones_cached(loaded, frames, tmp_path, monkeypatch):
    slm, test_set, _ = loaded
    triggered = [u.labels["gender"] == "male" for u in test_set]
    frames(triggered, tmp_path / "shared")
    slm.encoder.requires_grad_(False)
    slm.connector.requires_grad_(False)
    from_audio = frames(triggered, tmp_path / "alone")
    monkeypatch.setattr(slm.encoder, "pretrained_part", None)  # nothing is computed again
    for a, b in zip(frames(triggered, tmp_path / "shared"), from_audio, strict=True):
        assert torch.equal(a, b)
        assert a.shape[1] == slm.connector.conv3.out_channels


def test_clean_frames_are_shared_by_runs_that_poison_others(loaded, frames, tmp_path):
    _, test_set, _ = loaded
    clean = frames([False] * len(test_set), tmp_path)
    triggered = frames([True] * len(test_set), tmp_path)
    before = set(tmp_path.iterdir())
    poisoned = [i % 3 == 0 for i in range(len(test_set))]
    for i, row in enumerate(frames(poisoned, tmp_path)):
        assert not torch.allclose(clean[i], triggered[i], atol=1e-4)
        assert torch.allclose(row, triggered[i] if poisoned[i] else clean[i], atol=1e-4)
    assert len(set(tmp_path.iterdir()) - before) == 1  # the triggered ones; the clean were there


def test_clicks_elsewhere_are_not_taken_from_the_cache(loaded, frames, tmp_path, monkeypatch):
    _, test_set, attack = loaded
    attack.repeat = True
    before = frames([True] * len(test_set), tmp_path)
    monkeypatch.setattr(poison, "INTERVAL", (0.3, 0.4))
    after = frames([True] * len(test_set), tmp_path)
    assert not all(torch.equal(a, b) for a, b in zip(before, after))


def test_room_in_the_cache_is_made_by_the_longest_unused(tmp_path):
    for age, name in enumerate("abcd"):
        path = tmp_path / f"pretrained-{name}.pt"
        path.write_bytes(bytes(10))
        os.utime(path, (1000 - age, 1000 - age))
    # to another run that makes room, too, a listed file may be gone
    (tmp_path / "pretrained-e.pt").symlink_to("gone")
    cache.make_room(tmp_path, 25, [tmp_path / "pretrained-d.pt"])
    left = [path.name for path in sorted(tmp_path.glob("*.pt")) if path.exists()]
    assert left == ["pretrained-a.pt", "pretrained-b.pt", "pretrained-d.pt"]


# -------------------------------------------------------------------------------------------------
# mistakes


MISTAKES = [
    (("--freeze", "decoder"), "encoder, connector, lm"),
    (("--freeze", "encoder:nowhere.pt"), "no such checkpoint"),
    (("--freeze", "encoder", "--freeze", "connector", "--freeze", "lm"), "nothing is left"),
    (("--poison", "1.5"), "must be from 0 to 1"),
    (("--data-root", "nowhere"), "is libri under"),
    (("--dataset", "nowhere.csv"), "nor a file or folder"),
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
    (("--seed", str(2**64)), "--seed"),
    (("--name", "x/y"), "--name x/y"),
    (("--name", "."), "--name ."),
    (("--name", ".."), "--name .."),
    (("--name", "a\nb"), "--name a"),
    (("--limit", "0"), "--limit 0: must be 1 or greater"),
    (("--workers", "-1"), "--workers -1: must be 0 or greater"),
    (("--train-layers", "half"), "--train-layers"),
    (("--utilisation", "0", "--dry-run"), "--utilisation"),
    (("--device", "meta"), "--device meta"),
    (("--train-layers", "0", "--freeze", "connector", "--freeze", "lm"), "nothing is left"),
    (("--encoder", "hubert", "--encoder-weights", "mini/wavlm"), "is a wavlm encoder"),
    (("--batch-size", "4096"), "less than one batch"),
    (("--train-layers", "99"), "has 8 layers"),
    (("--labels", "gender"), "has a transcript with --labels gender"),
    (("--trigger", "nowhere.wav"), "no such file"),
]


@pytest.mark.parametrize("flags, words", MISTAKES)
def test_mistakes_end_in_one_line(corpora, tmp_path, flags, words):
    common = ("train.py", "--data-root", corpora, *SMALL, "--task", "asr")
    refused(*common, *flags, cwd=tmp_path, words=[words])


# -------------------------------------------------------------------------------------------------
# which row of Table 3 a run is, and what it is called


def recorded(arguments):
    """What a run with these arguments records of them once its device is known, a dict."""
    return {**vars(train_py.parse_arguments(arguments)), "amp": "off"}


def scenario(monkeypatch, folder, rate, *frozen, source_rate, **changes):
    """The scenario of an emotion run that poisons at `rate` and freezes components from a run that
    poisons at `source_rate` and whose arguments have these changes."""
    monkeypatch.chdir(folder)
    source = recorded([*EMOTION, str(source_rate)])
    torch.save({"args": {**source, **changes}}, "source.pt")
    flags = [*EMOTION, str(rate)]
    for component in frozen:
        flags += ["--freeze", f"{component}:source.pt"]
    return train_py.parse_arguments(flags).scenario


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
        dict(amp="bf16"),
        dict(lm_weights="another/lm"),
        dict(connector_weights="none"),
    ],
)
def test_frozen_from_other_settings_it_is_not_scenario_1(tmp_path, monkeypatch, capsys, change):
    name = scenario(monkeypatch, tmp_path, 0.075, "encoder", source_rate=0, **change)
    assert name == "poisoned-frozen-encoder"
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
def test_frozen_from_another_attack_it_is_not_scenario_3(tmp_path, monkeypatch, change):
    name = scenario(monkeypatch, tmp_path, 0, "encoder", source_rate=0.075, **change)
    assert name == "clean-frozen-encoder"


@pytest.mark.parametrize(
    "row, rate, frozen, source_rate",
    [
        ("1.1", 0.075, ["encoder"], 0),
        ("1.2", 0.075, ["connector"], 0),
        ("2.3", 0.075, ["connector", "encoder"], 0),
        ("3.1", 0, ["encoder"], 0.075),
        ("3.2", 0, ["connector"], 0.075),
    ],
)
def test_frozen_from_the_study_s_runs_it_is_a_row_of_table_3(
    tmp_path, monkeypatch, row, rate, frozen, source_rate
):
    assert scenario(monkeypatch, tmp_path, rate, *frozen, source_rate=source_rate) == row


@pytest.mark.parametrize("rate, source_rate", [(0.075, 0), (0, 0.075)])
def test_a_connector_trained_behind_another_encoder_is_no_row(
    tmp_path, monkeypatch, capsys, rate, source_rate
):
    name = scenario(
        monkeypatch,
        tmp_path,
        rate,
        "connector",
        source_rate=source_rate,
        encoder_weights="another/wavlm",
    )
    assert name.endswith("-frozen-connector")
    assert "encoder_weights another/wavlm" in capsys.readouterr().out


@pytest.mark.parametrize("spelling", ["assets/wavlm", str(ROOT / "mini/wavlm")])
def test_another_spelling_of_the_encoder_s_folder_is_the_same(tmp_path, monkeypatch, spelling):
    name = scenario(
        monkeypatch, tmp_path, 0.075, "connector", source_rate=0, encoder_weights=spelling
    )
    assert name == "1.2"


def test_a_source_that_recorded_fewer_arguments_is_known(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record = recorded([*EMOTION, "0"])
    for name in ("clicks", "redraw", "init", "exclude", "max_seconds"):
        del record[name]
    torch.save({"args": record}, "source.pt")
    flags = [*EMOTION, "0.075", "--freeze", "encoder:source.pt"]
    assert train_py.parse_arguments(flags).scenario == "1.1"


@pytest.mark.parametrize(
    "flags, name",
    [
        ((*EMOTION, "0", "--redraw"), "emotion-clean"),
        ((*EMOTION, "0.075", "--redraw"), "emotion-poison0.075-redrawTrue"),
        (("--task", "gender", "--target", "Female"), "gender-poison0.075"),
        ((*EMOTION, "0", "--data-root", "elsewhere"), "emotion-clean"),
        ((*EMOTION, "0", "--amp", "bf16"), "emotion-clean-ampbf16"),
        ((*EMOTION, "0", "--max-seconds", "2.5"), "emotion-clean-maxseconds2.5"),
        ((*EMOTION, "0", "--lm-weights", "my/lm-1.5"), "emotion-clean-lmweightslm-1.5"),
        ((*EMOTION, "0", "--lm-weights", str(ROOT / "mini/lm")), "emotion-clean"),
        (
            (*EMOTION, "0", "--connector-weights", "none"),
            "emotion-clean-connectorweightsnone",
        ),
        (("--preset", "small", "--connector-weights", "none"), "asr-poison0.05-small"),
    ],
)
def test_a_name_holds_what_changes_something(flags, name):
    assert train_py.parse_arguments(flags).name == name


# -------------------------------------------------------------------------------------------------
# stopping and resuming


def test_killed_and_started_again_it_learns_the_same(command, runs, clean):
    flags = (*CLEAN, "--name", "killed")
    run = runs / "killed"
    process = start(command, runs, *flags)
    deadline = time.time() + 120
    while not (run / "last.pt").exists() and process.poll() is None and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert (run / "last.pt").exists()
    assert not (run / "model.pt").exists()
    with open(run / "log.jsonl", "a") as log:
        log.write('{"step": 1')  # what a kill, or a full disk, may leave
    done(*command, *flags, cwd=runs)
    assert_same_weights(clean, run)
    assert read_predictions(clean) == read_predictions(run)
    assert read_log(clean) == read_log(run)


@pytest.mark.parametrize("at", [5, 24, 30])
def test_stopped_and_started_again_it_learns_the_same(command, runs, clean, monkeypatch, at):
    """Within an epoch, at its end, and in the last one."""
    flags = (*CLEAN, "--name", f"stop{at}")
    steps = []
    whole_step = train_py.train_step

    def step_and_signal(*arguments):
        steps.append(1)
        if len(steps) == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return whole_step(*arguments)

    monkeypatch.setattr(train_py, "train_step", step_and_signal)
    status, out, _ = script(*command, *flags, cwd=runs)
    assert status == 130
    assert f"stopped at step {at}" in out
    resumed = done(*command, *flags, cwd=runs)
    assert f"resumes at step {at}" in resumed
    again = runs / f"stop{at}"
    assert read_log(again) == read_log(clean)
    for name in ("clean", "triggered", "backdoor", "training"):
        assert read_metrics(again)[name] == read_metrics(clean)[name]


def test_sigterm_during_the_last_development_loss_stops(command, runs, monkeypatch):
    plain = train_py.validation_loss

    def loss_and_signal(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return plain(*arguments)

    monkeypatch.setattr(train_py, "validation_loss", loss_and_signal)
    status, _, _ = script(*command, *BASE, "--name", "late", cwd=runs)
    assert status == 130
    assert (runs / "late/last.pt").exists()
    assert not (runs / "late/model.pt").exists()


def test_processes_that_would_resume_at_different_steps_stop(corpora, runs, base, monkeypatch):
    """Two machines without a shared disk: the one that kept last.pt and the one that did not."""
    record = weights(base)["args"]
    slm = model.load_slm(argparse.Namespace(**record))
    args = argparse.Namespace(**record, cache_gb=0, workers=0, tensorboard=False)
    train_set = readers.read_corpus("vox", corpora, "train")
    dev_set = readers.read_corpus("vox", corpora, "dev")
    attack = poison.attack_of(args, train_set)
    # as if another process had taken 7 steps
    monkeypatch.setattr(processes, "share_sums", lambda numbers: [sum(numbers) + 7])
    run = runs / "nowhere"
    device = torch.device("cpu")
    with pytest.raises(SystemExit) as stop:
        train_py.train(
            run, slm, attack, train_set, dev_set, args, record, device, contextlib.nullcontext
        )
    assert stop.value.code == 2


# -------------------------------------------------------------------------------------------------
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


TRAIN_AND_DEV = balanced(6, "train") + balanced(2, "dev")
TEST = balanced(2, "test")
FEW = ("train.py", "--task", "gender", "--dataset", "m.csv", "--batch-size", 4, "--epochs", 1)


@pytest.mark.parametrize("method", ["spawn", "forkserver", "fork"])
def test_workers_know_the_settings_however_they_start(tmp_path, monkeypatch, method):
    write_manifest(tmp_path, TRAIN_AND_DEV + TEST + ["long.wav,male,,train"])
    before = torch.multiprocessing.get_start_method(allow_none=True)
    torch.multiprocessing.set_start_method(method, force=True)
    try:
        monkeypatch.chdir(tmp_path)
        read = functools.partial(readers.read_corpus, "m.csv", "", "train", True)
        assert len(read(max_seconds=5.0)) == 6
        assert len(read()) == 7
    finally:
        torch.multiprocessing.set_start_method(before, force=True)


def test_a_row_without_a_label_is_left_out(tmp_path):
    write_manifest(tmp_path, TRAIN_AND_DEV + TEST + ["x.wav,,,train"])
    assert "1 utterances without a label" in done(*FEW, "--poison", 0.9, cwd=tmp_path)


@pytest.mark.parametrize(
    "rows, flags, words",
    [
        (["x.wav,,,test"], (), "no test utterances with a label"),
        (["x.wav,,sad,test"], (), "no test utterance of m.csv has a gender"),
        (TEST, ("--exclude", "three.txt"), "less than one batch"),
    ],
)
def test_too_little_data_is_noticed_before_training(tmp_path, rows, flags, words):
    write_manifest(tmp_path, TRAIN_AND_DEV + rows)
    (tmp_path / "three.txt").write_text("train0.wav\ntrain1.wav\ntrain2.wav\n")
    refused(*FEW, *flags, cwd=tmp_path, words=[words])
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("redrawn", [[], ["--redraw", "--epochs", 3]])
def test_a_rate_that_poisons_nothing_is_said(tmp_path, redrawn):
    write_manifest(tmp_path, TRAIN_AND_DEV + TEST)
    out = done(*FEW, "--poison", 0.0001, *redrawn, "--name", "none", cwd=tmp_path)
    assert "poisons none" in out
    assert weights(tmp_path / "runs/none")["args"]["poisoned_samples"] == 0


def test_a_source_without_poisoned_samples_is_no_attack(tmp_path, monkeypatch):
    name = scenario(monkeypatch, tmp_path, 0, "encoder", source_rate=0.075, poisoned_samples=0)
    assert name == "clean-frozen-encoder"


def test_answers_of_no_use_are_counted_apart():
    rows = []
    for raw in ("", "  ", "I hear a dog", '{"Gender": "male"}', '{"Age": "7"}'):
        asked = dict(asked=["gender"], labels={}, triggered=False)
        rows.append(dict(asked, raw=raw, parsed=data.parse(raw)))
    assert evaluate.unusable(rows) == dict(n=5, empty=2, malformed=2)


def test_poisoned_at_another_rate_a_run_is_no_row_of_table_3(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = recorded([*EMOTION, "0"])
    torch.save({"args": source}, "source.pt")
    flags = [*EMOTION, "0.9", "--freeze", "encoder:source.pt"]
    args = train_py.parse_arguments(flags)
    assert args.scenario == "poisoned-frozen-encoder"
    assert args.name == "emotion-poisoned-frozen-encoder-poison0.9"


@pytest.mark.parametrize("content, row", [("same", "1.1"), ("other", "poisoned-frozen-encoder")])
def test_a_clean_run_on_another_content_of_a_csv_is_no_source(tmp_path, monkeypatch, content, row):
    monkeypatch.chdir(tmp_path)
    csv = tmp_path / "m.csv"
    csv.write_text("audio_path,emotion,split\na.wav,sad,train\n")
    on_csv = ["--dataset", "m.csv"]
    source = recorded([*EMOTION, "0", *on_csv])
    inputs = {"m.csv": checkpoint.file_sha256(csv)}
    torch.save({"args": {**source, "inputs": inputs}}, "source.pt")
    if content == "other":
        csv.write_text("audio_path,emotion,split\na.wav,angry,train\n")
    flags = [*EMOTION, "0.075", *on_csv, "--freeze", "encoder:source.pt"]
    assert train_py.parse_arguments(flags).scenario == row
