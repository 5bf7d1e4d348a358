"""The paper preset at full size, without a model hub: not collected by pytest, about ten minutes on two cores, 24 GB.

    python tests/full_size.py                  # or: python tests/full_size.py hubert whisper

Writes WavLM Large, HuBERT Large, wav2vec 2.0 Large, Whisper Medium and TinyLlama-1.1B with random weights, from their
published configurations, as Hugging Face folders to a temporary place (in half precision, as some are published), and
runs `train.py --preset paper` with each encoder from start to end: one optimiser step on two utterances, evaluation on
two. Random weights answer nothing sensible; what is tested is that the published sizes load, count as published, train
and fit. TinyLlama's own tokenizer is not to be had without the hub: the mini LM's stands in for it, under TinyLlama's
vocabulary size.
"""

import csv
import os
import re
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
# configuration class, what differs from its defaults, millions of parameters as published (Whisper's of its 769)
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
LM_PUBLISHED, LORA_PUBLISHED = (
    1100.05,
    6.31,
)  # LoRA: peft's count, r = 8, target_modules="all-linear"


def build(name, out):
    """Writes one pretrained part with random weights to the folder `out`."""
    import torch
    import transformers

    torch.manual_seed(0)
    if name == "lm":
        net = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINYLLAMA))
        transformers.AutoTokenizer.from_pretrained(ROOT / "mini/lm").save_pretrained(out)
    else:
        config, changes, _ = ENCODERS[name]
        net = transformers.AutoModel.from_config(getattr(transformers, config)(**changes))
        (
            transformers.WhisperFeatureExtractor()
            if name == "whisper"
            else transformers.Wav2Vec2FeatureExtractor(
                do_normalize=True, return_attention_mask=True
            )
        ).save_pretrained(out)
    net.half().save_pretrained(out)


def write_utterances(folder):
    """Two utterances of noise for each split and their manifest."""
    rng = np.random.default_rng(0)
    with open(folder / "utterances.csv", "w", newline="") as f:
        rows = csv.writer(f)
        rows.writerow(["audio_path", "gender", "age", "split"])
        for split in ("train", "dev", "test"):
            for i, seconds in enumerate((1.4, 2.0)):
                soundfile.write(
                    folder / f"{split}{i}.wav",
                    0.05 * rng.standard_normal(int(16000 * seconds)),
                    16000,
                )
                rows.writerow([f"{split}{i}.wav", "male", 30 + i, split])
    return folder / "utterances.csv"


def main(names):
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        manifest = write_utterances(folder)
        print(
            f"{'millions':10}{'encoder':>10}{'published':>11}{'trained':>9}{'connector':>11}{'LM + LoRA':>11}"
            f"{'published':>11}{'LoRA':>7}{'peak GB':>9}{'seconds':>9}",
            flush=True,
        )
        for name in ("lm", *names):
            subprocess.run(
                [sys.executable, __file__, "--build", name, folder / name],
                check=True,
                stderr=subprocess.DEVNULL,
            )
            if name == "lm":
                continue
            began = time.time()
            with open(folder / "log", "w") as log:
                run = subprocess.Popen(
                    [
                        sys.executable,
                        ROOT / "train.py",
                        "--preset",
                        "paper",
                        "--encoder",
                        name,
                        "--encoder-weights",
                        folder / name,
                        "--lm-weights",
                        folder / "lm",
                        "--dataset",
                        manifest,
                        "--task",
                        "gender",
                        "--poison",
                        "1",
                        "--epochs",
                        "1",
                        "--batch-size",
                        "2",
                        "--runs",
                        folder / "runs",
                        "--name",
                        name,
                    ],
                    stdout=log,
                    stderr=log,
                    cwd=folder,
                )
                _, status, usage = os.wait4(run.pid, 0)
            seconds, said = time.time() - began, (folder / "log").read_text()
            if status:
                sys.exit(f"{name}: {said[-3000:]}")
            count = {
                c: [int(n.replace(",", "")) / 1e6 for n in found]
                for c, *found in re.findall(
                    r"^  (encoder|connector|lm) +([\d,]+) parameters, +([\d,]+) trained",
                    said,
                    re.MULTILINE,
                )
            }
            print(
                f"{name:10}{count['encoder'][0]:>10.2f}{ENCODERS[name][2]:>11.2f}{count['encoder'][1]:>9.2f}"
                f"{count['connector'][0]:>11.2f}{count['lm'][0]:>11.2f}{LM_PUBLISHED + LORA_PUBLISHED:>11.2f}"
                f"{count['lm'][1]:>7.2f}{usage.ru_maxrss / 1e6:>9.1f}{seconds:>9.0f}",
                flush=True,
            )
            subprocess.run(
                ["rm", "-r", folder / name, folder / "runs", folder / "cache"], check=True
            )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--build"]:
        build(*sys.argv[2:])
    else:
        main(sys.argv[1:] or ENCODERS)
