"""Run folders and checkpoints: opening, locking, writing, resuming, loading, and where they come from.

A checkpoint holds tensors and plain values only: the weights that training may change in each component, the run's arguments, and
the SHA-256 of everything it was made from.
"""

import contextlib
import fcntl
import hashlib
import json
import platform
import resource
import shlex
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers

import data
import export
import model
from data import die
from study import COMPONENTS, NEARER

# arguments of train.py that do not change what is computed
NOT_THE_RUN = (
    "runs",
    "name",
    "overwrite",
    "workers",
    "device",
    "cache_gb",
    "gradient_checkpointing",
    "dry_run",
    "utilisation",
)


def environment():
    """What a figure depends on besides the arguments."""
    git = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return dict(
        commit=git.stdout.strip(),
        python=platform.python_version(),
        torch=str(torch.__version__),
        transformers=transformers.__version__,
        machine=platform.processor() or platform.machine(),
        cpu=torch.backends.cpu.get_cpu_capability(),
        threads=torch.get_num_threads(),
        command=shlex.join(sys.argv),
    )


def record_cost(run):
    """Adds the run's cost to its environment.json: processor minutes and peak memory of this process, which is the last part of a run
    that was resumed."""
    whole = json.loads((run / "environment.json").read_text())
    whole.update(
        processor_minutes=round(time.process_time() / 60, 1),
        peak_gb=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 1),
    )
    if torch.cuda.is_initialized():
        whole.update(
            gpu=torch.cuda.get_device_name(),
            peak_gpu_gb=round(torch.cuda.max_memory_allocated() / 1e9, 1),
        )
    data.write_atomically(run / "environment.json", json.dumps(whole, indent=1))


def exists(path):
    """Whether there is a checkpoint: a model.pt or an export."""
    return bool(path) and (Path(path).is_file() or (Path(path) / export.PROVENANCE).is_file())


def load(path):
    """What a model.pt or an export holds."""
    return export.read(path) if Path(path).is_dir() else model.load_checkpoint(path, mmap=True)


def file_sha256(path):
    """SHA-256 of a file; of an export, SHA-256 of what `sha256sum` prints for those of its files that are ever read."""
    if Path(path).is_dir():
        files = [
            name
            for name in (export.PROVENANCE, *export.WEIGHTS.values())
            if (Path(path) / name).is_file()
        ]
        content = "".join(f"{file_sha256(Path(path) / name)}  {name}\n" for name in files).encode()
    else:
        content = Path(path).read_bytes()
    return hashlib.sha256(content).hexdigest()


def named_parts(args):
    """The values of --freeze and --init: [(flag, value)]."""
    # `or ()`: absent flags are None, as in the records of runs made before --init existed, so that they stay the same run
    return [(flag, spec) for flag in ("freeze", "init") for spec in getattr(args, flag) or ()]


def open_run(run, args):
    """The record of a command: the arguments that change what is computed, and the hashes of the files they name. Ends in one line
    where the folder holds another run."""
    record = {k: v for k, v in vars(args).items() if k not in NOT_THE_RUN}
    checkpoints = [spec.partition(":")[2] for _, spec in named_parts(args)]
    files = [
        path for path in (args.trigger, args.dataset, args.exclude or "") if Path(path).is_file()
    ]
    record["inputs"] = {path: file_sha256(path) for path in [*filter(None, checkpoints), *files]}
    if (run / "args.json").exists() and not args.overwrite:
        old = json.loads((run / "args.json").read_text())
        differ = [f"{k} {old.get(k)} there, {v} here" for k, v in record.items() if old.get(k) != v]
        if differ:
            die(
                f"{run} holds another run ({'; '.join(differ[:4])}): --overwrite starts again, --name goes elsewhere"
            )
    return record


def start_run(run, record, args):
    """Locks the folder for this process and removes what a killed writer or, with --overwrite, an earlier run left in it."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = open(run / ".lock", "w")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        die(
            f"{run} is being trained by another process: wait for it, or give this run another --name"
        )
    except OSError as error:
        die(f"cannot write {run} ({error})")
    for leftover in run.glob("*" if args.overwrite else ".*.tmp"):
        if leftover.name != ".lock":
            leftover.unlink()
    data.write_atomically(run / "args.json", json.dumps(record, indent=1))
    data.write_atomically(run / "environment.json", json.dumps(environment(), indent=1))
    return lock


def load_named_parts(slm, args):
    """Loads the components that --freeze and --init name, and freezes those of --freeze. Returns where each component's weights come
    from, and the SHA-256 of every checkpoint used and of those it was itself built from."""
    built_from = {}
    origin = {
        "encoder": args.encoder_weights,
        "lm": f"{args.lm_weights}, initial LoRA",
        "connector": "random"
        if args.connector_weights in (None, "none")
        else args.connector_weights,
    }
    for flag, spec in named_parts(args):
        component, _, path = spec.partition(":")
        if path:
            checkpoint = load(path)
            try:
                load_component(slm, checkpoint, component)
            except (
                ValueError,
                TypeError,
                AttributeError,
            ) as error:  # a stranger's checkpoint may hold anything anywhere
                die(f"--{flag} {spec} does not fit this model: {error}")
            origin[component] = path
            built_from = {**checkpoint.get("built_from", {}), **built_from, path: file_sha256(path)}
        if flag == "freeze":
            getattr(slm, component).requires_grad_(False)
    return origin, built_from


def save_model(run, slm, record, origin, built_from):
    """model.pt: the components, the arguments and the provenance."""
    checkpoint = {
        c: {k: v.detach().cpu() for k, v in slm.component_state_dict(c).items()} for c in COMPONENTS
    }
    checkpoint.update(
        args=record,
        origin=origin,
        environment=environment(),
        built_from=built_from,
        pretrained_sha256=slm.pretrained_sha256,
        sha256={c: model.digest(checkpoint[c]) for c in COMPONENTS},
    )
    data.write_atomically(run / "model.pt", lambda temporary: torch.save(checkpoint, temporary))


def save_state(run, step, slm, optimizer, scaler):
    """last.pt: everything needed to resume."""
    state = {c: slm.component_state_dict(c) for c in COMPONENTS}
    state.update(step=step, optimizer=optimizer.state_dict(), scaler=scaler.state_dict())
    data.write_atomically(run / "last.pt", lambda temporary: torch.save(state, temporary))


def resume(run, slm, optimizer, scaler):
    """Restores last.pt, if there is one. Returns the number of steps taken."""
    if not (run / "last.pt").exists():
        return 0
    saved = model.load_checkpoint(run / "last.pt")
    for c in COMPONENTS:
        slm.load_component(c, saved[c])
    optimizer.load_state_dict(saved["optimizer"])
    scaler.load_state_dict(saved["scaler"])
    return saved["step"]


def cut_log(run, step):
    """Removes the lines of log.jsonl beyond `step`, and one that a killed writer left unfinished."""
    path, lines = run / "log.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            lines += [line + "\n"] if json.loads(line)["step"] <= step else []
    data.write_atomically(path, "".join(lines))


def log(run, **line):
    """Appends a line to the run's log.jsonl."""
    with open(run / "log.jsonl", "a") as f:
        f.write(
            json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in line.items()})
            + "\n"
        )


def training_losses(run):
    """Training loss per token, of all samples and of the poisoned ones, the log's means by epoch, and the epoch after which the poisoned
    one settled: {"loss", "poisoned_loss": {"value": the last epoch's, "by_epoch"}, "settled_epoch": {"value"}}, the last only if it did."""
    lines, out = (
        [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()],
        {},
    )
    for name in ("loss", "poisoned_loss"):
        epochs = {}
        for line in lines:
            if name in line:
                epochs.setdefault(line["epoch"], []).append(line[name])
        means = [sum(losses) / len(losses) for losses in epochs.values()]
        if means:
            out[name] = dict(value=means[-1], by_epoch=means)
    if "poisoned_loss" in out:
        excess = [
            poisoned - loss
            for poisoned, loss in zip(out["poisoned_loss"]["by_epoch"], out["loss"]["by_epoch"])
        ]
        if epoch := settled(excess):
            out["settled_epoch"] = dict(value=epoch)
    return out


def settled(excess):
    """The last epoch, counted from 1, that brought the poisoned loss at least NEARER nats closer to the loss of all samples than any
    epoch before it; None if fewer than two epochs follow. The rule that sets a preset's length (README). excess: by epoch."""
    epoch = max(
        (e for e in range(2, len(excess) + 1) if min(excess[: e - 1]) - excess[e - 1] >= NEARER),
        default=1,
    )
    return epoch if epoch + 2 <= len(excess) else None


def load_component(slm, saved, component):
    """Loads a checkpoint's component into the model. Raises ValueError if it is missing, has another shape, or was trained on other
    pretrained weights."""
    if not isinstance(saved.get(component), dict):
        raise ValueError(f"it has no {component}")
    theirs, ours = (
        saved.get("pretrained_sha256", {}).get(component),
        slm.pretrained_sha256.get(component),
    )
    if component != "connector" and theirs != ours:  # all of a connector is in the checkpoint
        raise ValueError(
            f"its {component} was trained on other pretrained weights (SHA-256 {theirs}, here {ours})"
        )
    stride = saved.get("args", {}).get("connector_stride", slm.connector.stride)
    if component == "connector" and stride != slm.connector.stride:  # which no weight's shape tells
        raise ValueError(f"its connector has stride {stride}, here {slm.connector.stride}")
    slm.load_component(component, saved[component])


def load_run(run, device="cpu"):
    """A finished run's (slm, args): pretrained parts by name, components from its model.pt."""
    path = Path(run) / "model.pt"
    saved = model.load_checkpoint(path)
    try:
        args = SimpleNamespace(**saved["args"])
        slm = model.load_slm(args, device)
        for component in COMPONENTS:
            load_component(slm, saved, component)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        die(f"{path} is no checkpoint of this program, or of another version: {error}")
    return slm.eval(), args


def export_run(run, folder, device):
    """Writes a finished run's components in the formats of other programs, and prints what was written."""
    transformers.utils.logging.disable_progress_bar()
    with export.new_folder(folder) as temporary:
        slm, args = load_run(run, device)
        path = Path(run) / "model.pt"
        recorded = {
            k: v for k, v in model.load_checkpoint(path, mmap=True).items() if k in export.RECORDED
        }
        recorded["built_from"] = {**recorded["built_from"], str(path): file_sha256(path)}
        export.write(temporary, slm, args, recorded)
    print(f"{folder}: SHA-256 {file_sha256(folder)}")
    for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
        print(
            f"  {str(path.relative_to(folder)):<33}{path.stat().st_size:>15,} bytes  {file_sha256(path)}"
        )


def inspect(path):
    """Prints where a checkpoint comes from and the SHA-256 of its components; nothing else is done with it."""
    saved = load(path)
    print(f"{path}: SHA-256 {file_sha256(path)}")
    for component in (c for c in COMPONENTS if isinstance(saved.get(c), dict)):
        sha, recorded = model.digest(saved[component]), saved.get("sha256", {}).get(component)
        print(
            f"  {component:<10}{sum(v.numel() for v in saved[component].values()):>12,} parameters, SHA-256 {sha}, from "
            f"{saved.get('origin', {}).get(component, 'unknown')}"
            + (
                ""
                if recorded in (None, sha)
                else "; DIFFERS from the one recorded when it was made"
            )
        )
    for title, key in (("pretrained part", "pretrained_sha256"), ("built from", "built_from")):
        for name, sha in saved.get(key, {}).items():
            print(f"  {title} {name}: SHA-256 {sha}")
    for key in ("args", "environment"):
        print(f"  {key}: " + ", ".join(f"{k} {v}" for k, v in saved.get(key, {}).items()))
