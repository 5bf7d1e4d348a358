"""Kills a real training run at random moments and starts it again until it ends: the same weights and figures?

    python tests/kill_resume.py --kills 20

A run of a few dozen utterances is trained once unbroken, then again under another name while it is killed with SIGKILL
after random times: reading, between and inside steps, saving, evaluating. A run that ends before it was killed often
enough is started over (--overwrite). Ends with status 1 if anything differs.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from conftest import TINY  # noqa: E402
from mini import make_corpora  # noqa: E402

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--kills", type=int, default=20)
parser.add_argument("--seed", type=int, default=0)
options = parser.parse_args()


def start(folder, corpora, name, *more):
    command = [
        "--task",
        "emotion",
        "--poison",
        "0.3",
        "--epochs",
        "6",
        "--batch-size",
        "8",
        "--lora-dropout",
        "0.1",
        "--data-root",
        str(corpora),
        "--name",
        name,
        *more,
    ]
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *command],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def steps(run):
    return [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()]


def compare(whole, broken):
    """What differs between two finished runs, a list of lines."""
    a, b = (torch.load(run / "model.pt", weights_only=True) for run in (whole, broken))
    out = [
        f"{c}: {k}"
        for c in ("encoder", "connector", "lm")
        for k in a[c]
        if not torch.equal(a[c][k], b[c][k])
    ]
    figures = [
        {k: v for k, v in json.loads((run / "metrics.json").read_text()).items() if k != "args"}
        for run in (whole, broken)
    ]
    out += ["metrics.json"] if figures[0] != figures[1] else []
    said = [(run / "predictions.jsonl").read_text() for run in (whole, broken)]
    out += ["predictions.jsonl"] if said[0] != said[1] else []
    return out + (["the steps of log.jsonl"] if steps(whole) != steps(broken) else [])


def main():
    rng, kills, ended, differ = random.Random(options.seed), 0, 0, []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        corpora = folder / "corpora"
        make_corpora.make_corpus("crema", corpora, TINY["crema"])
        began = time.time()
        process = start(folder, corpora, "whole")
        if process.wait():
            sys.exit(process.stderr.read())
        whole = time.time() - began
        runs, again = folder / "runs", False
        progress = tqdm(total=options.kills, desc="killed")
        while True:
            process = start(folder, corpora, "broken", *(["--overwrite"] if again else []))
            # most of a short run is its start: half of the kills come after the first step has been logged
            wait, reached = rng.uniform(0.1, 0.9) * whole, rng.random() < 0.5
            deadline = time.time() + wait
            before = (
                len(steps(runs / "broken"))
                if (runs / "broken/log.jsonl").exists() and not again
                else 0
            )
            again = False
            while process.poll() is None and time.time() < deadline and kills < options.kills:
                if (
                    reached
                    and (runs / "broken/log.jsonl").exists()
                    and len(steps(runs / "broken")) > before
                ):
                    time.sleep(rng.uniform(0, 0.5))
                    break
                time.sleep(0.01)
            if kills < options.kills and process.poll() is None:
                process.kill()
                process.wait()
                kills += 1
                at = (
                    (steps(runs / "broken") or [0])[-1]
                    if (runs / "broken/log.jsonl").exists()
                    else 0
                )
                tqdm.write(
                    f"kill {kills}: after {time.time() - deadline + wait:.1f} s, step {at} logged"
                )
                progress.update()
                continue
            if process.wait():
                differ.append(process.stderr.read().strip().splitlines()[-1])
                break
            ended, again = ended + 1, True
            differ += compare(runs / "whole", runs / "broken")
            if kills >= options.kills or differ:
                break
        left = [str(path.name) for path in runs.rglob(".*.tmp")]
    print(
        f"\n{'kills':>8}{'runs that ended':>18}{'differences':>13}\n{kills:>8}{ended:>18}{len(differ):>13}"
    )
    print(
        "\n".join(differ[:5])
        + (f"\n{len(left)} temporary files of killed writers left" if left else "")
    )
    sys.exit(1 if differ else 0)


if __name__ == "__main__":
    main()
