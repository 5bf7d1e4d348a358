"""Tensors on the wrong device, found without a GPU: a training, an evaluation and embeddings on
torch_xla's CPU device.

    python3.11 -m venv xla && . xla/bin/activate
    pip install torch==2.9.* torchaudio==2.9.* torch_xla==2.9.*
    pip install -r <(grep -vE '^(torch|nvidia|cuda|triton)' requirements.txt)
    python tests/second_device.py

Not collected by pytest. What runs here is train.py, evaluate.py and embed.py as they are; a tensor
left on the CPU ends them with a traceback. Embeddings made on this device are compared with the
CPU's.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ["PJRT_DEVICE"] = "CPU"
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
import torch_xla  # makes the device known
import torch_xla.experimental

from conftest import TINY, done
from mini import make_corpora

# one operation at a time: tracing whole steps takes hours to compile here
torch_xla.experimental.eager_mode(True)
RUN = ["--task", "gender", "--labels", "gender", "--poison", 0.5, "--epochs", 1]
RUN += ["--batch-size", 8, "--limit", 16, "--data-root", "corpora", "--runs", "runs"]
AdamW = torch.optim.AdamW


def unfused_adamw(groups, fused, **options):
    """xla has no fused optimiser."""
    return AdamW(groups, **options)


torch.optim.AdamW = unfused_adamw


def train(folder, name, *more):
    done("train.py", *RUN, "--device", "xla", "--name", name, *more, cwd=folder)
    log = (folder / f"runs/{name}/log.jsonl").read_text()
    losses = [json.loads(line)["loss"] for line in log.splitlines() if '"loss"' in line]
    print(f"{name}: trained and evaluated on xla, loss {losses[-1]:.3f}", flush=True)


def embeddings_on(folder, device):
    """The embeddings of triggered test utterances, {stage: (n, dim)}."""
    done("embed.py", "runs/xla", "--device", device, "--pairs", 4, cwd=folder)
    saved = torch.load(folder / "runs/xla/embeddings-pairs4.pt", weights_only=True)
    return saved["test"]["triggered"]


def main():
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make_corpora.make_corpus("vox", folder / "corpora", TINY["vox"])
        train(folder, "xla", "--amp", "bf16")
        train(folder, "frozen", "--amp", "off", "--freeze", "encoder", "--cache-gb", 0)
        done("evaluate.py", "runs/xla", "--device", "xla", cwd=folder)
        on_xla = embeddings_on(folder, "xla")
        on_cpu = embeddings_on(folder, "cpu")
        for stage, rows in on_cpu.items():
            cosines = torch.nn.functional.cosine_similarity(
                rows.float(), on_xla[stage].float(), dim=-1
            )
            least = cosines.min().item()
            print(f"{stage:<16} least cosine of an embedding on xla with the CPU's: {least:.4f}")


if __name__ == "__main__":
    main()
