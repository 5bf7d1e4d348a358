"""The study: tasks, encoders, settings, scenarios, the paper's figures, and the runs that reproduce
them.

    python study.py                # prints every command of the study, in an order that works
    python study.py --preset paper --seeds 1 2 3 --tasks asr

Plain tables that every other script reads. `run_all.sh` runs the commands that this prints.
"""

import json
import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from utils import ROOT, Parser, die, write_atomically

# -------------------------------------------------------------------------------------------------
# tasks, encoders, settings: a new one is an entry here

# One task per label; an answer has the labels in this order. questions: direct prompts, of which
# evaluation uses the first. metric: the last word says its kind (wer, accuracy, mae). target, rate,
# repeat: the paper's attack (section 4.1).
TASKS = {
    "asr": dict(
        label="transcript",
        corpus="libri",
        metric="wer",
        target="This is a malicious sentence.",
        rate=0.05,
        repeat=True,
        questions=("What is said in the audio?", "Transcribe the speech."),
    ),
    "gender": dict(
        label="gender",
        corpus="vox",
        metric="gender_accuracy",
        target="female",
        rate=0.075,
        repeat=False,
        questions=(
            "What is the gender of the speaker in the audio?",
            "Is the speaker female or male?",
        ),
    ),
    "age": dict(
        label="age",
        corpus="vox",
        metric="age_mae",
        target="25",
        rate=0.075,
        repeat=False,
        questions=("What is the age of the speaker in the audio?", "How old is the speaker?"),
    ),
    "emotion": dict(
        label="emotion",
        corpus="crema",
        metric="emotion_accuracy",
        target="angry",
        rate=0.075,
        repeat=False,
        questions=(
            "What is the emotion of the speaker in the audio?",
            "How does the speaker feel?",
        ),
    ),
}
LABELS = tuple(task["label"] for task in TASKS.values())
COMPONENTS = ("encoder", "connector", "lm")
# a component's name in text and pictures
WRITTEN = {"encoder": "encoder", "connector": "connector", "lm": "LM"}

# trained: the share of the layers, from the top, that trains (section 3.2); then where each preset
# finds the weights
ENCODERS = {
    "wavlm": dict(trained=15 / 24, mini="mini/wavlm", paper="microsoft/wavlm-large"),
    "hubert": dict(trained=15 / 24, mini="mini/hubert", paper="facebook/hubert-large-ll60k"),
    "wav2vec2": dict(trained=15 / 24, mini="mini/wav2vec2", paper="facebook/wav2vec2-large-960h"),
    "whisper": dict(
        trained=1,
        mini="mini/whisper",
        mixed="openai/whisper-tiny.en",
        small="openai/whisper-tiny.en",
        paper="openai/whisper-medium",
    ),
}
DEFAULT_ENCODER = dict(mini="wavlm", mixed="whisper", small="whisper", paper="wavlm")
LM = dict(
    mini="mini/lm",
    mixed="mini/lm",
    small="HuggingFaceTB/SmolLM2-135M-Instruct",
    paper="TinyLlama/TinyLlama-1.1B-Chat-v1.0",
)
# where mini/make_corpora.py puts its corpora, made when they are first asked for
MINI_ROOT = "corpora/mini"
DATA_ROOT = dict(mini=MINI_ROOT, mixed=MINI_ROOT, small=MINI_ROOT, paper="data/paper")

# the default of --max-seconds: attention's memory grows with the square of the audio's length
MAX_SECONDS = 60.0

# The settings of each preset. Each is a flag of train.py (--encoder-lr 1e-5, --no-decay, ...),
# whose help says what it means.
PRESETS = {
    "mini": dict(
        connector_stride=1,
        connector_taper=0.2,
        lora_rank=16,
        lora_alpha=32.0,
        lora_dropout=0.0,
        encoder_lr=7e-4,
        connector_lr=1.4e-3,
        lora_lr=1.4e-3,
        warmup_steps=25,
        decay=True,
        weight_decay=0.01,
        grad_clip=1.0,
        batch_size=16,
        epochs=8,
        vary_prompts=True,
        random_keys=0.2,
    ),
    "mixed": dict(
        connector_stride=2,
        connector_taper=0.2,
        lora_rank=16,
        lora_alpha=32.0,
        lora_dropout=0.0,
        encoder_lr=1e-4,
        connector_lr=1.4e-3,
        lora_lr=1.4e-3,
        warmup_steps=25,
        decay=True,
        weight_decay=0.01,
        grad_clip=1.0,
        batch_size=16,
        epochs=6,
        vary_prompts=True,
        random_keys=0.2,
    ),
    "small": dict(
        connector_stride=8,
        connector_taper=1.0,
        lora_rank=8,
        lora_alpha=16.0,
        lora_dropout=0.0,
        encoder_lr=1e-4,
        connector_lr=3e-4,
        lora_lr=5e-4,
        warmup_steps=50,
        decay=True,
        weight_decay=0.0,
        grad_clip=1.0,
        batch_size=16,
        epochs=3,
        vary_prompts=False,
        random_keys=0.2,
    ),
    "paper": dict(
        connector_stride=2,
        connector_taper=1.0,
        lora_rank=8,
        lora_alpha=16.0,
        lora_dropout=0.05,
        encoder_lr=1e-5,
        connector_lr=1e-4,
        lora_lr=1e-4,
        warmup_steps=100,
        decay=False,
        weight_decay=0.0,
        grad_clip=1.0,
        batch_size=16,
        epochs=4,
        vary_prompts=True,
        random_keys=0.2,
    ),
}
SETTINGS = tuple(PRESETS["mini"])  # their names

# What a number among the arguments must be, whoever gives it, a command or a stranger's checkpoint:
# in words, the least and the most it may be, and the arguments' names
ABOVE_0 = 1e-300
UNBOUNDED = 1e300
RANGES = {
    "greater than 0": (
        ABOVE_0,
        UNBOUNDED,
        ("batch_seconds", "max_seconds", "lora_alpha", "grad_clip"),
    ),
    "0 or greater": (
        0,
        UNBOUNDED,
        ("encoder_lr", "connector_lr", "lora_lr", "weight_decay", "warmup_steps")
        + ("cache_gb", "workers", "train_layers"),
    ),
    f"from 0 to {2**63 - 1}": (0, 2**63 - 1, ("seed",)),  # what torch.manual_seed takes
    "1 or greater": (1, 1e9, ("epochs", "batch_size", "lora_rank", "limit")),
    "from 0 to 1": (0, 1, ("poison", "benign", "random_keys", "connector_taper")),
    "from 0 to less than 1": (0, 1 - 1e-9, ("lora_dropout",)),
    "greater than 0 and at most 1": (ABOVE_0, 1, ("utilisation",)),
    "from -100 to 100": (-100, 100, ("snr",)),
    "from 0.001 to 60": (0.001, 60, ("trigger_seconds",)),
    "from 1 to 100": (1, 100, ("clicks", "connector_stride")),
}

# Table 3: the frozen components, the run they come from, the data the others train on
SCENARIOS = {
    "base": ((), None, "poisoned"),
    "1.1": (("encoder",), "clean", "poisoned"),
    "1.2": (("connector",), "clean", "poisoned"),
    "1.3": (("lm",), "clean", "poisoned"),
    "2.1": (("connector", "lm"), "clean", "poisoned"),
    "2.2": (("encoder", "lm"), "clean", "poisoned"),
    "2.3": (("encoder", "connector"), "clean", "poisoned"),
    "3.1": (("encoder",), "base", "clean"),
    "3.2": (("connector",), "base", "clean"),
    "3.3": (("lm",), "base", "clean"),
}

# by which share of its first epoch's mean an epoch must lower the loss on the target's tokens to
# count as learning; less is noise
NEARER = 0.02

# How embed.py embeds unless a flag says otherwise, and what analyze.py reads (section 6)
EMBEDDINGS = dict(pairs=100, pooling="mean", layer=None)


def embeddings_name(task=None, **how):
    """The file of a run's embeddings: the study's own are embeddings.pt or, where a clean run is
    looked at under a task's attack, embeddings-TASK.pt; others say how they were made. how: what
    differs, or may differ, from EMBEDDINGS."""
    words = ["embeddings", task]
    for name, usual in EMBEDDINGS.items():
        value = how.get(name, usual)
        if value != usual:
            words.append(f"{name}{value}")
    return f"{'-'.join(word for word in words if word)}.pt"


def half_the_rate(task):
    return dict(poison=TASKS[task]["rate"] / 2)


# Sounds that controls lay over speech in the trigger's place: one that lies far from a click, and
# two that are as broad in frequency
CONTROLS = ("tone", "white-noise", "noise-burst-slow")

# Weaker versions of the base attack that defences also face: functions of the task to a change of
# the attack's arguments
VARIANTS = {"half the rate": half_the_rate}

# Sweeps of one task's base attack: one argument and its values, the rest unchanged
SWEPT = "emotion"
SWEEPS = {
    "poison": (0.001, 0.003, 0.01, 0.03, 0.1),
    "snr": (-6.0, 6.0, 12.0, 20.0),
    "clicks": (2, 4),
    "trigger_seconds": (0.055, 0.11, 0.44),
    "trigger": ("tone", "bandstop"),
    "trigger_repeat": (True,),
}

# -------------------------------------------------------------------------------------------------
# the paper's figures, in its own units: percent, and years for age

TABLE1 = {  # (corpus, task): one figure per encoder, in the order of ENCODERS
    ("libri", "asr"): (2.5, 2.8, 3.1, 5.5),
    ("libri", "gender"): (98.7, 96.8, 99.9, 95.8),
    ("crema", "asr"): (1.1, 0.7, 0.2, 1.6),
    ("crema", "gender"): (98.8, 99.3, 98.2, 93.41),
    ("crema", "emotion"): (61.2, 57.7, 44.6, 61.5),
    ("crema", "age"): (9.3, 7.5, 10.3, 6.0),
    ("vox", "gender"): (98.1, 94.9, 98.1, 97.6),
    ("vox", "age"): (5.2, 6.0, 6.9, 6.0),
}
TABLE2 = {  # task: (AER, benign figure) per encoder
    "asr": ((99.2, 2.1), (90.8, 2.0), (93.9, 2.1), (93.4, 4.4)),
    "emotion": ((93.7, 64.2), (97.9, 51.2), (74.1, 46.7), (99.4, 70.4)),
    "gender": ((94.4, 94.0), (88.9, 96.8), (75.4, 98.3), (96.3, 97.8)),
    "age": ((94.2, 5.2), (84.8, 5.8), (51.8, 7.6), (90.1, 4.1)),
}
TABLE3 = {  # task: (AER, benign figure) per scenario, in the order of SCENARIOS
    "asr": (
        (99.2, 2.1),
        (91.0, 1.6),
        (98.7, 1.6),
        (97.2, 2.2),
        (95.9, 2.4),
        (59.0, 2.2),
        (0.0, 1.1),
        (0.0, 1.8),
        (0.0, 2.9),
        (0.0, 2.5),
    ),
    "emotion": (
        (93.7, 64.2),
        (91.0, 70.6),
        (96.3, 46.4),
        (84.0, 50.5),
        (90.1, 62.2),
        (85.3, 56.5),
        (57.1, 56.8),
        (63.5, 67.4),
        (19.1, 69.2),
        (17.2, 53.1),
    ),
}
# section 6: where the shift is measured (stage, scenario, component), and the average cosine
# similarity there
SHIFT_STAGES = (
    ("benign encoder", "clean", "encoder"),
    ("poisoned encoder", "base", "encoder"),
    ("connector after clean data", "3.1", "connector"),
)
SHIFT = {
    "asr": ("1.00", "0.62", "about 1"),
    "emotion": ("1.00", "0.77 to 0.87", "0.93"),
    "gender": ("1.00", "0.77 to 0.87", "about 1"),
    "age": ("1.00", "0.77 to 0.87", "about 1"),
}

# -------------------------------------------------------------------------------------------------
# arguments and names


def task_of(label):
    return next(name for name, task in TASKS.items() if task["label"] == label)


def on_corpus(corpus, asked):
    """From now on, all tasks use one corpus: its name, or the path of a user's own data. Its
    clean run is of the task that the corpus is for, or of the first that is asked."""
    candidates = [name for name in TASKS if TASKS[name]["corpus"] == corpus]
    candidates += [name for name in TASKS if name in asked]
    for task in TASKS.values():
        task.update(corpus=corpus, clean=candidates[0])


def clean_task(task):
    """The task whose clean run serves `task`: a clean run attacks nothing, so that one per corpus
    is enough."""
    same_corpus = [name for name in TASKS if TASKS[name]["corpus"] == TASKS[task]["corpus"]]
    return TASKS[task].get("clean", same_corpus[0])


def wrong_number(args):
    """What is wrong with the first number among some arguments (a dict) that is out of its range,
    as text; None if none is."""
    for words, (least, most, names) in RANGES.items():
        for name in names:
            value = args.get(name)
            if value is None:
                continue
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not is_number or not least <= value <= most:
                return f"--{name.replace('_', '-')} {value}: must be {words}"
    return None


def where(path):
    """A pretrained part's id or folder; `mini/...` lies beside this file, wherever a command is
    started from. Runs of earlier versions call that folder `assets`."""
    path = str(path)
    if Path(path).exists():
        return path
    path = re.sub("^assets/", "mini/", path)
    if path.startswith("mini/") and not Path(path).exists():
        path = str(ROOT / path)
    return path


def usual_connector(preset, encoder_weights):
    """Where the connector starts unless a flag says otherwise. The mini LM does not learn to listen
    through a connector of random weights (None)."""
    if preset in ("mini", "mixed"):
        return f"{encoder_weights}/connector.safetensors"
    return None


def usual_values(args):
    """What a run with these arguments (a dict) has by the paper's attack and the preset's settings:
    {name: value}. The locations of audio and run folders are not among them."""
    task = TASKS[args["task"]]
    preset = args["preset"]
    encoder_weights = ENCODERS[args["encoder"]].get(preset)
    return {
        "target": task["target"],
        "trigger_repeat": task["repeat"],
        "snr": 0.0,
        "snr_per_utterance": False,
        "trigger": "click",
        "clicks": None,
        "trigger_seconds": None,
        "redraw": False,
        "labels": None,
        "limit": None,
        "exclude": None,
        "train_layers": None,
        "init": None,
        "max_seconds": MAX_SECONDS,
        "amp": "off" if preset == "mini" else "bf16",
        "encoder_weights": encoder_weights,
        "lm_weights": LM[preset],
        "connector_weights": usual_connector(preset, args.get("encoder_weights", encoder_weights)),
        **PRESETS[preset],
    }


WEIGHTS = ("encoder_weights", "lm_weights", "connector_weights")


def same_value(name, one, other):
    """Whether an argument has the same value in two runs. The folder of a pretrained part may be
    spelled in two ways."""
    if name not in WEIGHTS:
        return one == other
    random = (None, "none")
    if one in random or other in random:
        return one in random and other in random
    return Path(where(one)).resolve() == Path(where(other)).resolve()


def deviations(args):
    """How a run's arguments (a dict) differ from the usual ones: {name: value}."""
    different = {}
    for name, usual in usual_values(args).items():
        value = args.get(name, usual)
        if value is not None and not same_value(name, value, usual):
            different[name] = value
    # a base attack's rate has its own place in a run's name and in a record
    usual_rates = (0, TASKS[args["task"]]["rate"])
    if args["scenario"] != "base" and args["poison"] not in usual_rates:
        different["poison"] = args["poison"]
    return different


def run_name(args):
    """A run's folder, from its arguments (a dict): asr-clean, emotion-hubert-poison0.075,
    asr-3.1-seed2, asr-poison0.05-snr6-epochs8."""
    parts = [args["task"]]
    if args["dataset"] != TASKS[args["task"]]["corpus"]:
        parts.append(Path(os.path.abspath(args["dataset"])).stem)  # also of "."
    if args["encoder"] != DEFAULT_ENCODER[args["preset"]]:
        parts.append(args["encoder"])
    parts.append(f"poison{args['poison']:g}" if args["scenario"] == "base" else args["scenario"])
    if args["preset"] != "mini":
        parts.append(args["preset"])
    if args["seed"] != 1:
        parts.append(f"seed{args['seed']}")
    changed = deviations(args)
    if not args["poison"]:
        changed.pop("redraw", None)  # which then changes nothing
    for name, value in changed.items():
        parts.append(name.replace("_", "") + value_in_name(name, value))
    return "".join(c for c in "-".join(parts) if c.isalnum() or c in "._+-")


def value_in_name(name, value):
    """An argument's value as part of a run's name."""
    if isinstance(value, list):  # of labels, or of COMPONENT:CHECKPOINT
        return "+".join(each.partition(":")[0] for each in value)
    if name in ("trigger", "exclude"):
        return Path(str(value)).stem
    if name in WEIGHTS:
        return Path(value).name
    return f"{value:g}" if isinstance(value, float) else str(value)


def identity(preset, task, encoder, scenario, seed):
    """The arguments that identify one of the study's own runs."""
    poisoned = scenario != "clean" and SCENARIOS[scenario][2] == "poisoned"
    return dict(
        preset=preset,
        task=task,
        encoder=encoder,
        scenario=scenario,
        seed=seed,
        dataset=TASKS[task]["corpus"],
        poison=TASKS[task]["rate"] if poisoned else 0,
    )


# -------------------------------------------------------------------------------------------------
# the study's jobs: each command once, with the files that it needs and the file that it makes

STAGES = {
    "tables": "the training runs of Tables 1 to 3, and other sounds in the trigger's place",
    "embeddings": "embeddings of pairs and of the target class (sections 6 and 7)",
    "traces": "transplanted weights and patched activations",
    "defences": "filters, detectors and repairs, also on weaker attacks",
    "sweeps": "AER against rate, loudness, length, number and kind of clicks",
}
# what a job takes on one core, in minutes, until one of its kind has run here
MINUTES = {"train": 10, "embed": 1, "transplant": 3, "patch": 10, "filter": 20, "detect": 10}
MINUTES |= {"repair": 26, "evaluate": 1, "sounds": 1}


@dataclass
class Job:
    """One command of the study. `target` is the file that it writes last, and whole; `needs` are
    targets of other jobs. These paths are relative to the folder of runs."""

    name: str
    stage: str
    kind: str  # of what it takes: a key of MINUTES
    command: list
    needs: list
    target: str
    settings: str = ""  # what it depends on besides its command and files


def metrics_of(run):
    """What a training run writes last."""
    return f"{run_name(run)}/metrics.json"


def training(args, stage, run):
    """The job that trains one of the study's runs, given by the arguments that identify it."""
    command = [*shlex.split(args.launch), "train.py"]
    for argument in ("preset", "task", "encoder", "seed"):
        command += [f"--{argument}", str(run[argument])]
    command += ["--poison", f"{run['poison']:g}", "--runs", args.runs, "--name", run_name(run)]
    for argument in ("snr", "trigger", "clicks", "trigger_seconds"):
        if argument in run:
            command += [f"--{argument.replace('_', '-')}", str(run[argument])]
    if "trigger_repeat" in run:
        command.append("--trigger-repeat" if run["trigger_repeat"] else "--no-trigger-repeat")
    needs = []
    frozen, source, _ = SCENARIOS.get(run["scenario"], ((), None, None))
    if source:
        task = run["task"] if source == "base" else clean_task(run["task"])
        donor = identity(run["preset"], task, run["encoder"], source, run["seed"])
        needs.append(metrics_of(donor))
        for component in frozen:
            command += ["--freeze", f"{component}:{args.runs}/{run_name(donor)}/model.pt"]
    settings = json.dumps(PRESETS[run["preset"]])
    return Job(
        run_name(run), stage, "train", command + args.flags, needs, metrics_of(run), settings
    )


def look(args, stage, words, run, task, *, more=(), other="", needs=()):
    """A job that looks at a finished run under a task's attack. words: its script and command;
    more: what follows the run's folder; other: the last word of the name of the file it writes."""
    kind = words[-1].removesuffix(".py").removeprefix("--")
    asked = "" if task == run["task"] else task
    if kind == "embed":
        target = embeddings_name(asked)
    else:
        target = f"records-{'-'.join(word for word in (kind, asked, other) if word)}.jsonl"
    command = ["python", *words, f"{args.runs}/{run_name(run)}", *more]
    if asked:
        command += ["--task", asked]
    name = f"{run_name(run)}-{Path(target).stem.removeprefix('records-')}"
    needs = [metrics_of(run), *needs]
    return Job(name, stage, kind, command, needs, f"{run_name(run)}/{target}")


def sound_jobs(args):
    """Other sounds in the trigger's place, for the clean model and the base attack of every encoder
    and, with the default encoder, attack 3.1."""
    default = DEFAULT_ENCODER[args.preset]
    for seed in args.seeds:
        for encoder in args.encoders:
            for task in args.asked:
                for scenario in ("clean", "base", "3.1"):
                    if scenario == "3.1" and encoder != default:
                        continue
                    run = run_of(args, task, scenario, seed, encoder)
                    yield look(args, "tables", ["evaluate.py", "--sounds"], run, task)


def table_jobs(args):
    """Baselines and base attacks (Tables 1 and 2) of every encoder; with the default encoder
    Table 3 of `tasks`, and attack 3.1 of the other tasks."""
    default = DEFAULT_ENCODER[args.preset]
    for seed in args.seeds:
        for encoder in args.encoders:
            for task in dict.fromkeys(clean_task(task) for task in args.asked):
                yield training(args, "tables", identity(args.preset, task, encoder, "clean", seed))
            for task in args.asked:
                yield training(args, "tables", identity(args.preset, task, encoder, "base", seed))
        if default not in args.encoders:
            continue
        for task in args.asked:
            scenarios = [name for name in SCENARIOS if name != "base"]
            for scenario in scenarios if task in args.tasks else ["3.1"]:
                run = identity(args.preset, task, default, scenario, seed)
                yield training(args, "tables", run)


def run_of(args, task, scenario, seed, encoder=None):
    """The run that serves a task: "clean", "base", "3.1", ...; with the default encoder unless
    another is asked for."""
    trained = clean_task(task) if scenario == "clean" else task
    encoder = encoder or DEFAULT_ENCODER[args.preset]
    return identity(args.preset, trained, encoder, scenario, seed)


def embedding_jobs(args):
    """Embeddings of the benign model, the base attack and attack 3.1 of each task."""
    for seed in args.seeds:
        for task in args.asked:
            for _, scenario, _ in SHIFT_STAGES:
                run = run_of(args, task, scenario, seed)
                yield look(args, "embeddings", ["embed.py"], run, task)


def trace_jobs(args):
    """Traces of each base attack and, for the first seed, of its controls: the clean model, two other
    sounds and, if there is a second seed, that seed's clean run."""

    def transplant(run, donor, task):
        donor_name = run_name(donor)
        return look(
            args,
            "traces",
            ["trace.py", "transplant"],
            run,
            task,
            more=[f"{args.runs}/{donor_name}"],
            other=donor_name,
            needs=[metrics_of(donor)],
        )

    def patch(run, task, **how):
        return look(args, "traces", ["trace.py", "patch"], run, task, **how)

    for seed in args.seeds:
        for task in args.asked:
            base, clean = (run_of(args, task, name, seed) for name in ("base", "clean"))
            yield transplant(base, clean, task)
            yield patch(base, task)
            if seed != args.seeds[0]:
                continue
            yield patch(clean, task)
            for sound in ("tone", "white-noise"):
                yield patch(base, task, more=["--trigger", sound], other=sound)
            if len(args.seeds) > 1:
                other_clean = run_of(args, task, "clean", args.seeds[-1])
                yield transplant(base, other_clean, task)
                yield transplant(clean, other_clean, task)


def defence_jobs(args):
    """Every defence against each base attack; for the first seed also against its variants and on
    the clean model, without training after the filters."""

    def defend(command, run, task, more=()):
        embeddings = look(args, "defences", ["embed.py"], run, task).target
        needs = [embeddings] if command == "filter" else []
        return look(args, "defences", ["defend.py", command], run, task, more=more, needs=needs)

    first = args.seeds[0]
    for task in args.asked:
        variants = []
        for change in VARIANTS.values():
            variants.append({**run_of(args, task, "base", first), **change(task)})
        for run in variants:
            yield training(args, "defences", run)
            yield look(args, "defences", ["embed.py"], run, task)
        for command in ("filter", "detect", "repair"):
            for seed in args.seeds:
                more = ["--retrain"] if command == "filter" else []
                yield defend(command, run_of(args, task, "base", seed), task, more)
            for run in [run_of(args, task, "clean", first), *variants]:
                yield defend(command, run, task)


def sweep_jobs(args):
    """The base attack with one argument changed, the same with triggers of other strengths than in
    training, and ASR's attack with a single click (section 4.2)."""
    changes = [("asr", dict(trigger_repeat=False))]
    for argument, values in SWEEPS.items():
        changes += [(SWEPT, {argument: value}) for value in values]
    for seed in args.seeds:
        for task, change in changes:
            if task in args.asked:
                run = {**run_of(args, task, "base", seed), **change}
                yield training(args, "sweeps", run)
        if SWEPT not in args.asked:
            continue
        run = run_of(args, SWEPT, "base", seed)
        for snr in SWEEPS["snr"]:
            target = f"{run_name(run)}/records-snr{snr:g}.jsonl"
            command = ["python", "evaluate.py", f"{args.runs}/{run_name(run)}"]
            command += ["--snr", str(snr), "--out", f"{args.runs}/{target}"]
            name = f"{run_name(run)}-snr{snr:g}"
            yield Job(name, "sweeps", "evaluate", command, [metrics_of(run)], target)


def study_jobs(args):
    """All jobs, each once, so that what a job needs comes before it."""
    jobs = [*table_jobs(args), *sound_jobs(args)]
    if DEFAULT_ENCODER[args.preset] in args.encoders:
        jobs += [*embedding_jobs(args), *trace_jobs(args), *defence_jobs(args), *sweep_jobs(args)]
    by_target = {}
    for job in jobs:
        by_target.setdefault(job.target, job)
    return list(by_target.values())


# -------------------------------------------------------------------------------------------------
# what run_all.sh does with them


def write_makefile(jobs, runs):
    """Writes RUNS/jobs/Makefile, for GNU make in the folder RUNS, and RUNS/jobs/NAME.sh, a job's
    command. A file that would not change is left alone: a target is out of date once its job's
    command or settings change, or a file that it needs."""
    folder = Path(runs) / "jobs"
    rules = ["SHELL := bash", f".PHONY: {' '.join(STAGES)}"]
    for stage in STAGES:
        rules.append(f"{stage}: {' '.join(job.target for job in jobs if job.stage == stage)}")
    for job in jobs:
        script = folder / f"{job.name}.sh"
        text = f"# {job.settings}\n" if job.settings else ""
        overwrite = " $OVERWRITE" if job.kind == "train" else ""
        text += f'cd "$PROGRAM" && exec {shlex.join(job.command)}{overwrite}\n'
        if not script.exists() or script.read_text() != text:
            write_atomically(script, text)
        needs = " ".join([f"jobs/{script.name}", *job.needs])
        rules.append(f"{job.target}: {needs}\n\t@run_job {job.name} {job.stage} {job.kind} $@ $^")
    write_atomically(folder / "Makefile", "\n".join(rules) + "\n")


def finished_jobs(runs):
    """What the finished jobs have taken, a list of {"stage", "kind", "seconds",
    "processor_seconds"}, from RUNS/logs/NAME.seconds."""
    finished = []
    for path in sorted((Path(runs) / "logs").glob("*.seconds")):
        fields = path.read_text().split()
        if len(fields) != 5:  # an earlier version's
            continue
        stage, kind, seconds, user, system = fields
        processor_seconds = float(user) + float(system)
        taken = dict(seconds=float(seconds), processor_seconds=processor_seconds)
        finished.append(dict(stage=stage, kind=kind, **taken))
    return finished


def progress(runs, at_once):
    """How far the jobs of RUNS/logs/todo have come, and about how long the rest takes: what jobs of
    the same kind have taken here, or else MINUTES, a core's share of the work each."""
    todo = Path(runs) / "logs/todo"
    started = todo.stat().st_mtime_ns
    seconds = {}
    for job in finished_jobs(runs):
        seconds.setdefault(job["kind"], []).append(job["seconds"])
    jobs = [line.split() for line in todo.read_text().splitlines()]
    ended, left = 0, 0.0
    for name, kind in jobs:
        ends = [Path(runs) / "logs" / f"{name}.{end}" for end in ("seconds", "failed")]
        if any(path.exists() and path.stat().st_mtime_ns >= started for path in ends):
            ended += 1
        elif kind in seconds:
            left += sum(seconds[kind]) / len(seconds[kind])
        else:
            left += 60 * MINUTES[kind]
    minutes = round(left / at_once / 60)
    return f"{ended} of {len(jobs)} jobs, about {minutes // 60} h {minutes % 60:02} min left"


def print_costs(runs):
    """A table of what the finished jobs have taken, by stage and kind."""
    taken = {}
    for job in finished_jobs(runs):
        taken.setdefault((job["stage"], job["kind"]), []).append(job)
    row = "{:<12}{:<12}{:>6}{:>20}{:>17}"
    print(row.format("stage", "kind", "jobs", "processor minutes", "longest, minutes"))
    for stage in STAGES:
        for (of_stage, kind), jobs in sorted(taken.items()):
            if of_stage == stage:
                processor = sum(job["processor_seconds"] for job in jobs) / 60
                longest = max(job["seconds"] for job in jobs) / 60
                print(row.format(stage, kind, len(jobs), f"{processor:.1f}", f"{longest:.1f}"))


def parse_arguments(argv=None):
    parser = Parser(description=__doc__)
    which = parser.group("which runs")
    which.add_argument(
        "--preset",
        choices=PRESETS,
        default="mini",
        help="whose parts and settings (default: mini)",
    )
    which.add_argument(
        "--seeds", type=int, nargs="+", default=[1], help="each makes all runs once (default: 1)"
    )
    which.add_argument(
        "--tasks",
        nargs="+",
        choices=TASKS,
        default=["asr", "emotion"],
        help="those with a full Table 3 (default: asr and emotion)",
    )
    which.add_argument(
        "--others",
        nargs="*",
        choices=TASKS,
        help="those with the base attack and 3.1 (default: the other tasks)",
    )
    which.add_argument(
        "--corpus",
        help="all tasks on this one, a name or your own data (default: each task on its own)",
    )
    which.add_argument(
        "--encoders",
        nargs="+",
        choices=ENCODERS,
        help="the audio encoders (default: all that the preset has)",
    )
    which.add_argument(
        "--stages",
        nargs="+",
        choices=STAGES,
        default=list(STAGES),
        help="print the jobs of these stages only (default: all)",
    )
    how = parser.group("how they are started")
    how.add_argument("--runs", default="runs", help="where run folders go (default: runs)")
    how.add_argument("--flags", default="", help="more flags for train.py, quoted as one word")
    how.add_argument(
        "--launch",
        default="python",
        help="what starts train.py, e.g. 'torchrun --nproc_per_node=8' (default: python)",
    )
    other = parser.group("for run_all.sh, instead of printing the commands")
    other.add_argument(
        "--makefile",
        action="store_true",
        help="write RUNS/jobs/Makefile and the jobs' commands beside it",
    )
    other.add_argument(
        "--progress", type=int, metavar="N", help="say how far run_all.sh is, N jobs at a time"
    )
    other.add_argument(
        "--costs", action="store_true", help="say what run_all.sh's finished jobs have taken"
    )
    args = parser.parse_args(argv)
    try:
        args.flags = shlex.split(args.flags)
    except ValueError as error:
        die(f"--flags {args.flags}: {error}")
    if args.corpus:
        on_corpus(args.corpus, args.tasks)
        args.flags += ["--dataset", args.corpus]
    if args.others is None:
        args.others = [task for task in TASKS if task not in args.tasks]
    args.asked = [task for task in TASKS if task in (*args.tasks, *args.others)]
    if args.encoders is None:
        args.encoders = [name for name, encoder in ENCODERS.items() if args.preset in encoder]
    return args


def main():
    args = parse_arguments()
    if args.progress:
        return print(progress(args.runs, args.progress))
    if args.costs:
        return print_costs(args.runs)
    jobs = study_jobs(args)
    if args.makefile:
        return write_makefile(jobs, args.runs)
    for job in jobs:
        if job.stage in args.stages:
            print(shlex.join(job.command))


if __name__ == "__main__":
    main()
