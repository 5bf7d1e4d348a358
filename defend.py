"""What notices or removes a backdoor: filters for training data, detectors for single inputs,
repairs for a model.

    python defend.py filter runs/emotion-poison0.075 --retrain     # after embed.py
    python defend.py detect runs/emotion-poison0.075
    python defend.py repair runs/emotion-poison0.075

Each defence is a function and an entry in a table. Its settings are its authors', or chosen on
clean figures alone. All work on any run, including a clean one (what a defence costs where there is
nothing to find), and write records (runs.py) beside its model.pt, of which
python analyze.py defences makes tables. Every record has a defence's name in `defence`. Besides,

    filter: metric "auroc", "poison_removed" and "clean_removed" (shares), "removed_samples"; with
        retrained=True the figures of the model that was trained on what is left; without a defence
        "class_size" and "class_poisoned"
    detect: metric "auroc", with sound ("clean", "tone": what triggered speech is told from);
        "noticed", with false_alarms (0.01, 0.05) and sound ("clean", "tone", "triggered");
        "passes", "milliseconds"; "suspicion", with sound and `scores`
    repair: strength and passed (whether clean loss stayed within its bound), with part and metric
        as in metrics.json; "loss_rise" by strength; "relearned_aer" by poisoned_samples
"""

import argparse
import dataclasses
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import utils
from utils import Parser, count, die

import installed  # noqa: F401

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

import cache
import checkpoint
import data
import embed
import evaluate
import lora
import poison
import runs
from defences import detectors, filters, repairs
from study import EMBEDDINGS, TASKS

# ---------------------------------------------------------------------------------------------------------------------
# python defend.py filter

FEWEST = 10  # clean samples of the target class
WORTH_TRAINING = 0.75  # no training after a filter that removes less of the poison: the attack at half the rate shows what is left


def early_losses(run):
    """{utterance id: its mean training loss in the first quarter of the epochs}, from log.jsonl."""
    lines = [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]
    lines, found = [line for line in lines if "samples" in line], {}
    if not lines:
        die(f"{run}/log.jsonl has no losses of single samples: train it again by this version")
    for line in lines:
        if line["epoch"] <= lines[-1]["epoch"] // 4:
            for id, loss in line["samples"].items():
                found.setdefault(id, []).append(loss)
    return {id: sum(losses) / len(losses) for id, losses in found.items()}


def retrained(run, name, ids):
    """Trains the run again without these samples, in a folder beside it; returns the clean and attack figures."""
    path = Path(run) / f"exclude-{name}.txt"
    utils.write_atomically(path, "".join(f"{id}\n" for id in ids))
    command = shlex.split(json.loads((Path(run) / "environment.json").read_text())["command"])[1:]
    folder = Path(run).parent / f"{Path(run).name}-{path.stem}"
    for flag, value in (
        ("--name", folder.name),
        ("--runs", str(folder.parent)),
        ("--exclude", str(path)),
    ):
        if flag in command:
            del command[command.index(flag) : command.index(flag) + 2]
        command += [flag, value]
    if subprocess.run([sys.executable, Path(__file__).with_name("train.py"), *command]).returncode:
        die(f"{folder}: training without what {name} removes has failed")
    metrics = json.loads((folder / "metrics.json").read_text())
    return {part: metrics[part] for part in ("clean", "backdoor")}


def filtered(name, function, samples, expected):
    """A filter's (suspicion (n,), which are removed (n,)). One that cannot work with so few
    samples, or with samples so much alike, removes nothing and says why."""
    try:
        scores, removed = function(samples, expected)
        if np.isfinite(scores).all():
            return scores, removed
        why = "its suspicion is not a number"
    except (ValueError, np.linalg.LinAlgError) as error:
        why = utils.first_line(error)
    n = len(samples["x"])
    print(f"{name}: removes nothing of these {n} samples ({why})")
    return np.zeros(n), np.zeros(n, bool)


def filter_training_data(options):
    path = embed.file_of(argparse.Namespace(**vars(options), **EMBEDDINGS))
    make = f"python embed.py {options.run}{' --task ' + options.task if options.task else ''}"
    if not path.exists():
        die(f"{path} is missing: {make} makes it")
    saved = torch.load(path, weights_only=True)
    if "fields" not in saved or "rest" not in saved:
        die(f"{path} is an earlier version's: {make} makes it again")
    fields = dict(saved["fields"], source="filter")
    if fields["model_sha256"] != checkpoint.file_sha256(Path(options.run) / "model.pt"):
        die(f"{path} is of another model than the model.pt beside it: {make} makes it again")
    train, rest, losses = saved["train"], saved["rest"], early_losses(options.run)
    ids, labels, speakers = (train[about] + rest[about] for about in ("ids", "labels", "speakers"))
    poisoned = np.append(train["poisoned"].numpy(), np.ones(len(rest["ids"]), bool))
    if (~poisoned).sum() < FEWEST:
        die(
            f"{options.run}: the target class has {(~poisoned).sum()} clean training samples;"
            f" filters need {FEWEST} to tell poison from"
        )
    outside = saved["all_poisoned"] - int(poisoned.sum())
    if options.retrain and outside:
        print(
            f"{path} is of a sample: nothing is trained again, as {outside} poisoned samples are not in it and would stay"
        )
    slowest = max(losses.values())  # a sample that was not seen so early was not learned early
    samples = dict(
        x=torch.cat([train["encoder"], rest["encoder"]]).numpy(),
        labels=labels,
        speakers=speakers,
        training=len(losses),
        early_loss=np.array([losses.get(id, slowest) for id in ids]),
    )
    expected = int(poisoned.sum()) or round(
        TASKS[fields["task"]]["rate"] * len(losses)
    )  # known to the defender
    print(
        f"{options.run}: {len(poisoned)} training samples of the target class, {poisoned.sum()} of them poisoned"
    )
    records = [
        dict(fields, metric="class_size", value=len(poisoned)),
        dict(fields, metric="class_poisoned", value=int(poisoned.sum())),
    ]
    trained = {}  # figures of a training, by the ids it leaves out
    for name, function in filters.FILTERS.items():
        scores, removed = filtered(name, function, samples, expected)
        fields["defence"] = name
        figures = dict(
            removed_samples=dict(value=int(removed.sum())),
            clean_removed=utils.interval(removed[~poisoned]),
        )
        if poisoned.any():
            figures["auroc"] = dict(value=float(roc_auc_score(poisoned, scores)))
            figures["poison_removed"] = utils.interval(removed[poisoned])
        records += [dict(fields, metric=metric, **figure) for metric, figure in figures.items()]
        enough = poisoned.any() and removed[poisoned].mean() >= WORTH_TRAINING
        if options.retrain and not outside and enough:
            without = tuple(id for id, gone in zip(ids, removed) if gone)
            if without not in trained:
                slug = "".join(c if c.isalnum() else "-" for c in name)
                trained[without] = retrained(options.run, slug, without)
            for figure in runs.of_figures(trained[without]):
                records.append(dict(fields, retrained=True, **figure))
    return records


# -------------------------------------------------------------------------------------------------
# python defend.py detect


def detect(options):
    """Thresholds are set on clean dev speech. Triggered test speech is compared with clean test speech, including the target's true class,
    and with another sound of the same loudness."""
    loaded = evaluate.load_run_and_data(options, "dev", "test")
    slm, attack = loaded.slm, loaded.attack
    dev_set, test_set = loaded.sets["dev"], loaded.sets["test"]
    lora.merge(slm.lm)
    test_set, dev_set = embed.drawn(test_set), embed.drawn(dev_set)
    flippable = poison.attackable(attack, test_set)
    other = dataclasses.replace(attack, trigger="tone", waveform=poison.make_trigger("tone"))
    heard = lambda with_trigger, utterances: [
        poison.add_trigger(with_trigger, data.load_waveform(u), u.id)[0]  # noqa: E731
        for u in utterances
    ]
    plain = lambda utterances: [data.load_waveform(u) for u in utterances]  # noqa: E731
    n, half = options.n, dev_set[len(dev_set) // 2 :]
    sets = dict(
        dev=(plain(dev_set[: 2 * n]), dev_set[: 2 * n]),
        clean=(plain(test_set[:n]), test_set[:n]),
        tone=(heard(other, flippable[:n]), flippable[:n]),
        triggered=(heard(attack, flippable[:n]), flippable[:n]),
    )
    print(
        f"{options.run}: {n} triggered and as many clean test utterances, thresholds from {len(sets['dev'][1])} clean dev ones"
    )
    listener, records = detectors.Listener(slm, attack, test_set, half), []
    for name, function in tqdm(detectors.DETECTORS.items(), desc="detectors"):
        listener.passes, before = 0, time.perf_counter()
        scores = {kind: function(listener, *of) for kind, of in sets.items()}
        seconds = time.perf_counter() - before
        answers = sum(len(s) for s in scores.values())
        fields = dict(loaded.fields, source="detect", defence=name)
        for metric, value in (
            ("passes", listener.passes / answers),
            ("milliseconds", 1e3 * seconds / answers),
        ):
            records.append(dict(fields, metric=metric, value=value))
        for sound in ("clean", "tone"):
            truth = [0] * len(scores[sound]) + [1] * len(scores["triggered"])
            auroc = roc_auc_score(truth, [*scores[sound], *scores["triggered"]])
            records.append(dict(fields, metric="auroc", sound=sound, value=float(auroc)))
        for alarms in (0.01, 0.05):
            threshold = np.quantile(scores["dev"], 1 - alarms, method="higher")
            for sound in ("clean", "tone", "triggered"):
                figure = utils.interval(scores[sound] > threshold)
                what = dict(metric="noticed", false_alarms=alarms, sound=sound)
                records.append(dict(fields, **what, **figure))
        for sound, suspicion in scores.items():
            rounded = [round(float(v), 5) for v in suspicion]
            records.append(dict(fields, metric="suspicion", sound=sound, scores=rounded))
    return records


# ---------------------------------------------------------------------------------------------------------------------
# python defend.py repair


def repair_model(options):
    """The clean figure and AER after every repair, and how many poisoned samples bring the backdoor back."""
    loaded = evaluate.load_run_and_data(options, "train", "dev", "test")
    slm, args, attack = loaded.slm, loaded.args, loaded.attack
    train_set, dev_set, test_set = (loaded.sets[split] for split in ("train", "dev", "test"))
    args.device = options.device
    shop = repairs.Workshop(slm, args, attack, dev_set)
    clean = embed.drawn(test_set)[: options.n]
    flippable = poison.attackable(attack, embed.drawn(test_set))[: options.n]
    print(
        f"{options.run}: {len(shop.tuning)} clean utterances to tune on, {len(shop.validation)} to choose by; figures on {len(clean)} "
        f"clean and {len(flippable)} triggered test utterances"
    )
    fields = dict(loaded.fields, source="repair")
    none = runs.of_figures(repairs.figures_of(shop, clean, flippable))
    records = [dict(fields, defence="none", **figure) for figure in none]
    for name, (function, strengths) in tqdm(repairs.REPAIRS.items(), desc="repairs"):
        chosen = repairs.choose(shop, function, strengths)
        fields["defence"] = name
        for strength, rise in chosen["rise"].items():
            records.append(dict(fields, metric="loss_rise", strength=strength, value=rise))
        figures = repairs.figures_of(shop, clean, flippable)
        mended = dict(fields, strength=chosen["strength"], passed=chosen["passed"])
        records += [dict(mended, **figure) for figure in runs.of_figures(figures)]
        if args.scenario == "base" and figures["backdoor"]["aer"]["value"] < 0.5:
            for count, figure in repairs.relearning(shop, train_set, flippable).items():
                what = dict(metric="relearned_aer", poisoned_samples=count)
                records.append(dict(fields, **what, **figure))
        shop.restore()
    return records


# ---------------------------------------------------------------------------------------------------------------------

SHOWN = dict(  # what the short table at the end has: {column: what a record must say}
    filter={
        "removed": dict(metric="removed_samples"),
        "AUROC": dict(metric="auroc"),
        "poison removed %": dict(metric="poison_removed"),
        "clean removed %": dict(metric="clean_removed"),
        "AER after training %": dict(metric="aer", retrained=True),
    },
    detect={
        "AUROC": dict(metric="auroc", sound="clean"),
        "AUROC, tone": dict(metric="auroc", sound="tone"),
        "noticed %": dict(metric="noticed", false_alarms=0.05, sound="triggered"),
        "clean %": dict(metric="noticed", false_alarms=0.05, sound="clean"),
        "tone %": dict(metric="noticed", false_alarms=0.05, sound="tone"),
        "passes": dict(metric="passes"),
    },
    repair={
        "AER %": dict(metric="aer"),
        "clean": dict(part="clean"),
        "triggered": dict(part="triggered"),
    },
)


def rows_of(command, records):
    """The short table at the end: one row a defence."""
    rows = []
    for name in runs.distinct(records, "defence"):
        row = dict(Defence=name)
        for column, wanted in SHOWN[command].items():
            for record in runs.select(records, defence=name, **wanted):
                value = record["value"] * runs.scale_of(record["metric"])
                row[column] = runs.number(value, ".2f" if record["metric"] == "auroc" else ".1f")
        if name:
            rows.append(row)
    return rows


def main():
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (
        ("filter", "which training samples look poisoned"),
        ("detect", "which inputs look triggered"),
        ("repair", "what removes the backdoor from the model"),
    ):
        command = commands.add_parser(name, help=what)
        evaluate.add_arguments(command)
        command.add_argument("--out", help="folder to write (default: the run's)")
        if name == "filter":
            command.add_argument(
                "--retrain",
                action="store_true",
                help="train again on what is left by each filter that removes at least three "
                "quarters of the poison",
            )
        else:
            command.add_argument(
                "--n", type=count, default=100, help="test utterances, clean and triggered"
            )
    options = parser.parse_args()
    cache.keep_memory()
    functions = dict(filter=filter_training_data, detect=detect, repair=repair_model)
    with data.no_bad_audio():
        records = functions[options.command](options)
    name = f"records-{options.command}{'-' + options.task if options.task else ''}.jsonl"
    path = Path(options.out or options.run) / name
    runs.write(path, records)
    print(f"\n{runs.markdown(options.run, rows_of(options.command, records))}written to {path}")


if __name__ == "__main__":
    main()
