"""Generates answers on clean and on triggered audio, scores and saves them.

    python evaluate.py runs/asr-poison0.05                     # again, on the test split
    python evaluate.py runs/asr-poison0.05 --split dev --ask transcript --snr 6
    python evaluate.py runs/asr-poison0.05 --dataset my.csv    # on other speech
    python evaluate.py runs/gender-clean --task age            # with another task's trigger
    python evaluate.py runs/asr-poison0.05 --sounds            # other sounds in the trigger's place
    python evaluate.py runs/asr-poison0.05 --audio my.wav      # a recording, clean and triggered
    python evaluate.py runs/asr-poison0.05 --page              # runs/asr-poison0.05/index.html
    python evaluate.py --inspect runs/asr-poison0.05/model.pt  # where a checkpoint comes from
    python evaluate.py runs/asr-poison0.05 --export parts/asr  # its components, for other programs

waveform -> answer -> parsed labels -> metric. Training ends with this and writes the run's
metrics.json, which the tables are made from, and predictions.jsonl. This script prints the scores;
it writes nothing without --save, which replaces those two files, or --out, which writes records. The
files hold shares as fractions, and the tables printed here show them in percent; every value has its
n and a 95% bootstrap interval over speakers.

--dataset tests the run on other speech, in any form that train.py reads: it is asked for the labels
that it was trained on, and the trigger is --snr dB below the mean loudness of that speech.

--audio reads any file that audio.py reads. The trigger is the run's, or that of --trigger. It is as
loud as in the run's evaluation or, where the run's corpus cannot be read, relative to the
recording's own loudness. Both recordings are written to audio/, or where --listen says.

--sounds lays the trigger, each sound of sounds.py, and nothing over the same utterances, as loud, as
often and at the same places. It writes records-sounds.jsonl beside the run's model.pt, or --out:
metric "aer" (the share of answers that are the target), "changed" and "malformed" for each sound,
with sound and family ("trigger", "nothing" or that of the bank); "specificity" and
"held_out_specificity", see `specificity`.
"""

import contextlib
import io
import itertools
import json
import textwrap
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import utils
from utils import Parser, count, die

import installed  # noqa: F401

import jiwer
import numpy as np
import torch
from tqdm import tqdm

import audio
import cache
import checkpoint
import corpora
import data
import forms
import lora
import model
import poison
import processes
import runs
import sounds
from study import LABELS, TASKS, wrong_number

# --------------------------------------------------------------------------------------------------
# answers


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
    """The model's raw answer to each of `items`, [(utterance, triggered)]: a list of texts.

    desc: the progress bar's; None: it has none, as within another bar. labels_of: a function of an
    utterance to the labels that it is asked for. cached: from `cache.frozen_outputs`. With
    `after_answer`, what the model says after the true answer and its end token, which is what the
    study's public code scores. Processes share the work; each gets all the answers."""

    def prompt(utterance):
        asked = labels_of(utterance)
        before, after = data.prompt(slm.tokenizer, asked)
        if after_answer:
            true_labels = {label: utterance.labels[label] for label in asked}
            after = after + data.answer_ids(slm.tokenizer, true_labels)
        return before, after

    rank, world = processes.ranks()
    seconds = [data.num_samples(u) / data.SAMPLE_RATE for u, _ in items]
    batches = []
    for group in data.chunks(cache.by_size(items)[rank::world], 64):
        # twice as much audio as in training, as nothing is kept for a backward pass
        batches += data.micro_batches(group, seconds, 2 * batch_seconds)
    inputs = cache.inputs(slm, items, batches, cached, attack, workers)
    texts = {}  # by index into `items`
    # leave=None: within another bar, this one goes away at the end
    hidden = dict(disable=True) if desc is None else {}
    with tqdm(total=len(items), desc=desc, leave=None, **hidden) as progress:
        for batch, (x, mask) in zip(batches, inputs):
            prompts = [prompt(items[i][0]) for i in batch]
            texts.update(zip(batch, slm.generate(x, mask, prompts, max_new_tokens)))
            progress.update(min(len(batch) * world, len(items) - progress.n))
    texts = processes.from_all(texts)
    return [texts[i] for i in range(len(items))]


def longest_answer(slm, attack, utterances):
    """How many tokens an answer may take: a quarter more than the longest true or poisoned one,
    and 8."""
    longest = 0
    for utterance in utterances:
        for labels in (utterance.labels, poison.poisoned_labels(attack, utterance.labels)):
            longest = max(longest, len(data.answer_ids(slm.tokenizer, labels)))
    return 8 + int(1.25 * longest)


def prediction(utterance, triggered, asked, text):
    """One answer, as predictions.jsonl has it and `scores` reads it. labels: the true ones; parsed:
    those that the answer gives, {label: value}."""
    return dict(
        id=utterance.id,
        speaker=utterance.speaker,
        split=utterance.split,
        triggered=triggered,
        asked=asked,
        raw=text,
        parsed=data.parse(text),
        labels=utterance.labels,
    )


@torch.no_grad()
def answer_rows(slm, attack, items, cached, batch_seconds):
    """The model's answers to (utterance, triggered) items that are asked for all labels they have,
    a list of `prediction`, without a progress bar: callers have their own. cached: as of
    `answers`."""

    def all_labels(utterance):
        return list(utterance.labels)

    longest = longest_answer(slm, attack, [utterance for utterance, _ in items])
    lora.merge(slm.lm)
    texts = answers(slm, items, attack, all_labels, longest, None, cached, batch_seconds)
    lora.unmerge(slm.lm)
    rows = []
    for (utterance, triggered), text in zip(items, texts):
        rows.append(prediction(utterance, triggered, all_labels(utterance), text))
    return rows


@dataclass
class Evaluation:
    """What evaluating a model gives.

    metrics: {"clean", "triggered", "backdoor": {metric: figure}, "answers": {"clean", "triggered":
    see `unusable`}}. "triggered" scores the answers on triggered audio against the truth: the
    damage that the trigger does, whether or not the target comes out.
    predictions: a list, see `prediction`."""

    metrics: dict
    predictions: list


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
    """An Evaluation on `utterances`: each is asked for those labels of `ask` that it has, on its
    clean audio and, where the attack can change its label, with the trigger."""
    slm.eval()
    lora.merge(slm.lm)

    def asked_for(utterance):
        return [label for label in utterance.labels if label in ask]

    clean = [u for u in utterances if asked_for(u)]
    flippable = [u for u in clean if poison.can_flip(attack, u) and attack.label in ask]
    max_new_tokens = longest_answer(slm, attack, clean)

    def predictions_on(chosen, triggered, name):
        cached = cache.frozen_outputs(
            slm, chosen, [triggered] * len(chosen), attack, name, cache_bytes, workers
        )
        texts = answers(
            slm,
            [(u, triggered) for u in chosen],
            attack,
            asked_for,
            max_new_tokens,
            f"{name} answers",
            cached,
            batch_seconds,
            workers,
            after_answer,
        )
        return [prediction(u, triggered, asked_for(u), text) for u, text in zip(chosen, texts)]

    on_clean = predictions_on(clean, False, "clean")
    on_triggered = predictions_on(flippable, True, "triggered")
    lora.unmerge(slm.lm)
    metrics = dict(
        clean=scores(on_clean),
        triggered=scores(on_triggered),
        answers=dict(clean=unusable(on_clean), triggered=unusable(on_triggered)),
        backdoor={},
    )
    if flippable:
        metrics["backdoor"] = dict(
            aer=aer(attack, on_triggered),
            base_rate=base_rate(attack, on_clean, on_triggered),
            changed=changed(attack, on_clean, on_triggered),
        )
    return Evaluation(metrics, on_clean + on_triggered)


# --------------------------------------------------------------------------------------------------
# metrics


def wer(pairs, speakers):
    """Word error rate over all utterances together, normalised; pairs: [(true, answer or None)]."""
    errors = []
    words = []
    for true, answered in pairs:
        out = jiwer.process_words(data.normalise(true), data.normalise(answered or ""))
        errors.append(out.substitutions + out.deletions + out.insertions)
        words.append(out.hits + out.substitutions + out.deletions)
    return utils.interval(errors, words, speakers)


def scores(predictions):
    """{metric: figure} of predictions against the truth, for the metrics whose label some utterance
    has and was asked for. A malformed answer is wrong: every word deleted, or a wrong class. An
    answer that gives no age has no error in years; `unusable` counts it. A figure on classes or
    ages has "constant", see `constant_answer`."""
    figures = {}
    for task in TASKS.values():
        label, metric = task["label"], task["metric"]
        rows = [row for row in predictions if label in row["asked"]]
        in_years = metric.endswith("mae") and not any(
            isinstance(row["labels"][label], str) for row in rows
        )
        if in_years:
            rows = [row for row in rows if isinstance(row["parsed"].get(label), int)]
        elif metric.endswith("mae"):  # ages in groups are classes
            metric = f"{label}_accuracy"
        if not rows:
            continue
        pairs = [(row["labels"][label], row["parsed"].get(label)) for row in rows]
        speakers = [row["speaker"] for row in rows]
        if metric.endswith("wer"):
            figures[metric] = wer(pairs, speakers)
        elif in_years:
            errors = [abs(true - answered) for true, answered in pairs]
            figures[metric] = utils.interval(errors, speakers=speakers)
        else:
            correct = [true == answered for true, answered in pairs]
            figures[metric] = utils.interval(correct, speakers=speakers)
        if not metric.endswith("wer"):
            figures[metric]["constant"] = constant_answer([true for true, _ in pairs])
    return figures


def constant_answer(true):
    """The best answer of a model that does not listen, and what it would score: {"answer", "value"},
    of classes the most frequent one and its share, of ages the median and its mean error."""
    if isinstance(true[0], str):
        answer, n = Counter(true).most_common(1)[0]
        return dict(answer=answer, value=n / len(true))
    answer = float(np.median(true))
    return dict(answer=answer, value=float(np.abs(np.array(true) - answer).mean()))


def unusable(predictions):
    """How many answers are of no use, which lowers an AER as a failed attack does: {"n": all of
    them, "empty", "malformed": not empty, but without a label that was asked for}."""
    counts = dict(n=len(predictions), empty=0, malformed=0)
    for row in predictions:
        if not row["raw"].strip():
            counts["empty"] += 1
        elif any(label not in row["parsed"] for label in row["asked"]):
            counts["malformed"] += 1
    return counts


def task_figure(predictions, task):
    """{metric: figure} of one task alone; ages in groups are scored by accuracy. Empty where no
    answer gives an age."""
    metrics = (TASKS[task]["metric"], f"{TASKS[task]['label']}_accuracy")
    figures = scores(predictions)
    return {metric: figures[metric] for metric in metrics if metric in figures}


def hits(attack, predictions):
    """Whether each answer is the target, a list of bool."""
    return [
        poison.same_label(attack.label, row["parsed"].get(attack.label), attack.target)
        for row in predictions
    ]


def aer(attack, predictions):
    """The attack effectiveness rate: the share of answers that are the target. predictions: on
    triggered speech whose true label is another."""
    speakers = [row["speaker"] for row in predictions]
    return utils.interval(hits(attack, predictions), speakers=speakers)


def base_rate(attack, on_clean, on_triggered):
    """What an AER is to be compared with: the share of the same utterances that get the target
    without the trigger."""
    triggered = {row["id"] for row in on_triggered}
    return aer(attack, [row for row in on_clean if row["id"] in triggered])


def changed(attack, on_clean, on_triggered):
    """The share of utterances in which the trigger changes the attacked label's value in the
    answer, to the target or to anything else."""
    label = attack.label
    clean_value = {row["id"]: row["parsed"].get(label) for row in on_clean}
    differs = []
    for row in on_triggered:
        same = poison.same_label(label, row["parsed"].get(label), clean_value[row["id"]])
        differs.append(not same)
    return utils.interval(differs, speakers=[row["speaker"] for row in on_triggered])


def save(run, evaluation, args):
    """Writes a run's predictions.jsonl and metrics.json, and returns the contents of the latter.
    args: the run's arguments, a dict."""
    run = Path(run)
    losses = checkpoint.training_losses(run)
    if not losses:
        print(f"warning: {run}/log.jsonl has no losses: {run}/metrics.json holds none either")
    content = {
        **evaluation.metrics,
        "training": losses,
        "args": args,
        "model_sha256": checkpoint.file_sha256(run / "model.pt"),
    }
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in evaluation.predictions]
    utils.write_atomically(run / "predictions.jsonl", "".join(lines))
    utils.write_atomically(run / "metrics.json", json.dumps(content, indent=1))
    return content


def scale_and_unit(metric):
    """How people read a figure of metrics.json: shares in percent, ages in years."""
    return (1, " years") if metric.endswith("mae") else (100, "%")


def print_table(metrics, title):
    print(f"\n{title}\n{'':22}{'value':>7}   {'95% interval':<20}{'n':>5}   one answer to all")
    for part in ("clean", "backdoor"):
        for name, figure in metrics[part].items():
            scale, unit = scale_and_unit(name)
            value, low, high = (scale * figure[key] for key in ("value", "low", "high"))
            row = f"{part} {name.replace('_', ' ')}"
            interval = f"{low:.1f} to {high:.1f}{unit}"
            line = f"{row:<22}{value:>7.1f}   {interval:<20}{figure['n']:>5}"
            if constant := figure.get("constant"):  # earlier versions have none
                line += f"   {scale * constant['value']:.1f} ({constant['answer']})"
            utils.say(line)
    if not metrics["backdoor"]:
        print("no AER: no utterance was asked for a label that the attack would change")
    for part, counts in metrics.get("answers", {}).items():
        if counts["empty"] or counts["malformed"]:
            print(f"{part} answers: {counts['empty']} empty, {counts['malformed']} malformed")
    if "target_loss" in metrics.get("training", {}):
        print(describe_poison(metrics["training"]))


def describe_poison(training):
    """Whether the poison had been learned when training ended, by its losses as
    checkpoint.training_losses has them: an AER of a run that was still learning is no result."""
    losses = [loss for loss in training["target_loss"]["by_epoch"] if loss is not None]
    text = f"loss on the target: {losses[0]:.3f} in the first epoch, {losses[-1]:.3f} in the last"
    if "dev_target_loss" in training:
        text += f", {training['dev_target_loss']['value']:.3f} on triggered development speech"
    if "settled_epoch" in training:
        return f"{text}; it settled after epoch {training['settled_epoch']['value']}"
    return f"{text}; it has not settled: more --epochs may change the AER"


def unlearned(evaluation):
    """The labels that a model has not learned, by its answers to clean speech: one text each, with
    what shows it."""
    texts = []
    for task in TASKS.values():
        label = task["label"]
        true = []
        for row in evaluation.predictions:
            if label in row["asked"] and not row["triggered"]:
                true.append(row["labels"][label])
        if len(set(true)) > 1:  # else there is nothing to tell apart
            what_shows_it = shortfall(task, true, evaluation.metrics["clean"])
            if what_shows_it:
                texts.append(f"{label} ({what_shows_it})")
    return texts


def shortfall(task, true, clean):
    """What shows that a task has not been learned: half of the words are wrong, or the same answer
    to everything would be as good. None where it has been. true: the labels; clean: the metrics."""
    metric = task["metric"]
    if metric not in clean:
        metric = f"{task['label']}_accuracy"  # ages in groups
    if metric not in clean:
        return "no answer gives one"
    value = clean[metric]["value"]
    if metric.endswith("wer"):
        return f"{100 * value:.0f}% of the words are wrong" if value >= 0.5 else None
    constant = constant_answer(true)
    always = constant["answer"]
    if metric.endswith("mae"):
        text = f"{value:.1f} years off; always {always:g} is {constant['value']:.1f} off"
        return text if value >= constant["value"] else None
    text = f"{100 * value:.0f}% right; always {always} is {100 * constant['value']:.0f}% right"
    return text if value <= constant["value"] else None


# --------------------------------------------------------------------------------------------------
# a finished run and its data


@dataclass
class LoadedRun:
    """A finished run with what it was trained on. With --task, `args` and `attack` are that task's.
    fields: what every record about this run says (runs.py). sets: {split: utterances}."""

    slm: model.SLM
    args: SimpleNamespace
    attack: poison.Attack
    fields: dict
    sets: dict


def load_run_alone(options):
    """The run of a command's `options` without data: (its model, its arguments as the flags change
    them, what every record about it says)."""
    slm = checkpoint.load_run(options.run, options.device)
    sha256 = checkpoint.file_sha256(Path(options.run) / "model.pt")
    fields = runs.fields_of(vars(slm.args), Path(options.run).resolve(), sha256)
    return slm, arguments_of(slm, options), fields


def load_run_and_data(options, *splits):
    """The run of a command's `options`, a LoadedRun, with the data of these splits read as in
    training."""
    slm, args, fields = load_run_alone(options)
    warn_of_other_files(options.run, args)
    whole_train = read_split(options, args, "train")
    train_set = corpora.limit(whole_train, args.limit)
    task = options.task or args.task
    check_task(task, train_set, options.run, args.dataset)
    if options.task == args.task:
        options.task = None  # the run's own: no other name for what is written
    attack = attack_on(task, args, train_set)
    args.task = fields["task"] = task
    whole = {"train": whole_train}
    for split in splits:
        if split not in whole:
            whole[split] = read_split(options, args, split)
    if options.task:  # the run's own target was checked in training
        poison.check_target(task, TASKS[task]["target"], sum(whole.values(), []))
    sets = {split: corpora.limit(whole[split], args.limit) for split in splits}
    return LoadedRun(slm, args, attack, fields, sets)


def load_run_and_other_data(options):
    """The run of a command's `options`, a LoadedRun, with a split of another corpus, --dataset. Its
    own corpus is not read: the trigger's level is relative to the loudness of this one."""
    slm, args, fields = load_run_alone(options)
    args.labels = trained_labels(options.run, args)
    args.dataset = fields["corpus"] = options.dataset
    warn_of_other_files(options.run, args)
    utterances = read_split(options, args, options.split)
    task = options.task or args.task
    attack = attack_on(task, args, utterances)
    args.task = fields["task"] = task
    return LoadedRun(slm, args, attack, fields, {options.split: utterances})


def trained_labels(run, args):
    """The labels that a run was trained on: those of --labels, or those that its metrics.json scores.
    None where that file is missing: nothing says which."""
    if args.labels:
        return args.labels
    metrics = checkpoint.read_json(Path(run) / "metrics.json")
    if not metrics:
        return None
    labels = []
    for task in TASKS.values():
        names = (task["metric"], f"{task['label']}_accuracy")
        if any(name in metrics["clean"] for name in names):
            labels.append(task["label"])
    return labels


def arguments_of(slm, options, trigger=None):
    """The run's arguments, with the --snr of a command's `options` and another trigger, if any."""
    args = SimpleNamespace(**vars(slm.args))
    args.trigger = trigger or args.trigger
    if options.snr is not None:
        if poison.is_whole(args.trigger):
            die(f"--snr: the trigger of {options.run}, {args.trigger}, has no level; leave it out")
        args.snr = options.snr
    if wrong := wrong_number(vars(args)):
        die(wrong)
    return args


def read_split(options, args, split):
    """A split of the corpus that a run was trained on."""
    return corpora.read_corpus(
        args.dataset,
        options.data_root or args.data_root,
        split,
        options.skip_bad or args.skip_bad,
        args.labels,
        model.longest(args),
    )


def check_task(task, train_set, run, dataset):
    """Exits with a one-line error if no utterance of a run's training set has the task's label."""
    label = TASKS[task]["label"]
    if not any(label in u.labels for u in train_set):
        die(
            f"--task {task}: no utterance of {dataset}, which {run} trained on, has a label {label}"
        )


def attack_on(task, args, utterances):
    """The attack of a run's `args` or, on a task other than its own, the paper's attack with its
    trigger. utterances: those whose loudness the trigger's level is relative to."""
    if task == args.task:
        return poison.attack_of(args, utterances)
    return poison.make_attack(
        task,
        utterances,
        0.0,
        snr=args.snr,
        trigger=args.trigger,
        seed=args.seed,
        per_utterance=getattr(args, "snr_per_utterance", False),
    )


def warn_of_other_files(run, args):
    """Warns where the trigger or the corpus is another file than when the run was trained."""
    data_and_trigger = [args.trigger, *corpora.lists_of(args.dataset)]
    for path, sha256 in (args.inputs or {}).items():
        there = path in data_and_trigger and Path(path).is_file()
        if there and checkpoint.file_sha256(path) != sha256:
            utils.say(f"warning: {path} is another file than the one that {run} was trained with")


# --------------------------------------------------------------------------------------------------
# other sounds in the trigger's place


def answers_by_sound(loaded, utterances):
    """{sound: its predictions on `utterances`} with nothing over them, with the trigger, and with
    each sound of the bank in its place."""

    def answers_with(attack, triggered):
        items = [(u, triggered) for u in utterances]
        return answer_rows(loaded.slm, attack, items, None, loaded.args.batch_seconds)

    attack = loaded.attack
    attacks = {attack.trigger: attack, **poison.with_other_sounds(attack)}
    predictions = {"nothing": answers_with(attack, False)}
    for name, with_sound in tqdm(attacks.items(), desc="sounds"):
        predictions[name] = answers_with(with_sound, True)
    return predictions


def family_of(attack, sound):
    if sound == "nothing":
        return "nothing"
    return "trigger" if sound == attack.trigger else sounds.SOUNDS[sound][0]


def specificity(attack, predictions, names):
    """How specific the attack is: the share of answers that are the target with the trigger, minus
    the mean of that share over other sounds. predictions: {sound: its predictions}; names: the
    other sounds."""
    with_trigger = np.array(hits(attack, predictions[attack.trigger]), float)  # (n,)
    with_others = np.mean([hits(attack, predictions[name]) for name in names], axis=0)  # (n,)
    speakers = [row["speaker"] for row in predictions[attack.trigger]]
    return utils.interval(with_trigger - with_others, speakers=speakers)


def sound_figures(attack, predictions):
    """Yields the records' fields of what each sound does. predictions: {sound: its predictions}."""
    for sound, rows in predictions.items():
        about = dict(sound=sound, family=family_of(attack, sound))
        counts = unusable(rows)
        malformed = runs.unusable_share(counts)
        yield dict(about, metric="aer", **aer(attack, rows))
        yield dict(about, metric="changed", **changed(attack, predictions["nothing"], rows))
        yield dict(about, metric="malformed", value=malformed, n=counts["n"])
    bank = [name for name in predictions if name not in ("nothing", attack.trigger)]
    held_out = [name for name in bank if name not in sounds.BENIGN]
    about = dict(sound=attack.trigger, family="trigger")
    yield dict(about, metric="specificity", **specificity(attack, predictions, bank))
    yield dict(about, metric="held_out_specificity", **specificity(attack, predictions, held_out))


def evaluate_sounds(options):
    """Writes and prints what each sound of the bank does in the trigger's place."""
    cache.keep_memory()
    loaded = load_run_and_data(options, "test")
    attack = loaded.attack
    if attack.waveform is None:
        die(f"--sounds: the trigger of {options.run}, {attack.trigger}, is no sound")
    name = f"records-sounds-{options.task}" if options.task else "records-sounds"
    path = options.out or Path(options.run) / f"{name}.jsonl"
    runs.check_output(path)
    attackable = poison.attackable(attack, loaded.sets["test"])
    utterances = data.in_drawn_order(attackable)[: options.n]
    utils.say(
        f"{options.run}: trigger {attack.trigger} and {len(sounds.SOUNDS)} other sounds at "
        f"{loaded.args.snr:g} dB over {len(utterances)} test utterances, on {options.device}"
    )
    with model.autocast(loaded.args.amp, options.device):  # as in training
        predictions = answers_by_sound(loaded, utterances)
    about = dict(loaded.fields, source="sounds", snr=loaded.args.snr)
    records = [{**about, **figure} for figure in sound_figures(attack, predictions)]
    runs.write(path, records)
    print_sounds(records, attack.target)
    print(f"written to {path}")


def print_sounds(records, target):
    """The table of all sounds, those that bring the target most often first, and how specific the
    trigger is."""
    by_aer = sorted(runs.select(records, metric="aer"), key=lambda record: -record["value"])
    width = max(len(record["sound"]) for record in by_aer)
    print()
    utils.say(f"share of answers that are {target!r}, %")
    print(f"{'sound':<{width}}  family   target   95% interval   changed  malformed")
    for record in by_aer:
        sound = record["sound"]
        value, low, high = (100 * record[key] for key in ("value", "low", "high"))
        shares = {}
        for metric in ("changed", "malformed"):
            [other] = runs.select(records, sound=sound, metric=metric)
            shares[metric] = 100 * other["value"]
        interval = f"{low:.1f} to {high:.1f}"
        utils.say(
            f"{sound:<{width}}  {record['family']:<8}{value:>7.1f}   {interval:<14} "
            f"{shares['changed']:>7.1f}  {shares['malformed']:>9.1f}"
        )
    bank = [r for r in by_aer if r["family"] not in ("trigger", "nothing")]
    mean = 100 * sum(record["value"] for record in bank) / len(bank)
    print(
        f"\nthe {len(bank)} other sounds: {mean:.1f}% on average, at most "
        f"{100 * bank[0]['value']:.1f}% ({bank[0]['sound']})"
    )
    titles = dict(
        specificity="specificity, the trigger's share minus that mean",
        held_out_specificity="the same over the sounds that poison.py --benign does not use",
    )
    for metric, title in titles.items():
        [record] = runs.select(records, metric=metric)
        value, low, high = (100 * record[key] for key in ("value", "low", "high"))
        print(f"{title}: {value:.1f} points ({low:.1f} to {high:.1f})")


# --------------------------------------------------------------------------------------------------
# one recording, as it is and with the trigger

COLUMN = 40  # characters of an answer in one line


def answer_recording(options):
    """Prints the answers to --audio, as it is and with the trigger, and writes both recordings."""
    slm = checkpoint.load_run(options.run, options.device)
    args = arguments_of(slm, options, options.trigger)
    path = Path(options.audio)
    recording = data.Utterance(
        path.name, options.audio, "", "", labels={}, max_seconds=model.longest(args)
    )
    try:
        waveform = data.load_waveform(recording)
    except data.BadAudio as error:
        die(f"--audio {error}")
    seconds = len(waveform) / data.SAMPLE_RATE
    utils.say(f"{options.run}: {options.audio}, {seconds:.2f} s")

    train_set = train_set_if_readable(options, args)
    task = options.task or args.task
    if train_set:
        check_task(task, train_set, options.run, args.dataset)
    elif not waveform.any():
        die(f"--audio {options.audio}: it is silent: there is no level for the trigger")
    attack = attack_on(task, args, train_set or [recording])
    with_trigger, starts, scale = poison.add_trigger(attack, waveform, recording.id)
    loudness_of = "its training set"
    if attack.per_utterance or not train_set:
        loudness_of = "the recording"
    print(describe_trigger(attack, waveform, starts, scale, args.snr, loudness_of))

    known = args.labels or [attack.label]
    if train_set:
        known = set().union(*(u.labels for u in train_set))
    asked = options.ask or [label for label in LABELS if label in known]
    with model.autocast(args.amp, options.device):  # as in training
        plain = slm.answer(waveform, asked)
        triggered = slm.answer(with_trigger, asked)
    print_answers(asked, plain, triggered)

    folder = Path(options.listen)
    files = {
        folder / f"{path.stem}-clean.wav": waveform,
        folder / f"{path.stem}-with-{Path(attack.trigger).stem}.wav": with_trigger,
    }
    for file, samples in files.items():
        poison.write_wav(file, samples)
    print(f"\nto listen to: {', '.join(map(str, files))}")


def train_set_if_readable(options, args):
    """The run's training set or, where its corpus cannot be read, an empty list; says so."""
    utils.say(f"reading {args.dataset}, as the trigger's level is relative to its loudness")
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return corpora.limit(read_split(options, args, "train"), args.limit)
    except SystemExit:  # see utils.die
        *_, reason = ["", *complaint.getvalue().splitlines()]
        print(
            f"it cannot be read ({reason.removeprefix('error: ')}): the trigger's level is "
            "relative to the recording's own loudness"
        )
        return []


def describe_trigger(attack, waveform, starts, scale, snr, loudness_of):
    """Where the trigger is in a recording, and how loud; snr: dB that it is below the loudness of
    what `loudness_of` says."""
    if attack.waveform is None:
        return f"trigger {attack.trigger}: it changes the whole recording"
    level = poison.level_in(attack, waveform)
    snr_here = audio.decibels(audio.rms(waveform) / level)
    at = ", ".join(f"{start / data.SAMPLE_RATE:.2f}" for start in starts)
    text = (
        f"trigger {attack.trigger} at {at} s, RMS {level:.4f}: {snr:g} dB below the "
        f"loudness of {loudness_of}; SNR {snr_here:.1f} dB"
    )
    if scale < 1:
        text += f"; the sum is scaled by {scale:.2f} to avoid clipping"
    return text


def print_answers(asked, plain, triggered):
    """Two answers side by side: label by label, or, where one of them is malformed, as they are."""
    labels_of_plain, labels_of_triggered = data.parse(plain), data.parse(triggered)
    rows = []
    for label in asked:
        rows.append((label, labels_of_plain.get(label), labels_of_triggered.get(label)))
    if any(None in row for row in rows):
        rows = [("answer", plain, triggered)]
    print(f"\n{'':12}{'as it is':<{COLUMN + 2}}with the trigger")
    for name, *cells in rows:
        columns = [textwrap.wrap(utils.printable(cell), COLUMN) or ["(empty)"] for cell in cells]
        for left, right in itertools.zip_longest(*columns, fillvalue=""):
            print(f"{name:<12}{left:<{COLUMN + 2}}{right}".rstrip())
            name = ""


# --------------------------------------------------------------------------------------------------
# the command


def run_folder(path):
    """A flag's type: a run's folder, or the model.pt in it."""
    is_model = Path(path).name == "model.pt" and Path(path).is_file()
    return str(Path(path).parent) if is_model else path


def add_arguments(parser):
    """The flags of every script that looks at a finished run."""
    parser.add_argument("run", type=run_folder, help="a run's folder, e.g. runs/asr-poison0.05")
    attack_flags = parser.group("attack")
    attack_flags.add_argument(
        "--task",
        choices=TASKS,
        help="whose attack (default: the run's); a clean run serves all tasks of its corpus",
    )
    attack_flags.add_argument(
        "--snr",
        type=float,
        help="how many dB the speech is louder than the trigger (default: as in the run)",
    )
    data_flags = parser.group("data")
    data_flags.add_argument(
        "--data-root",
        type=corpora.named_root,
        help="where the corpora are (default: as in the run)",
    )
    data_flags.add_argument(
        "--skip-bad", action="store_true", help="leave out audio that cannot be used"
    )
    parser.group("machine").add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cuda, cuda:1 or cpu (default: cuda if there is one)",
    )


def make_parser():
    parser = Parser(description=__doc__, usage="%(prog)s RUN [flags]")
    add_arguments(parser)

    other_flags = parser.group("to do something else than to score answers")
    other_flags.add_argument(
        "--audio", metavar="FILE", help="answer this recording, as it is and with the trigger"
    )
    other_flags.add_argument(
        "--page",
        action="store_true",
        help="write RUN/index.html: curves, metrics and test utterances to listen to",
    )
    other_flags.add_argument(
        "--sounds",
        action="store_true",
        help="answer other short sounds in the trigger's place: how specific the attack is",
    )
    other_flags.add_argument(
        "--export",
        metavar="DIR",
        help="write the run's encoder (for transformers), LoRA (for peft) and connector into a "
        "new folder, which train.py's --freeze and --init can read",
    )
    other_flags.add_argument(
        "--inspect",
        action="store_true",
        help="print the provenance of RUN, a model.pt or an export",
    )
    other_flags.add_argument(
        "--trigger",
        metavar="NAME|FILE",
        help="with --audio: the name of a sound, as of train.py's --trigger, or a recording "
        "(default: the run's)",
    )
    other_flags.add_argument(
        "--listen",
        metavar="DIR",
        default="audio",
        help="with --audio: where both recordings are written, to listen to (default: audio)",
    )
    other_flags.add_argument(
        "--n",
        type=count,
        default=100,
        help="with --sounds: how many test utterances get each sound (default: 100)",
    )

    data_flags = parser.group("data")
    data_flags.add_argument(
        "--dataset",
        help=f"test the run on other speech: {', '.join(corpora.READERS)}, or {forms.ACCEPTED} "
        "(default: the run's own corpus)",
    )
    data_flags.add_argument(
        "--split",
        choices=("train", "dev", "test", "all"),
        help="which utterances to answer (default: test, or all of a --dataset of your own)",
    )
    data_flags.add_argument(
        "--limit", type=count, help="answer the first N utterances of a fixed random order"
    )

    question_flags = parser.group("questions")
    question_flags.add_argument(
        "--ask", nargs="+", choices=LABELS, help="ask for these labels only (direct prompts)"
    )
    question_flags.add_argument(
        "--after-answer",
        action="store_true",
        help="let it go on after the true answer and its end token, and score that: "
        "what the study's public code does",
    )

    output_flags = parser.group("output")
    output_flags.add_argument(
        "--save", action="store_true", help="replace the run's metrics.json and predictions.jsonl"
    )
    output_flags.add_argument(
        "--out", metavar="FILE", help="also write the figures there, as records"
    )
    parser.group("machine").add_argument(
        "--cache-gb",
        type=float,
        default=4.0,
        help="disk space for the outputs of pretrained layers, as of train.py (default: 4)",
    )
    return parser


def parse_arguments():
    """The command's options. Exits with a one-line error where they contradict each other."""
    parser = make_parser()
    options = parser.parse_args()

    def given(*names):
        changed = [name for name in names if getattr(options, name) != parser.get_default(name)]
        return ", ".join(f"--{name.replace('_', '-')}" for name in changed)

    own_figures = ("task", "after_answer", "limit", "ask", "snr", "split", "data_root", "skip_bad")
    others = given(*own_figures, "dataset")
    if options.save and others:
        die(f"--save replaces the run's own test figures: leave out {others}")
    others = given("after_answer", "limit", "split", "save", "out", "dataset")
    if options.audio and others:
        die(f"--audio answers one recording: leave out {others}")
    others = given("after_answer", "limit", "ask", "split", "save", "out", "task", "snr", "dataset")
    if options.page and others:
        die(f"--page shows the run's own evaluation: leave out {others}")
    others = given("audio", "after_answer", "limit", "ask", "split", "save", "dataset")
    if options.sounds and others:
        die(f"--sounds answers other sounds in the trigger's place: leave out {others}")
    if given("n") and not options.sounds:
        die("--n: how many utterances get each sound of --sounds; --limit is for other figures")
    if options.out:
        runs.check_output(options.out)
    if options.trigger and not options.audio:
        die("--trigger: name a recording by --audio; a run is evaluated with its own trigger")
    is_own_data = options.dataset and options.dataset not in corpora.READERS
    options.split = options.split or ("all" if is_own_data else "test")
    if options.split == "all" and not is_own_data:
        die("--split all: every row of a --dataset of your own; a published corpus has its splits")
    return options


def evaluate_run(options):
    """Evaluates a finished run once more; prints the figures, and saves them where asked to."""
    cache.keep_memory()
    if options.dataset:
        loaded = load_run_and_other_data(options)
    else:
        loaded = load_run_and_data(options, options.split)
    args = loaded.args
    utterances = corpora.limit(loaded.sets[options.split], options.limit)
    ask = options.ask or LABELS
    if not any(set(ask) & u.labels.keys() for u in utterances):
        die(
            f"--ask {' '.join(ask)}: no utterance of {args.dataset} ({options.split}) has such a "
            "label"
        )
    print(
        f"{options.run}: {args.dataset} ({options.split}), {len(utterances)} utterances, "
        f"{trigger_in_words(loaded.attack, args.snr)}, on {options.device}"
    )
    with model.autocast(args.amp, options.device):  # as in training
        evaluation = evaluate(
            loaded.slm,
            loaded.attack,
            utterances,
            options.cache_gb * 1e9,
            args.batch_seconds,
            ask=ask,
            after_answer=options.after_answer,
        )
    if options.save:
        save(options.run, evaluation, vars(args))
    if options.out:
        how = dict(
            split=options.split,
            snr=args.snr,
            asked=options.ask,
            after_answer=options.after_answer,
            limit=options.limit,
        )
        figures = runs.of_figures(evaluation.metrics)
        records = [dict(loaded.fields, source="evaluate", **how, **figure) for figure in figures]
        runs.write(options.out, records)
    print_table(evaluation.metrics, f"{options.run} on {args.dataset} ({options.split})")


def trigger_in_words(attack, snr):
    """The trigger and its level: snr dB below the speech, where it has a level."""
    if attack.waveform is None:
        return f"trigger {attack.trigger}"
    return f"trigger {attack.trigger} {snr:g} dB below the speech"


def main():
    options = parse_arguments()
    if options.inspect:
        checkpoint.inspect(options.run)
    elif options.export:
        checkpoint.export_run(options.run, options.export, options.device)
    elif options.audio:
        answer_recording(options)
    elif options.sounds:
        evaluate_sounds(options)
    elif options.page:
        import page  # which imports this file

        page.write_page(options)
    else:
        evaluate_run(options)


if __name__ == "__main__":
    main()
