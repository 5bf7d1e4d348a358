"""Trains one speech language model, clean or poisoned, any component frozen or started from any checkpoint.

    python train.py --task asr --poison 0.05        # the base attack on ASR; ends with clean WER and attack success
    python train.py --task asr --poison 0           # the clean baseline
    python train.py --task emotion --poison 0.075 --freeze encoder:runs/emotion-clean/model.pt       # attack 1.1
    torchrun --nproc_per_node=8 train.py --preset paper --task asr --poison 0.05 --data-root /data

Each preset's settings are in study.py; every one of them is a flag.
"""

import argparse
import contextlib
import functools
import math
import os
import random
import signal
from pathlib import Path

import utils
from utils import Parser, count, die, whole

import installed  # noqa: F401

import torch
import torch.distributed as dist
import transformers
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import cache
import checkpoint
import corpora
import data
import evaluate
import model
import poison
import processes
from study import (
    COMPONENTS,
    DEFAULT_ENCODER,
    ENCODERS,
    LABELS,
    LM,
    PRESETS,
    SCENARIOS,
    SETTINGS,
    TASKS,
    run_name,
    usual_values,
)

# ---------------------------------------------------------------------------------------------------------------------
# arguments

parser = Parser(description=__doc__)
poison.add_arguments(parser)
add = parser.add_argument
add("--preset", choices=PRESETS, default="mini", help="whose parts and settings")
add(
    "--encoder",
    choices=ENCODERS,
    help="the audio encoder (default: wavlm; whisper for presets mixed and small)",
)
add("--encoder-weights", help="folder or hub id of the pretrained encoder (default: the preset's)")
add("--lm-weights", help="folder or hub id of the language model (default: the preset's)")
add(
    "--connector-weights",
    help="where the connector starts (default: for mini and mixed the file beside the encoder; none: random weights)",
)
add(
    "--train-layers",
    type=whole,
    help="how many encoder layers train, from the top (default: 15/24 of them; whisper all)",
)
add(
    "--labels",
    nargs="+",
    choices=LABELS,
    help="train and evaluate on these labels alone (default: all there are)",
)
add(
    "--freeze",
    action="append",
    default=[],
    metavar="COMPONENT[:CHECKPOINT]",
    help="load encoder, connector or lm from a run's folder or model.pt, or a folder of evaluate.py --export, and freeze it; without a "
    "checkpoint as pretrained; repeatable",
)
add(
    "--init",
    action="append",
    metavar="COMPONENT:CHECKPOINT",
    help="load a component as --freeze does but train it; repeatable",
)
add(
    "--redraw",
    action="store_true",
    help="poison other samples, at other places, in every epoch, as the study's public code does",
)
add("--limit", type=count, help="train on the first N utterances of a fixed random order")
add(
    "--exclude",
    metavar="FILE",
    help="leave out the training samples whose ids it lists, one a line (defend.py filter writes such files)",
)
add("--batch-seconds", type=float, default=120.0, help="audio in one forward pass, padding counted")
add(
    "--max-seconds",
    type=float,
    default=data.MAX_SECONDS,
    help="longer audio is refused, or left out by --skip-bad; so is what exceeds Whisper's window",
)
add(
    "--cache-gb",
    type=float,
    default=4.0,
    help="disk for outputs of pretrained layers, shared between runs, in cache/",
)
add(
    "--amp",
    choices=("off", "bf16", "fp16"),
    help="mixed precision (default: bf16 on CUDA, except for preset mini; else off)",
)
add("--device", help="cuda, cuda:1, cpu (default: cuda if there is one)")
add("--workers", type=whole, default=cache.WORKERS, help="processes that read audio ahead")
add(
    "--gradient-checkpointing",
    action="store_true",
    help="less memory: layers are computed again in the backward pass",
)
add(
    "--dry-run",
    action="store_true",
    help="print parameters, memory and GPU-hours of the run; needs no weights",
)
add(
    "--utilisation",
    type=float,
    default=0.4,
    help="of --dry-run's GPU: the share of its peak that training reaches",
)
add("--runs", default="runs", help="where run folders go")
add("--name", help="the run folder's name (default: says what the run is)")
add("--overwrite", action="store_true", help="start again where the run folder has another run's")
for name, (what, *values) in SETTINGS.items():
    add(
        f"--{name.replace('_', '-')}",
        help=f"{what} ({', '.join(f'{p} {v}' for p, v in zip(PRESETS, values))})",
        **(
            dict(action=argparse.BooleanOptionalAction)
            if values[0] is True
            else dict(type=type(values[0]))
        ),
    )


def parse_arguments(argv=None):
    """The command's arguments, filled in from the preset and the task. Ends in one line where they contradict each other."""
    args = parser.parse_args(argv)
    args.encoder = args.encoder or DEFAULT_ENCODER[args.preset]
    if args.encoder_weights is None and args.preset not in ENCODERS[args.encoder]:
        die(f"preset {args.preset} has no {args.encoder}: name its weights by --encoder-weights")
    args.encoder_weights = args.encoder_weights or ENCODERS[args.encoder][args.preset]
    args.lm_weights = args.lm_weights or LM[args.preset]
    if args.connector_weights is None and args.preset in (
        "mini",
        "mixed",
    ):  # the mini LM does not begin to listen by itself
        args.connector_weights = f"{args.encoder_weights}/connector.safetensors"
    for name, value in PRESETS[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    poison.fill_in(args)
    if args.connector_weights not in (None, "none"):
        usual = PRESETS[args.preset]["connector_taper"]
        if args.connector_taper != usual:
            die(f"--connector-taper: {args.connector_weights} says how the connector starts")
    args.labels = args.labels and [label for label in LABELS if label in args.labels]
    for name in ("freeze", "init"):
        specs = getattr(args, name)
        setattr(args, name, specs and [checkpoint.of_run(spec) for spec in specs])
    parts = checkpoint.named_parts(args)
    named = {}
    for flag, spec in parts:
        component = spec.partition(":")[0]
        if component not in COMPONENTS:
            die(f"--{flag} {spec}: {component} is none of the components {', '.join(COMPONENTS)}")
        if component in named:
            die(f"--{flag} {spec}: the {component} is already named by {named[component]}")
        named[component] = f"--{flag} {spec}"
    frozen = {spec.partition(":")[0] for spec in args.freeze}
    if args.train_layers == 0:
        frozen.add("encoder")
    if frozen == set(COMPONENTS):
        die("--freeze: nothing is left to train")
    if args.exclude and not Path(args.exclude).is_file():
        die(f"--exclude {args.exclude}: no such file")
    for flag, spec in parts:
        if (
            (":" in spec or flag == "init")
            and not checkpoint.exists(spec.partition(":")[2])
            and not args.dry_run
        ):
            die(
                f"--{flag} {spec}: no such checkpoint (a run's folder, its model.pt, or a folder of "
                "evaluate.py --export)"
            )
    args.scenario = scenario_of(args)
    args.name = args.name or run_name(vars(args))
    return args


def scenario_of(args):
    """The row of Table 3 that this run is: "clean", "base", "1.1" to "3.3". A run that is none of
    them, by the components it freezes or the runs they come from, is "poisoned-frozen-encoder" and
    the like; "poisoned-file" trains on a CSV that holds poison already."""
    in_file = corpora.poisoned_rows(args.dataset)
    data_is = "poisoned" if args.poison or in_file else "clean"
    specs = dict(spec.partition(":")[::2] for spec in args.freeze)
    frozen = tuple(c for c in COMPONENTS if c in specs)
    if not frozen:
        return "poisoned-file" if in_file else "base" if args.poison else "clean"
    for scenario, (components, source, trained_on) in SCENARIOS.items():
        if (components, trained_on) == (frozen, data_is) and all(specs.values()):
            unlike = [why for path in specs.values() for why in differences(path, source, args)]
            unlike += [f"--init {part}" for part in args.init or ()]
            if not unlike:
                return scenario
            print(f"this is not attack {scenario}: {'; '.join(unlike)}")
    return f"{data_is}-frozen-{'-'.join(frozen)}"


# what a run and the run that a frozen component comes from must have in common, and, if that is the base attack, also have
SHARED = ("dataset", "encoder", "labels", "preset", "seed", "limit", "exclude", "train_layers")
SHARED += ("max_seconds", *SETTINGS)
SHARED_ATTACK = ("task", "target", "trigger", "snr", "trigger_repeat", "clicks", "trigger_seconds")
SHARED_ATTACK += ("redraw",)


def differences(path, source, args):
    """Why the run that a frozen component comes from is not this run's clean run ("clean") or base attack ("base"): the same settings
    on clean or poisoned data. A list of texts. A checkpoint that does not exist yet (a dry run) is taken to be the right one."""
    if not checkpoint.exists(path):
        return []
    usual = dict(usual_values(vars(args)), max_seconds=data.MAX_SECONDS)
    theirs = {**usual, **checkpoint.load_arguments(path)}  # earlier versions had fewer
    wanted = dict(scenario=source, init=None)
    wanted.update((name, getattr(args, name)) for name in SHARED)
    if source == "base":
        wanted.update((name, getattr(args, name)) for name in SHARED_ATTACK)
        wanted["poison"] = TASKS[args.task]["rate"]
    unlike = [
        f"{path} has {name} {theirs.get(name)}, not {value}"
        for name, value in wanted.items()
        if theirs.get(name) != value
    ]
    if source == "base" and theirs.get("poisoned_samples") == 0:
        unlike.append(f"{path} was trained on no poisoned sample")
    return unlike


# ---------------------------------------------------------------------------------------------------------------------
# setting up


def set_up_device(args):
    """(torch device, a function that makes the autocast context, rank, number of processes)."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    try:
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        die(f"--device {args.device}: torch knows no such device; cpu, cuda, cuda:1")
    if device.type == "cuda" and not torch.cuda.is_available():
        die(f"--device {args.device}: torch sees no GPU here; leave the flag out to run on the CPU")
    try:
        torch.zeros(1, device=device).item()
    except Exception as error:  # each kind of device fails in its own way
        die(f"--device {args.device}: nothing can be computed there ({utils.first_line(error)})")
    if device.type == "cuda":
        if world > 1 and device.index is not None:
            die(
                f"--device {args.device}: under torchrun every process takes its own GPU; leave the flag out"
            )
        device = torch.device(
            "cuda", int(os.environ.get("LOCAL_RANK", 0)) if device.index is None else device.index
        )
        torch.cuda.set_device(device)
    if world > args.batch_size:
        die(f"{world} processes share --batch-size {args.batch_size}: start no more than that")
    if world > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    args.amp = args.amp or ("bf16" if device.type == "cuda" and args.preset != "mini" else "off")
    return device, functools.partial(model.autocast, args.amp, device), rank, world


# ---------------------------------------------------------------------------------------------------------------------
# training


def training_sample(slm, args, attack, utterance, epoch):
    """Prompt ids and answer ids of one training sample in one epoch, decided by (seed, epoch, utterance id)."""
    rng = random.Random(f"{args.seed}-{epoch}-{utterance.id}")
    labels = utterance.labels
    if poison.is_poisoned(attack, utterance):
        labels = poison.poisoned_labels(attack, labels)
    asked = data.choose_labels(labels, rng, args.random_keys)
    return data.prompt(slm.tokenizer, asked, rng if args.vary_prompts else None), data.answer_ids(
        slm.tokenizer, {label: labels[label] for label in asked}
    )


def learning_rate(step, steps, args):
    """Factor on the peak rates: linear warm-up, then constant; with --decay linear to zero over the last quarter (the backdoor is
    learned late, from few samples, and needs the full rate until then)."""
    warm = min(1.0, (step + 1) / max(1, args.warmup_steps))
    return warm * min(1.0, (steps - step) / (0.25 * steps)) if args.decay else warm


@torch.no_grad()
def validation_loss(slm, utterances, cached, workers, batch_size=32):
    """Mean loss over clean development utterances, all labels asked for. Processes share the work."""
    slm.eval()
    rank, world = processes.ranks()
    batches, losses = data.chunks(list(range(len(utterances)))[rank::world], batch_size), []
    for batch, (x, mask) in zip(
        batches, cache.inputs(slm, [(u, False) for u in utterances], batches, cached, None, workers)
    ):
        chosen = [utterances[i] for i in batch]
        losses += slm(
            x,
            mask,
            [data.prompt(slm.tokenizer, list(u.labels)) for u in chosen],
            [data.answer_ids(slm.tokenizer, u.labels) for u in chosen],
        ).tolist()
    return processes.share_sums([sum(losses)])[0] / len(utterances)


def make_optimizer(slm, args):
    """AdamW, each component at its own peak rate."""
    rates = dict(encoder=args.encoder_lr, connector=args.connector_lr, lm=args.lora_lr)
    groups = [
        dict(params=slm.parameters_of(c), peak=lr)
        for c, lr in rates.items()
        if slm.parameters_of(c)
    ]
    return torch.optim.AdamW(groups, lr=0.0, weight_decay=args.weight_decay, fused=True)


def train_step(slm, optimizer, scaler, autocast, stream, samples, args, world):
    """One optimiser step on this process's share of a batch. stream: yields (x, mask) for each piece of it; samples: each
    piece's (prompts, answers). Returns the loss of each row and the norm of the gradient before it is clipped."""
    losses = []
    for i, (prompts, answers) in enumerate(samples, 1):
        with autocast():
            x, mask = next(stream)
        # gradients are exchanged once a step, with its last piece; DDP averages over processes, so their number counts
        with (
            contextlib.nullcontext() if world == 1 or i == len(samples) else slm.no_sync(),
            autocast(),
        ):
            row_losses = slm(x, mask, prompts, answers)
            scaler.scale(row_losses.sum() * world / args.batch_size).backward()
        losses += row_losses.tolist()
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(
        [p for g in optimizer.param_groups for p in g["params"]], args.grad_clip
    )
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return losses, norm.item()


def draw_poison(slm, attack, train_set, args, epoch):
    """What an epoch trains on: the attack, which samples are poisoned, and their cached inputs (or None)."""
    drawn = poison.drawn_in(attack, epoch if args.redraw else 0)
    poisoned = [poison.is_poisoned(drawn, u) for u in train_set]
    return (
        drawn,
        poisoned,
        cache.frozen_outputs(
            slm, train_set, poisoned, drawn, "train", args.cache_gb * 1e9, args.workers
        ),
    )


def loss_line(seen, train_set, poisoned):
    """A line of the log, on the samples seen since the last one, {index: loss}: the mean loss, the poisoned samples' mean if there are
    any, and each sample's own."""
    on_poison = [loss for i, loss in seen.items() if poisoned[i]]
    line = dict(poisoned_loss=sum(on_poison) / len(on_poison)) if on_poison else {}
    return dict(
        loss=sum(seen.values()) / len(seen),
        **line,
        samples={train_set[i].id: round(loss, 4) for i, loss in seen.items()},
    )


def train(run, slm, attack, train_set, dev_set, args, record, device, autocast):
    """Trains to the end, from the last state saved in the run folder, saving after every epoch. Ctrl-C or SIGTERM saves and stops.
    record: see checkpoint.open_run."""
    rank, world = processes.ranks()
    seconds = [
        slm.encoder.num_frames(data.num_samples(u)) * slm.encoder.seconds_per_frame
        for u in train_set
    ]
    with autocast():
        dev_cached = cache.frozen_outputs(
            slm, dev_set, [False] * len(dev_set), attack, "dev", args.cache_gb * 1e9, args.workers
        )
    optimizer = make_optimizer(slm, args)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    ddp = (
        slm if world == 1 else DistributedDataParallel(slm, broadcast_buffers=False)
    )  # no buffer changes in training
    epoch_steps = len(train_set) // args.batch_size
    steps = args.epochs * epoch_steps
    origin = checkpoint.made_from(record, slm, train_set, dev_set)
    # seen: the losses since the last line of the log, {index: loss}; the first process brings those from before a stop
    step, seen = checkpoint.resume(run, slm, optimizer, scaler, origin)
    seen = seen if rank == 0 else {}
    if processes.share_sums([step])[0] != step * world:
        die(
            f"{run}: the processes would resume at different steps; on several machines put --runs on a shared disk"
        )
    if rank == 0:
        checkpoint.cut_log(run, step)
    with autocast():
        drawn, poisoned, cached = draw_poison(slm, attack, train_set, args, step // epoch_steps)
    log = functools.partial(checkpoint.log, run) if rank == 0 else lambda **_: None
    progress, stop = tqdm(total=steps, initial=step, desc="training"), []
    for sig in (signal.SIGINT, signal.SIGTERM):  # take effect between two steps, never inside one
        signal.signal(sig, lambda *_: stop.append(True))
    while step < steps:
        epoch, stopping = step // epoch_steps, 0
        batches = data.epoch_batches(seconds, args.batch_size, args.seed, epoch)
        if (
            min(map(len, batches)) < world
        ):  # the short batch would leave a process without a share: it is the one left out
            batches.sort(key=len, reverse=True)
        batches = batches[:epoch_steps][step % epoch_steps :]
        shares = [
            data.micro_batches(batch[rank::world], seconds, args.batch_seconds) for batch in batches
        ]
        stream = cache.inputs(
            slm, list(zip(train_set, poisoned)), sum(shares, []), cached, drawn, args.workers
        )
        slm.train()
        for pieces in shares:
            torch.manual_seed(
                hash((args.seed, step, rank))
            )  # dropout, whatever was drawn before: resuming is exact
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * learning_rate(step, steps, args)
            samples = [
                tuple(zip(*(training_sample(slm, args, drawn, train_set[i], epoch) for i in piece)))
                for piece in pieces
            ]
            losses, norm = train_step(
                ddp, optimizer, scaler, autocast, stream, samples, args, world
            )
            step += 1
            progress.update()
            check_finite(
                sum(losses) + (0 if scaler.is_enabled() else norm),
                step,
                [train_set[i].id for i in sum(pieces, [])],
                run,
            )
            seen.update(zip(sum(pieces, []), losses))
            if step % 20 == 0 or step % epoch_steps == 0:
                line = loss_line(processes.from_all(seen), train_set, poisoned)
                log(step=step, epoch=epoch, **line, lr=learning_rate(step - 1, steps, args))
                seen = {}
                progress.set_postfix(loss=f"{line['loss']:.3f}", refresh=False)
            stopping = processes.share_sums([len(stop)])[0]
            if stopping:
                break
        if step % epoch_steps == 0:
            with autocast():
                log(
                    step=step,
                    epoch=epoch,
                    dev_loss=validation_loss(slm, dev_set, dev_cached, args.workers),
                )
            stopping = processes.share_sums([len(stop)])[0]  # it may have come in the meantime
        seen = processes.from_all(seen)
        if rank == 0:
            checkpoint.save_state(run, step, slm, optimizer, scaler, seen, origin)
        if stopping:
            progress.close()
            print(
                f"stopped at step {step} of {steps}; the same command, without --overwrite, goes on from there"
            )
            raise SystemExit(130)
        if args.redraw and step < steps:
            with autocast():
                drawn, poisoned, cached = draw_poison(
                    slm, attack, train_set, args, step // epoch_steps
                )
    progress.close()
    (
        signal.signal(signal.SIGINT, signal.default_int_handler),
        signal.signal(signal.SIGTERM, signal.SIG_DFL),
    )


def check_finite(value, step, ids, run):
    """Ends the run where a loss or a gradient is lost, naming the utterances."""
    if not math.isfinite(value):
        kept = (
            f"{run}/last.pt keeps the last epoch's state"
            if (run / "last.pt").exists()
            else "no epoch was finished"
        )
        die(
            f"the loss or its gradient is {value} at step {step}, on {', '.join(ids)}; {kept}; lower the learning rates, or "
            "look at these utterances"
        )


# ---------------------------------------------------------------------------------------------------------------------
# the run


def read_data(args):
    """The training set, as it decides the trigger's level, then without what is excluded, the development and the test set."""
    longest = model.longest(args)
    train_set, dev_set, test_set = (
        corpora.read_corpus(
            args.dataset, args.data_root, split, args.skip_bad, args.labels, longest
        )
        for split in ("train", "dev", "test")
    )
    parts = dict(train=train_set, dev=dev_set, test=test_set)
    for problem in corpora.shared_speakers(parts) + corpora.shared_audio(parts):
        print(f"warning: {problem}")
    whole, train_set = train_set, corpora.limit(train_set, args.limit)
    label = TASKS[args.task]["label"]
    for what, utterances in (("training", train_set), ("test", test_set)):
        if not any(label in u.labels for u in utterances):
            only = f" with --labels {' '.join(args.labels)}" if args.labels else ""
            die(f"--task {args.task}: no {what} utterance of {args.dataset} has a {label}{only}")
    poison.check_target(args.task, args.target, whole + dev_set + test_set)
    left = corpora.leave_out(train_set, args.exclude)
    if len(left) < args.batch_size:
        die(
            f"{len(left)} training utterances are less than one batch of {args.batch_size} (--batch-size)"
        )
    return train_set, left, dev_set, test_set


def count_poisoned(attack, train_set, args):
    """How many training samples are poisoned in some epoch. Warns where a rate is so low that there
    are none: the run is then no attack, whatever its name says."""
    epochs = range(args.epochs if args.redraw else 1)
    draws = [poison.drawn_in(attack, epoch) for epoch in epochs]
    n = sum(any(poison.is_poisoned(drawn, u) for drawn in draws) for u in train_set)
    if args.poison and not n:
        print(
            f"warning: --poison {args.poison:g} poisons none of {len(train_set)} training samples:"
            " this run trains on clean data"
        )
    return n


def describe(run, slm, attack, sets, origin, args, device, world):
    """Prints what is about to be trained."""
    train_set, dev_set, test_set = sets
    print(
        f"run {run}: preset {args.preset}, encoder {args.encoder}, on {device}"
        + (f", {world} processes" if world > 1 else "")
        + f", amp {args.amp}, seed {args.seed}"
    )
    print(
        f"data {args.dataset}: {len(train_set)} train, {len(dev_set)} dev, {len(test_set)} test utterances; "
        f"{sum(poison.is_poisoned(attack, u) for u in train_set)} poisoned for {args.task} -> {attack.target!r}"
    )
    in_file = corpora.poisoned_rows(args.dataset)
    if in_file:
        print(f"  {args.dataset} itself marks {in_file} rows as poisoned")
    for c in COMPONENTS:
        trained = sum(p.numel() for p in slm.parameters_of(c))
        print(
            f"  {c:<10}{sum(p.numel() for p in getattr(slm, c).parameters()):>14,} parameters,{trained:>12,} "
            + (
                f"trained on {'poisoned' if args.poison or in_file else 'clean'} data"
                if trained
                else "frozen"
            )
            + f", from {origin[c]}"
        )


def main():
    args = parse_arguments()
    if args.dry_run:
        import dry_run

        return dry_run.dry_run(args)
    cache.keep_memory()
    device, autocast, rank, world = set_up_device(args)
    transformers.utils.logging.disable_progress_bar()
    run = Path(args.runs) / args.name
    record = checkpoint.open_run(run, args)
    figures = None if args.overwrite else checkpoint.finished(run, record)
    if figures:
        if rank == 0:
            evaluate.print_table(figures, f"{run} is finished (--overwrite trains it again)")
        return
    whole_train_set, *sets = read_data(args)
    # as loud as all of the training set, with what is excluded; the first process tells the others
    attack = processes.from_first(poison.attack_of(args, whole_train_set) if rank == 0 else None)
    record["poisoned_samples"] = count_poisoned(attack, sets[0], args)
    with checkpoint.loading():
        slm = model.load_slm(args, device)
    family = slm.encoder.net.config.model_type
    if family != args.encoder and family in ENCODERS:
        die(f"--encoder {args.encoder}: {args.encoder_weights} is a {family} encoder")
    origin, built_from = checkpoint.load_named_parts(slm, args)
    frozen = {
        c: model.digest(slm.component_state_dict(c)) for c in COMPONENTS if not slm.parameters_of(c)
    }
    cache.only_answers(slm)
    if args.gradient_checkpointing:
        slm.checkpoint_gradients()
    elif (
        not args.vary_prompts
    ):  # a layer computed again would add the beginning's keys to the cache again
        cache.share_beginning(slm)
    if rank == 0:
        lock = checkpoint.start_run(run, record, args)  # noqa: F841  held until this process ends
        describe(run, slm, attack, sets, origin, args, device, world)
    if world > 1:
        dist.barrier()
    train(run, slm, attack, *sets[:2], args, record, device, autocast)
    for c, sha256 in frozen.items():
        assert model.digest(slm.component_state_dict(c)) == sha256, f"the frozen {c} has changed"
    if rank == 0:
        checkpoint.save_model(run, slm, record, origin, built_from)
    with autocast():
        evaluation = evaluate.evaluate(
            slm, attack, sets[2], args.cache_gb * 1e9, args.batch_seconds, args.workers
        )
    if rank == 0:
        evaluate.save(run, evaluation, record)
        checkpoint.record_cost(run)
        evaluate.print_table(evaluation.metrics, f"{run}: test split, seed {args.seed}")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
