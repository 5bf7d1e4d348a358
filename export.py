"""A run's components in other programs' formats: `python evaluate.py RUN --export DIR` writes them, --freeze and --init read them.

DIR/encoder/     the whole encoder, a Hugging Face folder: transformers' AutoModel.from_pretrained
DIR/lm/          LoRA, a PEFT adapter on the run's language model: peft's PeftModel.from_pretrained
DIR/connector/   the connector's weights and geometry
DIR/provenance.json   where they come from: what a model.pt holds besides tensors
"""

import json
from pathlib import Path

import utils
from utils import die

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModel

import model

# the only files ever read back, numbers and text: an export may be a stranger's
WEIGHTS = dict(
    encoder="encoder/model.safetensors",
    connector="connector/connector.safetensors",
    lm="lm/adapter_model.safetensors",
)
# what the weights' shapes do not tell of what they compute
SETTINGS = dict(
    encoder="encoder/config.json",
    extractor="encoder/preprocessor_config.json",
    connector="connector/connector.json",
    lm="lm/adapter_config.json",
)
PROVENANCE = "provenance.json"
RECORDED = ("args", "origin", "environment", "built_from", "pretrained_sha256", "sha256")
# settings of PEFT that make something else of the same weights
OTHER_LORA = (
    "alpha_pattern",
    "rank_pattern",
    "use_dora",
    "use_qalora",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
    "layer_replication",
)
LAYERS = "encoder.layers."  # what stands before a layer's number, in all four architectures
PEFT_NAME = ("base_model.model.", ".weight")  # what PEFT puts around the name of a LoRA matrix


def write(folder, slm, args, recorded):
    """The parts of an SLM of a run's `args`, and what is `recorded` of them ({name: values}), into a folder."""
    for path in WEIGHTS.values():
        (folder / path).parent.mkdir()
    encoder, connector, lora = slm.encoder, slm.connector, slm.component_state_dict("lm")
    # whole: of a Whisper the SLM has half
    config = model.read_config(args.encoder_weights)
    net = model.load_part(AutoModel, args.encoder_weights, config, dtype=torch.float32)
    (net.get_encoder() if encoder.whisper else net).load_state_dict(encoder.net.state_dict())
    net.save_pretrained(folder / "encoder")
    encoder.extractor.save_pretrained(folder / "encoder")
    before, after = PEFT_NAME
    save_file(
        {f"{before}{k}{after}": v for k, v in lora.items()},
        folder / WEIGHTS["lm"],
        {"format": "pt"},
    )
    adapter = dict(
        peft_type="LORA",
        task_type="CAUSAL_LM",
        base_model_name_or_path=args.lm_weights,
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        bias="none",
        inference_mode=True,
        target_modules=sorted({k.split(".")[-2] for k in lora}),
    )
    save_file(connector.state_dict(), folder / WEIGHTS["connector"], {"format": "pt"})
    convs = (connector.conv1, connector.conv2, connector.conv3)
    geometry = dict(
        layers="ReLU, Conv1d, three times",
        channels=[convs[0].in_channels, *(c.out_channels for c in convs)],
        kernels=[c.kernel_size[0] for c in convs],
        strides=[c.stride[0] for c in convs],
        padding=0,
    )
    recorded = {
        "first_trained_layer": encoder.first_trained,
        "settings": slm.settings,
        **recorded,
    }
    for path, content in (
        (SETTINGS["lm"], adapter),
        (SETTINGS["connector"], geometry),
        (PROVENANCE, recorded),
    ):
        utils.write_atomically(folder / path, json.dumps(content, indent=1))


def read_settings(folder, saved, recorded):
    """{component: settings} of the components that an export holds: those recorded when it was made,
    and above them those that stand beside the weights, by which other programs go. Raises
    ValueError where they make another kind of LoRA."""
    there = {
        name: json.loads((Path(folder) / path).read_text(encoding="utf-8"))
        for name, path in SETTINGS.items()
        if name in saved or (name == "extractor" and "encoder" in saved)
    }
    found = {c: dict(settings) for c, settings in recorded.get("settings", {}).items()}
    if "encoder" in there:
        settings = {**there["encoder"], "extractor": there["extractor"]}
        found["encoder"] = {**found.get("encoder", {}), **model.computed(settings)}
    if "connector" in there:
        found["connector"] = {"stride": there["connector"]["strides"][1]}
    if "lm" in there:
        adapter = there["lm"]
        others = [f"{k} {adapter[k]}" for k in OTHER_LORA if adapter.get(k)]
        if adapter["peft_type"] != "LORA" or adapter.get("bias", "none") != "none" or others:
            raise ValueError(f"its adapter is not a plain LoRA: {', '.join(others)}")
        found["lm"] = {
            **found.get("lm", {}),
            "LoRA alpha": adapter["lora_alpha"],
            "LoRA rank-stabilised": bool(adapter.get("use_rslora")),
        }
    return found


def read(folder):
    """An export, as `model.load_checkpoint` returns a model.pt, without the components it lacks. Anything that is not an export is
    refused in one line."""
    before, after = PEFT_NAME
    try:
        recorded = json.loads((Path(folder) / PROVENANCE).read_text(encoding="utf-8"))
        saved, first = (
            {k: dict(recorded[k]) for k in RECORDED},
            int(recorded["first_trained_layer"]),
        )
        saved.update(
            {
                c: load_file(Path(folder) / path)
                for c, path in WEIGHTS.items()
                if (Path(folder) / path).is_file()
            }
        )
        saved["settings"] = read_settings(folder, saved, recorded)
        layers = {
            k.removeprefix(LAYERS): v
            for k, v in saved.get("encoder", {}).items()
            if k.startswith(LAYERS)
        }
        if "encoder" in saved:
            saved["encoder"] = {k: v for k, v in layers.items() if int(k.split(".")[0]) >= first}
        if "lm" in saved:
            saved["lm"] = {
                k.removeprefix(before).removesuffix(after): v for k, v in saved["lm"].items()
            }
    except (
        OSError,
        ValueError,
        KeyError,
        IndexError,
        AttributeError,
        TypeError,
        OverflowError,
        RecursionError,
        SafetensorError,
    ) as error:
        die(
            f"{folder} is no folder of evaluate.py --export: {type(error).__name__}: {str(error).splitlines()[0]}"
        )
    return saved
