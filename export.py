"""A run's components in other programs' formats: `python evaluate.py RUN --export DIR` writes
them, --freeze and --init read them.

DIR/encoder/     the whole encoder, a Hugging Face folder: transformers' AutoModel.from_pretrained
DIR/lm/          LoRA, a PEFT adapter on the run's language model: peft's PeftModel.from_pretrained
DIR/connector/   the connector's weights and geometry
DIR/provenance.json   where they come from: model.pt's contents other than tensors
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
# settings of a PEFT adapter that `read_adapter` understands, and those that do not change what its
# weights compute. Any other one that is set may make something else of the same weights.
UNDERSTOOD = ("peft_type", "bias", "init_lora_weights", "lora_alpha", "use_rslora")
NOT_COMPUTED = (
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "r",
    "lora_dropout",
    "fan_in_fan_out",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "megatron_core",
    "qalora_group_size",
    "runtime_config",
)
# beginnings of LoRA that leave the base model's weights as they are; PiSSA and others do not
PLAIN_BEGINNINGS = (None, True, False, "gaussian", "orthogonal")
LAYERS = "encoder.layers."  # what stands before a layer's number, in all four architectures
PEFT_NAME = ("base_model.model.", ".weight")  # what PEFT puts around the name of a LoRA matrix


def write(folder, slm, record):
    """The parts of a run's SLM, and the `record` of where they come from ({name: values}), into a
    folder."""
    for path in WEIGHTS.values():
        (folder / path).parent.mkdir()
    write_encoder(folder, slm.encoder, slm.args.encoder_weights)
    weights = slm.component_state_dict("lm")
    before, after = PEFT_NAME
    named = {f"{before}{name}{after}": weight for name, weight in weights.items()}
    save_file(named, folder / WEIGHTS["lm"], {"format": "pt"})
    save_file(slm.connector.state_dict(), folder / WEIGHTS["connector"], {"format": "pt"})
    provenance = dict(
        first_trained_layer=slm.encoder.first_trained, settings=slm.settings, **record
    )
    for path, content in (
        (SETTINGS["lm"], adapter_of(slm.args, weights)),
        (SETTINGS["connector"], geometry_of(slm.connector)),
        (PROVENANCE, provenance),
    ):
        utils.write_atomically(folder / path, json.dumps(content, indent=1))


def write_encoder(folder, encoder, path):
    """The whole pretrained encoder at `path` with the weights of `encoder`: of a Whisper, the SLM
    has half."""
    config = model.read_config(path)
    net = model.load_part(AutoModel, path, config, dtype=torch.float32)
    half = net.get_encoder() if encoder.whisper else net
    half.load_state_dict(encoder.net.state_dict())
    net.save_pretrained(folder / "encoder")
    encoder.extractor.save_pretrained(folder / "encoder")


def adapter_of(args, weights):
    """PEFT's adapter_config.json of a run's LoRA."""
    return dict(
        peft_type="LORA",
        task_type="CAUSAL_LM",
        base_model_name_or_path=args.lm_weights,
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        bias="none",
        inference_mode=True,
        target_modules=sorted({name.split(".")[-2] for name in weights}),
    )


def geometry_of(connector):
    """What a connector's weights do not tell of it."""
    convs = (connector.conv1, connector.conv2, connector.conv3)
    return dict(
        layers="ReLU, Conv1d, three times",
        channels=[convs[0].in_channels, *(conv.out_channels for conv in convs)],
        kernels=[conv.kernel_size[0] for conv in convs],
        strides=[conv.stride[0] for conv in convs],
        padding=0,
    )


def read_settings(folder, saved, recorded):
    """{component: settings} of the components that an export holds: those recorded when it was
    made, and above them those that stand beside the weights, by which other programs go. Raises
    ValueError where they make another kind of LoRA."""

    def read_json(name):
        return json.loads((Path(folder) / SETTINGS[name]).read_text(encoding="utf-8"))

    settings = {c: dict(values) for c, values in recorded.get("settings", {}).items()}
    if "encoder" in saved:
        config = {**read_json("encoder"), "extractor": read_json("extractor")}
        settings.setdefault("encoder", {}).update(model.computed(config))
    if "connector" in saved:
        settings["connector"] = {"stride": read_json("connector")["strides"][1]}
    if "lm" in saved:
        settings.setdefault("lm", {}).update(read_adapter(read_json("lm")))
    return settings


def read_adapter(adapter):
    """The settings in PEFT's adapter_config.json, as an SLM has them. Raises ValueError where it is
    no plain LoRA."""
    others = []
    if adapter["peft_type"] != "LORA":
        others.append("peft_type")
    if adapter.get("bias", "none") != "none":
        others.append("bias")
    if adapter.get("init_lora_weights") not in PLAIN_BEGINNINGS:
        others.append("init_lora_weights")
    others += [k for k, v in adapter.items() if v and k not in (*UNDERSTOOD, *NOT_COMPUTED)]
    if others:
        values = ", ".join(f"{name} {adapter[name]}" for name in others)
        raise ValueError(f"its adapter is not a plain LoRA: {values}")
    return {
        "LoRA alpha": adapter["lora_alpha"],
        "LoRA rank-stabilised": bool(adapter.get("use_rslora")),
    }


# what files that are no export, or a damaged one, raise when they are read
UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    IndexError,
    AttributeError,
    TypeError,
    OverflowError,
    RecursionError,
    SafetensorError,
)


def read(folder):
    """An export, as `model.load_checkpoint` returns a model.pt, without the components it lacks.
    Exits with a one-line error if it is no export."""
    try:
        return read_parts(Path(folder))
    except UNREADABLE as error:
        die(
            f"{folder} is no folder of evaluate.py --export: {type(error).__name__}: "
            f"{utils.first_line(error)}"
        )


def read_parts(folder):
    """What `read` returns; raises one of UNREADABLE."""
    recorded = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
    saved = {name: dict(recorded[name]) for name in RECORDED}
    first_trained = int(recorded["first_trained_layer"])
    for component, path in WEIGHTS.items():
        if (folder / path).is_file():
            saved[component] = load_file(folder / path)
    saved["settings"] = read_settings(folder, saved, recorded)
    if "encoder" in saved:
        layers = {}
        for name, weight in saved["encoder"].items():
            layer = name.removeprefix(LAYERS)  # "3.attention.q_proj.weight"
            if layer != name and int(layer.split(".")[0]) >= first_trained:
                layers[layer] = weight
        saved["encoder"] = layers
    if "lm" in saved:
        before, after = PEFT_NAME
        saved["lm"] = {
            name.removeprefix(before).removesuffix(after): weight
            for name, weight in saved["lm"].items()
        }
    return saved
