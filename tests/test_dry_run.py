"""What a run would cost, told from the parts' configurations alone."""

import shutil

from utils import ROOT

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import data
import dry_run
import model
import train
from conftest import done


@pytest.fixture
def without_weights(tmp_path):
    """What a dry run in `tmp_path` prints of a run at the paper's scale, of which only the parts'
    configurations are there."""
    for part in ("wavlm", "lm"):
        no_weights = shutil.ignore_patterns("*.safetensors")
        shutil.copytree(ROOT / "mini" / part, tmp_path / part, ignore=no_weights)
    before = sorted(tmp_path.rglob("*"))
    parts = ("--encoder-weights", tmp_path / "wavlm", "--lm-weights", tmp_path / "lm")
    flags = ("--preset", "paper", "--data-root", "nowhere", "--freeze", "connector:not/made.pt")
    out = done("train.py", "--dry-run", *parts, *flags, cwd=tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
    return out


def test_a_dry_run_needs_no_weights_and_no_corpus(without_weights):
    assert "104,014 train utterances" in without_weights
    assert "GPU-hours" in without_weights


def test_a_dry_run_trains_no_frozen_component(without_weights):
    lines = [line.split() for line in without_weights.splitlines()]
    trained = {words[0]: words[-1] for words in lines if words[0] in ("connector", "lm")}
    assert trained["connector"] == "0"
    assert trained["lm"] != "0"


@pytest.mark.parametrize(
    "name, frozen",
    [
        ("wavlm", ()),
        ("whisper", ()),
        ("hubert", ("encoder",)),
        ("wav2vec2", ("encoder", "connector")),
    ],
)
def test_a_dry_run_counts_the_flops_of_a_real_step(name, frozen):
    args = train.parse_arguments(["--encoder", name])
    real = model.load_slm(args).train()
    with torch.device("meta"):
        empty = model.load_slm(args, "meta").train()
    for component in frozen:
        getattr(real, component).requires_grad_(False)
        getattr(empty, component).requires_grad_(False)
    labels = {"transcript": "a b c", "gender": "male"}
    prompt = data.prompt(real.tokenizer, list(labels))
    answer = data.answer_ids(real.tokenizer, labels)
    waveform = torch.randn(2 * data.SAMPLE_RATE).numpy()
    features = [real.encoder.extract(waveform)] * 3
    # math: the counter does not know the CPU's fused attention
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        x, mask = real.frozen_part(*real.encoder.pretrained_part(features))
        real(x, mask, [prompt] * 3, [answer] * 3).mean().backward()
    prompt_tokens = sum(len(part) for part in prompt)
    counted = dry_run.count_flops(empty, 2.0, prompt_tokens, len(answer))
    assert 3 * counted == pytest.approx(counter.get_total_flops(), rel=0.02)
