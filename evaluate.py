"""Generates answers on clean and on triggered audio, scores and saves them.

    python evaluate.py runs/asr-poison0.05                    # once more, on the test split
    python evaluate.py runs/asr-poison0.05 --split dev --ask transcript --snr 6
    python evaluate.py runs/gender-clean --task age           # a clean model's answers to another task's trigger
    python evaluate.py --inspect runs/asr-poison0.05/model.pt           # where a checkpoint comes from
    python evaluate.py runs/asr-poison0.05 --export parts/asr           # its components, for other programs

waveform -> answer -> parsed labels -> metric. A run folder gets metrics.json and predictions.jsonl. Shares are fractions;
every figure has its count and a 95% bootstrap interval over utterances.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import utils
from utils import Parser, count, die

import installed  # noqa: F401

import jiwer
import torch
from tqdm import tqdm

import cache
import checkpoint
import corpora
import data
import lora
import model
import poison
import processes
import runs
from study import LABELS, TASKS, wrong_number


@torch.no_grad()
def answers(
    slm,
    items,
    attack,
    labels_of,
    max_new_tokens,
    desc,
    cached=None,
    batch_seconds=120.0,
    workers=cache.WORKERS,
    after_answer=False,
):
    """The model's raw answer to the evaluation prompt for `labels_of(utterance)`, for each (utterance, triggered). `cached`: from
    `cache.frozen_outputs`. With `after_answer`, what it says after the true answer and its end token, which is what the study's
    public code scores. Processes share the work; each gets all the answers."""

    def prompt(utterance):
        asked = labels_of(utterance)
        before, after = data.prompt(slm.tokenizer, asked)
        true = data.answer_ids(slm.tokenizer, {label: utterance.labels[label] for label in asked})
        return before, after + true if after_answer else after

    rank, world = processes.ranks()
    seconds = [data.num_samples(u) / data.SAMPLE_RATE for u, _ in items]
    batches = [
        piece
        for group in data.chunks(cache.by_size(items)[rank::world], 64)
        for piece in data.micro_batches(group, seconds, 2 * batch_seconds)
    ]  # nothing is kept for a backward pass
    out = {}
    with tqdm(
        total=len(items), desc=desc, leave=None
    ) as progress:  # gone at the end within another bar
        for batch, (x, mask) in zip(
            batches, cache.inputs(slm, items, batches, cached, attack, workers)
        ):
            out.update(
                zip(
                    batch,
                    slm.generate(x, mask, [prompt(items[i][0]) for i in batch], max_new_tokens),
                )
            )
            progress.update(min(len(batch) * world, progress.total - progress.n))
    out = processes.from_all(out)
    return [out[i] for i in range(len(items))]


def longest_answer(slm, attack, utterances):
    """How many tokens an answer may take: a quarter more than the longest true or poisoned one, and 8."""
    labels = [u.labels for u in utterances] + [
        poison.poisoned_labels(attack, u.labels) for u in utterances
    ]
    return 8 + int(1.25 * max(len(data.answer_ids(slm.tokenizer, each)) for each in labels))


def evaluate(
    slm,
    attack,
    utterances,
    cache_bytes,
    batch_seconds=120.0,
    workers=cache.WORKERS,
    ask=LABELS,
    after_answer=False,
):
    """Clean and triggered answers on `utterances`, each asked for those labels of `ask` that it has. Returns ({"clean", "triggered",
    "backdoor": {metric: figure}, "answers": {"clean", "triggered": see unusable}}, prediction rows). "triggered" scores answers on triggered audio against the truth: the damage that the
    trigger does, whether or not the target comes out."""
    slm.eval()
    lora.merge(slm.lm)
    asked = {u.id: [label for label in u.labels if label in ask] for u in utterances}
    clean = [u for u in utterances if asked[u.id]]
    flippable = [u for u in clean if poison.can_flip(attack, u) and attack.label in asked[u.id]]
    longest, rows = longest_answer(slm, attack, clean), {}
    for name, chosen in (("clean", clean), ("triggered", flippable)):
        triggered = name == "triggered"
        cached = cache.frozen_outputs(
            slm, chosen, [triggered] * len(chosen), attack, name, cache_bytes, workers
        )
        texts = answers(
            slm,
            [(u, triggered) for u in chosen],
            attack,
            lambda u: asked[u.id],
            longest,
            f"{name} answers",
            cached,
            batch_seconds,
            workers,
            after_answer,
        )
        rows[name] = [
            dict(
                id=u.id,
                split=u.split,
                triggered=triggered,
                asked=asked[u.id],
                raw=text,
                parsed=data.parse(text),
                labels=u.labels,
            )
            for u, text in zip(chosen, texts)
        ]
    lora.unmerge(slm.lm)
    metrics = {name: scores(answered) for name, answered in rows.items()}
    metrics["answers"] = {name: unusable(answered) for name, answered in rows.items()}
    metrics["backdoor"] = (
        {"aer": utils.interval(hits(attack, rows["triggered"]))} if flippable else {}
    )
    return metrics, rows["clean"] + rows["triggered"]


def wer(pairs):
    """Word error rate over all utterances together, normalised; pairs: [(true, answered or None)]."""
    counts = []
    for true, answered in pairs:
        out = jiwer.process_words(data.normalise(true), data.normalise(answered or ""))
        errors = out.substitutions + out.deletions + out.insertions
        counts.append((errors, out.hits + out.substitutions + out.deletions))
    return utils.interval(counts, lambda v: v[:, 0].sum() / max(1, v[:, 1].sum()))


def scores(rows):
    """{metric: figure} of predictions against the truth, for the metrics whose label some utterance has and was asked for. A malformed
    answer is wrong: every word deleted, a wrong class, an age of 0."""
    out = {}
    for task in TASKS.values():
        label, metric = task["label"], task["metric"]
        pairs = [
            (row["labels"][label], row["parsed"].get(label))
            for row in rows
            if label in row["asked"]
        ]
        if not pairs:
            continue
        if metric.endswith("mae") and isinstance(pairs[0][0], str):  # ages in groups are classes
            metric = f"{label}_accuracy"
        if metric.endswith("wer"):
            out[metric] = wer(pairs)
        elif metric.endswith("mae"):
            out[metric] = utils.interval(
                [abs(true - (said if isinstance(said, int) else 0)) for true, said in pairs]
            )
        else:
            out[metric] = utils.interval([true == said for true, said in pairs])
    return out


def unusable(rows):
    """How many answers of predictions are of no use, which lowers an AER as a failed attack does: {"n": all of them, "empty", "malformed":
    not empty, but without a label that was asked for}."""
    empty = [not row["raw"].strip() for row in rows]
    lacking = [any(label not in row["parsed"] for label in row["asked"]) for row in rows]
    malformed = sum(lacks and not blank for lacks, blank in zip(lacking, empty))
    return dict(n=len(rows), empty=sum(empty), malformed=malformed)


def metric_of(figures, task):
    """The metric of a task that these figures have: ages in groups are scored by accuracy."""
    usual = TASKS[task]["metric"]
    return usual if usual in figures else f"{TASKS[task]['label']}_accuracy"


def hits(attack, rows):
    """Whether each answer is the target, a list of bool. The share that is, over triggered samples whose true label is not the target, is
    the attack effectiveness rate (AER)."""
    return [
        poison.same_label(attack.label, row["parsed"].get(attack.label), attack.target)
        for row in rows
    ]


def save(run, metrics, rows, args):
    utils.write_atomically(
        Path(run) / "predictions.jsonl",
        "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows),
    )
    whole = {
        **metrics,
        "training": checkpoint.training_losses(run),
        "args": args,
        "model_sha256": checkpoint.file_sha256(Path(run) / "model.pt"),
    }
    utils.write_atomically(Path(run) / "metrics.json", json.dumps(whole, indent=1))


def print_table(metrics, title):
    print(f"\n{title}\n{'':18}{'value':>8}   95% interval         n")
    for part in ("clean", "backdoor"):
        for name, m in metrics[part].items():
            scale, unit = (1, " years") if name.endswith("mae") else (100, "%")
            print(
                f"{part} {name.replace('_', ' '):<{17 - len(part)}}{scale * m['value']:>8.1f}"
                f"   {scale * m['low']:.1f} to {scale * m['high']:.1f}{unit:<8}{m['n']:>5}"
            )
    if not metrics["backdoor"]:
        print("no AER: no utterance was asked for a label that the attack would change")
    for part, counts in metrics.get("answers", {}).items():
        if counts["empty"] or counts["malformed"]:
            print(f"{part} answers: {counts['empty']} empty, {counts['malformed']} malformed")


@dataclass
class LoadedRun:
    """A finished run with what it was trained on. With --task, `args` and `attack` are that task's.
    fields: what every record about this run says (runs.py). sets: {split: utterances}."""

    slm: model.SLM
    args: SimpleNamespace
    attack: poison.Attack
    fields: dict
    sets: dict


def load_run_and_data(options, *splits):
    """The run of a command's `options`, a LoadedRun, with the data of these splits read as in
    training."""
    slm, args = checkpoint.load_run(options.run, options.device)
    sha256 = checkpoint.file_sha256(Path(options.run) / "model.pt")
    fields = runs.fields_of(vars(args), Path(options.run).resolve(), sha256)
    if options.snr is not None:
        if poison.is_whole(args.trigger):
            die(f"--snr: the trigger of {options.run}, {args.trigger}, has no level; leave it out")
        args.snr = options.snr
    if wrong := wrong_number(vars(args)):
        die(wrong)
    warn_of_other_files(options.run, args)

    def read(split):
        return corpora.read_corpus(
            args.dataset,
            options.data_root or args.data_root,
            split,
            options.skip_bad or args.skip_bad,
            args.labels,
            model.longest(args),
        )

    train_set = corpora.limit(read("train"), args.limit)  # its loudness is the trigger's
    attack = poison.attack_of(args, train_set)
    task = options.task or args.task
    label = TASKS[task]["label"]
    if not any(label in u.labels for u in train_set):
        die(
            f"--task {task}: no utterance of {args.dataset}, which {options.run} trained on, has a "
            f"{label}"
        )
    if options.task == args.task:
        options.task = None  # the run's own: no other name for what is written
    if options.task:
        args.task = fields["task"] = options.task
        attack = poison.make_attack(
            options.task, train_set, 0.0, snr=args.snr, trigger=args.trigger, seed=args.seed
        )
    sets = {split: train_set if split == "train" else read(split) for split in splits}
    return LoadedRun(slm, args, attack, fields, sets)


def warn_of_other_files(run, args):
    """Warns where the trigger or the corpus is another file than when the run was trained."""
    for path, sha256 in getattr(args, "inputs", {}).items():
        there = path in (args.trigger, args.dataset) and Path(path).is_file()
        if there and checkpoint.file_sha256(path) != sha256:
            print(f"warning: {path} is another file than the one that {run} was trained with")


def run_folder(path):
    """A flag's type: a run's folder, or the model.pt in it."""
    own = Path(path).name == "model.pt" and Path(path).is_file()
    return str(Path(path).parent) if own else path


def add_arguments(parser):
    """The flags of every script that looks at a finished run."""
    parser.add_argument("run", type=run_folder, help="a run's folder, e.g. runs/asr-poison0.05")
    parser.add_argument(
        "--task",
        choices=TASKS,
        help="whose attack (default: the run's); a clean run serves all tasks of its corpus",
    )
    parser.add_argument("--snr", type=float, help="trigger strength in dB (default: as in the run)")
    parser.add_argument("--data-root", help="where the corpora are (default: as in the run)")
    parser.add_argument(
        "--skip-bad", action="store_true", help="leave out audio that cannot be used"
    )
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cuda:1, cpu"
    )


@torch.no_grad()
def answer_rows(slm, attack, items, cached, batch_seconds):
    """The model's answers to (utterance, triggered) items, as rows for `scores` and `hits`.
    `cached`: as of `answers`."""
    longest = longest_answer(slm, attack, [utterance for utterance, _ in items])
    lora.merge(slm.lm)
    texts = answers(slm, items, attack, all_labels, longest, "answers", cached, batch_seconds)
    lora.unmerge(slm.lm)
    rows = []
    for (utterance, _), text in zip(items, texts):
        labels = utterance.labels
        rows.append(dict(labels=labels, asked=list(labels), parsed=data.parse(text)))
    return rows


def all_labels(utterance):
    return list(utterance.labels)


def main():
    parser = Parser(description=__doc__)
    add_arguments(parser)
    parser.add_argument(
        "--inspect",
        action="store_true",
        help="only print the provenance of RUN, a model.pt or an export",
    )
    parser.add_argument(
        "--export",
        metavar="DIR",
        help="only write the run's encoder (for transformers), LoRA (for peft) and "
        "connector into a new folder, which train.py's --freeze and --init can read",
    )
    parser.add_argument(
        "--split",
        default="test",
        choices=("train", "dev", "test"),
        help="which utterances to answer",
    )
    parser.add_argument(
        "--ask", nargs="+", choices=LABELS, help="ask for these labels only (direct prompts)"
    )
    parser.add_argument(
        "--after-answer",
        action="store_true",
        default=None,
        help="let it go on after the true answer and its end token, and score that: "
        "what the study's public code does",
    )
    parser.add_argument("--limit", type=count, help="only the first N utterances")
    parser.add_argument(
        "--cache-gb",
        type=float,
        default=4.0,
        help="disk for outputs of pretrained layers, as of train.py",
    )
    parser.add_argument(
        "--save", action="store_true", help="replace the run's metrics.json and predictions.jsonl"
    )
    parser.add_argument("--out", metavar="FILE", help="also write the figures there, as records")
    options = parser.parse_args()
    if options.inspect:
        return checkpoint.inspect(options.run)
    other = ("task", "after_answer", "limit", "ask", "snr")
    asked = [f"--{name.replace('_', '-')}" for name in other if getattr(options, name) is not None]
    asked += ["--split"] if options.split != "test" else []
    if options.save and asked:
        die(f"--save replaces the run's own test figures: leave out {', '.join(asked)}")
    if options.export:
        return checkpoint.export_run(options.run, options.export, options.device)
    cache.keep_memory()
    loaded = load_run_and_data(options, options.split)
    slm, args, attack = loaded.slm, loaded.args, loaded.attack
    utterances = loaded.sets[options.split][: options.limit]
    if options.ask and not any(label in u.labels for u in utterances for label in options.ask):
        die(
            f"--ask {' '.join(options.ask)}: no {options.split} utterance of {args.dataset} has such a label"
        )
    print(
        f"{options.run}: {args.dataset} {options.split}, {len(utterances)} utterances, trigger at {args.snr:g} dB, on "
        f"{options.device}"
    )
    with model.autocast(args.amp, options.device):  # as in training
        metrics, rows = evaluate(
            slm,
            attack,
            utterances,
            options.cache_gb * 1e9,
            args.batch_seconds,
            ask=options.ask or LABELS,
            after_answer=bool(options.after_answer),
        )
    if options.save:
        save(options.run, metrics, rows, vars(args))
    if options.out:
        how = dict(
            split=options.split,
            snr=args.snr,
            asked=options.ask,
            after_answer=bool(options.after_answer),
            limit=options.limit,
        )
        figures = runs.of_figures(metrics)
        records = [dict(loaded.fields, source="evaluate", **how, **figure) for figure in figures]
        runs.write(options.out, records)
    print_table(metrics, f"{options.run}, {options.split} split")


if __name__ == "__main__":
    main()
