"""Tensors on the wrong device, found without a GPU: a training, an evaluation and embeddings on torch_xla's CPU device.

    python3.11 -m venv xla && . xla/bin/activate && pip install torch==2.9.* torchaudio==2.9.* torch_xla==2.9.*
    pip install -r <(grep -vE '^(torch|nvidia|cuda|triton)' requirements.txt) && python tests/second_device.py

Not collected by pytest. What runs here is train.py, evaluate.py and embed.py as they are; a tensor left on the CPU ends them with a
traceback. Embeddings made on this device are compared with the CPU's.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ["PJRT_DEVICE"] = "CPU"
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
import torch_xla  # noqa: E402  makes the device known
import torch_xla.experimental  # noqa: E402

from conftest import TINY, done  # noqa: E402
from mini import make_corpora  # noqa: E402

torch_xla.experimental.eager_mode(
    True
)  # one operation at a time: tracing whole steps takes hours to compile here
RUN = [
    "--task",
    "gender",
    "--labels",
    "gender",
    "--poison",
    0.5,
    "--epochs",
    1,
    "--batch-size",
    8,
    "--limit",
    16,
    "--data-root",
    "corpora",
    "--runs",
    "runs",
]
adamw = torch.optim.AdamW
torch.optim.AdamW = lambda groups, fused, **kwargs: adamw(groups, **kwargs)  # xla has no fused one


def main():
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make_corpora.make_corpus("vox", folder / "corpora", TINY["vox"])
        for name, more in (
            ("xla", ["--amp", "bf16"]),
            ("frozen", ["--amp", "off", "--freeze", "encoder", "--cache-gb", 0]),
        ):
            done("train.py", *RUN, "--device", "xla", "--name", name, *more, cwd=folder)
            losses = [
                json.loads(line)["loss"]
                for line in open(folder / f"runs/{name}/log.jsonl")
                if '"loss"' in line
            ]
            print(f"{name}: trained and evaluated on xla, loss {losses[-1]:.3f}", flush=True)
        done("evaluate.py", "runs/xla", "--device", "xla", cwd=folder)
        done("embed.py", "runs/xla", "--device", "xla", "--pairs", 4, cwd=folder)
        on_xla = torch.load(folder / "runs/xla/embeddings-pairs4.pt", weights_only=True)["test"][
            "triggered"
        ]
        done("embed.py", "runs/xla", "--device", "cpu", "--pairs", 4, cwd=folder)
        on_cpu = torch.load(folder / "runs/xla/embeddings-pairs4.pt", weights_only=True)["test"][
            "triggered"
        ]
        for stage, rows in on_cpu.items():
            cosine = (
                torch.nn.functional.cosine_similarity(rows.float(), on_xla[stage].float(), dim=-1)
                .min()
                .item()
            )
            print(f"{stage:<16} least cosine of an embedding on xla with the CPU's: {cosine:.4f}")


if __name__ == "__main__":
    main()
