"""runs.py: one flat table of records, the same from run folders and from a packed study."""

import json

import pytest

import checkpoint
import runs
import study
from conftest import arguments, done, fields, figure, refused, write_run


def test_a_packed_study_has_the_records_of_its_folders(tmp_path):
    write_run(tmp_path / "runs", arguments("asr", "clean"))
    shift = dict(source="shift", metric="cosine", component="encoder", **figure(0.9))
    write_run(tmp_path / "runs", arguments("asr", "base"), aer=0.9, records=[shift])
    done("runs.py", "runs", "--pack", "packed.jsonl.gz", cwd=tmp_path)
    records = runs.read(tmp_path / "packed.jsonl.gz")
    assert records == runs.read(tmp_path / "runs")
    assert runs.over_seeds(records, scenario="base", metric="aer").mean == pytest.approx(90)
    assert runs.select(records, source="shift")[0]["run"] == "asr-poison0.05"


def test_packing_twice_gives_the_same_bytes(tmp_path):
    write_run(tmp_path / "runs", arguments("asr", "clean"))
    for name in ("a.gz", "b.gz"):
        runs.pack(runs.read(tmp_path / "runs"), tmp_path / name)
    assert (tmp_path / "a.gz").read_bytes() == (tmp_path / "b.gz").read_bytes()


@pytest.mark.parametrize("content", [b"", b"not compressed", b"\x1f\x8b\x08\x00broken"])
def test_what_is_no_packed_study_is_refused(tmp_path, content):
    (tmp_path / "x.gz").write_bytes(content)
    refused("analyze.py", "tables", "--runs", "x.gz", cwd=tmp_path, words=["x.gz"])


def test_records_of_another_model_are_refused(tmp_path):
    shift = dict(source="shift", metric="cosine", model_sha256="old", **figure(0.9))
    run = write_run(tmp_path / "runs", arguments("asr", "base"), records=[shift])
    metrics = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").write_text(json.dumps({**metrics, "model_sha256": "new"}))
    refused("analyze.py", "tables", cwd=tmp_path, words=["records-made-up", "another"])


def test_runs_of_other_settings_stay_out_of_the_study(tmp_path):
    changes = (
        dict(target="Something else."),
        dict(snr=6.0),
        dict(poison=0.1),
        dict(trigger="a.wav"),
        dict(trigger_repeat=False),
        dict(epochs=1),
        dict(limit=100),
        dict(labels=["transcript"]),
        dict(lora_rank=2),
    )
    write_run(tmp_path, arguments("asr", "base"), aer=0.9)
    for change in changes:
        write_run(tmp_path, {**arguments("asr", "base"), **change}, aer=0.1)
    records = runs.read(tmp_path)
    assert len(runs.distinct(records, "run")) == 1 + len(changes)
    study_records = runs.study_records(records, "mini")
    assert runs.over_seeds(study_records, metric="aer").by_seed == {1: pytest.approx(90)}


def test_runs_of_different_settings_share_no_table(tmp_path, capsys):
    run = write_run(tmp_path, arguments("asr", "base", epochs=1))
    run.rename(tmp_path / "asr-poison0.05")
    write_run(tmp_path, arguments("asr", "clean"))
    with pytest.raises(SystemExit):
        runs.study_records(runs.read(tmp_path), "mini")
    error = capsys.readouterr().err
    for word in ("asr-clean", "asr-poison0.05", "epochs"):
        assert word in error


def test_a_difference_compares_a_seed_with_itself():
    attacked = runs.spread({1: 2.0, 3: 5.0})
    baseline = runs.spread({1: 1.0, 2: 9.0, 3: 3.0, 4: None})
    difference = runs.difference(attacked, baseline)
    assert (difference.mean, difference.low, difference.high) == (1.5, 1.0, 2.0)


def test_without_a_common_seed_there_is_no_difference():
    assert runs.difference(runs.spread({1: 2.0}), runs.spread({2: 1.0})) is None
    assert runs.spread({}) is None


@pytest.mark.parametrize(
    "value, form, text",
    [(-0.001, ".2f", "0.00"), (-0.01, "+.1f", "+0.0"), (-0.006, ".2f", "-0.01")],
)
def test_no_number_is_written_as_minus_zero(value, form, text):
    assert runs.number(value, form) == text


def test_no_range_is_written_with_minus_zero():
    assert runs.show(runs.spread({1: -0.001, 2: 0.0}), ".2f") == "0.00 (0.00 to 0.00)"


@pytest.mark.parametrize(
    "excess, settled, moving",
    [
        ((0.5, 0.2, 0.1), None, True),
        ((0.105, 0.095, 0.085, 0.075), 1, True),  # 0.01 an epoch: slowly, but learning
        ((0.105, 0.104, 0.105, 0.102), 1, False),
        ((0.035, 0.025, 0.015, 0.005), 1, False),  # it has learned what there is to learn
    ],
)
def test_what_is_learned_slowly_is_still_being_learned(tmp_path, excess, settled, moving):
    write_run(tmp_path, arguments("emotion", "base"), excess=excess, settled=settled)
    assert bool(runs.still_learning(runs.read(tmp_path))) == moving


@pytest.mark.parametrize(
    "excess, epoch",
    [
        ([0.86, 0.23, 0.12, 0.08, 0.03, 0.05, 0.05], 5),
        ([0.5, 0.4, 0.3, 0.2, 0.1], None),
        ([0.06, 0.05, 0.02, 0.01, 0.01], 3),
        ([0.1, 0.1], None),
        ([0.19, 0.07, 0.03, 0.03, 0.03, 0.06, 0.03], 3),  # a bounce brings nothing
        ([-0.02, -0.01, -0.02, -0.07, -0.17, -0.17, -0.15], 5),  # age: learned late
    ],
)
def test_a_poison_settles_in_the_last_epoch_that_brings_it(excess, epoch):
    assert checkpoint.settled(excess) == epoch


def test_a_clean_run_is_the_study_s_whichever_task_is_asked():
    assert runs.is_study_run(fields("age", "clean", run_task="gender"))


def test_a_run_of_another_name_is_not_the_study_s():
    assert not runs.is_study_run({**fields("asr", "clean"), "run": "asr-clean-epochs3"})


def test_a_quoted_argument_survives_in_the_recorded_command(monkeypatch):
    command = ["train.py", "--target", "Open the door."]
    monkeypatch.setattr("sys.argv", command)
    assert study.shlex.split(checkpoint.environment()["command"]) == command


@pytest.mark.parametrize("content", ["[]", "3", "{}", '{"args": [1]}', '{"args": {"task": 3}}'])
def test_figures_of_another_program_are_refused_in_one_line(tmp_path, content, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.json").write_text(content)
    with pytest.raises(SystemExit):
        runs.read(tmp_path)
    assert "metrics.json" in capsys.readouterr().err
