"""What the tests share: tiny corpora and models, made-up runs, scripts run in this process."""

import contextlib
import importlib
import io
import json
import os
import socket
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# the same sums in the same order, in this process and in those it starts
os.environ.update(TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")

import pytest
import torch
from transformers import (
    AutoFeatureExtractor,
    AutoModel,
    HubertConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Wav2Vec2Config,
    WavLMConfig,
)

import lora
import model
import runs
import study
from mini import make_corpora, make_encoders
from study import ENCODERS

torch.set_num_threads(1)
SHARED = ROOT.parent / "shared"
TINY = {
    "libri": {"train-clean-360": (4, 12), "dev-clean": (2, 4), "test-clean": (2, 6)},
    "crema": {"actors": 20, "takes": 1},
    "vox": {"dev": (10, 2, 2), "test": (4, 1, 2)},
}
SMALL = ["--batch-size", "8", "--warmup-steps", "2"]


def free_port():
    """A port that nobody listens to, for torchrun's --master_port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


# --------------------------------------------------------------------------------------------------
# scripts


def script(name, *arguments, cwd):
    """Runs a script's main() in this process as the command would in the folder `cwd`: (exit
    status, stdout, stderr)."""
    out = io.StringIO()
    err = io.StringIO()
    argv = sys.argv
    sys.argv = [name, *map(str, arguments)]
    try:
        with (
            contextlib.chdir(cwd),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            importlib.import_module(name.removesuffix(".py")).main()
        status = 0
    except SystemExit as stop:
        status = stop.code or 0
    finally:
        sys.argv = argv
    return status, out.getvalue(), err.getvalue()


def done(name, *arguments, cwd):
    """The same, for a command that must succeed: its stdout."""
    status, out, err = script(name, *arguments, cwd=cwd)
    assert status == 0, err
    return out


def errors_in(stderr):
    """The lines of error that a command printed, those over a progress bar too."""
    lines = stderr.replace("\r", "\n").splitlines()
    return [line for line in lines if line.startswith("error: ")]


def refused(name, *arguments, cwd, words=()):
    """The same, for a command that must end with status 2 and one line of error that holds all the
    words."""
    status, _, err = script(name, *arguments, cwd=cwd)
    assert status == 2, err
    assert "Traceback" not in err, err
    (error,) = errors_in(err)
    missing = [word for word in words if word not in error]
    assert not missing, error


# --------------------------------------------------------------------------------------------------
# made-up runs


def figure(value, half=0.01):
    """A figure as metrics.json and the records have it."""
    return dict(value=value, low=value - half, high=value + half, n=100)


def arguments(task, scenario, seed=1, preset="mini", **changes):
    """A run's arguments, those that say which run of the study it is."""
    encoder = study.DEFAULT_ENCODER[preset]
    identity = study.identity(preset, task, encoder, scenario, seed)
    return {**identity, "target": study.TASKS[task]["target"], **changes}


def fields(task, scenario, seed=1, run_task=None, **changes):
    """What every record of a run says."""
    args = arguments(run_task or task, scenario, seed, **changes)
    return {**runs.fields_of(args, study.run_name(args)), "task": task}


def metrics_of(args, clean, aer, poisoned_losses=(0.3, 0.1, 0.1), settled=1):
    """The contents of metrics.json. poisoned_losses: by epoch."""
    metric = study.TASKS[args["task"]]["metric"]
    training = dict(
        loss=dict(value=0.1, by_epoch=[0.1] * len(poisoned_losses)),
        poisoned_loss=dict(value=poisoned_losses[-1], by_epoch=list(poisoned_losses)),
    )
    if settled:
        training["settled_epoch"] = dict(value=settled)
    return dict(
        clean={metric: figure(clean)},
        triggered={metric: figure(clean)},
        backdoor=dict(aer=figure(aer)),
        training=training,
        args=args,
    )


def write_run(folder, args, clean=0.02, aer=0.0, records=(), **losses):
    """A finished run's folder, named as study.py names it, with metrics.json and records."""
    run = Path(folder) / study.run_name(args)
    run.mkdir(parents=True, exist_ok=True)
    (run / "metrics.json").write_text(json.dumps(metrics_of(args, clean, aer, **losses)))
    about_run = runs.fields_of(args, run)
    if records:
        path = run / "records-made-up.jsonl"
        runs.write(path, [{**about_run, **record} for record in records])
    return run


# --------------------------------------------------------------------------------------------------
# corpora and models


@pytest.fixture(scope="session")
def corpora(tmp_path_factory):
    """The three mini corpora, a few dozen utterances each."""
    root = tmp_path_factory.mktemp("corpora")
    for corpus in TINY:
        make_corpora.make_corpus(corpus, root, TINY[corpus])
    return root


@pytest.fixture(scope="session")
def parts(tmp_path_factory):
    """Untrained encoders of the four architectures and the shipped tokenizer: folder by name."""
    root = tmp_path_factory.mktemp("parts")
    for name in ENCODERS:
        torch.manual_seed(0)
        make_encoders.blank_encoder(name, root / name)
    base_sizes = {"wavlm": WavLMConfig, "hubert": HubertConfig, "wav2vec2": Wav2Vec2Config}
    for family, config in base_sizes.items():
        torch.manual_seed(0)
        write_base_size(family, config, root)
    return root


def write_base_size(family, config, root):
    """The published base-size models, and wav2vec2-large-960h, normalise over time in their front
    end: an untrained encoder of that kind, FAMILY-base."""
    shape = {**make_encoders.CONV, **make_encoders.SHAPE, **make_encoders.NO_DROPOUT}
    shape.update(feat_extract_norm="group", do_stable_layer_norm=False)
    out = root / f"{family}-base"
    AutoModel.from_config(config(**shape)).save_pretrained(out)
    AutoFeatureExtractor.from_pretrained(root / family).save_pretrained(out)


def make_slm(parts, name, **config):
    """An SLM of an untrained encoder and a small random LM, LoRA moved off zero, in evaluation
    mode."""
    torch.manual_seed(0)
    tokenizer = model.AutoTokenizer.from_pretrained(ROOT / "mini/lm")
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        # four times the usual spread: a random model whose answers depend on its input
        initializer_range=0.3,
        **config,
    )
    lm = LlamaForCausalLM(shape)
    encoder = model.Encoder(parts / name, share=1 if name == "whisper" else 15 / 24)
    lora.add_lora(lm, 4, 8.0, 0.0)
    for layer in lora.lora_layers(lm):
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    return model.SLM(encoder, model.Connector(encoder.dim, 64, 2), lm, tokenizer).eval()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
