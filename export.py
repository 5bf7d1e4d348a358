"""A run's components in other programs' formats: `python evaluate.py RUN --export DIR` writes them, --freeze and --init read them.

DIR/encoder/     the whole encoder, a Hugging Face folder: transformers' AutoModel.from_pretrained
DIR/lm/          LoRA, a PEFT adapter on the run's language model: peft's PeftModel.from_pretrained
DIR/connector/   the connector's weights and geometry
DIR/provenance.json   where they come from: what a model.pt holds besides tensors
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModel

import data
import model
from data import die

# the only files ever read back, numbers and text: an export may be a stranger's
WEIGHTS = dict(
    encoder="encoder/model.safetensors",
    connector="connector/connector.safetensors",
    lm="lm/adapter_model.safetensors",
)
PROVENANCE = "provenance.json"
RECORDED = ("args", "origin", "environment", "built_from", "pretrained_sha256", "sha256")
LAYERS = "encoder.layers."  # what stands before a layer's number, in all four architectures
PEFT_NAME = ("base_model.model.", ".weight")  # what PEFT puts around the name of a LoRA matrix


def write(folder, slm, args, recorded):
    """The parts of an SLM of a run's `args`, and what is `recorded` of them ({name: values}), into a folder."""
    for path in WEIGHTS.values():
        (folder / path).parent.mkdir()
    encoder, connector, lora = slm.encoder, slm.connector, slm.component_state_dict("lm")
    net = model.load_part(
        AutoModel, args.encoder_weights, dtype=torch.float32
    )  # whole: of a Whisper the SLM has half
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
    recorded = {"first_trained_layer": encoder.first_trained, **recorded}
    for path, content in (
        ("lm/adapter_config.json", adapter),
        ("connector/connector.json", geometry),
        (PROVENANCE, recorded),
    ):
        data.write_atomically(folder / path, json.dumps(content, indent=1))


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
        TypeError,
        OverflowError,
        RecursionError,
        SafetensorError,
    ) as error:
        die(
            f"{folder} is no folder of evaluate.py --export: {type(error).__name__}: {str(error).splitlines()[0]}"
        )
    return saved
