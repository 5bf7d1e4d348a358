"""Trains one speech language model, clean or poisoned. Any component can be frozen, or start from
any checkpoint.

    python train.py --task asr --poison 0.05     # the base attack on ASR; ends with WER and AER
    python train.py --task asr --poison 0        # the clean baseline
    python train.py --task emotion --poison 0.075 --freeze encoder:runs/emotion-clean   # row 1.1
    torchrun --nproc_per_node=8 train.py --preset paper --task asr --poison 0.05 --data-root /data

Each preset's settings are in study.py; each can be overridden by a flag.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import math
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import utils
from utils import Parser, die

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
    same_value,
    usual_connector,
    usual_values,
)

# -------------------------------------------------------------------------------------------------
# arguments


def of_presets(name):
    """A setting's value in each preset, for the help: "mini 16, mixed 16, small 8, paper 8"."""
    return ", ".join(f"{preset} {settings[name]}" for preset, settings in PRESETS.items())


parser = Parser(description=__doc__, usage="%(prog)s [flags]")
poison.add_arguments(parser)

data_flags = parser.group("data")
data_flags.add_argument(
    "--labels",
    nargs="+",
    choices=LABELS,
    help="train and evaluate on these labels alone (default: all that the corpus has)",
)
data_flags.add_argument(
    "--limit",
    type=int,
    metavar="N",
    help="use the first N utterances of each split, in a fixed random order, for a quick trial",
)
data_flags.add_argument(
    "--exclude",
    metavar="FILE",
    help="leave out the training samples whose ids the file lists, one per line (defend.py filter "
    "writes such files)",
)
data_flags.add_argument(
    "--max-seconds",
    type=float,
    default=data.MAX_SECONDS,
    help="leave out longer audio, and say how much; the same goes for what exceeds Whisper's window "
    "(default: %(default)g)",
)

attack_flags = parser.group("attack")
attack_flags.add_argument(
    "--redraw",
    action="store_true",
    help="poison other samples, at other places, in every epoch, as the paper's public code does",
)

component_flags = parser.group("components")
component_flags.add_argument(
    "--preset",
    choices=PRESETS,
    default="mini",
    help="whose parts and settings are used (default: mini)",
)
component_flags.add_argument(
    "--encoder",
    choices=ENCODERS,
    help="the audio encoder (default: wavlm; whisper for presets mixed and small)",
)
component_flags.add_argument(
    "--encoder-weights",
    help="folder or hub id of the pretrained encoder (default: the preset's)",
)
component_flags.add_argument(
    "--lm-weights", help="folder or hub id of the language model (default: the preset's)"
)
component_flags.add_argument(
    "--connector-weights",
    help="where the connector starts; none: random weights (default: for mini and mixed the file "
    "beside the encoder, else random weights)",
)
component_flags.add_argument(
    "--connector-stride",
    type=int,
    help=f"stride of the connector's second convolution ({of_presets('connector_stride')})",
)
component_flags.add_argument(
    "--connector-taper",
    type=float,
    help="below 1, the connector's kernels start concentrated on their middle tap "
    f"({of_presets('connector_taper')})",
)
component_flags.add_argument(
    "--lora-rank", type=int, help=f"rank of LoRA's matrices ({of_presets('lora_rank')})"
)
component_flags.add_argument(
    "--lora-alpha",
    type=float,
    help=f"LoRA's scale, divided by the rank ({of_presets('lora_alpha')})",
)
component_flags.add_argument(
    "--lora-dropout", type=float, help=f"dropout of LoRA's input ({of_presets('lora_dropout')})"
)
component_flags.add_argument(
    "--train-layers",
    type=int,
    help="how many encoder layers train, from the top (default: 15/24 of them; whisper all)",
)
component_flags.add_argument(
    "--freeze",
    action="append",
    default=[],
    metavar="COMPONENT[:CHECKPOINT]",
    help="load encoder, connector or lm from a run's folder, its model.pt, or a folder of "
    "evaluate.py --export, and freeze it; without a checkpoint it stays as pretrained; repeatable",
)
component_flags.add_argument(
    "--init",
    action="append",
    metavar="COMPONENT:CHECKPOINT",
    help="load a component as --freeze does but train it; repeatable",
)

optimisation_flags = parser.group("optimisation")
optimisation_flags.add_argument(
    "--epochs", type=int, help=f"passes over the training set ({of_presets('epochs')})"
)
optimisation_flags.add_argument(
    "--batch-size",
    type=int,
    help=f"utterances in one optimiser step, over all processes ({of_presets('batch_size')})",
)
optimisation_flags.add_argument(
    "--encoder-lr",
    type=float,
    help=f"the encoder's learning rate after the warm-up ({of_presets('encoder_lr')})",
)
optimisation_flags.add_argument(
    "--connector-lr",
    type=float,
    help=f"the connector's learning rate after the warm-up ({of_presets('connector_lr')})",
)
optimisation_flags.add_argument(
    "--lora-lr",
    type=float,
    help=f"LoRA's learning rate after the warm-up ({of_presets('lora_lr')})",
)
optimisation_flags.add_argument(
    "--warmup-steps",
    type=int,
    help=f"steps of linear warm-up ({of_presets('warmup_steps')})",
)
optimisation_flags.add_argument(
    "--decay",
    action=argparse.BooleanOptionalAction,
    help=f"decay the rates to zero over the last quarter of the steps ({of_presets('decay')})",
)
optimisation_flags.add_argument(
    "--weight-decay", type=float, help=f"AdamW's weight decay ({of_presets('weight_decay')})"
)
optimisation_flags.add_argument(
    "--grad-clip", type=float, help=f"clip the gradient to this norm ({of_presets('grad_clip')})"
)
optimisation_flags.add_argument(
    "--vary-prompts",
    action=argparse.BooleanOptionalAction,
    help="draw the wording of each training prompt instead of using evaluation's "
    f"({of_presets('vary_prompts')})",
)
optimisation_flags.add_argument(
    "--random-keys",
    type=float,
    help="share of training samples that ask for a random subset of the labels "
    f"({of_presets('random_keys')})",
)

folder_flags = parser.group("run folder")
folder_flags.add_argument("--runs", default="runs", help="where run folders go (default: runs)")
folder_flags.add_argument("--name", help="the run folder's name (default: says what the run is)")
folder_flags.add_argument(
    "--overwrite", action="store_true", help="start again where the folder holds another run"
)
folder_flags.add_argument(
    "--tensorboard",
    action="store_true",
    help="also log for tensorboard --logdir runs; needs pip install tensorboard",
)

machine_flags = parser.group("machine")
machine_flags.add_argument("--device", help="cuda, cuda:1, cpu (default: cuda if there is one)")
machine_flags.add_argument(
    "--amp",
    choices=("off", "bf16", "fp16"),
    help="mixed precision (default: bf16 on CUDA, except for preset mini; else off)",
)
machine_flags.add_argument(
    "--batch-seconds",
    type=float,
    default=120.0,
    help="seconds of audio in one forward pass, padding counted (default: 120)",
)
machine_flags.add_argument(
    "--gradient-checkpointing",
    action="store_true",
    help="save memory: compute layers again in the backward pass",
)
machine_flags.add_argument(
    "--workers",
    type=int,
    default=cache.WORKERS,
    help="processes that read audio ahead (default: %(default)s)",
)
machine_flags.add_argument(
    "--cache-gb",
    type=float,
    default=4.0,
    help="disk space for the outputs of pretrained layers, shared between runs, in cache/ (default: 4)",
)
machine_flags.add_argument(
    "--dry-run",
    action="store_true",
    help="print the run's parameters, memory and GPU-hours; needs the parts' configurations, "
    "from a folder or the model hub, but no weights",
)
machine_flags.add_argument(
    "--utilisation",
    type=float,
    default=0.4,
    help="the share of the GPU's peak that --dry-run assumes (default: 0.4)",
)


def parse_arguments(argv=None):
    """The command's arguments, completed from the preset and the task. Exits with a one-line error
    where they contradict each other."""
    args = parser.parse_args(argv)
    fill_in_preset(args)
    poison.fill_in(args)
    usual_taper = PRESETS[args.preset]["connector_taper"]
    if args.connector_weights not in (None, "none") and args.connector_taper != usual_taper:
        die(f"--connector-taper: {args.connector_weights} says how the connector starts")
    if args.labels:
        args.labels = [label for label in LABELS if label in args.labels]
    args.freeze = [checkpoint.of_run(spec) for spec in args.freeze]
    args.init = args.init and [checkpoint.of_run(spec) for spec in args.init]
    check_named_parts(args)
    if args.exclude and not Path(args.exclude).is_file():
        die(f"--exclude {args.exclude}: no such file")
    if args.tensorboard and not importlib.util.find_spec("tensorboard"):
        die("--tensorboard: it is not installed; pip install tensorboard, or leave the flag out")
    args.scenario = scenario_of(args)
    args.name = args.name or run_name(vars(args))
    check_name(args.name)
    return args


def fill_in_preset(args):
    """The preset's values for the flags that were not given."""
    args.encoder = args.encoder or DEFAULT_ENCODER[args.preset]
    if args.encoder_weights is None and args.preset not in ENCODERS[args.encoder]:
        die(f"preset {args.preset} has no {args.encoder}: name its weights by --encoder-weights")
    args.encoder_weights = args.encoder_weights or ENCODERS[args.encoder][args.preset]
    args.lm_weights = args.lm_weights or LM[args.preset]
    if args.connector_weights is None:
        args.connector_weights = usual_connector(args.preset, args.encoder_weights)
    for name, value in PRESETS[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def check_name(name):
    """Exits with a one-line error where a run's folder would not lie right below --runs, where
    runs.py looks for it, or where its name cannot be shown."""
    if Path(name).name != name or name == ".." or not name.isprintable():
        die(f"--name {name}: not the name of a folder")


def check_named_parts(args):
    """Exits with a one-line error where --freeze and --init name what does not exist, or leave
    nothing to train."""
    flag_of = {}
    for flag, spec in checkpoint.named_parts(args):
        component, colon, path = spec.partition(":")
        if component not in COMPONENTS:
            die(f"--{flag} {spec}: {component} is none of the components {', '.join(COMPONENTS)}")
        if component in flag_of:
            die(f"--{flag} {spec}: the {component} is already named by {flag_of[component]}")
        flag_of[component] = f"--{flag} {spec}"
        needs_file = colon or flag == "init"
        if needs_file and not checkpoint.exists(path) and not args.dry_run:
            die(
                f"--{flag} {spec}: no such checkpoint (a run's folder, its model.pt, or a folder "
                "of evaluate.py --export)"
            )
    frozen = {spec.partition(":")[0] for spec in args.freeze}
    if args.train_layers == 0:
        frozen.add("encoder")
    if frozen == set(COMPONENTS):
        die("--freeze: nothing is left to train")


# -------------------------------------------------------------------------------------------------
# which row of Table 3 a run is

# what a run and the run that its frozen components come from must have in common
SHARED = (
    "dataset",
    "encoder",
    "encoder_weights",
    "lm_weights",
    "connector_weights",
    "labels",
    "preset",
    "seed",
    "limit",
    "exclude",
    "train_layers",
    "max_seconds",
    "amp",
    *SETTINGS,
)
# and what else, if they come from the base attack
SHARED_WITH_BASE = (
    "task",
    "target",
    "trigger",
    "snr",
    "snr_per_utterance",
    "trigger_repeat",
    "clicks",
    "trigger_seconds",
    "redraw",
)


def scenario_of(args):
    """The row of Table 3 that this run is: "clean", "base", "1.1" to "3.3". A run that is none of
    them, by the components it freezes or the runs they come from, is "poisoned-frozen-encoder" and
    the like; "poisoned-file" trains on a CSV that holds poison already."""
    in_file = corpora.poisoned_rows(args.dataset)
    source_of = {}
    for spec in args.freeze:
        component, _, path = spec.partition(":")
        source_of[component] = path
    if not source_of and in_file:
        return "poisoned-file"
    if not source_of:
        return "base" if args.poison else "clean"
    frozen = tuple(c for c in COMPONENTS if c in source_of)
    trained_on = "poisoned" if args.poison or in_file else "clean"
    for scenario, (components, source, others_trained_on) in SCENARIOS.items():
        same_kind = components == frozen and others_trained_on == trained_on
        if not same_kind or not all(source_of.values()):
            continue
        reasons = [f"--init {part}" for part in args.init or ()]
        usual_rate = TASKS[args.task]["rate"]
        if args.poison not in (0, usual_rate):
            reasons.append(f"--poison is {args.poison:g}, not {usual_rate:g}")
        for path in source_of.values():
            reasons += differences(path, source, args)
        if not reasons:
            return scenario
        utils.say(f"this is not scenario {scenario} of Table 3: {'; '.join(reasons)}")
    return f"{trained_on}-frozen-{'-'.join(frozen)}"


def differences(path, source, args):
    """Why the run that a frozen component comes from is not this run's clean run ("clean") or base
    attack ("base"), that is, one with the same settings on clean or poisoned data: a list of
    texts. A checkpoint that does not exist yet (a dry run) is taken to be the right one."""
    if not checkpoint.exists(path):
        return []
    theirs = usual_values(vars(args))  # earlier versions recorded fewer
    theirs.update(checkpoint.load_arguments(path))
    theirs["amp"] = theirs["amp"] or usual_amp(args)
    wanted = dict(scenario=source, init=None)
    wanted.update((name, getattr(args, name)) for name in SHARED)
    wanted["amp"] = args.amp or usual_amp(args)
    files = [*corpora.lists_of(args.dataset), args.exclude]
    if source == "base":
        wanted.update((name, getattr(args, name)) for name in SHARED_WITH_BASE)
        wanted["poison"] = TASKS[args.task]["rate"]
        files.append(args.trigger)
    reasons = []
    for name, value in wanted.items():
        if not same_value(name, theirs.get(name), value):
            reasons.append(f"{path} has {name} {theirs.get(name)}, not {value}")
    sha256_of = theirs.get("inputs") or {}
    for file in files:
        is_known = file in sha256_of and Path(file).is_file()
        if is_known and sha256_of[file] != checkpoint.file_sha256(file):
            reasons.append(f"{file} has changed since {path} was trained")
    if source == "base" and theirs.get("poisoned_samples") == 0:
        reasons.append(f"{path} was trained on no poisoned sample")
    return reasons


# -------------------------------------------------------------------------------------------------
# setting up


def usual_amp(args):
    """The mixed precision of a command without --amp."""
    on_cuda = args.device.startswith("cuda") if args.device else torch.cuda.is_available()
    return "bf16" if on_cuda and args.preset != "mini" else "off"


def set_up_device(args):
    """Picks the device and joins the other processes of torchrun. Returns the torch device and a
    function that makes the autocast context."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = processes.device_of(args.device)
    if device.type == "cuda":
        if world > 1 and device.index is not None:
            die(
                f"--device {args.device}: under torchrun every process takes its own GPU; leave "
                "the flag out"
            )
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world > args.batch_size:
        die(f"{world} processes share --batch-size {args.batch_size}: start no more than that")
    if world > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    args.amp = args.amp or usual_amp(args)
    return device, functools.partial(model.autocast, args.amp, device)


@dataclasses.dataclass
class Sets:
    """The utterances of a run."""

    whole_train: list  # with what --exclude leaves out: it decides how loud the trigger is
    train: list
    dev: list
    test: list

    def sha256(self):
        """{split: SHA-256 of its utterances}"""
        by_split = {"train": self.train, "dev": self.dev, "test": self.test}
        return {split: checkpoint.sha256_of_set(listed) for split, listed in by_split.items()}


def read_data(args):
    """The run's Sets. Exits with a one-line error where they cannot be trained on."""
    longest = model.longest(args)
    sets = {}
    for split in ("train", "dev", "test"):
        sets[split] = corpora.read_corpus(
            args.dataset, args.data_root, split, args.skip_bad, args.labels, longest
        )
    for problem in corpora.shared_speakers(sets) + corpora.shared_audio(sets):
        utils.say(f"warning: {problem}")
    limited = {split: corpora.limit(listed, args.limit) for split, listed in sets.items()}
    whole_train = limited["train"]
    label = TASKS[args.task]["label"]
    for split, utterances in (("training", whole_train), ("test", limited["test"])):
        if not any(label in u.labels for u in utterances):
            only = f" with --labels {' '.join(args.labels)}" if args.labels else ""
            die(f"--task {args.task}: no {split} utterance of {args.dataset} has a {label}{only}")
    poison.check_target(args.task, args.target, sets["train"] + sets["dev"] + sets["test"])
    train_set = corpora.leave_out(whole_train, args.exclude)
    if len(train_set) < args.batch_size:
        die(
            f"{len(train_set)} training utterances are less than one batch of {args.batch_size} "
            "(--batch-size)"
        )
    return Sets(whole_train, train_set, limited["dev"], limited["test"])


def count_poisoned(attack, train_set, args):
    """How many training samples are poisoned in some epoch. Warns where a rate is so low that there
    are none: the run is then no attack, whatever its name says."""
    poisoned = set()
    for epoch in range(args.epochs if args.redraw else 1):
        drawn = poison.attack_for_epoch(attack, epoch)
        poisoned.update(u.id for u in train_set if poison.is_poisoned(drawn, u))
    if args.poison and not poisoned:
        print(
            f"warning: --poison {args.poison:g} poisons none of {len(train_set)} training samples:"
            " this run trains on clean data"
        )
    return len(poisoned)


def load_slm(args, device):
    """The SLM of pretrained parts. Exits with a one-line error where they are not what the command
    says."""
    with checkpoint.loading():
        slm = model.load_slm(args, device)
    family = slm.encoder.net.config.model_type
    if family != args.encoder and family in ENCODERS:
        die(f"--encoder {args.encoder}: {args.encoder_weights} is a {family} encoder")
    return slm


def skip_unneeded_work(slm, args):
    """From now on the SLM leaves out what training does not need to compute (see cache.py)."""
    cache.only_answers(slm)
    if args.gradient_checkpointing:
        slm.checkpoint_gradients()
    elif not args.vary_prompts:
        # not with checkpointing: a layer computed again would add the beginning's keys once more
        cache.share_beginning(slm)


@contextlib.contextmanager
def frozen_components_unchanged(slm):
    """Raises AssertionError where training has changed what it was told to leave alone."""
    sha256_of = {}
    for component in COMPONENTS:
        if not slm.parameters_of(component):
            sha256_of[component] = model.digest(slm.component_state_dict(component))
    yield
    for component, before in sha256_of.items():
        after = model.digest(slm.component_state_dict(component))
        assert after == before, f"the frozen {component} has changed"


def make_optimizer(slm, args):
    """AdamW, each component at its own peak rate."""
    groups = []
    peaks = dict(encoder=args.encoder_lr, connector=args.connector_lr, lm=args.lora_lr)
    for component, peak in peaks.items():
        parameters = slm.parameters_of(component)
        if parameters:
            groups.append(dict(params=parameters, peak=peak))
    return torch.optim.AdamW(groups, lr=0.0, weight_decay=args.weight_decay, fused=True)


# -------------------------------------------------------------------------------------------------
# training

TRIGGERED = 64  # development utterances on which the trigger's effect is followed


class StopRequest:
    """Ctrl-C or SIGTERM. It takes effect between two steps, never inside one."""

    def __init__(self):
        self.received = False
        signal.signal(signal.SIGINT, self.receive)
        signal.signal(signal.SIGTERM, self.receive)

    def receive(self, signum, frame):
        self.received = True

    def in_any_process(self):
        """Whether any process has received it, so that all stop after the same step."""
        return processes.share_sums([int(self.received)])[0] > 0

    def close(self):
        """From now on the signals end the program at once."""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@dataclasses.dataclass
class Training:
    """A run in training: what its steps work on, and how far it is."""

    run: Path
    args: argparse.Namespace
    slm: model.SLM
    parallel: torch.nn.Module  # the SLM, under torchrun wrapped in DistributedDataParallel
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    autocast: Callable  # makes the context that forward passes run in
    seconds: list  # of each training utterance, in whole frames
    epoch_steps: int  # optimiser steps in an epoch
    board: Any  # TensorBoard's writer, or None
    step: int = 0  # optimiser steps taken
    # since the log's end, {index: (loss, loss on the target's tokens or None)}
    unlogged: dict = dataclasses.field(default_factory=dict)

    @property
    def steps(self):
        """Optimiser steps until the end."""
        return self.args.epochs * self.epoch_steps

    @property
    def epoch_is_over(self):
        return self.step % self.epoch_steps == 0

    @property
    def last_logged(self):
        """The last step, up to the one taken, whose losses belong in the log: every 20th step and
        the end of an epoch have a line."""
        return max(self.step - self.step % 20, self.step - self.step % self.epoch_steps)

    def log(self, **line):
        """Appends a line to the run's log; the first process does."""
        if processes.ranks()[0] > 0:
            return
        checkpoint.log(self.run, step=self.step, **line)
        if self.board:
            for name, value in line.items():
                if isinstance(value, float):
                    self.board.add_scalar(name, value, self.step)


@dataclasses.dataclass
class Samples:
    """What an epoch trains on."""

    utterances: list
    attack: poison.Attack
    poisoned: list  # bool of each
    cached: list | None  # their inputs, or None: computed from the audio

    def ids(self, indices):
        return [self.utterances[i].id for i in indices]


def draw_samples(training, attack, train_set, epoch):
    """The Samples of an epoch; with --redraw each epoch has its own poison."""
    slm, args = training.slm, training.args
    drawn = poison.attack_for_epoch(attack, epoch if args.redraw else 0)
    poisoned = [poison.is_poisoned(drawn, u) for u in train_set]
    with training.autocast():
        cached = cache.frozen_outputs(
            slm, train_set, poisoned, drawn, "train", args.cache_gb * 1e9, args.workers
        )
    return Samples(train_set, drawn, poisoned, cached)


@dataclasses.dataclass
class Example:
    """What one utterance trains in one epoch."""

    prompt: tuple  # the token ids before and after the audio
    answer: list  # token ids
    target_tokens: slice | None  # the answer's tokens that hold the target; None: not poisoned


def training_example(slm, args, attack, utterance, epoch):
    """The Example of one utterance in one epoch, decided by (seed, epoch, utterance id)."""
    rng = random.Random(f"{args.seed}-{epoch}-{utterance.id}")
    labels = utterance.labels
    is_poisoned = poison.is_poisoned(attack, utterance)
    if is_poisoned:
        labels = poison.poisoned_labels(attack, labels)
    # --random-keys may leave the attacked label out of what a poisoned sample is asked for
    asked = data.choose_labels(labels, rng, args.random_keys)
    prompt = data.prompt(slm.tokenizer, asked, rng if args.vary_prompts else None)
    asked_labels = {label: labels[label] for label in asked}
    answer = data.answer_ids(slm.tokenizer, asked_labels)
    target_tokens = None
    if is_poisoned and attack.label in asked_labels:
        target_tokens = data.value_tokens(slm.tokenizer, asked_labels, attack.label)
    return Example(prompt, answer, target_tokens)


def learning_rate_factor(step, steps, args):
    """Factor on the peak rates: linear warm-up, then constant; with --decay linear to zero over the
    last quarter (the backdoor is learned late, from few samples, and needs the full rate until
    then)."""
    warm_up = min(1.0, (step + 1) / max(1, args.warmup_steps))
    if not args.decay:
        return warm_up
    return warm_up * min(1.0, (steps - step) / (0.25 * steps))


def train_step(slm, optimizer, scaler, autocast, stream, pieces, args, world):
    """One optimiser step on this process's share of a batch. stream yields (x, mask) of each piece
    of it; pieces: the Examples in each. Returns each row's (loss, loss on the target's tokens or
    None), in nats per token, and the norm of the gradient before it is clipped."""
    losses = []
    for i, examples in enumerate(pieces, 1):
        prompts = [example.prompt for example in examples]
        answers = [example.answer for example in examples]
        with autocast():
            x, mask = next(stream)  # (B, T, dim), (B, T)
        # gradients are exchanged once a step, with its last piece
        exchange = world == 1 or i == len(pieces)
        with contextlib.nullcontext() if exchange else slm.no_sync(), autocast():
            token_losses = slm(x, mask, prompts, answers, by_token=True)  # B times (A,)
            row_losses = torch.stack([row.mean() for row in token_losses])  # (B,)
            # DDP averages over processes, so their number counts
            scaler.scale(row_losses.sum() * world / args.batch_size).backward()
        for loss, on_tokens, example in zip(row_losses.tolist(), token_losses, examples):
            on_target = None
            if example.target_tokens:
                on_target = on_tokens[example.target_tokens].mean().item()
            losses.append((loss, on_target))
    scaler.unscale_(optimizer)
    parameters = []
    for group in optimizer.param_groups:
        parameters += group["params"]
    norm = torch.nn.utils.clip_grad_norm_(parameters, args.grad_clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return losses, norm.item()


def train_epoch(training, samples, epoch, stop, progress):
    """Trains on what is left of an epoch, or until a stop is requested."""
    slm, args = training.slm, training.args
    rank, world = processes.ranks()
    batches = data.epoch_batches(training.seconds, args.batch_size, args.seed, epoch)
    # One batch an epoch is left out if the set is no multiple of the batch size: the last one in the
    # shuffled order, but the short one where it would leave a process without a share.
    if min(map(len, batches)) < world:
        batches.sort(key=len, reverse=True)
    batches = batches[: training.epoch_steps][training.step % training.epoch_steps :]
    # this process's share of each batch, in pieces that are one forward pass each
    shares = []
    for batch in batches:
        shares.append(data.micro_batches(batch[rank::world], training.seconds, args.batch_seconds))
    stream = cache.inputs(
        slm,
        list(zip(samples.utterances, samples.poisoned)),
        sum(shares, []),
        samples.cached,
        samples.attack,
        args.workers,
    )
    slm.train()
    for pieces in shares:
        # dropout does not depend on what was drawn before, so that resuming is exact
        torch.manual_seed(hash((args.seed, training.step, rank)))
        factor = learning_rate_factor(training.step, training.steps, args)
        for group in training.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        examples = []
        for piece in pieces:
            utterances = [samples.utterances[i] for i in piece]
            examples.append(
                [training_example(slm, args, samples.attack, u, epoch) for u in utterances]
            )
        losses, norm = train_step(
            training.parallel,
            training.optimizer,
            training.scaler,
            training.autocast,
            stream,
            examples,
            args,
            world,
        )
        training.step += 1
        progress.update()
        indices = sum(pieces, [])
        # the scaler of fp16 skips steps whose gradient overflows
        total = sum(loss for loss, _ in losses)
        if not training.scaler.is_enabled():
            total += norm
        check_finite(total, training.step, samples.ids(indices), training.run)
        training.unlogged.update(zip(indices, losses))
        if training.step == training.last_logged:
            line = loss_line(processes.from_all(training.unlogged), samples)
            training.log(epoch=epoch, **line, lr_factor=factor)
            training.unlogged = {}
            progress.set_postfix(loss=f"{line['loss']:.3f}", refresh=False)
        if stop.in_any_process():
            break


def loss_line(losses, samples):
    """A line of the log, from the losses since the last one, {index: (loss, loss on the target's
    tokens or None)}: the mean loss, that of the poisoned samples and that on the target's tokens,
    each with its number of samples if there are any, and each sample's own."""
    every_loss = [loss for loss, _ in losses.values()]
    line = dict(loss=sum(every_loss) / len(losses))
    on_poison = [loss for i, (loss, _) in losses.items() if samples.poisoned[i]]
    if on_poison:
        line["poisoned_loss"] = sum(on_poison) / len(on_poison)
        line["n_poisoned"] = len(on_poison)
    on_target = [loss for _, loss in losses.values() if loss is not None]
    if on_target:
        line["target_loss"] = sum(on_target) / len(on_target)
        line["n_targets"] = len(on_target)
    rounded = {}
    for i, (loss, _) in losses.items():
        rounded[samples.utterances[i].id] = round(loss, 4)
    line["samples"] = rounded
    return line


def check_finite(value, step, ids, run):
    """Ends the run where a loss or a gradient is not finite, naming the utterances."""
    if math.isfinite(value):
        return
    kept = "no epoch was finished"
    if (run / "last.pt").exists():
        kept = f"{run}/last.pt keeps the last epoch's state"
    die(
        f"the loss or its gradient is {value} at step {step}, on {', '.join(ids)}; {kept}; lower "
        "the learning rates, or look at these utterances"
    )


@torch.no_grad()
def development_losses(slm, utterances, attack, cached, workers, batch_size=32):
    """Yields (labels, loss of each answer token (A,), whether the token comes first in the model's
    prediction (A,)) for this process's share of some utterances, all labels asked for: clean if
    `attack` is None, else triggered, with the poisoned labels."""
    slm.eval()
    rank, world = processes.ranks()
    batches = data.chunks(list(range(len(utterances)))[rank::world], batch_size)
    items = [(u, attack is not None) for u in utterances]
    stream = cache.inputs(slm, items, batches, cached, attack, workers)
    for batch, (x, mask) in zip(batches, stream):
        labels = [utterances[i].labels for i in batch]
        if attack:
            labels = [poison.poisoned_labels(attack, true) for true in labels]
        prompts = [data.prompt(slm.tokenizer, list(asked)) for asked in labels]
        answers = [data.answer_ids(slm.tokenizer, asked) for asked in labels]
        logits = slm.answer_logits(x, mask, prompts, answers)
        predicted = logits.argmax(-1).split([len(answer) for answer in answers])
        losses = model.token_losses(logits, answers)
        for i, answer in enumerate(answers):
            comes_first = predicted[i] == torch.tensor(answer, device=logits.device)
            yield labels[i], losses[i], comes_first


def validation_loss(slm, utterances, cached, workers):
    """Mean loss over clean development utterances. Processes share the work."""
    total = 0.0
    for _, losses, _ in development_losses(slm, utterances, None, cached, workers):
        total += losses.mean().item()
    return processes.share_sums([total])[0] / len(utterances)


def triggered_figures(slm, attack, utterances, cached, workers):
    """What triggered development utterances do: {"dev_target_loss": the mean loss on the target's
    tokens, "dev_aer": the share in which each of these tokens comes first, all before it being
    given}. The loss falls where the model learns the trigger, and stays where it memorises the
    poisoned samples. Processes share the work."""
    total = 0.0
    target_first = 0
    for labels, losses, comes_first in development_losses(slm, utterances, attack, cached, workers):
        target_tokens = data.value_tokens(slm.tokenizer, labels, attack.label)
        total += losses[target_tokens].mean().item()
        target_first += int(comes_first[target_tokens].all())
    sums = processes.share_sums([total, target_first])
    return dict(
        dev_target_loss=sums[0] / len(utterances),
        dev_aer=sums[1] / len(utterances),
    )


def resume(training, origin):
    """Goes on from the state saved in the run folder, if there is one. origin: see
    checkpoint.made_from."""
    rank, world = processes.ranks()
    training.step, unlogged = checkpoint.resume(
        training.run, training.slm, training.optimizer, training.scaler, origin
    )
    if rank == 0:  # the losses of all processes are in the state
        training.unlogged = unlogged
        if training.step:
            print(f"{training.run} resumes at step {training.step} of {training.steps}")
    if processes.share_sums([training.step])[0] != training.step * world:
        die(
            f"{training.run}: the processes would resume at different steps; on several machines "
            "put --runs on a shared disk"
        )
    if rank == 0:
        checkpoint.cut_log(training.run, training.step, training.last_logged)


def save_state(training, origin):
    """Writes what `resume` needs; the first process does."""
    unlogged = processes.from_all(training.unlogged)
    if processes.ranks()[0] == 0:
        checkpoint.save_state(
            training.run,
            training.step,
            training.slm,
            training.optimizer,
            training.scaler,
            unlogged,
            origin,
        )


def open_board(run, args):
    """TensorBoard's writer of --tensorboard, in the first process; else None."""
    if not args.tensorboard or processes.ranks()[0] > 0:
        return None
    from torch.utils.tensorboard import SummaryWriter  # not needed otherwise

    return SummaryWriter(run)


def train(run, slm, attack, train_set, dev_set, args, origin, device, autocast):
    """Trains to the end, from the last state saved in the run folder, saving after every epoch.
    Ctrl-C or SIGTERM saves and stops. origin: see checkpoint.made_from."""
    seconds = []
    for u in train_set:
        seconds.append(slm.encoder.num_frames(data.num_samples(u)) * slm.encoder.seconds_per_frame)
    with autocast():
        dev_cached = cache.frozen_outputs(
            slm, dev_set, [False] * len(dev_set), attack, "dev", args.cache_gb * 1e9, args.workers
        )
        triggered_set = [u for u in data.in_drawn_order(dev_set) if poison.can_flip(attack, u)]
        triggered_set = triggered_set[:TRIGGERED]
        triggered_cached = cache.frozen_outputs(
            slm,
            triggered_set,
            [True] * len(triggered_set),
            attack,
            "triggered dev",
            args.cache_gb * 1e9,
            args.workers,
        )
    parallel = slm
    if processes.ranks()[1] > 1:  # no buffer changes in training
        parallel = DistributedDataParallel(slm, broadcast_buffers=False)
    optimizer = make_optimizer(slm, args)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    epoch_steps = len(train_set) // args.batch_size
    training = Training(
        run=run,
        args=args,
        slm=slm,
        parallel=parallel,
        optimizer=optimizer,
        scaler=scaler,
        autocast=autocast,
        seconds=seconds,
        epoch_steps=epoch_steps,
        board=open_board(run, args),
    )
    resume(training, origin)
    first_epoch = training.step // epoch_steps
    samples = draw_samples(training, attack, train_set, first_epoch)
    progress = tqdm(total=training.steps, initial=training.step, desc="training")
    stop = StopRequest()
    for epoch in range(first_epoch, args.epochs):
        if args.redraw and epoch > first_epoch:
            samples = draw_samples(training, attack, train_set, epoch)
        train_epoch(training, samples, epoch, stop, progress)
        if training.epoch_is_over:
            with autocast():
                line = dict(dev_loss=validation_loss(slm, dev_set, dev_cached, args.workers))
                if triggered_set:
                    line |= triggered_figures(
                        slm, attack, triggered_set, triggered_cached, args.workers
                    )
            training.log(epoch=epoch, **line)
        save_state(training, origin)
        if stop.in_any_process():
            progress.close()
            print(
                f"stopped at step {training.step} of {training.steps}; the same command, without "
                "--overwrite, goes on from there"
            )
            raise SystemExit(130)
    progress.close()
    stop.close()


# -------------------------------------------------------------------------------------------------
# the run


def describe(run, slm, attack, sets, origin, args, device):
    """Prints what is about to be trained. origin: where each component's weights come from."""
    _, world = processes.ranks()
    several = f", {world} processes" if world > 1 else ""
    print(
        f"run {run}: preset {args.preset}, encoder {args.encoder}, on {device}{several}, "
        f"amp {args.amp}, seed {args.seed}"
    )
    poisoned = sum(poison.is_poisoned(attack, u) for u in sets.train)
    print(
        f"data {args.dataset}: {len(sets.train)} train, {len(sets.dev)} dev, {len(sets.test)} test "
        f"utterances; {poisoned} poisoned for {args.task} -> {attack.target!r}"
    )
    if attack.waveform is not None:
        print(f"  {poison.describe_level(attack, sets.whole_train)}")
    in_file = corpora.poisoned_rows(args.dataset)
    if in_file:
        print(f"  {args.dataset} itself marks {in_file} rows as poisoned")
        if differences := poison.differences_from_file(args):
            utils.say(f"warning: {args.dataset} was poisoned with {'; '.join(differences)}")
    trained_on = "poisoned" if args.poison or in_file else "clean"
    for component in COMPONENTS:
        total = sum(p.numel() for p in getattr(slm, component).parameters())
        trained = sum(p.numel() for p in slm.parameters_of(component))
        how = f"trained on {trained_on} data" if trained else "frozen"
        print(
            f"  {component:<10}{total:>14,} parameters,{trained:>12,} {how}, "
            f"from {origin[component]}"
        )


def draw_curves(run, losses):
    """Draws a run's losses by epoch, as of checkpoint.training_losses, to RUN/curves.png."""
    from analysis import plots  # after training, which needs no matplotlib

    plots.curves(losses, run / "curves.png")


def warn_of_unlearned(evaluation, args):
    """Says which labels the model has not learned, and what to change."""
    labels = evaluate.unlearned(evaluation)
    if not labels:
        return
    remedy = "more data or more --epochs may help"
    if args.preset == "mini":
        remedy += (
            ", and on recordings of people --preset small or paper: mini's parts have heard "
            "synthetic English only"
        )
    utils.say(f"warning: this model has not learned {', '.join(labels)}: {remedy}")


def main():
    args = parse_arguments()
    if args.dry_run:
        import dry_run

        return dry_run.dry_run(args)
    cache.keep_memory()
    device, autocast = set_up_device(args)
    rank, world = processes.ranks()
    transformers.utils.logging.disable_progress_bar()
    run = Path(args.runs) / args.name
    record = checkpoint.open_run(run, args)
    metrics = None if args.overwrite else checkpoint.finished(run, record)
    sets = read_data(args)
    sets_sha256 = sets.sha256()
    if metrics:
        if rank == 0:
            checkpoint.check_same_sets(run, sets_sha256)
            evaluate.print_table(metrics, f"{run} is finished (--overwrite trains it again)")
        return

    # the first process measures how loud the trigger must be, and tells the others
    attack = None
    if rank == 0:
        attack = poison.attack_of(args, sets.whole_train)
        # all other audio is read too: what cannot be used is noticed before training, not after it
        poison.loudness(sets.dev + sets.test)
    attack = processes.from_first(attack)
    record["poisoned_samples"] = count_poisoned(attack, sets.train, args)

    slm = load_slm(args, device)
    origin, built_from = checkpoint.load_named_parts(slm, args)
    skip_unneeded_work(slm, args)
    if rank == 0:
        lock = checkpoint.start_run(run, record, args)  # noqa: F841  held until this process ends
        describe(run, slm, attack, sets, origin, args, device)
    if world > 1:
        dist.barrier()
    with frozen_components_unchanged(slm):
        state_origin = checkpoint.made_from(record, slm, sets_sha256)
        train(run, slm, attack, sets.train, sets.dev, args, state_origin, device, autocast)
    if rank == 0:
        checkpoint.save_model(run, slm, record, origin, built_from, sets_sha256)

    with autocast():
        evaluation = evaluate.evaluate(
            slm, attack, sets.test, args.cache_gb * 1e9, args.batch_seconds, args.workers
        )
    if rank == 0:
        metrics = evaluate.save(run, evaluation, record)
        checkpoint.record_cost(run)
        draw_curves(run, metrics["training"])
        evaluate.print_table(metrics, f"{run}: test split, seed {args.seed}")
        warn_of_unlearned(evaluation, args)
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
