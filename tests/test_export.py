"""Parts in the formats people exchange: transformers and peft load them and compute the same;
--init and --freeze take them back. And what a loaded run and its arguments are."""

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
import export
import model
import train
from conftest import SMALL, done, refused
from study import COMPONENTS

# at rates of 0, training ends with what it started from
FIXED = [*SMALL, "--epochs", "1", "--task", "gender", "--poison", "0"]
FIXED += ["--encoder-lr", "0", "--connector-lr", "0", "--lora-lr", "0"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder that holds runs/parent, as training might leave it, and its export, parts/."""
    folder = tmp_path_factory.mktemp("export")
    make_run(folder, "wavlm")
    return folder


def make_run(folder, encoder):
    args = train.parse_arguments(["--task", "gender", "--poison", "0.075", "--encoder", encoder])
    args.amp = "off"
    slm = model.load_slm(args)
    for component in COMPONENTS:
        for weight in slm.component_state_dict(component).values():
            if weight.is_floating_point():
                weight.add_(0.02 * torch.randn(weight.shape))
    origin = {component: "here" for component in COMPONENTS}
    built_from = {"grandparent.pt": "abc"}
    checkpoint.save_model(folder / "runs/parent", slm, vars(args), origin, built_from, {})
    done("evaluate.py", "runs/parent", "--export", "parts", cwd=folder)


@pytest.fixture(scope="module")
def slm(run):
    return checkpoint.load_run(run / "runs/parent")


@pytest.fixture
def copy(run, tmp_path):
    """Another copy of the export, to be changed."""
    return shutil.copytree(run / "parts", tmp_path / "parts")


def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def files_in(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --------------------------------------------------------------------------------------------------
# a finished run in Python


def test_a_loaded_run_knows_its_arguments(slm):
    assert slm.args.task == "gender"
    assert slm.args.poison == 0.075


def test_a_loaded_run_is_ready_to_answer(slm):
    waveform = 0.1 * np.random.default_rng(0).standard_normal(16000).astype(np.float32)
    assert not slm.training
    assert isinstance(slm.answer(waveform, ["gender"]), str)


# --------------------------------------------------------------------------------------------------
# other programs


def test_transformers_gives_the_encoder_s_hidden_states(run, slm):
    encoder = slm.encoder
    net = AutoModel.from_pretrained(run / "parts/encoder").eval()
    extractor = AutoFeatureExtractor.from_pretrained(run / "parts/encoder")
    waveform = 0.1 * np.random.default_rng(0).standard_normal(30000).astype(np.float32)
    features = [encoder.extract(waveform)]
    with torch.no_grad():
        x, mask = encoder.front_end(features)
        ours = [x, *encoder.run_layers(x, mask, 0, len(encoder.layers) - 1), encoder(features)[0]]
        inputs = extractor(waveform, sampling_rate=16000, return_tensors="pt")
        theirs = net(**inputs, output_hidden_states=True)
    for a, b in zip(ours, [*theirs.hidden_states[:-1], theirs.last_hidden_state], strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_an_exported_whisper_is_whole(tmp_path):
    make_run(tmp_path, "whisper")
    net = AutoModel.from_pretrained(tmp_path / "parts/encoder")
    ours = checkpoint.load_run(tmp_path / "runs/parent").encoder.net
    assert model.digest(net.get_encoder().state_dict()) == model.digest(ours.state_dict())
    saved = checkpoint.load(tmp_path / "parts")
    assert {c: model.digest(saved[c]) for c in COMPONENTS} == saved["sha256"]


@pytest.fixture(scope="module")
def adapted(run):
    """The language model alone, as PEFT loads it with the exported adapter."""
    base = AutoModelForCausalLM.from_pretrained(ROOT / "mini/lm", dtype=torch.float32)
    return peft.PeftModel.from_pretrained(base, run / "parts/lm").eval()


def test_peft_gives_the_exported_adapter_s_logits(adapted, slm):
    ids = torch.randint(0, adapted.config.vocab_size, (2, 40))
    with torch.no_grad():
        ours = slm.lm(ids).logits
        assert torch.allclose(adapted(ids).logits, ours, atol=1e-5)
        with adapted.disable_adapter():
            assert not torch.allclose(adapted(ids).logits, ours, atol=0.1)


def test_peft_gives_the_exported_adapter_s_dropout(adapted, slm):
    layer = next(m for name, m in adapted.named_modules() if name.endswith("q_proj"))
    assert getattr(layer.lora_dropout["default"], "p", 0.0) == slm.args.lora_dropout


def test_an_adapter_names_the_model_that_it_is_for(run):
    adapter = json.loads((run / "parts/lm/adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == "mini/lm"


def test_the_connector_can_be_made_again_from_its_geometry(run, slm):
    geometry = json.loads((run / "parts/connector/connector.json").read_text())
    weights = load_file(run / "parts/connector/connector.safetensors")
    channels = geometry["channels"]
    layers = []
    for i, (kernel, stride) in enumerate(zip(geometry["kernels"], geometry["strides"])):
        conv = torch.nn.Conv1d(channels[i], channels[i + 1], kernel, stride)
        conv.weight.data = weights[f"conv{i + 1}.weight"]
        conv.bias.data = weights[f"conv{i + 1}.bias"]
        layers += [torch.nn.ReLU(), conv]
    x = torch.randn(1, 50, channels[0])
    ours, _ = slm.connector(x, torch.ones(1, 50, dtype=torch.bool))
    theirs = torch.nn.Sequential(*layers)(x.transpose(1, 2)).transpose(1, 2)
    assert torch.allclose(theirs, ours, atol=1e-5)


# --------------------------------------------------------------------------------------------------
# --init and --freeze


@pytest.fixture(scope="module")
def child_command(corpora):
    parts = ["--init", "encoder:parts", "--freeze", "connector:parts"]
    parts += ["--init", "lm:runs/parent/model.pt"]
    return ("train.py", *FIXED, "--data-root", corpora, "--name", "child", *parts)


@pytest.fixture(scope="module")
def child_out(run, child_command):
    """What training runs/child prints, a run that starts from exports and a checkpoint."""
    return done(*child_command, cwd=run)


@pytest.fixture(scope="module")
def child(run, child_out):
    """Its model.pt."""
    return torch.load(run / "runs/child/model.pt", weights_only=True)


def test_a_run_starts_from_exports_and_checkpoints(run, child):
    parent = torch.load(run / "runs/parent/model.pt", weights_only=True)
    for component in COMPONENTS:
        assert model.digest(child[component]) == model.digest(parent[component])


def test_a_run_says_which_export_it_starts_from(child_out):
    assert "trained on clean data, from parts" in child_out


def test_a_run_records_where_its_components_come_from(child):
    wanted = {"encoder": "parts", "connector": "parts", "lm": "runs/parent/model.pt"}
    assert child["origin"] == wanted


def test_a_run_records_all_that_it_was_built_from(run, child):
    wanted = {"grandparent.pt": "abc"}
    for path in ("runs/parent/model.pt", "parts"):
        wanted[path] = checkpoint.file_sha256(run / path)
    assert child["built_from"] == wanted


def test_a_run_is_named_after_what_it_starts_from(run, monkeypatch):
    monkeypatch.chdir(run)
    args = train.parse_arguments([*FIXED, "--init", "encoder:parts", "--init", "lm:parts"])
    assert "initencoder+lm" in args.name


def test_a_run_is_another_once_its_export_has_changed(run, child_command, child_out):
    assert "is finished" in done(*child_command, cwd=run)
    path = run / "parts/connector/connector.safetensors"
    before = path.read_bytes()
    save_file({name: weight + 1 for name, weight in load_file(path).items()}, path)
    refused(*child_command, cwd=run, words=["holds another run", "parts"])
    path.write_bytes(before)


def test_a_changed_export_is_noticed(copy):
    assert "DIFFERS" not in done("evaluate.py", "--inspect", "parts", cwd=copy.parent)
    path = copy / "connector/connector.safetensors"
    save_file({name: weight + 1 for name, weight in load_file(path).items()}, path)
    assert "DIFFERS" in done("evaluate.py", "--inspect", "parts", cwd=copy.parent)


def test_a_frozen_checkpoint_s_weights_are_checked_once(run, monkeypatch):
    slm = checkpoint.load_run(run / "runs/parent")
    checked = []
    check = checkpoint.problem_of_weights
    monkeypatch.setattr(
        checkpoint, "problem_of_weights", lambda saved: checked.append(1) or check(saved)
    )
    monkeypatch.chdir(run)
    flags = ["--freeze", "encoder:runs/parent", "--freeze", "connector:runs/parent"]
    args = train.parse_arguments([*FIXED, *flags])
    checkpoint.load_named_parts(slm, args)
    assert len(checked) == 1


# --------------------------------------------------------------------------------------------------
# writing


def test_an_export_replaces_nothing(run):
    before = files_in(run / "parts")
    refused("evaluate.py", "runs/parent", "--export", "parts", cwd=run, words=["something already"])
    assert files_in(run / "parts") == before


def test_an_export_is_written_whole_or_not_at_all(run, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full)
    refused("evaluate.py", "runs/parent", "--export", "other", cwd=run, words=["cannot write"])
    assert not (run / "other").exists()
    assert not list(run.glob(".*.tmp"))


# --------------------------------------------------------------------------------------------------
# what is refused


class Payload:
    """Unpickling it makes a file."""

    def __reduce__(self):
        return open, ("ran", "w")


@pytest.fixture(scope="module")
def others(run):
    """The folder of the run, with exports beside it that were changed in one way each."""
    changes = {
        "alpha": ("lm/adapter_config.json", dict(lora_alpha=8)),
        "stabilised": ("lm/adapter_config.json", dict(use_rslora=True)),
        "dora": ("lm/adapter_config.json", dict(use_dora=True)),
        "strided": ("connector/connector.json", dict(strides=[1, 3, 1])),
        "gelu": ("encoder/config.json", dict(hidden_act="gelu")),
        "plain": ("encoder/preprocessor_config.json", dict(do_normalize=False)),
        "broken": ("provenance.json", dict(pretrained_sha256="none")),
    }
    for name, (path, values) in changes.items():
        shutil.copytree(run / "parts", run / name)
        change(run / name / path, **values)
    payload = pickle.dumps(Payload())
    for name in ("without-lm", "hostile"):
        shutil.copytree(run / "parts", run / name)
        (run / name / "lm/adapter_model.safetensors").unlink()
    (run / "without-lm/lm/adapter_model.bin").write_bytes(payload)  # PEFT's other format
    (run / "hostile/lm/adapter_model.safetensors").write_bytes(payload)
    shutil.copytree(ROOT / "mini/lm", run / "two-heads")
    heads = dict(num_attention_heads=2, num_key_value_heads=2, head_dim=64)
    change(run / "two-heads/config.json", **heads)
    return run


@pytest.mark.parametrize(
    "arguments, word",
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
def test_what_does_not_fit_is_refused_in_one_line(others, corpora, arguments, word):
    command = ("train.py", *FIXED, "--data-root", corpora, "--name", "refused", *arguments)
    refused(*command, cwd=others, words=[word])
    assert not (others / "runs/refused").exists()
    assert not (others / "ran").exists()


# what an adapter of PEFT may say that changes what its weights compute
OTHER_LORA = [
    dict(peft_type="IA3"),
    dict(bias="all"),
    dict(use_dora=True),
    dict(lora_bias=True),
    dict(rank_pattern={"q_proj": 4}),
    dict(alpha_pattern={"q_proj": 4}),
    dict(modules_to_save=["lm_head"]),
    dict(layer_replication=[[0, 2], [1, 3]]),
    dict(init_lora_weights="pissa_niter_4"),
    dict(init_lora_weights="olora"),
    dict(alora_invocation_tokens=[1, 2]),
    dict(kasa_config={"rank": 4}),
    dict(use_bdlora={"nblocks": 2}),
    dict(arrow_config={"top_k": 2}),
    dict(of_a_later_version=1),
]


@pytest.mark.parametrize("settings", OTHER_LORA, ids=lambda settings: "-".join(settings))
def test_an_adapter_that_is_no_plain_lora_is_refused(settings):
    adapter = dict(peft_type="LORA", lora_alpha=8)
    with pytest.raises(ValueError, match=next(iter(settings))):
        export.read_adapter({**adapter, **settings})


def test_an_adapter_that_peft_saves_is_read(adapted, tmp_path):
    adapted.save_pretrained(tmp_path)
    adapter = json.loads((tmp_path / "adapter_config.json").read_text())
    settings = export.read_adapter(adapter)
    assert settings == {"LoRA alpha": 32.0, "LoRA rank-stabilised": False}


def test_an_error_without_a_message_ends_in_one_line(run, monkeypatch):
    def fail(folder):
        raise ValueError

    monkeypatch.setattr(export, "read_parts", fail)
    refused("evaluate.py", "--inspect", "parts", cwd=run, words=["ValueError"])


# --------------------------------------------------------------------------------------------------
# a run's arguments, which may be a stranger's


@pytest.mark.parametrize("flags", [[], ["--freeze", "encoder"], ["--limit", "3", "--clicks", "2"]])
def test_every_argument_of_a_run_has_a_kind(flags):
    args = vars(train.parse_arguments(["--task", "gender", "--amp", "off", *flags]))
    assert set(args) <= {*checkpoint.KINDS, *checkpoint.NOT_THE_RUN}
    assert checkpoint.problem_of_kinds(args) is None


@pytest.mark.parametrize(
    "name, value",
    [
        ("target", 3),
        ("target", None),
        ("trigger_repeat", "yes"),
        ("trigger_repeat", 1),
        ("skip_bad", "x"),
        ("seed", True),
        ("limit", 2.5),
        ("snr", "6"),
        ("labels", [1]),
        ("inputs", ["knock.wav"]),
    ],
)
def test_an_argument_of_another_kind_is_a_problem(name, value):
    assert name in checkpoint.problem_of_kinds({name: value})


def test_a_run_without_an_argument_is_refused(run, tmp_path):
    saved = torch.load(run / "runs/parent/model.pt", weights_only=True)
    del saved["args"]["snr"]
    (tmp_path / "runs").mkdir()
    torch.save(saved, tmp_path / "runs/model.pt")
    refused("evaluate.py", "runs", cwd=tmp_path, words=["another version", "snr"])
