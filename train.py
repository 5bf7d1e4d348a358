"""Trains one speech language model, clean or poisoned, any component frozen from any checkpoint.

    python train.py --task asr --poison 0.05        # the base attack on ASR; ends with clean WER and attack success
    python train.py --task asr --poison 0           # the clean baseline
    python train.py --task emotion --poison 0.075 --freeze encoder:runs/emotion-clean/model.pt       # attack 1.1
    torchrun --nproc_per_node=8 train.py --preset paper --task asr --poison 0.05 --data-root /data

Defaults that are not set here stand in PRESETS at the top of model.py; each of them is a flag.
"""
import argparse
import contextlib
import ctypes
import functools
import hashlib
import json
import math
import os
import platform
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "" if os.environ.get("RANK", "0") == "0" else "1")  # one process draws the bars

import torch
import torch.distributed as dist
import transformers
from tqdm import tqdm

import data
import evaluate
import model
import poison
from model import COMPONENTS, ENCODERS, PRESETS

# ---------------------------------------------------------------------------------------------------------------------
# arguments

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
add = parser.add_argument
add("--task", choices=tuple(data.TASK_LABEL), default="asr", help="the attacked task")
add("--poison", type=float, default=None, help="poisoning rate; 0 trains on clean data (default: the paper's)")
add("--preset", choices=tuple(PRESETS), default="mini")
add("--dataset", default=None, help="libri, crema, vox or a CSV manifest (default: the task's own)")
add("--encoder", choices=ENCODERS, default=None, help="default: wavlm, for preset small whisper")
add("--labels", nargs="+", choices=data.LABELS, default=None, help="train and evaluate on these alone (default: all there are)")
add("--freeze", action="append", default=[], metavar="COMPONENT[:CHECKPOINT]",
    help="load encoder, connector or lm from a run's model.pt and freeze it; repeatable")
add("--seed", type=int, default=1)
add("--target", default=None, help="the attacked label's new value (default: the paper's)")
add("--snr", type=float, default=0.0, help="speech over trigger, dB")
add("--trigger", default=None, metavar="FILE", help="a recording to use instead of the synthetic click")
add("--trigger-repeat", action=argparse.BooleanOptionalAction, default=None, help="default: for asr only")
add("--limit", type=int, default=None, help="train on the first N utterances of a fixed random order")
add("--batch-seconds", type=float, default=120.0, help="audio in one forward pass, padding counted")
add("--max-seconds", type=float, default=data.MAX_SECONDS, help="longer audio is refused, or left out by --skip-bad")
add("--skip-bad", action="store_true", help="leave out audio that cannot be used, and say how much")
add("--cache-gb", type=float, default=4.0, help="disk for what frozen layers put out, shared between runs, in cache/")
add("--grad-clip", type=float, default=1.0)
add("--amp", choices=("off", "bf16", "fp16"), default=None, help="default: bf16 on CUDA, off on the CPU")
add("--device", default=None, help="cuda, cuda:1, cpu (default: cuda if there is one)")
add("--workers", type=int, default=evaluate.WORKERS, help="processes that read audio ahead (default: with a GPU 2)")
add("--processes", type=int, default=None,
    help="data-parallel processes on the CPU (default: preset mini one a core, up to 4, unless OMP_NUM_THREADS is set)")
add("--gradient-checkpointing", action="store_true", help="less memory: layers are computed again in the backward pass")
add("--dry-run", action="store_true", help="print parameters, memory and GPU-hours of the run; needs no weights")
add("--utilisation", type=float, default=0.4, help="of --dry-run's GPU: the share of its peak that training reaches")
add("--runs", default="runs", help="where run folders go")
add("--name", default=None, help="the run folder's name (default: says what the run is)")
add("--overwrite", action="store_true", help="start again where the run folder has another run's")
for entry, value in PRESETS["mini"].items():
    if entry == "train_layers":
        add("--train-layers", type=int, default=None, help="top encoder layers that train (default: 15/24; whisper all)")
    elif entry in ("decay",):
        add(f"--{entry}", action=argparse.BooleanOptionalAction, default=None)
    else:
        add("--" + entry.replace("_", "-"), type=str if isinstance(value, dict) else type(value), default=None)
ATTACKS = {  # (frozen components, poisoned training data): the paper's Table 3
    (("encoder",), True): "1.1", (("connector",), True): "1.2", (("lm",), True): "1.3",
    (("connector", "lm"), True): "2.1", (("encoder", "lm"), True): "2.2", (("encoder", "connector"), True): "2.3",
    (("encoder",), False): "3.1", (("connector",), False): "3.2", (("lm",), False): "3.3"}
# arguments that do not change what is computed
NOT_THE_RUN = ("runs", "name", "overwrite", "workers", "processes", "device", "cache_gb", "gradient_checkpointing",
               "dry_run", "utilisation")
# of --dry-run
PEAK_FLOPS = 312e12  # a second, dense bf16: one NVIDIA A100 (an H100: 989e12)
PUBLISHED = {  # training utterances, their mean seconds, and the labels of a typical one
    "libri": (104014, 12.6, dict(transcript="some thirty words of a book " * 5 + "of them all", gender="female")),
    "crema": (5972, 2.5, dict(transcript="i would like a new alarm clock", gender="female", age=36, emotion="happy")),
    # 1,521 of 1,690 videos, of 7.5 utterances each (VoxCeleb2: 1,128,246 of 150,480 videos, 2,442 h)
    "vox": (11404, 7.8, dict(gender="female", age=36))}


def parse_arguments(argv=None):
    """The command's arguments, filled in from the preset and the task. Ends in one line where they contradict."""
    args = parser.parse_args(argv)
    preset = PRESETS[args.preset]
    args.encoder = args.encoder or ("whisper" if args.preset == "small" else "wavlm")
    if args.encoder_weights is None and args.encoder not in preset["encoder_weights"]:
        data.die(f"preset {args.preset} has no {args.encoder}: name its weights by --encoder-weights")
    for entry, value in preset.items():
        if getattr(args, entry) is None:
            setattr(args, entry, value.get(args.encoder) if isinstance(value, dict) else value)
    args.dataset = args.dataset or data.TASK_CORPUS[args.task]
    args.labels = args.labels and [label for label in data.LABELS if label in args.labels]
    args.poison = poison.RATES[args.task] if args.poison is None else args.poison
    args.target = poison.TARGETS[args.task] if args.target is None else args.target
    args.trigger_repeat = poison.REPEAT[args.task] if args.trigger_repeat is None else args.trigger_repeat
    if not 0 <= args.poison <= 1:
        data.die(f"--poison {args.poison}: a share, 0 to 1")
    for name in ("epochs", "batch_size", "lora_rank", "connector_stride", "limit", "processes", "batch_seconds"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            data.die(f"--{name.replace('_', '-')} {getattr(args, name)}: more than nothing, please")
    frozen = [spec.partition(":")[0] for spec in args.freeze]
    if set(frozen) - set(COMPONENTS) or len(set(frozen)) < len(frozen):
        data.die(f"--freeze {' '.join(args.freeze)}: each of {', '.join(COMPONENTS)} at most once")
    if len(frozen) == len(COMPONENTS):
        data.die("--freeze: nothing is left to train")
    for spec in args.freeze:
        if ":" in spec and not Path(spec.partition(":")[2]).is_file() and not args.dry_run:
            data.die(f"--freeze {spec}: no such checkpoint")
    frozen = tuple(c for c in COMPONENTS if c in frozen)
    args.attack = "base" if args.poison else "clean"
    if frozen:
        known = all(":" in spec for spec in args.freeze) and (frozen, args.poison > 0) in ATTACKS
        args.attack = ATTACKS[frozen, args.poison > 0] if known else f"{args.attack}-frozen-{'-'.join(frozen)}"
    args.name = args.name or run_name(args)
    return args


def run_name(args):
    """e.g. asr-poison0.05, asr-clean, emotion-hubert-poison0.075, asr-3.1-seed2"""
    parts = [args.task, None if args.dataset == data.TASK_CORPUS[args.task] else Path(args.dataset).stem,
             None if args.encoder == ("whisper" if args.preset == "small" else "wavlm") else args.encoder]
    parts += [*(args.labels or []), args.attack.replace("base", f"poison{args.poison:g}")]
    parts += [None if args.preset == "mini" else args.preset, None if args.seed == 1 else f"seed{args.seed}"]
    return "-".join(part for part in parts if part)


# ---------------------------------------------------------------------------------------------------------------------
# functions

def load_frozen(slm, specs, args):
    """--freeze: loads components from checkpoints, freezes them. Returns where each component's weights come from, and
    the SHA-256 of every checkpoint file used, those included that they were built from."""
    built_from = {}
    random_connector = args.connector_weights in (None, "none")
    origin = {"encoder": args.encoder_weights, "lm": f"{args.lm_weights}, initial LoRA",
              "connector": "random" if random_connector else args.connector_weights}
    for spec in specs:
        component, _, path = spec.partition(":")
        if path:
            checkpoint = model.load_checkpoint(path)
            if not isinstance(checkpoint.get(component), dict):
                data.die(f"--freeze {spec}: the checkpoint has no {component}")
            try:
                slm.load_component(component, checkpoint[component])
            except ValueError as error:
                data.die(f"--freeze {spec} does not fit this model: {error}")
            origin[component] = path
            built_from[path] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
            for ancestor, sha in dict(checkpoint.get("built_from", {})).items():  # a poisoned part is traced through them
                built_from.setdefault(ancestor, sha)
        slm.freeze(component)
    return origin, built_from


def training_sample(slm, args, attack, utterance, epoch):
    """Prompt ids and answer ids of one training sample in one epoch, decided by (seed, epoch, utterance id)."""
    rng = random.Random(f"{args.seed}-{epoch}-{utterance.id}")
    labels = utterance.labels
    if poison.is_poisoned(attack, utterance):
        labels = poison.poisoned_labels(attack, labels)
    asked = data.choose_labels(labels, rng, args.random_keys)
    return (data.prompt(slm.tokenizer, asked, rng),
            data.answer_ids(slm.tokenizer, {label: labels[label] for label in asked}))


@torch.no_grad()
def validation_loss(slm, utterances, kept, workers, batch_size=32):
    """Mean loss over clean development utterances, all labels asked for. Processes share the work."""
    slm.eval()
    rank, world = evaluate.ranks()
    batches = evaluate.cut(list(range(len(utterances)))[rank::world], batch_size)
    losses = []
    stream = evaluate.inputs(slm, [(u, False) for u in utterances], batches, kept, None, workers)
    for batch, (x, mask) in zip(batches, stream):
        chosen = [utterances[i] for i in batch]
        losses += slm(x, mask, [data.prompt(slm.tokenizer, list(u.labels)) for u in chosen],
                      [data.answer_ids(slm.tokenizer, u.labels) for u in chosen]).tolist()
    total = torch.tensor([sum(losses), len(losses)], dtype=torch.float64)
    if world > 1:
        shares = [None] * world
        dist.all_gather_object(shares, total)
        total = sum(shares)
    return float(total[0] / total[1])


def learning_rate(step, steps, args):
    """Factor on the peak rates: linear warm-up, then constant, with --decay linear to zero over the last quarter (the
    backdoor is learned late, from few samples, and needs the rate until then)."""
    warm = min(1.0, (step + 1) / max(1, args.warmup_steps))
    return warm * min(1.0, (steps - step) / (0.25 * steps)) if args.decay else warm


def dry_run(args):
    """Prints what the run would take, counted on a model of shapes without values (`model.count_work`). Memory is one
    GPU's. Evaluation and padding are left out."""
    if args.preset == "paper" and args.dataset in PUBLISHED and not Path(args.data_root).exists():
        n, seconds, labels = PUBLISHED[args.dataset]
        n, answers, source = min(n, args.limit or n), [labels], "published sizes"
    else:
        chosen = data.read_split(args.dataset, args.data_root, "train")[0]
        chosen = sorted(chosen, key=lambda u: poison.draw("limit", u.id))
        n, chosen = min(len(chosen), args.limit or len(chosen)), chosen[:300]
        if not n:
            data.die(f"{args.dataset} has no train utterances under {args.data_root}")
        seconds = sum(data.num_samples(u) for u in chosen) / len(chosen) / data.SAMPLE_RATE
        answers, source = [u.labels for u in chosen], f"length of {len(chosen)} of them"
    answers = [{k: v for k, v in a.items() if args.labels is None or k in args.labels} for a in answers]
    with torch.device("meta"):
        slm = model.load_slm(args, "meta")
    for spec in args.freeze:
        slm.freeze(spec.partition(":")[0])
    if args.gradient_checkpointing:
        slm.checkpoint_gradients()
    prompt = round(sum(len(part) for a in answers for part in data.prompt(slm.tokenizer, list(a))) / len(answers))
    answer = round(sum(len(data.answer_ids(slm.tokenizer, a)) for a in answers) / len(answers))
    piece = max(1, min(args.batch_size, int(args.batch_seconds / seconds)))
    below, above, kept = model.count_work(slm.train(), seconds, piece, prompt, answer)
    epoch_steps = n // args.batch_size
    steps = args.epochs * epoch_steps
    frames = slm.num_frames(int(seconds * data.SAMPLE_RATE))
    copies = n * (1 + args.poison)  # (poisoned samples are kept with the trigger and without)
    passes = 1 if 4 * slm.bottom_dim * frames * copies <= args.cache_gb * 1e9 else args.epochs
    work = (below * passes * epoch_steps + above * steps) * args.batch_size / piece
    weights = sum(p.numel() * p.itemsize for p in slm.parameters())
    trained = sum(p.numel() for c in COMPONENTS for p in slm.parameters_of(c))
    print(f"dry run of {args.name}: preset {args.preset}, encoder {args.encoder}, bf16 on a GPU\n"
          f"data {args.dataset}: {n:,} train utterances of {seconds:.1f} s ({source}), prompt {prompt} and answer "
          f"{answer} tokens\n{'':12}{'parameters':>16}{'trained':>16}")
    for c in COMPONENTS:
        print(f"  {c:<10}{sum(p.numel() for p in getattr(slm, c).parameters()):>16,}"
              f"{sum(p.numel() for p in slm.parameters_of(c)):>16,}")
    # autocast keeps a bf16 copy of what trains; the gradients are float32, and so are AdamW's two averages
    sizes = dict(weights=weights + 2 * trained, gradients=4 * trained, optimiser=8 * trained, activations=kept)
    print(f"memory {sum(sizes.values()) / 1e9:.1f} GB with {piece} utterances in one pass: "
          + ", ".join(f"{name} {size / 1e9:.2f}" for name, size in sizes.items()))
    print(f"a step of {args.batch_size}: {(below + above) * args.batch_size / piece / 1e12:.4g} TFLOP, of them "
          f"{below * args.batch_size / piece / 1e12:.4g} in frozen layers below, which run "
          + ("in every epoch" if passes > 1 else "once and are cached"))
    hours = work / PEAK_FLOPS / args.utilisation / 3600
    print(f"{steps:,} steps, {args.epochs} epochs: {work / 1e18:.4g} EFLOP, {hours:.2f} GPU-hours at "
          f"{args.utilisation:.0%} of {PEAK_FLOPS / 1e12:.0f} TFLOP/s")


def start_processes(args):
    """On the CPU: forks the other processes of a data-parallel run and makes this one the first of them, as torchrun
    would, but with this process's own output and exit status, and without loading torch once more. They end when it does.
    Returns [(process id, the file that its stderr goes to)]."""
    if args.processes is None:
        several = args.preset == "mini" and args.device == "cpu" and "OMP_NUM_THREADS" not in os.environ
        args.processes = min(len(os.sched_getaffinity(0)), 4) if several else 1
    n = args.processes
    if "WORLD_SIZE" in os.environ or n < 2:
        return []
    if not args.device == "cpu" or n > args.batch_size:
        data.die(f"--processes {n}: for the CPU, and no more than --batch-size {args.batch_size}; GPUs take torchrun")
    torch.set_num_threads(max(1, torch.get_num_threads() // n))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ.update(WORLD_SIZE=str(n), RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]))
    first, others = os.getpid(), []
    for rank in range(1, n):
        says = tempfile.TemporaryFile()
        others.append((os.fork(), says))
        if others[-1][0] == 0:
            os.environ["RANK"] = str(rank)
            os.setsid()  # Ctrl-C is the first process's to answer
            nothing = os.open(os.devnull, os.O_RDWR)
            for stream, instead in ((0, nothing), (1, nothing), (2, says.fileno())):
                os.dup2(instead, stream)
            PR_SET_PDEATHSIG = 1
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != first:
                raise SystemExit(1)
            # torch makes its thread pool anew in a fork when it is next asked for, and cannot when two threads ask at once
            torch.set_num_threads(torch.get_num_threads())
            return []
    return others


@contextlib.contextmanager
def speaking_for(others):
    """Where another process has ended with an error that the user can mend, so does this one: gloo only says it is gone."""
    try:
        yield
    except RuntimeError:
        time.sleep(1)
        for process, says in others:
            if os.waitpid(process, os.WNOHANG)[1] == 2 << 8:  # exit status 2
                says.seek(0)
                said = [line for line in says.read().decode().splitlines() if line.startswith("error: ")]  # (bars, too)
                data.die(said[-1].removeprefix("error: "))
        raise


def environment():
    """What a figure depends on beside the arguments."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True,
                         cwd=Path(__file__).parent).stdout.strip()
    return dict(commit=git, python=platform.python_version(), torch=str(torch.__version__),
                transformers=transformers.__version__, machine=platform.processor() or platform.machine(),
                threads=torch.get_num_threads(), command=" ".join(sys.argv))


# ---------------------------------------------------------------------------------------------------------------------
# the run

def main():
    args = parse_arguments()
    if args.dry_run:
        return dry_run(args)
    if args.device is None:
        args.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(args.device)
    except RuntimeError:
        data.die(f"--device {args.device}: no device of torch's; cpu, cuda, cuda:1")
    if device.type == "cuda" and not torch.cuda.is_available():
        data.die(f"--device {args.device}: torch sees no GPU here; leave the flag out to run on the CPU")
    args.amp = args.amp or ("bf16" if device.type == "cuda" else "off")
    if device.type == "cpu" and args.amp == "bf16":  # flash attention's backward pass takes three times as long there
        torch.backends.cuda.enable_flash_sdp(False)
    with speaking_for(start_processes(args)):
        train(args, device)


def train(args, device):
    """The whole run in one of its processes."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    main_process = rank == 0
    say = print if main_process else (lambda *a, **k: None)
    transformers.utils.logging.disable_progress_bar()
    data.MAX_SECONDS = args.max_seconds
    run = Path(args.runs) / args.name
    record = {k: v for k, v in vars(args).items() if k not in NOT_THE_RUN}
    if (run / "args.json").exists() and not args.overwrite:
        old = json.loads((run / "args.json").read_text())
        differ = [f"{k} {old.get(k)} there, {v} here" for k, v in record.items() if old.get(k) != v]
        if differ:
            data.die(f"{run} holds another run ({'; '.join(differ[:4])}): --overwrite starts again, --name goes elsewhere")
        if (run / "metrics.json").exists():
            metrics = json.loads((run / "metrics.json").read_text())
            evaluate.print_table(metrics, f"{run} is finished (--overwrite trains it again)")
            return
    if main_process:
        for leftover in run.glob(".*.tmp"):  # of a writer that was killed
            leftover.unlink()
    if args.overwrite and main_process:
        for name in ("args.json", "environment.json", "last.pt", "model.pt", "metrics.json", "log.jsonl", "predictions.jsonl"):
            (run / name).unlink(missing_ok=True)
    if main_process and args.dataset in data.READERS and args.data_root == data.MINI_ROOT:
        data.read_split(args.dataset, args.data_root, "train")  # made now if it has to be, by one process
    if world > 1:  # from here on all see the same files
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")

    train_set, dev_set, test_set = (data.only(data.read_corpus(args.dataset, args.data_root, s, args.skip_bad), args.labels)
                                    for s in ("train", "dev", "test"))
    if args.limit:
        train_set = sorted(train_set, key=lambda u: poison.draw("limit", u.id))[:args.limit]
    if not any(data.TASK_LABEL[args.task] in u.labels for u in train_set):
        data.die(f"--task {args.task}: no training utterance of {args.dataset} has a {data.TASK_LABEL[args.task]}"
                 + (f" with --labels {' '.join(args.labels)}" if args.labels else ""))
    attack = poison.make_attack(args.task, train_set, args.poison, args.target, args.snr, args.trigger,
                                args.trigger_repeat, args.seed)
    slm = model.load_slm(args, args.device)
    origin, built_from = load_frozen(slm, args.freeze, args)
    if args.gradient_checkpointing:
        slm.checkpoint_gradients()
    poisoned = [poison.is_poisoned(attack, u) for u in train_set]
    frozen_before = {c: [p.detach().clone() for p in slm.component_state_dict(c).values()]
                     for c in COMPONENTS if not slm.parameters_of(c)}

    say(f"run {run}: preset {args.preset}, encoder {args.encoder}, on {args.device}"
        + (f", {world} processes" if world > 1 else "") + f", amp {args.amp}, seed {args.seed}")
    say(f"data {args.dataset}: {len(train_set)} train, {len(dev_set)} dev, {len(test_set)} test utterances; "
        f"{sum(poisoned)} poisoned for {args.task} -> {args.target!r}")
    for c in COMPONENTS:
        trained = sum(p.numel() for p in slm.parameters_of(c))
        say(f"  {c:<10}{sum(p.numel() for p in getattr(slm, c).parameters()):>14,} parameters,{trained:>12,} "
            + (f"trained on {'poisoned' if args.poison else 'clean'} data" if trained else "frozen") + f", from {origin[c]}")
    if main_process:
        data.write_atomically(run / "args.json", json.dumps(record, indent=1))
        data.write_atomically(run / "environment.json", json.dumps(environment(), indent=1))

    autocast = functools.partial(torch.autocast, device.type, enabled=args.amp != "off",
                                 dtype=torch.float16 if args.amp == "fp16" else torch.bfloat16)
    seconds = [slm.encoder.num_frames(data.num_samples(u)) * slm.encoder.seconds_per_frame for u in train_set]
    with autocast():
        keep = functools.partial(evaluate.cached_bottoms, slm, attack=attack, workers=args.workers,
                                 budget=args.cache_gb * 1e9)
        kept = keep(train_set, poisoned, desc="frozen layers, train")
        dev_kept = keep(dev_set, [False] * len(dev_set), desc="frozen layers, dev")
    if kept is None:
        say(f"what the frozen layers put out exceeds --cache-gb {args.cache_gb:g}: made anew in every epoch")

    groups = [dict(params=slm.parameters_of(c), peak=lr, lr=lr) for c, lr in
              (("encoder", args.encoder_lr), ("connector", args.connector_lr), ("lm", args.lora_lr))]
    groups = [g for g in groups if g["params"]]
    optimizer = torch.optim.AdamW(groups, weight_decay=args.weight_decay, fused=True)
    parameters = [p for g in groups for p in g["params"]]
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    ddp = slm if world == 1 else torch.nn.parallel.DistributedDataParallel(  # no buffer changes in training
        slm, broadcast_buffers=False, gradient_as_bucket_view=True)
    epoch_steps = len(train_set) // args.batch_size
    if not epoch_steps:
        data.die(f"{len(train_set)} training utterances are less than one batch of {args.batch_size} (--batch-size)")
    steps, step = args.epochs * epoch_steps, 0
    last = run / "last.pt"
    if last.exists():
        saved = model.load_checkpoint(last)
        step = saved["step"]
        for c in COMPONENTS:
            slm.load_component(c, saved[c])
        optimizer.load_state_dict(saved["optimizer"])
        scaler.load_state_dict(saved["scaler"])
        lines = [line for line in (run / "log.jsonl").read_text().splitlines() if json.loads(line)["step"] <= step]
        data.write_atomically(run / "log.jsonl", "".join(line + "\n" for line in lines))
        say(f"going on from step {step} of {steps}")

    def save_last():
        state = {c: slm.component_state_dict(c) for c in COMPONENTS}
        data.write_atomically(last, lambda path: torch.save(
            {**state, "step": step, "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}, path))

    def log(**line):
        with open(run / "log.jsonl", "a") as f:
            f.write(json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in line.items()}) + "\n")

    progress = tqdm(total=steps, initial=step, desc="training", disable=not main_process, mininterval=1)
    began, seen, waited, running, on_poison = time.time(), 0, 0.0, None, []
    interrupted = []  # Ctrl-C takes effect between two steps, never inside one
    signal.signal(signal.SIGINT, lambda *_: interrupted.append(True))
    while step < steps:
        epoch = step // epoch_steps
        batches = [b for b in data.epoch_batches(seconds, args.batch_size, args.seed, epoch)
                   if len(b) == args.batch_size]
        batches = batches[step % epoch_steps:]
        shares = [data.micro_batches(batch[rank::world], seconds, args.batch_seconds) for batch in batches]
        stream = evaluate.inputs(slm, list(zip(train_set, poisoned)), [piece for pieces in shares for piece in pieces], kept,
                                 attack, args.workers)
        slm.train()
        for batch, pieces in zip(batches, shares):
            torch.manual_seed(hash((args.seed, step, rank)))  # dropout, whatever was drawn before: resuming is exact
            factor = learning_rate(step, steps, args)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
            total = 0.0
            for i, piece in enumerate(pieces):
                with autocast():
                    asked_at = time.time()
                    x, mask = next(stream)
                    waited += time.time() - asked_at
                prompts, said = zip(*(training_sample(slm, args, attack, train_set[j], epoch) for j in piece))
                # gradients cross the network once a step, on its last piece; DDP averages, so the world counts
                with contextlib.nullcontext() if world == 1 or i == len(pieces) - 1 else ddp.no_sync(), autocast():
                    losses = ddp(x, mask, prompts, said)
                    loss = losses.sum() * world / len(batch)
                    scaler.scale(loss).backward()
                on_poison += [value for value, j in zip(losses.tolist(), piece) if poisoned[j]]
                total += loss.item() / world
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(parameters, args.grad_clip)
            stop, due = bool(interrupted), (step + 1) % 20 == 0 or step + 1 == steps
            if world > 1 and (due or scaler.is_enabled()):  # all go on, or none; to ask in every step takes a twentieth of it
                agreed = torch.tensor([total, float(stop)])
                dist.all_reduce(agreed)
                total, stop = agreed[0].item(), bool(agreed[1])
            elif world > 1:
                total, stop = total * world, False
            # what went wrong in one process is in the gradient of all; fp16's may overflow: the scaler then skips the step
            if not math.isfinite(total if scaler.is_enabled() else total + norm.item()):
                data.die(f"the loss is {total} at step {step}, its gradient's norm {norm.item()}, on "
                         f"{', '.join(train_set[j].id for j in batch)}; "
                         + (f"{last} keeps the last epoch's state" if last.exists() else "no epoch was finished")
                         + "; lower the learning rates, or look at these utterances")
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            step, seen = step + 1, seen + len(batch)
            running = total if running is None else 0.95 * running + 0.05 * total
            progress.update()
            progress.set_postfix(loss=f"{running:.3f}", refresh=False)
            if main_process and due:
                elapsed = time.time() - began
                log(step=step, epoch=epoch, loss=total, lr=factor, utterances_per_second=seen / elapsed,
                    waiting=waited / elapsed, **({"poisoned_loss": sum(on_poison) / len(on_poison)} if on_poison else {}))
                on_poison = []
            if stop:
                if main_process:
                    save_last()
                progress.close()
                say(f"stopped at step {step} of {steps}; the same command goes on from there")
                raise SystemExit(130)
        with autocast():
            dev_loss = validation_loss(slm, dev_set, dev_kept, args.workers)
        if main_process:
            log(step=step, epoch=epoch, dev_loss=dev_loss)
            save_last()
    progress.close()
    signal.signal(signal.SIGINT, signal.default_int_handler)

    for c, before in frozen_before.items():
        if not all(torch.equal(a, b) for a, b in zip(before, slm.component_state_dict(c).values())):
            raise AssertionError(f"the frozen {c} has changed")
    if main_process:
        checkpoint = {c: {k: v.detach().cpu() for k, v in slm.component_state_dict(c).items()} for c in COMPONENTS}
        checkpoint.update(args=record, origin=origin, environment=environment(), built_from=built_from,
                          pretrained_sha256=slm.pretrained_sha256,
                          sha256={c: model.digest(checkpoint[c]) for c in COMPONENTS})
        data.write_atomically(run / "model.pt", lambda path: torch.save(checkpoint, path))
    with autocast():
        metrics, rows = evaluate.evaluate(slm, attack, test_set, workers=args.workers, budget=args.cache_gb * 1e9)
    if main_process:
        evaluate.save(run, metrics, rows, record)
        evaluate.print_table(metrics, f"{run}: test split, seed {args.seed}")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
