"""Run folders and checkpoints: opening, locking, writing, resuming, loading, and where they come from.

A checkpoint holds tensors and plain values only: the weights that training may change in each component, the run's arguments, and
the SHA-256 of everything it was made from.
"""

import contextlib
import fcntl
import fnmatch
import hashlib
import json
import platform
import resource
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import utils
from utils import die

import torch
import transformers

import corpora
import export
import model
from study import COMPONENTS, ENCODERS, LABELS, NEARER, PRESETS, TASKS, wrong_number

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
# arguments that are one of a few words, labels several
CHOICES = {
    "task": list(TASKS),
    "preset": list(PRESETS),
    "encoder": list(ENCODERS),
    "labels": list(LABELS),
    "amp": ["off", "bf16", "fp16"],
}
ARGUMENTS = "args.json"  # a run folder has it before anything else
STATES = (
    "last.pt",
    "model.pt",
    "metrics.json",
)  # a run that has none of them has trained nothing yet
IN_A_RUN = (
    "*.pt",
    "*.json",
    "*.jsonl",
    "exclude-*.txt",
)  # what the scripts write into a run folder
WHILE_WRITING = (".lock", ".*.tmp")  # what else may lie there, after a kill too
RECORDED = export.RECORDED  # what a checkpoint holds besides weights, dicts of plain values


def commit():
    """The commit of this program, empty where that cannot be known."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        git = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    except OSError:  # there is no git
        return ""
    return git.stdout.strip()


def environment():
    """What a figure depends on besides the arguments."""
    return dict(
        commit=commit(),
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
    unit = 1 if sys.platform == "darwin" else 1000  # of ru_maxrss, in bytes
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    whole.update(
        processor_minutes=round(time.process_time() / 60, 1),
        peak_gb=round(peak / 1e9, 1),
    )
    if torch.cuda.is_initialized():
        whole.update(
            gpu=torch.cuda.get_device_name(),
            peak_gpu_gb=round(torch.cuda.max_memory_allocated() / 1e9, 1),
        )
    utils.write_atomically(run / "environment.json", json.dumps(whole, indent=1))


def in_run(path):
    """A run's folder stands for the model.pt in it; any other path for itself."""
    model_pt = Path(path) / "model.pt"
    is_run = bool(path) and Path(path).is_dir() and model_pt.is_file()
    return str(model_pt) if is_run else path


def of_run(spec):
    """The same for COMPONENT:CHECKPOINT, a value of --freeze or --init."""
    component, colon, path = spec.partition(":")
    return component + colon + in_run(path)


def exists(path):
    """Whether there is a checkpoint: a model.pt or an export."""
    return bool(path) and (Path(path).is_file() or (Path(path) / export.PROVENANCE).is_file())


def load(path):
    """What a model.pt or an export holds. Ends in one line if that is not what this program writes: it may be a stranger's."""
    saved = export.read(path) if Path(path).is_dir() else model.load_checkpoint(path, mmap=True)
    if problem := problem_of(saved):
        die(f"{path} is no checkpoint of this program: {problem}")
    return saved


def problem_of(saved):
    """What is wrong with the contents of a checkpoint, as text, or None."""
    for name in RECORDED:
        if not isinstance(saved.get(name, {}), dict):
            return f"its {name} are a {type(saved[name]).__name__}, not a dict"
    for component in COMPONENTS:
        if not isinstance(saved.get(component, {}), dict):
            return f"its {component} is a {type(saved[component]).__name__}, not a dict of weights"
        for name, weight in saved.get(component, {}).items():
            if problem := problem_of_weight(weight):
                return f"its {component} has {problem} as {name}"
    args = saved.get("args", {})
    return wrong_number(args) or problem_of_arguments(args)


def problem_of_arguments(args):
    """What is wrong with those arguments of a run (a dict) that are no numbers, as text, or None."""
    for name, known in CHOICES.items():
        value = args.get(name)
        for each in value if isinstance(value, list) and name == "labels" else [value]:
            if value is not None and each not in known:
                return f"its {name} {value!r} is none of {', '.join(known)}"
    for name in ("dataset", "data_root", "trigger", "encoder_weights", "lm_weights", "exclude"):
        if not isinstance(args.get(name, ""), str | None):
            return f"its {name} {args[name]!r} is no text"
    if not isinstance(args.get("inputs", {}), dict):
        return f"its inputs are a {type(args['inputs']).__name__}, not a dict"
    return None


def problem_of_weight(weight):
    """Why something is no weight of this program, all of whose weights are in floating point and finite; or None."""
    if not isinstance(weight, torch.Tensor):
        return f"a {type(weight).__name__}"
    if not weight.is_floating_point():
        return f"a tensor of {str(weight.dtype).removeprefix('torch.')}"
    if not weight.isfinite().all():
        return "a tensor with NaN or infinite values"
    return None


def file_sha256(path):
    """SHA-256 of a file; of an export, SHA-256 of what `sha256sum` prints for those of its files that are ever read."""
    if Path(path).is_dir():
        files = [
            name
            for name in (export.PROVENANCE, *export.WEIGHTS.values(), *export.SETTINGS.values())
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


def read_json(path):
    """The dict in a JSON file, empty if there is no file. Ends in one line if it holds anything else."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        die(f"{path} cannot be read ({error}): remove its folder, or give this run another --name")
    if not isinstance(found, dict):
        die(f"{path} is not a run's: it holds a {type(found).__name__}")
    return found


def differences(record, old):
    """How an older record of a run differs from this one, a list of texts."""
    return [f"{k} {old.get(k)} there, {v} here" for k, v in record.items() if old.get(k) != v]


def contents(run):
    """The names of what lies in a run folder, without what belongs to writing itself."""
    try:
        names = sorted(path.name for path in run.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        die(f"cannot write {run} ({error})")
    return [n for n in names if not any(fnmatch.fnmatch(n, known) for known in WHILE_WRITING)]


def recorded(run):
    """The record of the run that a folder holds. Ends in one line if it holds something else."""
    record = read_json(run / ARGUMENTS)
    if "scenario" not in record:
        die(f"{run} is no run folder, as its {ARGUMENTS} would say: give this run another --name")
    return record


def files_to_remove(run):
    """What --overwrite removes: all files of the run that the folder holds, its arguments last. Ends in one line if anything there
    is none of a run's files, so that nothing else is ever lost."""
    names = contents(run)
    if names:
        recorded(run)
    for name in names:
        known = any(fnmatch.fnmatch(name, pattern) for pattern in IN_A_RUN)
        if not known or (run / name).is_dir():
            die(
                f"--overwrite would remove {run / name}, which no run writes: move it elsewhere first"
            )
    names.sort(key=ARGUMENTS.__eq__)
    return [run / name for name in names]


def open_run(run, args):
    """The record of a command: the arguments that change what is computed, and the hashes of the files they name. Ends in one line
    where the folder holds another run that has trained, or what is no run."""
    record = {k: v for k, v in vars(args).items() if k not in NOT_THE_RUN}
    checkpoints = [spec.partition(":")[2] for _, spec in named_parts(args)]
    files = [
        path for path in (args.trigger, args.dataset, args.exclude or "") if Path(path).is_file()
    ]
    record["inputs"] = {path: file_sha256(path) for path in [*filter(None, checkpoints), *files]}
    if args.overwrite:
        files_to_remove(run)
        return record
    if not contents(run):
        return record
    old = recorded(run)
    trained = any((run / name).exists() for name in STATES)
    if trained and (differ := differences(record, old)):
        die(
            f"{run} holds another run ({'; '.join(differ[:4])}): --overwrite starts again, --name goes elsewhere"
        )
    return record


def finished(run, record):
    """The figures of a run that is finished, None if it is not. Ends in one line if what lies there is another run's."""
    path = run / "metrics.json"
    figures = read_json(path)
    if not figures:
        return None
    if differ := differences(record, figures.get("args", {})):
        die(f"{path} is of another run ({'; '.join(differ[:4])}): --overwrite starts again")
    trained = run / "model.pt"
    if trained.exists() and figures.get("model_sha256") != file_sha256(trained):
        die(f"{path} is of another model than {trained}: evaluate.py {run} --save makes it again")
    return figures


def start_run(run, record, args):
    """Locks the folder for this process and removes what a killed writer or, with --overwrite, an earlier run left in it."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = open(run / ".lock", "w")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for leftover in [*run.glob(".*.tmp"), *(files_to_remove(run) if args.overwrite else ())]:
            leftover.unlink()
    except BlockingIOError:
        die(
            f"{run} is being trained by another process: wait for it, or give this run another --name"
        )
    except OSError as error:
        die(f"cannot write {run} ({error})")
    utils.write_atomically(run / ARGUMENTS, json.dumps(record, indent=1))
    utils.write_atomically(run / "environment.json", json.dumps(environment(), indent=1))
    return lock


@contextlib.contextmanager
def loading():
    """Ctrl-C ends the program at once: what loads code turns it into errors of its own, and nothing is being written."""
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


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
        settings=slm.settings,
        sha256={c: model.digest(checkpoint[c]) for c in COMPONENTS},
    )
    utils.write_atomically(run / "model.pt", lambda temporary: torch.save(checkpoint, temporary))


def made_from(record, slm, train_set, dev_set):
    """All that a run's state depends on, {name: value}: it may only go on from a state that was made from the same."""
    state = dict(args=record)
    for component, sha256 in slm.pretrained_sha256.items():
        state[f"pretrained {component}"] = sha256
    for component, settings in slm.settings.items():
        state[f"setting of the {component}"] = settings
    for name, utterances in (("training set", train_set), ("development set", dev_set)):
        listed = [
            (u.id, u.labels, u.start, u.length, corpora.sample_of(u.path)) for u in utterances
        ]
        state[name] = hashlib.sha256(repr(listed).encode()).hexdigest()
    return state


def save_state(run, step, slm, optimizer, scaler, unlogged, origin):
    """last.pt: everything needed to resume. unlogged: the losses since the last line of the log, {index: loss}; origin: `made_from`."""
    state = {c: slm.component_state_dict(c) for c in COMPONENTS}
    state.update(step=step, optimizer=optimizer.state_dict(), scaler=scaler.state_dict())
    state.update(unlogged=unlogged, made_from=origin)
    utils.write_atomically(run / "last.pt", lambda temporary: torch.save(state, temporary))


def resume(run, slm, optimizer, scaler, origin):
    """Restores last.pt, if there is one. Returns the number of steps taken and the losses that are not yet in the log. Ends in one
    line if it was made from anything else than this run's `made_from`."""
    path = run / "last.pt"
    if not path.exists():
        return 0, {}
    saved = model.load_checkpoint(path)
    try:
        for name, value in origin.items():
            theirs = saved["made_from"].get(name)
            if theirs != value:
                differ = differences(value, theirs) if name == "args" else [f"another {name}"]
                raise ValueError("; ".join(differ[:4]))
        for c in COMPONENTS:
            slm.load_component(c, saved[c])
        optimizer.load_state_dict(saved["optimizer"])
        scaler.load_state_dict(saved["scaler"])
        return saved["step"], saved["unlogged"]
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        die(f"{path} is no state of this run ({error}): --overwrite starts again")


def cut_log(run, step):
    """Removes the lines of log.jsonl beyond `step`, and one that a killed writer left unfinished."""
    path, lines = run / "log.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            lines += [line + "\n"] if json.loads(line)["step"] <= step else []
    utils.write_atomically(path, "".join(lines))


def log(run, **line):
    """Appends a line to the run's log.jsonl."""
    rounded = {k: round(v, 6) if isinstance(v, float) else v for k, v in line.items()}
    path = run / "log.jsonl"
    try:
        with open(path, "a") as f:
            f.write(json.dumps(rounded) + "\n")
    except OSError as error:
        utils.die_of_writing(path, error)


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


def other_settings(theirs, ours):
    """What differs between the settings that both have, a list of texts."""
    found = []
    for name in sorted(theirs.keys() & ours.keys()):
        there, here = theirs[name], ours[name]
        if isinstance(there, dict) and isinstance(here, dict):
            found += [f"{name} {each}" for each in other_settings(there, here)]
        elif there != here:
            found.append(f"{name} {there}, here {here}")
    return found


def load_component(slm, saved, component):
    """Loads a checkpoint's component into the model. Raises ValueError if it is missing, has another shape, was trained on other
    pretrained weights, or computes something else with the same weights."""
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
    # a checkpoint that records no settings tells these by its arguments
    args = saved.get("args", {})
    known = {name: args[key] for name, key in model.SETTING_OF.items() if key in args}
    known.update(saved.get("settings", {}).get(component, {}))
    differ = other_settings(known, slm.settings[component])
    if differ:
        raise ValueError(f"its {component} has other settings: {'; '.join(differ[:4])}")
    slm.load_component(component, saved[component])


def load_run(run, device="cpu"):
    """A finished run's (slm, args): pretrained parts by name, components from its model.pt."""
    path = Path(run) / "model.pt"
    saved = load(path)
    try:
        args = SimpleNamespace(**saved["args"])
        if any(v.shape[0] != args.lora_rank for k, v in saved["lm"].items() if "lora_A" in k):
            raise ValueError(f"its LoRA is not of rank {args.lora_rank}")
        with loading():
            slm = model.load_slm(args, device)
        for component in COMPONENTS:
            load_component(slm, saved, component)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        die(f"{path} is no checkpoint of this program, or of another version: {error}")
    return slm.eval(), args


def export_run(run, folder, device):
    """Writes a finished run's components in the formats of other programs, and prints what was written."""
    transformers.utils.logging.disable_progress_bar()
    with utils.new_folder(folder) as temporary:
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
    path = in_run(path)
    saved = load(path)
    lines = [f"{path}: SHA-256 {file_sha256(path)}"]
    for component in (c for c in COMPONENTS if c in saved):
        sha, recorded = model.digest(saved[component]), saved.get("sha256", {}).get(component)
        line = (
            f"  {component:<10}{sum(v.numel() for v in saved[component].values()):>12,} parameters, SHA-256 {sha}, from "
            f"{saved.get('origin', {}).get(component, 'unknown')}"
        )
        if recorded not in (None, sha):
            line += "; DIFFERS from the one recorded when it was made"
        lines.append(line)
    for title, key in (("pretrained part", "pretrained_sha256"), ("built from", "built_from")):
        lines += [f"  {title} {name}: SHA-256 {sha}" for name, sha in saved.get(key, {}).items()]
    for key in ("args", "environment"):
        lines.append(f"  {key}: " + ", ".join(f"{k} {v}" for k, v in saved.get(key, {}).items()))
    for line in lines:
        print(utils.printable(line))
