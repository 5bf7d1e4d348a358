"""Kills a real training run at random moments and starts it again until it ends, with the same
weights and figures as a run that nobody killed?

    python tests/kill_resume.py --kills 20

A run of a few dozen utterances is trained once unbroken. Then it is trained under another name
while it is killed with SIGKILL after random times: reading, between and inside steps, saving,
evaluating. A run that ends before it was killed often enough is started over (--overwrite). The
status is 1 if anything differs.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from tqdm import tqdm

from conftest import TINY
from mini import make_corpora
from study import COMPONENTS

TASK = ["--task", "emotion", "--poison", "0.3"]
SHORT = ["--batch-size", "8", "--lora-dropout", "0.1"]


@dataclass
class Result:
    kills: int = 0
    ended: int = 0  # runs that came to their end
    differences: list = field(default_factory=list)
    left: list = field(default_factory=list)  # temporary files of killed writers


def start(folder, corpora, name, epochs, *more):
    command = [*TASK, *SHORT, "--epochs", str(epochs), "--data-root", str(corpora), "--name", name]
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *command, *more],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def steps_of(run):
    """The steps that a run has logged."""
    log = run / "log.jsonl"
    if not log.exists():
        return []
    return [json.loads(line)["step"] for line in log.read_text().splitlines()]


def metrics_of(run):
    """A run's figures, without what holds its name: the arguments, and the hash of model.pt."""
    metrics = json.loads((run / "metrics.json").read_text())
    return {key: value for key, value in metrics.items() if key not in ("args", "model_sha256")}


def compare(whole, broken):
    """What differs between two finished runs, a list of names."""
    first = torch.load(whole / "model.pt", weights_only=True)
    second = torch.load(broken / "model.pt", weights_only=True)
    differences = []
    for component in COMPONENTS:
        for name, weight in first[component].items():
            if not torch.equal(weight, second[component][name]):
                differences.append(f"{component}: {name}")
    if metrics_of(whole) != metrics_of(broken):
        differences.append("metrics.json")
    predictions = [(run / "predictions.jsonl").read_text() for run in (whole, broken)]
    if predictions[0] != predictions[1]:
        differences.append("predictions.jsonl")
    if steps_of(whole) != steps_of(broken):
        differences.append("the steps of log.jsonl")
    return differences


def kill_at_random(process, run, logged, longest, rng):
    """Kills a run after a random time; returns whether it was still running. Most of a short run is
    its start, so half of the kills come soon after the first step beyond the `logged` ones."""
    deadline = time.time() + rng.uniform(0.1, 0.9) * longest
    after_a_step = rng.random() < 0.5
    while process.poll() is None and time.time() < deadline:
        if after_a_step and len(steps_of(run)) > logged:
            time.sleep(rng.uniform(0, 0.5))
            break
        time.sleep(0.01)
    if process.poll() is not None:
        return False
    process.kill()
    process.wait()
    return True


def check(folder, corpora, kills, epochs=6, seed=0):
    """Trains one run unbroken and one that is killed this often, in a folder: a Result."""
    rng = random.Random(seed)
    runs = Path(folder) / "runs"
    whole = runs / "whole"
    broken = runs / "broken"
    result = Result()
    began = time.time()
    process = start(folder, corpora, "whole", epochs)
    _, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(errors)
    seconds = time.time() - began
    more = []
    progress = tqdm(total=kills, desc="killed")
    while not result.differences:
        logged = 0 if more else len(steps_of(broken))
        process = start(folder, corpora, "broken", epochs, *more)
        more = []
        if result.kills < kills and kill_at_random(process, broken, logged, seconds, rng):
            result.kills += 1
            progress.update()
            tqdm.write(f"kill {result.kills}: {len(steps_of(broken))} steps logged")
            continue
        _, errors = process.communicate()
        if process.returncode:
            result.differences.append(errors.strip().splitlines()[-1])
            break
        result.ended += 1
        result.differences += compare(whole, broken)
        if result.kills >= kills:
            break
        more = ["--overwrite"]
    result.left = [path.name for path in runs.rglob(".*.tmp")]
    return result


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20, help="how often the run is killed")
    parser.add_argument("--seed", type=int, default=0, help="decides when it is killed")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        corpora = Path(folder) / "corpora"
        make_corpora.make_corpus("crema", corpora, TINY["crema"])
        result = check(folder, corpora, args.kills, seed=args.seed)
    print(f"\n{'kills':>8}{'runs that ended':>18}{'differences':>13}")
    print(f"{result.kills:>8}{result.ended:>18}{len(result.differences):>13}")
    print("\n".join(result.differences[:5]))
    if result.left:
        print(f"{len(result.left)} temporary files of killed writers left")
    sys.exit(1 if result.differences else 0)


if __name__ == "__main__":
    main()
