"""The study: tasks, encoders, settings, scenarios, the paper's figures, and the runs that reproduce
them.

    python study.py                # prints every command of the study, in an order that works
    python study.py --preset paper --seeds 1 2 3 --tasks asr

Plain tables that every other script reads. `run_all.sh` runs the commands that this prints.
"""

import shlex
from pathlib import Path

from utils import Parser

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
        + ("cache_gb", "seed", "workers", "train_layers"),
    ),
    "1 or greater": (1, 1e9, ("epochs", "batch_size", "lora_rank", "limit")),
    "from 0 to 1": (0, 1, ("poison", "random_keys", "connector_taper")),
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

# nats per token by which the loss on poisoned samples must come nearer to that on all samples
# before it counts; less is noise
NEARER = 0.02

# How embed.py embeds unless a flag says otherwise, and what analyze.py reads (section 6)
EMBEDDINGS = dict(pairs=100, pooling="mean", layer=None)


def half_the_rate(task):
    return dict(poison=TASKS[task]["rate"] / 2)


# Weaker versions of the base attack that defences also face: functions of the task to a change of
# the attack's arguments
VARIANTS = {"half the rate": half_the_rate}

# Sweeps of one task's base attack: one argument and its values, the rest unchanged; SWEEP=1 bash
# run_all.sh
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
    """From now on, all tasks use one corpus: its name, or the path of a CSV. Its clean run is of
    the task that the corpus is for, or of the first that is asked."""
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


def usual_values(args):
    """What a run with these arguments (a dict) has by the paper's attack and the preset's settings:
    {name: value}. The locations of weights, audio and run folders are not among them."""
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
    different = {}
    for name, usual in usual_values(args).items():
        value = args.get(name, usual)
        if value is not None and value != usual:
            different[name] = value
    return different


def run_name(args):
    """A run's folder, from its arguments (a dict): asr-clean, emotion-hubert-poison0.075,
    asr-3.1-seed2, asr-poison0.05-snr6-epochs8."""
    parts = [args["task"]]
    if args["dataset"] != TASKS[args["task"]]["corpus"]:
        parts.append(Path(args["dataset"]).stem)
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


def name_of(preset, task, scenario, seed):
    """The name of one of the study's own runs with the preset's default encoder. A clean run serves
    all tasks of its corpus."""
    if scenario == "clean":
        task = clean_task(task)
    return run_name(identity(preset, task, DEFAULT_ENCODER[preset], scenario, seed))


# -------------------------------------------------------------------------------------------------
# the list of runs


def study_runs(preset, seeds, encoders, tasks, others):
    """[(wave, identity)]: baselines and base attacks (Tables 1 and 2) of every encoder, then, with
    the default encoder, Table 3 of `tasks` and scenario 3.1 of the others. A run only needs runs of
    earlier waves."""
    asked = [task for task in TASKS if task in (*tasks, *others)]
    clean_tasks = list(dict.fromkeys(clean_task(task) for task in asked))
    default = DEFAULT_ENCODER[preset]
    table3 = [scenario for scenario in SCENARIOS if scenario != "base"]
    runs = []
    for seed in seeds:
        for encoder in encoders:
            runs += [(1, identity(preset, task, encoder, "clean", seed)) for task in clean_tasks]
            runs += [(1, identity(preset, task, encoder, "base", seed)) for task in asked]
        if default not in encoders:
            continue
        for task in asked:
            for scenario in table3 if task in tasks else ["3.1"]:
                runs.append((2, identity(preset, task, default, scenario, seed)))
    return sorted(runs, key=lambda run: run[0])


def train_command(run, runs, flags):
    """The command of one of the study's runs, a list of words. `flags` are added to it; they do not
    change the run's name."""
    words = ["train.py", "--preset", run["preset"], "--task", run["task"]]
    words += ["--encoder", run["encoder"], "--seed", str(run["seed"])]
    words += ["--poison", f"{run['poison']:g}", "--runs", runs, "--name", run_name(run)]
    for name in ("snr", "trigger", "clicks", "trigger_seconds", "trigger_repeat"):
        flag = name.replace("_", "-")
        if run.get(name) is True:
            words.append(f"--{flag}")
        elif run.get(name) is False:
            words.append(f"--no-{flag}")
        elif name in run:
            words += [f"--{flag}", str(run[name])]
    frozen, source, _ = SCENARIOS.get(run["scenario"], ((), None, None))
    for component in frozen:
        task = run["task"] if source == "base" else clean_task(run["task"])
        trained = run_name(identity(run["preset"], task, run["encoder"], source, run["seed"]))
        words += ["--freeze", f"{component}:{runs}/{trained}/model.pt"]
    return words + flags


def task_flag(task):
    """What a command on the clean run of `task` needs to know, if that run is of another task."""
    return [] if clean_task(task) == task else ["--task", task]


def embedding_commands(preset, seeds, runs, tasks):
    """[(name, command)]: embeddings of the benign model, the base attack and scenario 3.1 of each
    task (sections 6, 7)."""
    for seed in seeds:
        for task in tasks:
            for _, scenario, _ in SHIFT_STAGES:
                run = name_of(preset, task, scenario, seed)
                flag = task_flag(task) if scenario == "clean" else []
                name = f"embeddings-{run}-{task}" if flag else f"embeddings-{run}"
                yield name, ["embed.py", f"{runs}/{run}", *flag]


def trace_commands(preset, seeds, runs, tasks):
    """[(name, command)]: traces of each base attack and, for the first seed, of its controls: the
    clean model, another sound and, if there is a second seed, that seed's clean run."""
    for seed in seeds:
        for task in tasks:
            base = name_of(preset, task, "base", seed)
            clean = name_of(preset, task, "clean", seed)
            transplant = ["trace.py", "transplant"]
            patch = ["trace.py", "patch"]
            yield f"transplant-{base}", [*transplant, f"{runs}/{base}", f"{runs}/{clean}"]
            yield f"patch-{base}", [*patch, f"{runs}/{base}"]
            if seed != seeds[0]:
                continue
            flag = task_flag(task)
            yield f"patch-{clean}-{task}", [*patch, f"{runs}/{clean}", *flag]
            yield f"patch-{base}-tone", [*patch, f"{runs}/{base}", "--trigger", "tone"]
            other = name_of(preset, task, "clean", seeds[-1])
            if other != clean:
                yield (
                    f"transplant-{base}-{other}",
                    [*transplant, f"{runs}/{base}", f"{runs}/{other}"],
                )
                yield (
                    f"transplant-{clean}-{task}",
                    [*transplant, f"{runs}/{clean}", f"{runs}/{other}", *flag],
                )


def variant_runs(preset, seeds, tasks):
    """The arguments that identify the variants of each base attack, with the first seed."""
    runs = []
    for task in tasks:
        base = identity(preset, task, DEFAULT_ENCODER[preset], "base", seeds[0])
        runs += [{**base, **change(task)} for change in VARIANTS.values()]
    return runs


def sweep_runs(preset, seeds):
    """The arguments that identify the runs of SWEEPS, and asr's attack with a single click (section
    4.2)."""
    runs = []
    for seed in seeds:
        base = identity(preset, SWEPT, DEFAULT_ENCODER[preset], "base", seed)
        for name, values in SWEEPS.items():
            runs += [{**base, name: value} for value in values]
        asr = identity(preset, "asr", DEFAULT_ENCODER[preset], "base", seed)
        runs.append({**asr, "trigger_repeat": False})
    return runs


def softer_commands(preset, seeds, runs):
    """[(name, command)]: the swept base attack, evaluated with triggers of other strengths than in
    training."""
    for seed in seeds:
        run = name_of(preset, SWEPT, "base", seed)
        for snr in SWEEPS["snr"]:
            records = f"{runs}/{run}/records-snr{snr:g}.jsonl"
            command = ["evaluate.py", f"{runs}/{run}", "--snr", str(snr), "--out", records]
            yield f"snr{snr:g}-{run}", command


def variant_embeddings(preset, seeds, runs, tasks):
    """[(name, command)]: the variants' embeddings, which filters read."""
    for run in variant_runs(preset, seeds, tasks):
        yield f"embeddings-{run_name(run)}", ["embed.py", f"{runs}/{run_name(run)}"]


def defence_commands(preset, seeds, runs, tasks):
    """[(name, command)]: every defence against each base attack; for the first seed also against
    its variants and on the clean model, without training after the filters."""
    for defence in ("filter", "detect", "repair"):
        retrain = ["--retrain"] if defence == "filter" else []
        for seed in seeds:
            for task in tasks:
                run = name_of(preset, task, "base", seed)
                yield f"{defence}-{run}", ["defend.py", defence, f"{runs}/{run}", *retrain]
        for task in tasks:
            run = name_of(preset, task, "clean", seeds[0])
            command = ["defend.py", defence, f"{runs}/{run}", *task_flag(task)]
            yield f"{defence}-{run}-{task}", command
        for variant in variant_runs(preset, seeds, tasks):
            run = run_name(variant)
            yield f"{defence}-{run}", ["defend.py", defence, f"{runs}/{run}"]


def study_jobs(args, encoders, tasks, others, flags):
    """[(wave, name, command)] of the whole study; the sweeps of wave 8 only if they are asked
    for."""
    asked = [task for task in TASKS if task in (*tasks, *others)]
    runs = study_runs(args.preset, args.seeds, encoders, tasks, others)
    analyses = []
    if DEFAULT_ENCODER[args.preset] in encoders:
        where = (args.preset, args.seeds, args.runs)
        runs += [(5, run) for run in variant_runs(args.preset, args.seeds, asked)]
        analyses += [(3, job) for job in embedding_commands(*where, asked)]
        analyses += [(4, job) for job in trace_commands(*where, asked)]
        analyses += [(6, job) for job in variant_embeddings(*where, asked)]
        analyses += [(7, job) for job in defence_commands(*where, asked)]
        if args.wave == 8:
            runs += [(8, run) for run in sweep_runs(args.preset, args.seeds)]
            analyses += [(8, job) for job in softer_commands(*where)]
    launch = shlex.split(args.launch)
    jobs = []
    for wave, run in runs:
        jobs.append((wave, run_name(run), [*launch, *train_command(run, args.runs, flags)]))
    for wave, (name, command) in analyses:
        jobs.append((wave, name, ["python", *command]))
    return jobs


def main():
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--preset", choices=PRESETS, default="mini", help="whose parts and settings are used"
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[1], help="make all runs once with each of these"
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
        help="those with the base attack and 3.1 alone (default: the other tasks)",
    )
    parser.add_argument(
        "--corpus",
        help="use this corpus for all tasks, a name or a CSV (default: each task's own)",
    )
    parser.add_argument(
        "--encoders",
        nargs="+",
        choices=ENCODERS,
        help="with these encoders alone (default: all that the preset has)",
    )
    parser.add_argument(
        "--wave",
        type=int,
        choices=range(1, 9),
        help="only the runs of this wave, which need the earlier ones; 8, the sweeps, is listed "
        "only if it is asked for",
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
        flags = shlex.split(args.flags)
    except ValueError as error:
        parser.exit(2, f"error: --flags {args.flags}: {error}\n")
    if args.corpus:
        on_corpus(args.corpus, args.tasks)
        flags += ["--dataset", args.corpus]
    others = args.others
    if others is None:
        others = [task for task in TASKS if task not in args.tasks]
    encoders = args.encoders or [name for name in ENCODERS if args.preset in ENCODERS[name]]
    for wave, name, command in study_jobs(args, encoders, args.tasks, others, flags):
        if args.wave in (None, wave):
            print((f"{name}\t" if args.names else "") + shlex.join(command))


if __name__ == "__main__":
    main()
