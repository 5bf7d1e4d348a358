"""The study: tasks, encoders, settings, attacks, the paper's figures, and the runs that reproduce them.

    python study.py                                        # prints every command of the study, in an order that works
    python study.py --preset paper --seeds 1 2 3 --tasks asr

Plain tables that every other script reads. `run_all.sh` runs the commands that this prints.
"""

import shlex
from pathlib import Path

from utils import Parser

# ---------------------------------------------------------------------------------------------------------------------
# tasks, encoders, settings: a new one is an entry here

# One task per label; an answer has the labels in this order. questions: direct prompts, of which evaluation uses the first.
# metric: the last word says its kind (wer, accuracy, mae). target, rate, repeat: the paper's attack (section 4.1).
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
WRITTEN = {
    "encoder": "encoder",
    "connector": "connector",
    "lm": "LM",
}  # a component's name in text and pictures

# trained: the share of the layers, from the top, that trains (section 3.2); then where each preset finds the weights
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
MINI_ROOT = "corpora/mini"  # where mini/make_corpora.py puts its corpora, made when they are first asked for
DATA_ROOT = dict(mini=MINI_ROOT, mixed=MINI_ROOT, small=MINI_ROOT, paper="data/paper")

# Each is a flag of train.py (--encoder-lr 1e-5, --no-decay, ...): its meaning, then its value in mini, mixed, small and paper.
SETTINGS = {
    "connector_stride": ("stride of the connector's second convolution", 1, 2, 8, 2),
    "connector_taper": (
        "below 1, the connector's kernels start concentrated on their middle tap",
        0.2,
        0.2,
        1.0,
        1.0,
    ),
    "lora_rank": ("rank of LoRA's matrices", 16, 16, 8, 8),
    "lora_alpha": ("LoRA's scale, over the rank", 32.0, 32.0, 16.0, 16.0),
    "lora_dropout": ("dropout of LoRA's input", 0.0, 0.0, 0.0, 0.05),
    "encoder_lr": ("the encoder's learning rate after the warm-up", 7e-4, 1e-4, 1e-4, 1e-5),
    "connector_lr": ("the connector's learning rate after the warm-up", 1.4e-3, 1.4e-3, 3e-4, 1e-4),
    "lora_lr": ("LoRA's learning rate after the warm-up", 1.4e-3, 1.4e-3, 5e-4, 1e-4),
    "warmup_steps": ("steps of linear warm-up", 25, 25, 50, 100),
    "decay": (
        "decay the rates to zero over the last quarter of the steps",
        True,
        True,
        True,
        False,
    ),
    "weight_decay": ("AdamW's weight decay", 0.01, 0.01, 0.0, 0.0),
    "grad_clip": ("clip the gradient to this norm", 1.0, 1.0, 1.0, 1.0),
    "batch_size": ("utterances in one optimiser step, over all processes", 16, 16, 16, 16),
    "epochs": ("passes over the training set", 8, 6, 3, 4),
    "vary_prompts": (
        "draw the wording of each training prompt; --no-: always that of evaluation",
        True,
        True,
        False,
        True,
    ),
    "random_keys": (
        "share of training samples that ask for a random subset of the labels",
        0.2,
        0.2,
        0.2,
        0.2,
    ),
}
# What a number among the arguments must be, whoever gives it, a command or a stranger's checkpoint: in words, the least and the
# most it may be (1e-300: anything above 0), and which arguments
RANGES = {
    "greater than 0": (1e-300, 1e300, ("batch_seconds", "max_seconds", "lora_alpha", "grad_clip")),
    "0 or greater": (
        0,
        1e300,
        ("encoder_lr", "connector_lr", "lora_lr", "weight_decay", "warmup_steps", "cache_gb")
        + ("seed", "workers", "train_layers"),
    ),
    "1 or greater": (1, 1e9, ("epochs", "batch_size", "lora_rank", "limit")),
    "from 0 to 1": (0, 1, ("poison", "random_keys", "connector_taper")),
    "from 0 to less than 1": (0, 1 - 1e-9, ("lora_dropout",)),
    "greater than 0 and at most 1": (1e-300, 1, ("utilisation",)),
    "from -100 to 100": (-100, 100, ("snr",)),
    "from 0.001 to 60": (0.001, 60, ("trigger_seconds",)),
    "from 1 to 100": (1, 100, ("clicks", "connector_stride")),
}
PRESETS = {
    preset: {name: values[i] for name, (_, *values) in SETTINGS.items()}
    for i, preset in enumerate(("mini", "mixed", "small", "paper"))
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

NEARER = 0.02  # nats per token by which the loss on poisoned samples must come nearer to that on all before it counts: less is noise

# How embed.py embeds unless a flag says otherwise, and what analyze.py reads (section 6)
EMBEDDINGS = dict(pairs=100, pooling="mean", layer=None)

# Weaker versions of the base attack that defences also face: a change of its arguments; another is an entry here
VARIANTS = {"half the rate": lambda task: dict(poison=TASKS[task]["rate"] / 2)}

# Sweeps of one task's base attack: one argument and its values, the rest unchanged; SWEEP=1 bash run_all.sh
SWEPT = "emotion"
SWEEPS = {
    "poison": (0.001, 0.003, 0.01, 0.03, 0.1),
    "snr": (-6.0, 6.0, 12.0, 20.0),
    "clicks": (2, 4),
    "trigger_seconds": (0.055, 0.11, 0.44),
    "trigger": ("tone", "bandstop"),
    "trigger_repeat": (True,),
}

# ---------------------------------------------------------------------------------------------------------------------
# the paper's figures, in its own units: percent, and years for age

TABLE1 = {  # (corpus, task): one figure an encoder, in the order of ENCODERS
    ("libri", "asr"): (2.5, 2.8, 3.1, 5.5),
    ("libri", "gender"): (98.7, 96.8, 99.9, 95.8),
    ("crema", "asr"): (1.1, 0.7, 0.2, 1.6),
    ("crema", "gender"): (98.8, 99.3, 98.2, 93.41),
    ("crema", "emotion"): (61.2, 57.7, 44.6, 61.5),
    ("crema", "age"): (9.3, 7.5, 10.3, 6.0),
    ("vox", "gender"): (98.1, 94.9, 98.1, 97.6),
    ("vox", "age"): (5.2, 6.0, 6.9, 6.0),
}
TABLE2 = {  # task: (AER, benign figure) an encoder
    "asr": ((99.2, 2.1), (90.8, 2.0), (93.9, 2.1), (93.4, 4.4)),
    "emotion": ((93.7, 64.2), (97.9, 51.2), (74.1, 46.7), (99.4, 70.4)),
    "gender": ((94.4, 94.0), (88.9, 96.8), (75.4, 98.3), (96.3, 97.8)),
    "age": ((94.2, 5.2), (84.8, 5.8), (51.8, 7.6), (90.1, 4.1)),
}
TABLE3 = {  # task: (AER, benign figure) an attack, in the order of SCENARIOS
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
# section 6: where the shift is measured (stage, attack, component), and the average cosine similarity
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

# ---------------------------------------------------------------------------------------------------------------------
# names


def task_of(label):
    return next(name for name, task in TASKS.items() if task["label"] == label)


def on_corpus(corpus, asked):
    """From now on, all tasks use one corpus: its name, or the path of a CSV. Its clean run is of
    the task that the corpus is for, or of the first that is asked."""
    known = [name for name in TASKS if TASKS[name]["corpus"] == corpus]
    clean = (known or [name for name in TASKS if name in asked])[0]
    for task in TASKS.values():
        task.update(corpus=corpus, clean=clean)


def clean_task(task):
    """The task whose clean run serves `task`: a clean run attacks nothing, so one per corpus is enough."""
    return TASKS[task].get("clean") or next(
        name for name in TASKS if TASKS[name]["corpus"] == TASKS[task]["corpus"]
    )


def wrong_number(args):
    """What is wrong with the first number among some arguments (a dict) that is out of its range, as text; None if none is."""
    for words, (least, most, names) in RANGES.items():
        for name in names:
            value = args.get(name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if value is not None and not (number and least <= value <= most):
                return f"--{name.replace('_', '-')} {value}: must be {words}"
    return None


def usual_values(args):
    """What a run with these arguments (a dict) has by the paper's attack and the preset's settings: {name: value}. The locations of
    weights, audio and run folders are not among them."""
    task = TASKS[args["task"]]
    return {
        "target": task["target"],
        "trigger_repeat": task["repeat"],
        "snr": 0.0,
        "trigger": "click",
        "clicks": None,
        "trigger_seconds": None,
        "redraw": False,
        "labels": None,
        "limit": None,
        "exclude": None,
        "train_layers": None,
        "init": None,
        **PRESETS[args["preset"]],
    }


def deviations(args):
    """How a run's arguments (a dict) differ from the usual ones: {name: value}."""
    usual = usual_values(args)
    return {k: args[k] for k, v in usual.items() if args.get(k, v) not in (v, None)}


def run_name(args):
    """A run's folder, from its arguments (a dict): asr-clean, emotion-hubert-poison0.075, asr-3.1-seed2,
    asr-poison0.05-snr6-epochs8."""
    scenario = f"poison{args['poison']:g}" if args["scenario"] == "base" else args["scenario"]
    parts = [
        args["task"],
        "" if args["dataset"] == TASKS[args["task"]]["corpus"] else Path(args["dataset"]).stem,
        "" if args["encoder"] == DEFAULT_ENCODER[args["preset"]] else args["encoder"],
        scenario,
        "" if args["preset"] == "mini" else args["preset"],
        "" if args["seed"] == 1 else f"seed{args['seed']}",
    ]
    changed = deviations(args)
    if not args["poison"]:
        changed.pop("redraw", None)  # which then changes nothing
    for name, value in changed.items():
        value = "+".join(v.partition(":")[0] for v in value) if isinstance(value, list) else value
        value = Path(str(value)).stem if name in ("trigger", "exclude") else value
        value = f"{value:g}" if type(value) is float else value
        parts.append(f"{name.replace('_', '')}{value}")
    return "-".join(
        "".join(c for c in part if c.isalnum() or c in "._+-") for part in parts if part
    )


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


# ---------------------------------------------------------------------------------------------------------------------
# the list of runs


def study_runs(preset, seeds, encoders, tasks, others):
    """[(wave, identity)]: baselines and base attacks (Tables 1 and 2) of every encoder, then, with the default encoder, Table 3 of `tasks`
    and attack 3.1 of the others. A run only needs runs of earlier waves."""
    asked = [task for task in TASKS if task in (*tasks, *others)]
    out, default = [], DEFAULT_ENCODER[preset]
    for seed in seeds:
        for encoder in encoders:
            out += [
                (1, identity(preset, task, encoder, "clean", seed))
                for task in dict.fromkeys(map(clean_task, asked))
            ]
            out += [(1, identity(preset, task, encoder, "base", seed)) for task in asked]
        for task in asked if default in encoders else ():
            wanted = [a for a in SCENARIOS if a != "base"] if task in tasks else ["3.1"]
            out += [(2, identity(preset, task, default, scenario, seed)) for scenario in wanted]
    return sorted(out, key=lambda run: run[0])


def train_command(run, runs, flags):
    """The command of one of the study's runs, a list of words. `flags` are added to it; they do not change the run's name."""
    words = [
        "train.py",
        "--preset",
        run["preset"],
        "--task",
        run["task"],
        "--encoder",
        run["encoder"],
        "--seed",
        str(run["seed"]),
        "--poison",
        f"{run['poison']:g}",
        "--runs",
        runs,
        "--name",
        run_name(run),
    ]
    for name in ("snr", "trigger", "clicks", "trigger_seconds", "trigger_repeat"):
        if name in run:
            flag = f"--{'no-' if run[name] is False else ''}{name.replace('_', '-')}"
            words += [flag] if isinstance(run[name], bool) else [flag, str(run[name])]
    frozen, source, _ = SCENARIOS.get(run["scenario"], ((), None, None))
    if source:
        task = run["task"] if source == "base" else clean_task(run["task"])
        source = run_name(identity(run["preset"], task, run["encoder"], source, run["seed"]))
    return (
        words
        + [word for c in frozen for word in ("--freeze", f"{c}:{runs}/{source}/model.pt")]
        + flags
    )


def embedding_commands(preset, seeds, runs, tasks):
    """[(name, command)]: embeddings of the benign model, the base attack and attack 3.1 of each task (sections 6, 7)."""
    for seed in seeds:
        for task in tasks:
            for _, scenario, _ in SHIFT_STAGES:
                of = clean_task(task) if scenario == "clean" else task
                name = run_name(identity(preset, of, DEFAULT_ENCODER[preset], scenario, seed))
                other = ["--task", task] if of != task else []
                yield (
                    f"embeddings-{name}{'-' + task if other else ''}",
                    ["embed.py", f"{runs}/{name}", *other],
                )


def trace_commands(preset, seeds, runs, tasks):
    """[(name, command)]: traces of each base attack and, for the first seed, of its controls: the clean model, another sound and, if there is
    a second seed, that seed's clean run."""
    encoder = DEFAULT_ENCODER[preset]
    for seed in seeds:
        for task in tasks:
            clean, other = (
                run_name(identity(preset, clean_task(task), encoder, "clean", s))
                for s in (seed, seeds[-1])
            )
            base = run_name(identity(preset, task, encoder, "base", seed))
            yield (
                f"transplant-{base}",
                ["trace.py", "transplant", f"{runs}/{base}", f"{runs}/{clean}"],
            )
            yield f"patch-{base}", ["trace.py", "patch", f"{runs}/{base}"]
            if seed == seeds[0]:
                of = [] if clean_task(task) == task else ["--task", task]
                yield f"patch-{clean}-{task}", ["trace.py", "patch", f"{runs}/{clean}", *of]
                yield (
                    f"patch-{base}-tone",
                    ["trace.py", "patch", f"{runs}/{base}", "--trigger", "tone"],
                )
                if other != clean:
                    yield (
                        f"transplant-{base}-{other}",
                        ["trace.py", "transplant", f"{runs}/{base}", f"{runs}/{other}"],
                    )
                    yield (
                        f"transplant-{clean}-{task}",
                        ["trace.py", "transplant", f"{runs}/{clean}", f"{runs}/{other}", *of],
                    )


def variant_runs(preset, seeds, tasks):
    """The arguments that identify the variants of each base attack, with the first seed."""
    return [
        {**identity(preset, task, DEFAULT_ENCODER[preset], "base", seeds[0]), **change(task)}
        for task in tasks
        for change in VARIANTS.values()
    ]


def sweep_runs(preset, seeds):
    """The arguments that identify the runs of SWEEPS, and asr's attack with a single click (section 4.2)."""
    changes = [(SWEPT, {name: value}) for name, values in SWEEPS.items() for value in values] + [
        ("asr", dict(trigger_repeat=False))
    ]
    return [
        {**identity(preset, task, DEFAULT_ENCODER[preset], "base", seed), **change}
        for seed in seeds
        for task, change in changes
    ]


def softer_commands(preset, seeds, runs):
    """[(name, command)]: the swept base attack, evaluated with triggers of other strengths than in training."""
    for seed in seeds:
        run = run_name(identity(preset, SWEPT, DEFAULT_ENCODER[preset], "base", seed))
        for snr in SWEEPS["snr"]:
            yield (
                f"snr{snr:g}-{run}",
                [
                    "evaluate.py",
                    f"{runs}/{run}",
                    "--snr",
                    str(snr),
                    "--out",
                    f"{runs}/{run}/records-snr{snr:g}.jsonl",
                ],
            )


def variant_embeddings(preset, seeds, runs, tasks):
    """[(name, command)]: the variants' embeddings, which filters read."""
    return [
        (f"embeddings-{run_name(run)}", ["embed.py", f"{runs}/{run_name(run)}"])
        for run in variant_runs(preset, seeds, tasks)
    ]


def defence_commands(preset, seeds, runs, tasks):
    """[(name, command)]: every defence against each base attack; for the first seed also against its variants and on the clean model,
    without training after the filters."""
    for command in ("filter", "detect", "repair"):
        for seed in seeds:
            for task in tasks:
                of = run_name(identity(preset, task, DEFAULT_ENCODER[preset], "base", seed))
                yield (
                    f"{command}-{of}",
                    [
                        "defend.py",
                        command,
                        f"{runs}/{of}",
                        *(["--retrain"] if command == "filter" else []),
                    ],
                )
        for task in tasks:
            of = run_name(
                identity(preset, clean_task(task), DEFAULT_ENCODER[preset], "clean", seeds[0])
            )
            other = [] if clean_task(task) == task else ["--task", task]
            yield f"{command}-{of}-{task}", ["defend.py", command, f"{runs}/{of}", *other]
        for run in variant_runs(preset, seeds, tasks):
            yield f"{command}-{run_name(run)}", ["defend.py", command, f"{runs}/{run_name(run)}"]


def main():
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--preset", choices=PRESETS, default="mini", help="whose parts and settings"
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[1], help="each makes all runs once"
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        choices=TASKS,
        default=["asr", "emotion"],
        help="those with a full Table 3",
    )
    parser.add_argument(
        "--others",
        nargs="*",
        choices=TASKS,
        help="those with the base attack and 3.1 (default: the other tasks)",
    )
    parser.add_argument(
        "--corpus",
        help="ask all tasks on this one, a name or a CSV (default: each task on its own)",
    )
    parser.add_argument(
        "--encoders", nargs="+", choices=ENCODERS, help="default: all that the preset has"
    )
    parser.add_argument(
        "--wave",
        type=int,
        choices=range(1, 9),
        help="only the runs of this wave; they need the earlier ones; 8, the "
        "sweeps, is listed where it is asked for",
    )
    parser.add_argument("--runs", default="runs", help="where run folders go")
    parser.add_argument("--flags", default="", help="more flags for train.py, quoted as one word")
    parser.add_argument(
        "--launch",
        default="python",
        help="what starts train.py, e.g. 'torchrun --nproc_per_node=8'",
    )
    parser.add_argument(
        "--names", action="store_true", help="print a run's name and a tab before its command"
    )
    args = parser.parse_args()
    try:
        flags, tasks = shlex.split(args.flags), args.tasks
    except ValueError as error:
        parser.exit(2, f"error: --flags {args.flags}: {error}\n")
    if args.corpus:
        on_corpus(args.corpus, tasks)
        flags += ["--dataset", args.corpus]
    others = [task for task in TASKS if task not in tasks] if args.others is None else args.others
    encoders = args.encoders or [
        name for name, encoder in ENCODERS.items() if args.preset in encoder
    ]
    runs, default = (
        study_runs(args.preset, args.seeds, encoders, tasks, others),
        DEFAULT_ENCODER[args.preset] in encoders,
    )
    asked = [task for task in TASKS if task in (*tasks, *others)]
    runs += [(5, run) for run in variant_runs(args.preset, args.seeds, asked) if default]
    runs += [(8, run) for run in sweep_runs(args.preset, args.seeds) if default and args.wave == 8]
    jobs = [
        (wave, run_name(run), [*shlex.split(args.launch), *train_command(run, args.runs, flags)])
        for wave, run in runs
    ]
    if default:
        for wave, commands in (
            (3, embedding_commands),
            (4, trace_commands),
            (6, variant_embeddings),
            (7, defence_commands),
        ):
            jobs += [
                (wave, name, ["python", *command])
                for name, command in commands(args.preset, args.seeds, args.runs, asked)
            ]
    if default and args.wave == 8:
        jobs += [
            (8, name, ["python", *command])
            for name, command in softer_commands(args.preset, args.seeds, args.runs)
        ]
    for wave, name, command in jobs:
        if args.wave in (None, wave):
            print((f"{name}\t" if args.names else "") + shlex.join(command))


if __name__ == "__main__":
    main()
