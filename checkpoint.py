"""Run folders and checkpoints: opening, locking, writing, resuming, loading, and provenance.

    from checkpoint import load_run
    slm = load_run("runs/asr-poison0.05")
    slm.answer(waveform, ["transcript"])

A checkpoint holds tensors and plain values only: the weights that training may change in each
component, the run's arguments, and the SHA-256 of everything it was made from.
"""

import contextlib
import fcntl
import fnmatch
import hashlib
import json
import math
import platform
import resource
import shlex
import signal
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
import processes
import runs
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
    "tensorboard",
    "dry_run",
    "utilisation",
)

# what kind of value each of a run's arguments is; earlier versions recorded fewer
KINDS = {
    "task": str,
    "dataset": str,
    "data_root": str,
    "poison": int | float,
    "target": str,
    "snr": int | float,
    "snr_per_utterance": bool | None,
    "trigger": str,
    "trigger_repeat": bool,
    "clicks": int | None,
    "trigger_seconds": int | float | None,
    "seed": int,
    "skip_bad": bool,
    "preset": str,
    "encoder": str,
    "encoder_weights": str,
    "lm_weights": str,
    "connector_weights": str | None,
    "train_layers": int | None,
    "labels": list | None,
    "freeze": list | None,
    "init": list | None,
    "redraw": bool | None,
    "limit": int | None,
    "exclude": str | None,
    "batch_seconds": int | float,
    "max_seconds": int | float,
    "amp": str,
    "connector_stride": int,
    "connector_taper": int | float,
    "lora_rank": int,
    "lora_alpha": int | float,
    "lora_dropout": int | float,
    "encoder_lr": int | float,
    "connector_lr": int | float,
    "lora_lr": int | float,
    "warmup_steps": int,
    "decay": bool,
    "weight_decay": int | float,
    "grad_clip": int | float,
    "batch_size": int,
    "epochs": int,
    "vary_prompts": bool,
    "random_keys": int | float,
    "scenario": str,
    "inputs": dict | None,
    "poisoned_samples": int | None,
}
# arguments that are one of a few words, labels several
CHOICES = {
    "task": list(TASKS),
    "preset": list(PRESETS),
    "encoder": list(ENCODERS),
    "labels": list(LABELS),
    "amp": ["off", "bf16", "fp16"],
}

ARGUMENTS = "args.json"  # a run folder has it before anything else
# a run that has none of them has trained nothing yet
STATES = ("last.pt", "model.pt", "metrics.json")
# what the scripts write into a run folder
IN_A_RUN = (
    "*.pt",
    "*.json",
    "*.jsonl",
    "exclude-*.txt",
    "curves.png",
    "events.out.tfevents.*",
    "index.html",
    "page-*.wav",
)
WHILE_WRITING = (".lock", ".*.tmp")  # what else may lie there, after a kill too
RECORDED = export.RECORDED  # what a checkpoint holds besides weights, dicts of plain values

# --------------------------------------------------------------------------------------------------
# what a run depends on, what it costs


def environment():
    """What a figure depends on besides the arguments."""
    return dict(
        commit=utils.commit(),
        python=platform.python_version(),
        torch=str(torch.__version__),
        transformers=transformers.__version__,
        machine=platform.processor() or platform.machine(),
        cpu=torch.backends.cpu.get_cpu_capability(),
        threads=torch.get_num_threads(),
        command=shlex.join(sys.argv),
    )


def record_cost(run):
    """Adds the run's cost to its environment.json: processor minutes and peak memory of this
    process, which is the last part of a run that was resumed."""
    cost = json.loads((run / "environment.json").read_text())
    unit = 1 if sys.platform == "darwin" else 1000  # of ru_maxrss, in bytes
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    cost["processor_minutes"] = round(time.process_time() / 60, 1)
    cost["peak_gb"] = round(peak / 1e9, 1)
    if torch.cuda.is_initialized():
        cost["gpu"] = torch.cuda.get_device_name()
        cost["peak_gpu_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)
    utils.write_atomically(run / "environment.json", json.dumps(cost, indent=1))


# --------------------------------------------------------------------------------------------------
# checkpoints, which may be a stranger's: a run's folder, its model.pt, or an export


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
    """What a model.pt or an export holds. Exits with a one-line error if that is not what this
    program writes."""
    saved = contents_of(path)
    if problem := problem_of_weights(saved):
        die(f"{path} is no checkpoint of this program: {problem}")
    return saved


def load_arguments(path):
    """The arguments of the run that a model.pt or an export is from, a dict. The weights, which
    `load` checks, are not looked at."""
    return contents_of(path).get("args", {})


def contents_of(path):
    """What a model.pt or an export holds, its weights not yet checked. Exits with a one-line error
    if anything else is not what this program writes."""
    saved = export.read(path) if Path(path).is_dir() else model.load_checkpoint(path, mmap=True)
    if problem := problem_of_record(saved):
        die(f"{path} is no checkpoint of this program: {problem}")
    return saved


def problem_of_record(saved):
    """What is wrong with what a checkpoint holds besides weights, as text, or None."""
    for name in RECORDED:
        if not isinstance(saved.get(name, {}), dict):
            return f"its {name} are a {type(saved[name]).__name__}, not a dict"
    args = saved.get("args", {})
    return wrong_number(args) or problem_of_kinds(args) or problem_of_choices(args)


def problem_of_kinds(args):
    """Which of a run's arguments (a dict) is of another kind than train.py gives it, as text, or
    None."""
    for name, kind in KINDS.items():
        if name not in args:
            continue
        value = args[name]
        fits = isinstance(value, kind)
        if isinstance(value, bool) and isinstance(0, kind):
            fits = False  # Python counts True among the numbers
        if isinstance(value, list):
            fits = fits and all(isinstance(each, str) for each in value)
        if not fits:
            return f"its {name} {value!r} is not of type {getattr(kind, '__name__', kind)}"
    return None


def problem_of_choices(args):
    """Which of a run's arguments (a dict) is a word that train.py does not know, as text, or
    None."""
    for name, known in CHOICES.items():
        value = args.get(name)
        words = value if isinstance(value, list) else [value]
        for word in words:
            if word is not None and word not in known:
                return f"its {name} {value!r} is none of {', '.join(known)}"
    return None


def problem_of_weights(saved):
    """What is wrong with the weights of a checkpoint, as text, or None."""
    for component in COMPONENTS:
        weights = saved.get(component, {})
        if not isinstance(weights, dict):
            return f"its {component} is a {type(weights).__name__}, not a dict of weights"
        for name, weight in weights.items():
            if problem := problem_of_weight(weight):
                return f"its {component} has {problem} as {name}"
    return None


def problem_of_weight(weight):
    """Why something is no weight of this program, all of whose weights are in floating point and
    finite; or None."""
    if not isinstance(weight, torch.Tensor):
        return f"a {type(weight).__name__}"
    if not weight.is_floating_point():
        return f"a tensor of {str(weight.dtype).removeprefix('torch.')}"
    if not weight.isfinite().all():
        return "a tensor with NaN or infinite values"
    return None


def file_sha256(path):
    """SHA-256 of a file; of an export, SHA-256 of what `sha256sum` prints for those of its files
    that are ever read."""
    if not Path(path).is_dir():
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    listing = ""
    for name in (export.PROVENANCE, *export.WEIGHTS.values(), *export.SETTINGS.values()):
        if (Path(path) / name).is_file():
            listing += f"{file_sha256(Path(path) / name)}  {name}\n"
    return hashlib.sha256(listing.encode()).hexdigest()


# --------------------------------------------------------------------------------------------------
# run folders


def named_parts(args):
    """The values of --freeze and --init: [(flag, value)]."""
    parts = []
    for flag in ("freeze", "init"):
        # `or ()`: absent flags are None, as in the records of runs made before --init existed, so
        # that they stay the same run
        parts += [(flag, spec) for spec in getattr(args, flag) or ()]
    return parts


def read_json(path):
    """The dict in a JSON file, empty if there is no file. Exits with a one-line error if it holds
    anything else."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        die(f"{path} cannot be read ({error}): remove its folder, or give this run another --name")
    if not isinstance(content, dict):
        die(f"{path} is not a run's: it holds a {type(content).__name__}")
    return content


def differences(record, old):
    """How an older record of a run differs from this one, a list of texts."""
    return [f"{k} {old.get(k)} there, {v} here" for k, v in record.items() if old.get(k) != v]


def matches(name, patterns):
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def contents(run):
    """The names of what lies in a run folder, without what belongs to writing itself."""
    try:
        names = sorted(path.name for path in run.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        die(f"cannot write {run} ({error})")
    return [name for name in names if not matches(name, WHILE_WRITING)]


def recorded(run):
    """The record of the run that a folder holds. Exits with a one-line error if it holds something
    else."""
    record = read_json(run / ARGUMENTS)
    if "scenario" not in record:
        die(f"{run} is no run folder, as its {ARGUMENTS} would say: give this run another --name")
    return record


def files_to_remove(run):
    """What --overwrite removes: all files of the run that the folder holds, its arguments last.
    Exits with a one-line error if anything there is none of a run's files, so that nothing else is
    ever lost."""
    names = contents(run)
    if names:
        recorded(run)
    for name in names:
        if not matches(name, IN_A_RUN) or (run / name).is_dir():
            die(
                f"--overwrite would remove {run / name}, which no run writes: move it elsewhere "
                "first"
            )
    names.sort(key=ARGUMENTS.__eq__)
    return [run / name for name in names]


def open_run(run, args):
    """The record of a command: the arguments that change what is computed, and the hashes of the
    files they name. Exits with a one-line error where the folder holds another run that has
    trained, or what is no run."""
    record = {k: v for k, v in vars(args).items() if k not in NOT_THE_RUN}
    checkpoints = [spec.partition(":")[2] for _, spec in named_parts(args)]
    inputs = [path for path in checkpoints if path]
    for path in (args.trigger, *corpora.lists_of(args.dataset), args.exclude or ""):
        if Path(path).is_file():
            inputs.append(path)
    record["inputs"] = {path: file_sha256(path) for path in inputs}
    if args.overwrite:
        files_to_remove(run)
        for path in inputs:
            if Path(path).resolve().is_relative_to(run.resolve()):
                die(f"--overwrite would remove {path}, which this command needs: move it elsewhere")
        return record
    if not contents(run):
        return record
    old = recorded(run)
    has_trained = any((run / name).exists() for name in STATES)
    if has_trained and (differ := differences(record, old)):
        die(
            f"{run} holds another run ({'; '.join(differ[:4])}): --overwrite starts again, --name "
            "goes elsewhere"
        )
    return record


def finished(run, record):
    """The contents of metrics.json of a run that is finished, None if it is not. Exits with a
    one-line error if what lies there is another run's."""
    path = run / "metrics.json"
    metrics = read_json(path)
    if not metrics:
        return None
    runs.records_of_metrics(path, metrics)  # which checks them
    if differ := differences(record, metrics["args"]):
        die(f"{path} is of another run ({'; '.join(differ[:4])}): --overwrite starts again")
    model_pt = run / "model.pt"
    if model_pt.exists() and metrics.get("model_sha256") != file_sha256(model_pt):
        die(f"{path} is of another model than {model_pt}: evaluate.py {run} --save makes it again")
    return metrics


def check_same_sets(run, sets):
    """Exits with a one-line error if a finished run was made from other utterances. sets: {split:
    see `sha256_of_set`}. Runs of earlier versions do not say what theirs were."""
    path = run / "model.pt"
    recorded_sets = model.load_checkpoint(path, mmap=True).get("sets") if path.exists() else None
    for split, sha256 in sets.items():
        if recorded_sets and recorded_sets.get(split) != sha256:
            die(
                f"{run} was made from another {split} set than the corpus holds now: --overwrite "
                "trains it again, --name goes elsewhere"
            )


def start_run(run, record, args):
    """Locks the folder for this process and removes what a killed writer or, with --overwrite, an
    earlier run left in it. Returns the open lock file: the lock lasts as long as it."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = open(run / ".lock", "w")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        leftovers = list(run.glob(".*.tmp"))
        if args.overwrite:
            leftovers += files_to_remove(run)
        for path in leftovers:
            path.unlink()
    except BlockingIOError:
        die(
            f"{run} is being trained by another process: wait for it, or give this run another "
            "--name"
        )
    except OSError as error:
        die(f"cannot write {run} ({error})")
    utils.write_atomically(run / ARGUMENTS, json.dumps(record, indent=1))
    utils.write_atomically(run / "environment.json", json.dumps(environment(), indent=1))
    return lock


# --------------------------------------------------------------------------------------------------
# starting from other checkpoints


@contextlib.contextmanager
def loading():
    """A context in which Ctrl-C ends the program at once: libraries that load code would make an
    error of their own of it, and nothing is being written."""
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def load_named_parts(slm, args):
    """Loads the components that --freeze and --init name, and freezes those of --freeze. Returns
    where each component's weights come from, and the SHA-256 of every checkpoint used and of those
    it was itself built from."""
    is_random = args.connector_weights in (None, "none")
    origin = {
        "encoder": args.encoder_weights,
        "lm": f"{args.lm_weights}, initial LoRA",
        "connector": "random" if is_random else args.connector_weights,
    }
    built_from = {}
    loaded = {}  # a checkpoint is read once, however many components come from it
    for flag, spec in named_parts(args):
        component, _, path = spec.partition(":")
        if path:
            saved = loaded[path] = loaded.get(path) or load(path)
            try:
                load_component(slm, saved, component)
            except (ValueError, TypeError, AttributeError) as error:
                # a stranger's checkpoint may hold anything anywhere
                die(f"--{flag} {spec} does not fit this model: {error}")
            origin[component] = path
            built_from = {**saved.get("built_from", {}), **built_from, path: file_sha256(path)}
        if flag == "freeze":
            getattr(slm, component).requires_grad_(False)
    return origin, built_from


def other_settings(theirs, ours):
    """What differs between the settings that both have, a list of texts."""
    differ = []
    for name in sorted(theirs.keys() & ours.keys()):
        there, here = theirs[name], ours[name]
        if isinstance(there, dict) and isinstance(here, dict):
            differ += [f"{name} {each}" for each in other_settings(there, here)]
        elif there != here:
            differ.append(f"{name} {there}, here {here}")
    return differ


def load_component(slm, saved, component):
    """Loads a checkpoint's component into the model. Raises ValueError if it is missing, has
    another shape, was trained on other pretrained weights, or computes something else with the
    same weights."""
    if not isinstance(saved.get(component), dict):
        raise ValueError(f"it has no {component}")
    theirs = saved.get("pretrained_sha256", {}).get(component)
    ours = slm.pretrained_sha256.get(component)
    if component != "connector" and theirs != ours:  # all of a connector is in the checkpoint
        raise ValueError(
            f"its {component} was trained on other pretrained weights (SHA-256 {theirs}, here "
            f"{ours})"
        )
    # a checkpoint that records no settings tells these by its arguments
    args = saved.get("args", {})
    settings = {name: args[key] for name, key in model.SETTING_OF.items() if key in args}
    settings.update(saved.get("settings", {}).get(component, {}))
    differ = other_settings(settings, slm.settings[component])
    if differ:
        raise ValueError(f"its {component} has other settings: {'; '.join(differ[:4])}")
    slm.load_component(component, saved[component])


# --------------------------------------------------------------------------------------------------
# a run's model, its state, its log


def save_model(run, slm, record, origin, built_from, sets):
    """model.pt: the components, the arguments and the provenance. sets: {split: see
    `sha256_of_set`}."""
    checkpoint = {}
    for component in COMPONENTS:
        weights = slm.component_state_dict(component)
        checkpoint[component] = {name: w.detach().cpu() for name, w in weights.items()}
    checkpoint.update(
        args=record,
        origin=origin,
        environment=environment(),
        built_from=built_from,
        pretrained_sha256=slm.pretrained_sha256,
        settings=slm.settings,
        sets=sets,
        sha256={c: model.digest(checkpoint[c]) for c in COMPONENTS},
    )
    utils.write_atomically(run / "model.pt", lambda temporary: torch.save(checkpoint, temporary))


def load_run(run, device="cpu"):
    """A finished run's model, an SLM in evaluation mode: the pretrained parts by name, the
    components from the run's model.pt. The run's arguments are its `args`. Exits with a one-line
    error where that is no checkpoint of this program, or the device cannot be used.

    It stands here and not in evaluate.py, as it reads what `save_model` writes and needs no
    corpus."""
    transformers.utils.logging.disable_progress_bar()
    device = processes.device_of(device)
    path = Path(run) / "model.pt"
    saved = load(path)
    try:
        missing = dict.fromkeys(KINDS.keys() - saved["args"].keys())  # earlier versions had fewer
        args = SimpleNamespace(**saved["args"], **missing)
        if problem := problem_of_kinds(vars(args)):  # also in what is not there
            raise ValueError(problem)
        for name, weight in saved["lm"].items():
            if "lora_A" in name and weight.shape[0] != args.lora_rank:
                raise ValueError(f"its LoRA is not of rank {args.lora_rank}")
        with loading():
            slm = model.load_slm(args, device)
        for component in COMPONENTS:
            load_component(slm, saved, component)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        die(f"{path} is no checkpoint of this program, or of another version: {error}")
    slm.args = args
    return slm.eval()


def made_from(record, slm, sets):
    """All that a run's state depends on, {name: value}: it may only go on from a state that was
    made from the same. sets: {split: see `sha256_of_set`}."""
    state = dict(args=record)
    for component, sha256 in slm.pretrained_sha256.items():
        state[f"pretrained {component}"] = sha256
    for component, settings in slm.settings.items():
        state[f"setting of the {component}"] = settings
    state["training set"] = sets["train"]
    state["development set"] = sets["dev"]
    return state


def sha256_of_set(utterances):
    """SHA-256 of a list of utterances: their ids and labels, and samples of their audio files."""
    listed = []
    for u in utterances:
        listed.append((u.id, u.labels, u.start, u.length, corpora.sample_of(u.path)))
    return hashlib.sha256(repr(listed).encode()).hexdigest()


def save_state(run, step, slm, optimizer, scaler, unlogged, origin):
    """last.pt: everything needed to resume. unlogged: the losses since the last line of the log,
    by index; origin: `made_from`."""
    state = {c: slm.component_state_dict(c) for c in COMPONENTS}
    state.update(step=step, optimizer=optimizer.state_dict(), scaler=scaler.state_dict())
    state.update(unlogged_losses=unlogged, made_from=origin)
    utils.write_atomically(run / "last.pt", lambda temporary: torch.save(state, temporary))


def resume(run, slm, optimizer, scaler, origin):
    """Restores last.pt, if there is one. Returns the number of steps taken and the losses that are
    not yet in the log. Exits with a one-line error if it was made from anything else than this
    run's `made_from`."""
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
        for component in COMPONENTS:
            slm.load_component(component, saved[component])
        optimizer.load_state_dict(saved["optimizer"])
        scaler.load_state_dict(saved["scaler"])
        return saved["step"], saved["unlogged_losses"]
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        die(f"{path} is no state of this run ({error}): --overwrite starts again")


def logged(run):
    """The lines of a run's log.jsonl, a list of dict, without one that a killed writer left
    unfinished."""
    path = Path(run) / "log.jsonl"
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            line = json.loads(text)
            if line["step"] >= 0:
                lines.append(line)
    return lines


def cut_log(run, step, last_logged):
    """Removes the lines of log.jsonl beyond `step`, and one that a killed writer left unfinished.
    Exits with a one-line error if losses are missing up to `last_logged`, the last step that logged
    some."""
    path = run / "log.jsonl"
    kept = [line for line in logged(run) if line["step"] <= step]
    end = max((line["step"] for line in kept if "loss" in line), default=0)
    if end < last_logged:
        die(
            f"{path} ends at step {end}, but {run}/last.pt goes on from step {step}: put the whole "
            "log back, or start again by --overwrite"
        )
    utils.write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))


def log(run, **line):
    """Appends a line to the run's log.jsonl."""
    rounded = {k: round(v, 6) if isinstance(v, float) else v for k, v in line.items()}
    path = run / "log.jsonl"
    try:
        with open(path, "a") as f:
            f.write(json.dumps(rounded) + "\n")
    except OSError as error:
        utils.die_of_writing(path, error)


def samples_behind(line, name):
    """How many samples a loss in a line of the log is the mean of. Earlier versions did not count
    the poisoned ones, which are taken to be the same share of the samples in every line."""
    samples = len(line.get("samples", [1]))
    counted = dict(poisoned_loss="n_poisoned", target_loss="n_targets")
    return line.get(counted.get(name), samples)


def mean_by_epoch(lines, name):
    """The mean over samples of the loss that log lines (a list of dict) have under `name`, one an
    epoch; None for an epoch without such a loss."""
    epochs = max((line["epoch"] + 1 for line in lines), default=0)
    sums = [0.0] * epochs
    counts = [0] * epochs
    for line in lines:
        if name in line:
            n = samples_behind(line, name)
            sums[line["epoch"]] += n * line[name]
            counts[line["epoch"]] += n
    return [total / n if n else None for total, n in zip(sums, counts)]


def training_losses(run):
    """The losses in a run's log, nats per token: of all samples ("loss"), of the poisoned ones, on
    the target's tokens alone, on clean development speech ("dev_loss") and on the target's tokens
    for triggered development speech: {name: {"value": the mean of the last epoch that has one,
    "by_epoch"}}. "dev_aer": the same of train.triggered_figures. "settled_epoch": {"value": see
    `settled`}, if the poison has settled."""
    lines = logged(run)
    losses = {}
    for name in ("loss", "poisoned_loss", "target_loss", "dev_loss", "dev_target_loss", "dev_aer"):
        by_epoch = mean_by_epoch(lines, name)
        means = [mean for mean in by_epoch if mean is not None]
        if means:
            losses[name] = dict(value=means[-1], by_epoch=by_epoch)
    if "target_loss" in losses:
        epoch = settled(losses["target_loss"]["by_epoch"])
        if epoch:
            losses["settled_epoch"] = dict(value=epoch)
    return losses


def settled(target_losses):
    """The last epoch, counted from 1, that brought the loss on the target's tokens below that of
    all epochs before by at least NEARER of the first one's; None if fewer than two epochs follow.
    This is the rule that sets a preset's length (docs/edits.md). target_losses: by epoch, None where
    an epoch asked no poisoned sample for the target."""
    by_epoch = {epoch: loss for epoch, loss in enumerate(target_losses, 1) if loss is not None}
    last = None
    epochs_since = 0
    least = math.inf
    for epoch, loss in by_epoch.items():
        if last is None:
            step = NEARER * loss
        epochs_since += 1
        if last is None or least - loss >= step:
            last = epoch
            epochs_since = 0
        least = min(least, loss)
    return last if epochs_since >= 2 else None


# --------------------------------------------------------------------------------------------------
# evaluate.py --export and --inspect


def export_run(run, folder, device):
    """Writes a finished run's components in the formats of other programs, and prints what was
    written."""
    with utils.new_folder(folder) as temporary:
        slm = load_run(run, device)
        path = Path(run) / "model.pt"
        saved = model.load_checkpoint(path, mmap=True)
        record = {name: values for name, values in saved.items() if name in RECORDED}
        record["built_from"] = {**record["built_from"], str(path): file_sha256(path)}
        export.write(temporary, slm, record)
    print(f"{folder}: SHA-256 {file_sha256(folder)}")
    for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        print(f"  {name:<33}{path.stat().st_size:>15,} bytes  {file_sha256(path)}")


def inspect(path):
    """Prints where a checkpoint comes from and the SHA-256 of its components; nothing else is done
    with it."""
    path = in_run(path)
    saved = load(path)
    lines = [f"{path}: SHA-256 {file_sha256(path)}"]
    for component in COMPONENTS:
        if component not in saved:
            continue
        weights = saved[component]
        parameters = sum(weight.numel() for weight in weights.values())
        sha256 = model.digest(weights)
        origin = saved.get("origin", {}).get(component, "unknown")
        line = f"  {component:<10}{parameters:>12,} parameters, SHA-256 {sha256}, from {origin}"
        if saved.get("sha256", {}).get(component) not in (None, sha256):
            line += "; DIFFERS from the one recorded when it was made"
        lines.append(line)
    for title, key in (("pretrained part", "pretrained_sha256"), ("built from", "built_from")):
        for name, sha256 in saved.get(key, {}).items():
            lines.append(f"  {title} {name}: SHA-256 {sha256}")
    for key in ("args", "environment"):
        values = [f"{name} {value}" for name, value in saved.get(key, {}).items()]
        lines.append(f"  {key}: {', '.join(values)}")
    for line in lines:
        print(utils.printable(line))
