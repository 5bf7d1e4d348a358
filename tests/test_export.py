"""Parts in the formats people exchange: transformers and peft load them and say the same; --init and --freeze take them back."""

import json
import os
import pickle
import shutil

from utils import ROOT

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoFeatureExtractor, AutoModel, AutoModelForCausalLM

import checkpoint
import model
import train
from conftest import SMALL, done, refused
from study import COMPONENTS

FIXED = [
    *SMALL,
    "--epochs",
    "1",
    "--task",
    "gender",
    "--poison",
    "0",
    "--encoder-lr",
    "0",
    "--connector-lr",
    "0",
    "--lora-lr",
    "0",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder that holds runs/parent, as training might leave it, and its export, parts/."""
    folder = tmp_path_factory.mktemp("export")
    make_run(folder, "wavlm")
    return folder


def make_run(folder, encoder):
    args = train.parse_arguments(["--task", "gender", "--poison", "0.075", "--encoder", encoder])
    slm = model.load_slm(args)
    for component in COMPONENTS:
        for k, v in slm.component_state_dict(component).items():
            if v.is_floating_point():
                v.add_(0.02 * torch.randn(v.shape))
    checkpoint.save_model(
        folder / "runs/parent",
        slm,
        vars(args),
        {c: "here" for c in COMPONENTS},
        {"grandparent.pt": "abc"},
    )
    done("evaluate.py", "runs/parent", "--export", "parts", cwd=folder)


def loaded(folder):
    return checkpoint.load_run(folder / "runs/parent")


def test_transformers_gives_the_exported_encoder_s_hidden_states(run):
    encoder, net = loaded(run).encoder, AutoModel.from_pretrained(run / "parts/encoder").eval()
    extractor = AutoFeatureExtractor.from_pretrained(run / "parts/encoder")
    waveform = 0.1 * np.random.default_rng(0).standard_normal(30000).astype(np.float32)
    with torch.no_grad():
        x, mask = encoder.front_end([encoder.extract(waveform)])
        ours = [
            x,
            *encoder.run_layers(x, mask, 0, len(encoder.layers) - 1),
            encoder([encoder.extract(waveform)])[0],
        ]
        theirs = net(
            **extractor(waveform, sampling_rate=16000, return_tensors="pt"),
            output_hidden_states=True,
        )
    for a, b in zip(ours, [*theirs.hidden_states[:-1], theirs.last_hidden_state], strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_an_exported_whisper_is_whole(tmp_path):
    make_run(tmp_path, "whisper")
    net, slm = AutoModel.from_pretrained(tmp_path / "parts/encoder"), loaded(tmp_path)
    assert model.digest(net.get_encoder().state_dict()) == model.digest(
        slm.encoder.net.state_dict()
    )
    saved = checkpoint.load(tmp_path / "parts")
    assert {c: model.digest(saved[c]) for c in COMPONENTS} == saved["sha256"]


def test_peft_gives_the_exported_adapter_s_logits(run):
    config = json.loads((run / "parts/lm/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "mini/lm"
    base = AutoModelForCausalLM.from_pretrained(ROOT / "mini/lm", dtype=torch.float32)
    ids = torch.randint(0, base.config.vocab_size, (2, 40))
    with torch.no_grad():
        bare = base(ids).logits
        theirs = peft.PeftModel.from_pretrained(base, run / "parts/lm").eval()
        ours = loaded(run).lm(ids).logits
        assert torch.allclose(theirs(ids).logits, ours, atol=1e-5) and not torch.allclose(
            bare, ours, atol=0.1
        )
    lora_dropout = next(m for k, m in theirs.named_modules() if k.endswith("q_proj")).lora_dropout[
        "default"
    ]
    assert getattr(lora_dropout, "p", 0.0) == config["lora_dropout"]


def test_the_connector_can_be_made_again_from_its_geometry(run):
    geometry = json.loads((run / "parts/connector/connector.json").read_text())
    convs = [
        torch.nn.Conv1d(*shape)
        for shape in zip(
            geometry["channels"], geometry["channels"][1:], geometry["kernels"], geometry["strides"]
        )
    ]
    again = torch.nn.Sequential(*(layer for conv in convs for layer in (torch.nn.ReLU(), conv)))
    weights = load_file(run / "parts/connector/connector.safetensors")
    for i, conv in enumerate(convs, 1):
        conv.weight.data, conv.bias.data = weights[f"conv{i}.weight"], weights[f"conv{i}.bias"]
    x, connector = torch.randn(1, 50, geometry["channels"][0]), loaded(run).connector
    assert torch.allclose(
        again(x.transpose(1, 2)).transpose(1, 2),
        connector(x, torch.ones(1, 50, dtype=torch.bool))[0],
        atol=1e-5,
    )


def test_a_run_starts_from_exports_and_checkpoints_and_says_so(run, corpora):
    """At rates of 0 it ends with what it started from."""
    command = (
        "train.py",
        *FIXED,
        "--data-root",
        corpora,
        "--init",
        "encoder:parts",
        "--freeze",
        "connector:parts",
        "--init",
        "lm:runs/parent/model.pt",
    )
    out = done(*command, cwd=run)
    folder = next(path for path in (run / "runs").iterdir() if path.name != "parent")
    assert "initencoder+lm" in folder.name and "trained on clean data, from parts" in out
    parent, child = (
        torch.load(run / "runs" / path / "model.pt", weights_only=True)
        for path in ("parent", folder.name)
    )
    for component in COMPONENTS:
        assert all(torch.equal(v, child[component][k]) for k, v in parent[component].items())
    assert child["origin"] == {
        "encoder": "parts",
        "connector": "parts",
        "lm": "runs/parent/model.pt",
    }
    assert child["built_from"] == {
        "grandparent.pt": "abc",
        **{path: checkpoint.file_sha256(run / path) for path in ("runs/parent/model.pt", "parts")},
    }
    assert "is finished" in done(*command, cwd=run)
    old = (run / "parts/connector/connector.safetensors").read_bytes()
    save_file(
        {k: v + 1 for k, v in load_file(run / "parts/connector/connector.safetensors").items()},
        run / "parts/connector/connector.safetensors",
    )
    assert "DIFFERS" in done("evaluate.py", "--inspect", "parts", cwd=run)
    refused(*command, cwd=run, words=["holds another run", "parts"])
    (run / "parts/connector/connector.safetensors").write_bytes(old)
    assert "DIFFERS" not in done("evaluate.py", "--inspect", "parts", cwd=run)


def test_an_export_is_written_whole_or_not_at_all(run, monkeypatch):
    before = {path: path.read_bytes() for path in (run / "parts").rglob("*") if path.is_file()}
    refused("evaluate.py", "runs/parent", "--export", "parts", cwd=run, words=["something already"])
    assert {
        path: path.read_bytes() for path in (run / "parts").rglob("*") if path.is_file()
    } == before

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full)
    refused("evaluate.py", "runs/parent", "--export", "other", cwd=run, words=["cannot write"])
    assert not (run / "other").exists() and not list(run.glob(".*.tmp"))


class Payload:
    """Unpickling it makes a file."""

    def __reduce__(self):
        return open, ("ran", "w")


def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("--init", "encoder"), "no such checkpoint"),
        (("--init", "lm:runs"), "no such checkpoint"),
        (("--init", "lm:parts", "--freeze", "lm"), "already named by --freeze lm"),
        (("--init", "lm:parts", "--lora-rank", "4"), "not (4, "),
        (("--init", "connector:parts", "--connector-stride", "2"), "stride 1, here 2"),
        (("--init", "encoder:parts", "--train-layers", "4"), "is not in this model"),
        (("--init", "encoder:parts", "--encoder", "hubert"), "other pretrained weights"),
        (("--init", "lm:parts", "--lora-alpha", "64"), "LoRA alpha 32.0, here 64.0"),
        (("--init", "lm:alpha"), "LoRA alpha 8, here 32.0"),
        (("--init", "lm:stabilised"), "LoRA rank-stabilised True, here False"),
        (("--init", "lm:dora"), "use_dora"),
        (("--freeze", "connector:strided"), "stride 3, here 1"),
        (("--freeze", "encoder:gelu"), "hidden_act gelu, here relu"),
        (("--init", "encoder:plain"), "extractor do_normalize False, here True"),
        (("--init", "lm:parts", "--lm-weights", "two-heads"), "num_attention_heads 4, here 2"),
        (("--freeze", "lm:without-lm"), "has no lm"),
        (("--init", "lm:hostile"), "is no folder of evaluate.py --export"),
        (("--init", "lm:broken"), "is no folder of evaluate.py --export"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(run, corpora, arguments, said):
    if not (run / "broken").exists():
        for name in ("without-lm", "hostile", "broken"):
            shutil.copytree(run / "parts", run / name)
        (run / "without-lm/lm/adapter_model.safetensors").unlink()
        (run / "without-lm/lm/adapter_model.bin").write_bytes(
            pickle.dumps(Payload())
        )  # peft's other format
        (run / "hostile/lm/adapter_model.safetensors").write_bytes(pickle.dumps(Payload()))
        change(run / "broken/provenance.json", pretrained_sha256="none")
        for name, path, values in (
            ("alpha", "lm/adapter_config.json", dict(lora_alpha=8)),
            ("stabilised", "lm/adapter_config.json", dict(use_rslora=True)),
            ("dora", "lm/adapter_config.json", dict(use_dora=True)),
            ("strided", "connector/connector.json", dict(strides=[1, 3, 1])),
            ("gelu", "encoder/config.json", dict(hidden_act="gelu")),
            ("plain", "encoder/preprocessor_config.json", dict(do_normalize=False)),
        ):
            shutil.copytree(run / "parts", run / name)
            change(run / name / path, **values)
        shutil.copytree(ROOT / "mini/lm", run / "two-heads")
        change(run / "two-heads/config.json", num_attention_heads=2, num_key_value_heads=2)
        change(run / "two-heads/config.json", head_dim=64)
    refused(
        "train.py",
        *FIXED,
        "--data-root",
        corpora,
        "--name",
        "refused",
        *arguments,
        cwd=run,
        words=[said],
    )
    assert not (run / "runs/refused").exists() and not (run / "ran").exists()
