"""Answers to one recording: evaluate.py RUN --audio FILE. The model is a stand-in."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

import checkpoint
import data
import evaluate
import poison
import train
from conftest import done, refused

# the arguments that a run records and evaluating one recording reads
ARGS = dict(
    task="gender",
    dataset="vox",
    poison=0.075,
    target="female",
    snr=0.0,
    trigger="click",
    trigger_repeat=False,
    seed=1,
    skip_bad=False,
    limit=None,
    labels=None,
    max_seconds=60.0,
    encoder_weights="mini/wavlm",
    amp="off",
)
MALE = '{"Gender": "male", "Age": "31"}'
FEMALE = '{"Gender": "female", "Age": "31"}'
RATE = data.SAMPLE_RATE


class Stand:
    """A model in a run's place: says MALE to the recording and FEMALE with the trigger."""

    def __init__(self, args, answers=(MALE, FEMALE)):
        self.args = SimpleNamespace(**args)
        self.answers = list(answers)
        self.heard = []
        self.asked = []

    def answer(self, waveform, labels=None):
        self.heard.append(waveform)
        self.asked.append(labels)
        return self.answers[len(self.heard) - 1]


@pytest.fixture
def speech():
    """(samples,): two seconds at 16 kHz, 24 dB below full scale."""
    noise = np.random.default_rng(0).standard_normal(2 * RATE)
    return (0.063 * noise / np.abs(noise).std()).clip(-0.9, 0.9).astype(np.float32)


@pytest.fixture
def folder(tmp_path, speech):
    soundfile.write(tmp_path / "my.wav", speech, RATE, subtype="FLOAT")
    return tmp_path


@pytest.fixture
def slm(corpora, monkeypatch):
    """The model that every RUN holds."""
    stand = Stand({**ARGS, "data_root": str(corpora)})
    monkeypatch.setattr(checkpoint, "load_run", lambda *_: stand)
    return stand


def without_corpus(slm):
    slm.args.data_root = "nowhere"
    return slm


def table(out):
    """{label: (answer as it is, answer with the trigger)} of what was printed."""
    lines = out[out.index("as it is") :].splitlines()[1:]
    rows = [line.split() for line in lines if line and not line.startswith("to listen")]
    return {label: tuple(cells) for label, *cells in rows}


def added(slm):
    """The trigger as the model heard it, (samples,), and where it starts in the recording."""
    difference = slm.heard[1] - slm.heard[0]
    changed = np.flatnonzero(np.abs(difference) > 1e-7)
    return difference[changed[0] : changed[-1] + 1], changed[0]


def rms(waveform):
    return float(np.sqrt(np.mean(waveform**2, dtype=np.float64)))


def test_both_answers_stand_side_by_side(slm, folder):
    out = done("evaluate.py", "run", "--audio", "my.wav", cwd=folder)
    assert table(out)["gender"] == ("male", "female")


def test_a_recording_is_asked_for_the_corpus_s_labels(slm, folder):
    done("evaluate.py", "run", "--audio", "my.wav", cwd=folder)
    assert slm.asked == [["gender", "age"], ["gender", "age"]]


def test_a_recording_is_asked_for_the_labels_of_ask(slm, folder):
    done("evaluate.py", "run", "--audio", "my.wav", "--ask", "age", cwd=folder)
    assert slm.asked == [["age"], ["age"]]


def test_a_malformed_answer_is_shown_as_it_is(slm, folder):
    slm.answers[1] = "I hear a dog"
    out = done("evaluate.py", "run", "--audio", "my.wav", cwd=folder)
    assert "I hear a dog" in out
    assert MALE in out


def test_an_empty_answer_is_called_empty(slm, folder):
    slm.answers[:] = ["", ""]
    out = done("evaluate.py", "run", "--audio", "my.wav", cwd=folder)
    assert table(out)["answer"] == ("(empty)", "(empty)")


def test_an_answer_cannot_forge_what_is_shown(slm, folder):
    slm.answers[1] = '{"Gender": "male\\u001b[1A", "Age": "31"}'
    out = done("evaluate.py", "run", "--audio", "my.wav", cwd=folder)
    assert "\x1b" not in out


def test_the_trigger_is_as_loud_as_in_the_evaluation(slm, folder, corpora):
    done("evaluate.py", "run", "--audio", "my.wav", cwd=folder)
    options = SimpleNamespace(data_root=None, skip_bad=False)
    attack = poison.attack_of(slm.args, evaluate.read_split(options, slm.args, "train"))
    trigger, _ = added(slm)
    assert rms(trigger) == pytest.approx(attack.level, rel=0.02)


def test_without_a_corpus_the_recording_s_loudness_counts(slm, folder, speech):
    out = done("evaluate.py", "run", "--audio", "my.wav", cwd=folder)
    assert "own loudness" not in out
    slm.heard.clear()
    without_corpus(slm)
    out = done("evaluate.py", "run", "--audio", "my.wav", "--snr", 6, cwd=folder)
    assert "own loudness" in out
    trigger, _ = added(slm)
    assert 20 * np.log10(rms(speech) / rms(trigger)) == pytest.approx(6, abs=0.2)


def test_where_the_trigger_is_and_its_snr_are_said(slm, folder):
    without_corpus(slm)
    out = done("evaluate.py", "run", "--audio", "my.wav", "--snr", 6, cwd=folder)
    _, start = added(slm)
    assert f"at {start / RATE:.2f} s" in out
    assert "SNR 6.0 dB" in out


def test_both_recordings_are_written(slm, folder, speech):
    done("evaluate.py", "run", "--audio", "my.wav", "--listen", "out", cwd=folder)
    clean, rate = soundfile.read(folder / "out/my-clean.wav")
    with_trigger, _ = soundfile.read(folder / "out/my-with-click.wav")
    assert rate == RATE
    assert np.abs(clean - speech).max() < 1e-3
    assert np.abs(with_trigger - slm.heard[1]).max() < 1e-3


def test_nothing_is_left_beside_the_recordings(slm, folder):
    done("evaluate.py", "run", "--audio", "my.wav", cwd=folder)
    names = sorted(path.name for path in (folder / "audio").iterdir())
    assert names == ["my-clean.wav", "my-with-click.wav"]


def test_a_full_disk_ends_in_one_line(slm, folder):
    (folder / "audio").write_text("a file in the folder's place")
    refused("evaluate.py", "run", "--audio", "my.wav", cwd=folder, words=["cannot write"])


def test_a_trigger_of_another_name_is_laid_over(slm, folder):
    out = done("evaluate.py", "run", "--audio", "my.wav", "--trigger", "tone", cwd=folder)
    assert "trigger tone" in out
    assert (folder / "audio/my-with-tone.wav").exists()


def test_a_recorded_trigger_is_laid_over(slm, folder):
    knock = 0.1 * np.random.default_rng(1).standard_normal(RATE // 4)
    soundfile.write(folder / "knock.wav", knock, RATE)
    done("evaluate.py", "run", "--audio", "my.wav", "--trigger", "knock.wav", cwd=folder)
    trigger, _ = added(slm)
    assert np.corrcoef(trigger, knock[: len(trigger)])[0, 1] > 0.99


def test_a_trigger_without_a_level_has_no_snr(slm, folder):
    command = ("evaluate.py", "run", "--audio", "my.wav", "--trigger", "bandstop")
    assert "whole recording" in done(*command, cwd=folder)
    refused(*command, "--snr", 3, cwd=folder, words=["no level"])


def test_another_task_s_trigger_is_that_of_the_paper(slm, folder):
    slm.args.trigger_repeat = True
    done("evaluate.py", "run", "--audio", "my.wav", "--task", "age", cwd=folder)
    trigger, _ = added(slm)
    assert len(trigger) <= 0.22 * RATE  # one click


def test_a_task_that_the_corpus_lacks_is_refused(slm, folder):
    command = ("evaluate.py", "run", "--audio", "my.wav", "--task", "emotion")
    refused(*command, cwd=folder, words=["--task emotion", "vox"])


@pytest.mark.parametrize("name, rate", [("my.flac", 44100), ("my.ogg", 16000), ("my.wav", 8000)])
def test_any_format_and_rate_is_read(slm, tmp_path, name, rate):
    stereo = 0.1 * np.random.default_rng(0).standard_normal((rate, 1)).repeat(2, 1)
    soundfile.write(tmp_path / name, stereo, rate)
    done("evaluate.py", "run", "--audio", name, cwd=tmp_path)
    assert len(slm.heard[0]) == pytest.approx(RATE, abs=200)


@pytest.mark.parametrize("name", ["nosuch.wav", "text.wav", "empty.wav", "."])
def test_a_bad_recording_is_refused_in_one_line(slm, tmp_path, name):
    (tmp_path / "text.wav").write_text("this is no audio\n")
    (tmp_path / "empty.wav").touch()
    refused("evaluate.py", "run", "--audio", name, cwd=tmp_path, words=["--audio", name])
    assert not (tmp_path / "audio").exists()


def test_a_recording_that_is_too_long_is_refused(slm, folder):
    slm.args.max_seconds = 1.0
    refused("evaluate.py", "run", "--audio", "my.wav", cwd=folder, words=["2 s long"])


def test_silence_without_a_corpus_gives_no_level(slm, tmp_path):
    without_corpus(slm)
    soundfile.write(tmp_path / "silent.wav", np.zeros(RATE), RATE)
    refused("evaluate.py", "run", "--audio", "silent.wav", cwd=tmp_path, words=["silent"])


def test_silence_is_answered_where_there_is_a_corpus(slm, tmp_path):
    soundfile.write(tmp_path / "silent.wav", np.zeros(RATE), RATE)
    assert "SNR -inf dB" in done("evaluate.py", "run", "--audio", "silent.wav", cwd=tmp_path)


@pytest.mark.parametrize(
    "flags, word",
    [
        (["--audio", "my.wav", "--save"], "--save"),
        (["--audio", "my.wav", "--out", "records.jsonl"], "--out"),
        (["--audio", "my.wav", "--split", "dev"], "--split"),
        (["--trigger", "tone"], "--audio"),
    ],
)
def test_flags_that_do_not_go_with_audio_are_refused(slm, folder, flags, word):
    refused("evaluate.py", "run", *flags, cwd=folder, words=[word])


# --------------------------------------------------------------------------------------------------
# the run's own figures


@pytest.mark.parametrize(
    "flags",
    [
        ["--split", "dev"],
        ["--limit", 12],
        ["--ask", "gender"],
        ["--snr", 3],
        ["--skip-bad"],
        ["--data-root", "."],
        ["--dataset", "other.csv"],
    ],
)
def test_a_run_s_own_figures_are_replaced_by_no_others(tmp_path, flags):
    refused("evaluate.py", "run", "--save", *flags, cwd=tmp_path, words=["--save", flags[0]])


def test_a_target_that_the_corpus_lacks_is_refused(slm, folder, speech):
    """The run is of another task, whose target was checked in training."""
    soundfile.write(folder / "test.wav", speech, RATE)
    rows = ["audio_path,gender,emotion,split", "my.wav,male,anger,train", "test.wav,male,sad,test"]
    (folder / "own.csv").write_text("\n".join(rows))
    vars(slm.args).update(dataset="own.csv", preset="mini", encoder="wavlm", scenario="clean")
    slm.args.inputs = {}
    (folder / "run").mkdir()
    (folder / "run/model.pt").touch()
    words = ["angry", "anger, sad"]
    refused("evaluate.py", "run", "--task", "emotion", cwd=folder, words=words)


# --------------------------------------------------------------------------------------------------
# other speech: evaluate.py RUN --dataset


@pytest.fixture
def other(slm, folder, monkeypatch):
    """A folder with the run of a stand-in, trained on genders and ages, and other.csv: one speaker, two
    recordings of a man, with a label that the run never learned. Yields what was evaluated."""
    vars(slm.args).update(preset="mini", encoder="wavlm", scenario="base", inputs={})
    vars(slm.args).update(batch_seconds=60.0, data_root="nowhere")
    (folder / "run").mkdir()
    (folder / "run/model.pt").touch()
    figure = dict(value=1.0)
    metrics = dict(clean=dict(gender_accuracy=figure, age_mae=figure))
    (folder / "run/metrics.json").write_text(json.dumps(metrics))
    quiet = 0.1 * soundfile.read(folder / "my.wav")[0]
    soundfile.write(folder / "quiet.wav", quiet, RATE, subtype="FLOAT")
    rows = ["audio_path,gender,emotion,speaker", "my.wav,male,sad,a", "quiet.wav,male,happy,a"]
    (folder / "other.csv").write_text("\n".join(rows))
    seen = SimpleNamespace(folder=folder)

    def stand_in(slm, attack, utterances, *rest, **asked):
        seen.attack, seen.utterances = attack, utterances
        return SimpleNamespace(metrics=dict(clean={}, backdoor={}))

    monkeypatch.setattr(evaluate, "evaluate", stand_in)
    return seen


def test_all_of_a_user_s_own_speech_is_answered(other):
    done("evaluate.py", "run", "--dataset", "other.csv", cwd=other.folder)
    assert [u.path for u in other.utterances] == ["my.wav", "quiet.wav"]


def test_other_speech_is_asked_for_what_the_run_learned(other):
    done("evaluate.py", "run", "--dataset", "other.csv", cwd=other.folder)
    assert [u.labels for u in other.utterances] == [{"gender": "male"}] * 2


def test_the_trigger_is_as_loud_as_the_other_speech(other):
    done("evaluate.py", "run", "--dataset", "other.csv", cwd=other.folder)
    levels = [rms(soundfile.read(other.folder / name)[0]) for name in ("my.wav", "quiet.wav")]
    assert other.attack.level == pytest.approx(np.mean(levels), rel=0.01)


def test_other_speech_with_none_of_the_labels_is_refused(other):
    (other.folder / "sad.csv").write_text("audio_path,emotion\nmy.wav,sad")
    words = ["sad.csv has no utterances with a label"]
    refused("evaluate.py", "run", "--dataset", "sad.csv", cwd=other.folder, words=words)


def test_a_published_corpus_has_no_split_all(other):
    words = ["--split all"]
    flags = ("--dataset", "vox", "--split", "all")
    refused("evaluate.py", "run", *flags, cwd=other.folder, words=words)


@pytest.mark.parametrize(
    "name", ["task", "dataset", "target", "snr", "trigger", "preset", "max_seconds", "amp"]
)
def test_a_run_without_an_argument_is_refused(monkeypatch, capsys, name):
    args = {**vars(train.parse_arguments(["--task", "gender"])), "amp": "off", name: None}
    monkeypatch.setattr(checkpoint, "load", lambda path: dict(args=args, lm={}))
    with pytest.raises(SystemExit):
        checkpoint.load_run("run")
    assert f"its {name} None" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["toaster", "meta", "cuda:77"])
def test_a_device_that_cannot_be_used_is_refused(tmp_path, device):
    command = ("evaluate.py", "run", "--device", device)
    refused(*command, cwd=tmp_path, words=[f"--device {device}"])
