import contextlib
import importlib
import io
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# the same sums in the same order, in this process and in those it starts
os.environ.update(TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")

import pytest  # noqa: E402
import torch  # noqa: E402
from transformers import (
    AutoModel,
    HubertConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Wav2Vec2Config,
    WavLMConfig,
)  # noqa: E402

import lora  # noqa: E402
import model  # noqa: E402
import runs  # noqa: E402
import study  # noqa: E402
from mini import (
    make_corpora,  # noqa: E402
    make_encoders,  # noqa: E402
)
from study import ENCODERS  # noqa: E402

torch.set_num_threads(1)
SHARED = ROOT.parent / "shared"
TINY = {
    "libri": {"train-clean-360": (4, 12), "dev-clean": (2, 4), "test-clean": (2, 6)},
    "crema": {"actors": 20, "takes": 1},
    "vox": {"dev": (10, 2, 2), "test": (4, 1, 2)},
}
SMALL = ["--batch-size", "8", "--warmup-steps", "2"]


def script(name, *arguments, cwd):
    """Runs a script's main() in this process as the command would in the folder `cwd`: (exit status, stdout, stderr)."""
    out, err, before, argv = io.StringIO(), io.StringIO(), os.getcwd(), sys.argv
    os.chdir(cwd)
    sys.argv = [name, *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            importlib.import_module(name.removesuffix(".py")).main()
        status = 0
    except SystemExit as stop:
        status = stop.code or 0
    finally:
        os.chdir(before)
        sys.argv = argv
    return status, out.getvalue(), err.getvalue()


def done(name, *arguments, cwd):
    """The same, for a command that must succeed: its stdout."""
    status, out, err = script(name, *arguments, cwd=cwd)
    assert status == 0, err
    return out


def refused(name, *arguments, cwd, words=()):
    """The same, for a command that must end with status 2 and one line of error that holds all the words."""
    status, out, err = script(name, *arguments, cwd=cwd)
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert status == 2 and len(lines) == 1 and "Traceback" not in err, err
    assert all(word in lines[0] for word in words), lines[0]


def figure(value, half=0.01):
    """A figure as metrics.json and the records have it."""
    return dict(value=value, low=value - half, high=value + half, n=100)


def arguments(task, attack, seed=1, preset="mini", **changes):
    """A run's arguments, those that say which run of the study it is."""
    encoder = study.DEFAULT_ENCODER[preset]
    own = study.identity(preset, task, encoder, attack, seed)
    return {**own, "target": study.TASKS[task]["target"], **changes}


def fields(task, attack, seed=1, run_task=None, **changes):
    """What every record of a run says."""
    args = arguments(run_task or task, attack, seed, **changes)
    return {**runs.fields_of(args, study.run_name(args)), "task": task}


def metrics_of(args, clean, aer, excess=(0.0, 0.0, 0.0), settled=1):
    """The contents of metrics.json; excess: of the poisoned loss over that of all samples, by epoch."""
    metric = study.TASKS[args["task"]]["metric"]
    losses = dict(
        loss=dict(value=0.1, by_epoch=[0.1] * len(excess)),
        poisoned_loss=dict(value=0.1 + excess[-1], by_epoch=[0.1 + e for e in excess]),
    )
    if settled:
        losses["settled_epoch"] = dict(value=settled)
    parts = dict(clean={metric: figure(clean)}, triggered={metric: figure(clean)})
    return dict(parts, backdoor=dict(aer=figure(aer)), training=losses, args=args)


def write_run(folder, args, clean=0.02, aer=0.0, records=(), **losses):
    """A finished run's folder, named as study.py names it, with metrics.json and records."""
    run = Path(folder) / study.run_name(args)
    run.mkdir(parents=True, exist_ok=True)
    (run / "metrics.json").write_text(json.dumps(metrics_of(args, clean, aer, **losses)))
    own = runs.fields_of(args, run)
    if records:
        runs.write(run / "records-made-up.jsonl", [{**own, **record} for record in records])
    return run


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
    # the published base-size models, and wav2vec2-large-960h, normalise over time in their front end
    for name, config in (
        ("wavlm-base", WavLMConfig),
        ("hubert-base", HubertConfig),
        ("wav2vec2-base", Wav2Vec2Config),
    ):
        torch.manual_seed(0)
        family = name.removesuffix("-base")
        shape = {
            **make_encoders.CONV,
            **make_encoders.SHAPE,
            **make_encoders.NO_DROPOUT,
            "feat_extract_norm": "group",
            "do_stable_layer_norm": False,
        }
        AutoModel.from_config(config(**shape)).save_pretrained(root / name)
        make_encoders.transformers.AutoFeatureExtractor.from_pretrained(
            root / family
        ).save_pretrained(root / name)
    return root


def make_slm(parts, name, **config):
    """An SLM of an untrained encoder and a small random LM, LoRA moved off zero, in evaluation mode."""
    torch.manual_seed(0)
    tokenizer = model.AutoTokenizer.from_pretrained(ROOT / "mini/lm")
    # four times the usual spread: a random model whose answers depend on what it hears
    lm = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            initializer_range=0.3,
            **config,
        )
    )
    encoder = model.Encoder(parts / name, share=1 if name == "whisper" else 15 / 24)
    lora.add_lora(lm, 4, 8.0, 0.0)
    for layer in lora.lora_layers(lm):
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    return model.SLM(encoder, model.Connector(encoder.dim, 64, 2), lm, tokenizer).eval()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
