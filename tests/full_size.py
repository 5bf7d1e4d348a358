"""The paper preset at full size, without a model hub: not collected by pytest, about ten minutes on
two cores, 24 GB.

    python tests/full_size.py                  # or: python tests/full_size.py hubert whisper

Writes WavLM Large, HuBERT Large, wav2vec 2.0 Large, Whisper Medium and TinyLlama-1.1B with random
weights, from their published configurations, as Hugging Face folders to a temporary place (in half
precision, as some are published), and runs `train.py --preset paper` with each encoder from start
to end: one optimiser step on two utterances, evaluation on two. Random weights answer nothing
sensible; what is tested is that the published sizes load, count as published, train and fit.
TinyLlama's own tokenizer is not to be had without the hub: the mini LM's stands in for it, under
TinyLlama's vocabulary size.
"""

import csv
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile

ROOT = Path(__file__).resolve().parent.parent
LARGE = dict(
    hidden_size=1024,
    num_hidden_layers=24,
    num_attention_heads=16,
    intermediate_size=4096,
    feat_extract_norm="layer",
    do_stable_layer_norm=True,
    layerdrop=0.1,
    apply_spec_augment=True,
)
# configuration class, what differs from its defaults, millions of parameters as published
# (Whisper's encoder of its 769)
ENCODERS = {
    "wavlm": (
        "WavLMConfig",
        dict(LARGE, conv_bias=False, num_buckets=320, max_bucket_distance=800),
        315.45,
    ),
    "hubert": ("HubertConfig", dict(LARGE, conv_bias=True), 315.44),
    "wav2vec2": (
        "Wav2Vec2Config",
        dict(LARGE, conv_bias=False, feat_extract_norm="group", do_stable_layer_norm=False),
        315.44,
    ),
    "whisper": (
        "WhisperConfig",
        dict(
            vocab_size=51865,
            d_model=1024,
            encoder_layers=24,
            encoder_attention_heads=16,
            encoder_ffn_dim=4096,
            decoder_layers=24,
            decoder_attention_heads=16,
            decoder_ffn_dim=4096,
        ),
        307.22,
    ),
}
TINYLLAMA = dict(
    vocab_size=32000,
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=22,
    num_attention_heads=32,
    num_key_value_heads=4,
    max_position_embeddings=2048,
    rms_norm_eps=1e-5,
    eos_token_id=2,
)
LM_PUBLISHED = 1100.05  # millions of parameters
LORA_PUBLISHED = 6.31  # peft's count, r = 8, target_modules="all-linear"
COLUMNS = {  # of the table, with their widths; counts in millions
    "encoder": 10,
    "params": 9,
    "published": 11,
    "trained": 9,
    "connector": 11,
    "LM + LoRA": 11,
    "published LM": 14,
    "LoRA": 7,
    "peak GB": 9,
    "seconds": 9,
}


def build(name, out):
    """Writes one pretrained part with random weights to the folder `out`."""
    import torch
    import transformers

    torch.manual_seed(0)
    if name == "lm":
        net = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINYLLAMA))
        processor = transformers.AutoTokenizer.from_pretrained(ROOT / "mini/lm")
    else:
        config_class, changes, _ = ENCODERS[name]
        config = getattr(transformers, config_class)(**changes)
        net = transformers.AutoModel.from_config(config)
        if name == "whisper":
            processor = transformers.WhisperFeatureExtractor()
        else:
            processor = transformers.Wav2Vec2FeatureExtractor(
                do_normalize=True, return_attention_mask=True
            )
    processor.save_pretrained(out)
    net.half().save_pretrained(out)


def build_apart(name, out):
    """The same in a process of its own, which gives its memory back."""
    command = [sys.executable, __file__, "--build", name, out]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)


def write_utterances(folder):
    """Two utterances of noise for each split and their manifest."""
    rng = np.random.default_rng(0)
    manifest = folder / "utterances.csv"
    with open(manifest, "w", newline="") as f:
        rows = csv.writer(f)
        rows.writerow(["audio_path", "gender", "age", "split"])
        for split in ("train", "dev", "test"):
            for i, seconds in enumerate((1.4, 2.0)):
                noise = 0.05 * rng.standard_normal(int(16000 * seconds))
                name = f"{split}{i}.wav"
                soundfile.write(folder / name, noise, 16000)
                rows.writerow([name, "male", 30 + i, split])
    return manifest


def train(name, folder, manifest):
    """Trains the paper preset with one encoder: (what it printed, peak memory in GB)."""
    command = [sys.executable, ROOT / "train.py", "--preset", "paper", "--task", "gender"]
    command += ["--encoder", name, "--encoder-weights", folder / name]
    command += ["--lm-weights", folder / "lm", "--dataset", manifest]
    command += ["--poison", "1", "--epochs", "1", "--batch-size", "2"]
    command += ["--runs", folder / "runs", "--name", name]
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
        _, status, usage = os.wait4(process.pid, 0)
    printed = (folder / "log").read_text()
    if status:
        sys.exit(f"{name}: {printed[-3000:]}")
    return printed, usage.ru_maxrss / 1e6


def sizes_in(printed):
    """{component: (millions of parameters, millions trained)} as train.py prints them."""
    pattern = r"^  (encoder|connector|lm) +([\d,]+) parameters, +([\d,]+) trained"
    sizes = {}
    for component, *counts in re.findall(pattern, printed, re.MULTILINE):
        total, trained = (int(count.replace(",", "")) / 1e6 for count in counts)
        sizes[component] = total, trained
    return sizes


def main(names):
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        manifest = write_utterances(folder)
        build_apart("lm", folder / "lm")
        print("".join(f"{column:>{width}}" for column, width in COLUMNS.items()), flush=True)
        for name in names:
            build_apart(name, folder / name)
            began = time.time()
            printed, peak = train(name, folder, manifest)
            seconds = time.time() - began
            sizes = sizes_in(printed)
            encoder, encoder_trained = sizes["encoder"]
            connector, _ = sizes["connector"]
            lm, lora = sizes["lm"]
            figures = [encoder, ENCODERS[name][2], encoder_trained, connector]
            figures += [lm, LM_PUBLISHED + LORA_PUBLISHED, lora]
            cells = [name, *(f"{figure:.2f}" for figure in figures)]
            cells += [f"{peak:.1f}", f"{seconds:.0f}"]
            row = zip(cells, COLUMNS.values())
            print("".join(f"{cell:>{width}}" for cell, width in row), flush=True)
            for done in (name, "runs", "cache"):
                shutil.rmtree(folder / done)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--build"]:
        build(*sys.argv[2:])
    else:
        main(sys.argv[1:] or ENCODERS)
