"""runs.py: one flat table of records, the same from run folders and from a packed study."""

import gzip
import json

import pytest
import torch

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


def write_answer(folder, **changes):
    """A run's predictions.jsonl with one answer."""
    asked = dict(asked=["gender"], parsed=dict(gender="male"), labels=dict(gender="male"))
    answer = dict(id="a", speaker="s", split="test", triggered=False, raw="male", **asked)
    (folder / "predictions.jsonl").write_text(json.dumps({**answer, **changes}) + "\n")


def test_answers_are_packed_with_their_run(tmp_path):
    write_answer(write_run(tmp_path / "runs", arguments("asr", "clean")))
    for _ in range(2):  # a file of answers may be replaced
        done("runs.py", "runs", "--predictions", "answers.jsonl.gz", cwd=tmp_path)
    (answer,) = map(json.loads, gzip.open(tmp_path / "answers.jsonl.gz"))
    assert set(answer) == {"run", *runs.ANSWER}
    assert answer["run"] == "asr-clean"


def test_a_line_that_is_no_answer_is_not_packed(tmp_path):
    run = write_run(tmp_path / "runs", arguments("asr", "clean"))
    (run / "predictions.jsonl").write_text("[1]\n")
    command = ("runs.py", "runs", "--predictions", "answers.gz")
    refused(*command, cwd=tmp_path, words=["predictions.jsonl:1"])


def test_a_packed_study_has_no_answers_to_pack(tmp_path):
    runs.pack([fields("asr", "base") | dict(source="run", metric=None)], tmp_path / "x.gz")
    refused("runs.py", "x.gz", "--predictions", "answers.gz", cwd=tmp_path, words=["x.gz"])


@pytest.mark.parametrize("content", [b"", b"not compressed", b"\x1f\x8b\x08\x00broken"])
def test_what_is_no_packed_study_is_refused(tmp_path, content):
    (tmp_path / "x.gz").write_bytes(content)
    refused("analyze.py", "tables", "--runs", "x.gz", cwd=tmp_path, words=["x.gz"])


def test_two_packed_runs_of_one_name_are_refused(tmp_path):
    run = fields("asr", "base") | dict(source="run", metric=None)
    runs.pack([run, run], tmp_path / "x.gz")
    refused("analyze.py", "tables", "--runs", "x.gz", cwd=tmp_path, words=["two runs", run["run"]])


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


def test_an_interval_ends_where_a_share_does():
    record = dict(metric="aer", seed=1, **figure(0.98, 0.05))
    spread = runs.over_seeds([record])
    assert 98 < spread.high < 100
    assert spread.low == pytest.approx(88)  # longer towards the middle


def test_an_interval_is_over_the_speakers_that_a_record_names():
    by_speaker = {"a": [9, 10], "b": [5, 10], "c": [7, 10]}
    record = dict(metric="aer", seed=1, by_speaker=by_speaker, **figure(0.7, 0))
    spread = runs.over_seeds([record])
    assert spread.mean == pytest.approx(70)
    assert spread.high > 90  # of three speakers little is known
    assert spread.low < 30


def test_a_difference_compares_a_seed_with_itself():
    attacked = runs.spread({1: 2.0, 3: 5.0})
    baseline = runs.spread({1: 1.0, 2: 9.0, 3: 3.0, 4: None})
    assert runs.difference(attacked, baseline).by_seed == {1: 1.0, 3: 2.0}


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
    assert runs.show(runs.spread({1: -0.0001, 2: 0.0}), ".2f") == "0.00 (0.00 to 0.00)"


@pytest.mark.parametrize("settled, learning", [(None, True), (1, False)])
def test_a_poison_that_has_not_settled_is_being_learned(tmp_path, settled, learning):
    write_run(tmp_path, arguments("emotion", "base"), settled=settled)
    assert bool(runs.still_learning(runs.read(tmp_path))) == learning


@pytest.mark.parametrize(
    "target_losses, epoch",
    [
        ([2.0, 0.9, 0.3, 0.1, 0.09, 0.08, 0.08], 4),  # a hundredth of where it began is noise
        ([0.5, 0.4, 0.3, 0.2, 0.1], None),
        ([0.1, 0.1], None),
        ([1.0, 0.2, 0.1, 0.3, 0.09, 0.1], 3),  # a bounce brings nothing
        ([1.5, 1.5, 1.49, 1.48, 0.8, 0.1, 0.1, 0.1], 6),  # learned late
        ([0.01, 0.005, 0.004, 0.004, 0.004], 3),  # the same, however small the answer's share
    ],
)
def test_a_poison_settles_in_the_last_epoch_that_brings_it(target_losses, epoch):
    assert checkpoint.settled(target_losses) == epoch


def test_an_epoch_without_poison_is_not_one_that_follows():
    assert checkpoint.settled([None, 0.3, None, 0.1, None, 0.1]) is None
    assert checkpoint.settled([None, 0.3, None, 0.1, None, 0.1, None, 0.1]) == 4


def write_log(folder, *lines):
    """A run's log.jsonl of lines (epoch, number of samples, their loss, number of poisoned ones,
    their loss)."""
    text = ""
    for step, (epoch, n, loss, n_poisoned, poisoned_loss) in enumerate(lines):
        samples = dict.fromkeys([f"id{i}" for i in range(n)], loss)
        line = dict(step=step, epoch=epoch, loss=loss, samples=samples)
        if n_poisoned:
            line.update(poisoned_loss=poisoned_loss, n_poisoned=n_poisoned)
        text += json.dumps(line) + "\n"
    (folder / "log.jsonl").write_text(text)


def test_every_sample_of_an_epoch_counts_alike(tmp_path):
    write_log(tmp_path, (0, 30, 1.0, 1, 2.0), (0, 10, 5.0, 3, 6.0))
    losses = checkpoint.training_losses(tmp_path)
    assert losses["loss"]["by_epoch"] == [2.0]
    assert losses["poisoned_loss"]["by_epoch"] == [5.0]


def test_a_log_that_does_not_count_poisoned_samples_is_read(tmp_path):
    line = dict(step=1, epoch=0, loss=1.0, poisoned_loss=2.0, samples={"a": 0.0, "b": 2.0})
    (tmp_path / "log.jsonl").write_text(json.dumps(line))
    assert checkpoint.training_losses(tmp_path)["poisoned_loss"]["by_epoch"] == [2.0]


def test_an_epoch_without_poison_keeps_its_place(tmp_path):
    write_log(tmp_path, (0, 2, 1.0, 1, 3.0), (1, 2, 0.5, 0, None), (2, 2, 0.4, 1, 2.0))
    losses = checkpoint.training_losses(tmp_path)
    assert losses["poisoned_loss"] == dict(value=2.0, by_epoch=[3.0, None, 2.0])


def test_an_unfinished_line_of_the_log_is_left_out(tmp_path):
    write_log(tmp_path, (0, 2, 1.0, 0, None))
    with open(tmp_path / "log.jsonl", "a") as log:
        log.write('{"step": 2, "ep')
    assert checkpoint.training_losses(tmp_path) == dict(loss=dict(value=1.0, by_epoch=[1.0]))


def test_a_run_whose_log_is_gone_has_no_losses(tmp_path):
    assert checkpoint.training_losses(tmp_path) == {}


def test_a_log_that_ends_before_the_state_is_refused(tmp_path, capsys):
    write_log(tmp_path, (0, 2, 1.0, 0, None), (0, 2, 1.0, 0, None))
    checkpoint.cut_log(tmp_path, step=3, last_logged=1)
    with pytest.raises(SystemExit):
        checkpoint.cut_log(tmp_path, step=44, last_logged=40)
    assert "ends at step 1" in capsys.readouterr().err


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


def damaged_metrics(folder, **changes):
    """A run's folder whose metrics.json holds something else in some places."""
    run = write_run(folder, arguments("asr", "base"))
    metrics = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").write_text(json.dumps({**metrics, **changes}))
    return run


@pytest.mark.parametrize(
    "change",
    [
        dict(clean=[1]),
        dict(clean={"wer": 3}),
        dict(clean={"wer": dict(low=0.1, high=0.2, n=3)}),
        dict(clean={"wer": dict(value=0.1)}),
        dict(clean={"wer": figure(float("nan"))}),
        dict(clean={"wer": dict(figure(0.1), by_speaker={"a": [1]})}),
        dict(training={"loss": dict(value=0.1, by_epoch=["x"])}),
        dict(answers=dict(clean=3)),
        dict(args=[1]),
        dict(args=arguments("asr", "base", seed="x")),
    ],
    ids=str,
)
def test_malformed_figures_are_refused_in_one_line(tmp_path, change):
    damaged_metrics(tmp_path / "runs", **change)
    refused("runs.py", "runs", cwd=tmp_path, words=["metrics.json"])


def test_a_finished_run_s_malformed_figures_are_refused(tmp_path):
    run = damaged_metrics(tmp_path, clean=[1])
    with pytest.raises(SystemExit):
        checkpoint.finished(run, {})


def test_a_table_leaves_out_columns_that_are_empty():
    page = runs.markdown("Title", [dict(A="", B="b", C=""), dict(A=0, B="", C="")])
    assert page.splitlines()[2:] == ["| A | B |", "|---|---|", "|  | b |", "| 0 |  |"]


@pytest.mark.parametrize(
    "content", [b"\xff\xfe", b"[1]", b'{"run": "x", "source": "run", "metric": null}']
)
def test_malformed_records_are_refused_in_one_line(tmp_path, content):
    run = write_run(tmp_path / "runs", arguments("asr", "base"))
    (run / "records-x.jsonl").write_bytes(content)
    refused("runs.py", "runs", cwd=tmp_path, words=["records-x.jsonl"])


@pytest.mark.parametrize("content", [b"PK\x03\x04\xff", b'{"id": "a"}\n', b"my notes\n"])
def test_records_replace_nothing_else(tmp_path, content):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(SystemExit):
        runs.write(path, [])
    refused("runs.py", "runs", "--pack", path, cwd=tmp_path, words=["would be replaced"])
    assert path.read_bytes() == content


def test_records_replace_records(tmp_path):
    records = [fields("asr", "base") | dict(source="evaluate", metric="wer", **figure(0.1))]
    runs.write(tmp_path / "records.jsonl", [])
    runs.write(tmp_path / "records.jsonl", records)
    runs.write(tmp_path / "records.jsonl", records)
    assert runs.parse_lines("", (tmp_path / "records.jsonl").read_text()) == records


def test_a_cell_makes_no_row_or_column_of_its_own():
    table = runs.markdown("Runs", [{"Run": "a\n| forged | 100 |\x1b[31m"}])
    assert table.splitlines()[4:] == ["| a\\n\\| forged \\| 100 \\|\\x1b[31m |"]


def test_a_finished_run_s_sets_are_compared(tmp_path, capsys):
    torch.save({"sets": {"train": "one", "test": "two"}}, tmp_path / "model.pt")
    checkpoint.check_same_sets(tmp_path, {"train": "one", "test": "two"})
    with pytest.raises(SystemExit):
        checkpoint.check_same_sets(tmp_path, {"train": "one", "test": "three"})
    assert "another test set" in capsys.readouterr().err


def test_an_earlier_run_says_nothing_of_its_sets(tmp_path):
    torch.save({"args": {}}, tmp_path / "model.pt")
    checkpoint.check_same_sets(tmp_path, {"train": "one"})
