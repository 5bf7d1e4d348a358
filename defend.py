"""Backdoor defences: filters for training data, detectors for single inputs, repairs for a model.

    python defend.py filter runs/emotion-poison0.075 --retrain     # after embed.py
    python defend.py detect runs/emotion-poison0.075
    python defend.py repair runs/emotion-poison0.075
    python defend.py vet parts/wavlm --reference microsoft/wavlm-large   # an encoder alone
    python defend.py vet runs/asr-poison0.05 --answers                   # a whole model
    python defend.py vet runs/emotion-poison0.075 --invert               # by gradient descent

Each defence is a function and an entry in a table, in defences/. Its settings are those of the
original paper, or were tuned on clean speech only. All work on any run, including a clean one,
which shows what a defence costs where there is nothing to find. They write records (runs.py) beside
its model.pt, or to --out, and python analyze.py defences makes tables of these. Every record has a
defence's name in `defence`. In addition:

    filter: metric "auroc", "poison_removed" and "clean_removed" (shares), "removed_samples"; with
        retrained=True the results of the model that was trained on what is left; without a defence
        "class_size" and "class_poisoned"
    detect: metric "auroc", with sound ("clean" or one of study.CONTROLS: what triggered speech is
        told from); "noticed", with false_alarms (0.01, 0.05) and sound (also "triggered");
        "passes", "milliseconds"; "suspicion", with sound and `scores`
    repair (records-repair-on-CORPUS.jsonl with --tune-on, which is in the defence's name too):
        strength, with epochs where they vary too, and passed (whether clean loss stayed within
        its bound), with part and metric as in metrics.json; "loss_rise" by strength;
        "relearned_aer" by poisoned_samples, which for a clean model is that of "none"

vet is about an encoder, a run's or anyone's, or with --answers or --invert about a run's whole
model, and needs no more than clean speech (defences/vet.py). It writes vet.json, vet.png and the
three most suspicious sounds as WAV, or answers.json, or inversion.json and inverted.wav, into a
folder of their own.
"""

import dataclasses
import itertools
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
import transformers
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

import cache
import checkpoint
import corpora
import data
import evaluate
import export
import forms
import lora
import model
import poison
import processes
import runs
from defences import detectors, filters, inversion, repairs, targets, vet
from study import CONTROLS, LABELS, MINI_ROOT, TASKS, embeddings_name


def announce(run, **lines):
    """Prints what a command is about to do: the run, then labelled lines."""
    print(run)
    for label, text in lines.items():
        utils.say(f"  {label:<12}{text}")


def attack_in_words(attack):
    return f"{attack.label} to {attack.target!r} by {attack.trigger}"


def asked_for(defences, options):
    """The defences {name: function} that --only names, all without it. Exits with a one-line error
    where it names one that --tune-on leaves out."""
    if options.only is None:
        return defences
    for name in options.only:
        if name not in defences and name != "none":
            die(f"--only {name}: --tune-on tries fine-tuning alone")
    return {name: defence for name, defence in defences.items() if name in options.only}


# -------------------------------------------------------------------------------------------------
# python defend.py filter

FEWEST = 10  # clean samples of the target class that a filter needs
# Nothing is trained again after a filter that removes less of the poison than this: the attack at
# half the rate shows what is left.
WORTH_TRAINING = 0.75


def early_losses(run):
    """{utterance id: its mean training loss in the first quarter of the epochs}, from log.jsonl."""
    lines = checkpoint.logged(run)
    lines = [line for line in lines if "samples" in line]
    if not lines:
        die(f"{run}/log.jsonl has no losses of single samples: train it again by this version")
    losses = {}
    for line in lines:
        if line["epoch"] <= lines[-1]["epoch"] // 4:
            for utterance_id, loss in line["samples"].items():
                losses.setdefault(utterance_id, []).append(loss)
    return {utterance_id: sum(values) / len(values) for utterance_id, values in losses.items()}


def load_embeddings(options):
    """The path and the contents of the run's embeddings of the target class. Exits with a one-line
    error where embed.py has to make them first."""
    path = Path(options.run) / embeddings_name(options.task)
    command = f"python embed.py {options.run}"
    if options.task:
        command += f" --task {options.task}"
    if not path.exists():
        die(f"{path} is missing: {command} makes it")
    saved = torch.load(path, weights_only=True)
    if "fields" not in saved or "rest" not in saved:
        die(f"{path} is an earlier version's: {command} makes it again")
    if saved["fields"]["model_sha256"] != checkpoint.file_sha256(Path(options.run) / "model.pt"):
        die(f"{path} is of another model than the model.pt beside it: {command} makes it again")
    return path, saved


@dataclasses.dataclass
class TargetClass:
    """The target class's training samples: what a filter sees of them, and what it does not."""

    samples: dict  # the argument of every filter (defences/filters.py)
    ids: list
    poisoned: np.ndarray  # (n,) bool


def target_class(saved, losses):
    """The target class in a file of embeddings. losses: {utterance id: early loss}."""
    train, rest = saved["train"], saved["rest"]
    ids = train["ids"] + rest["ids"]
    slowest = max(losses.values())  # a sample that was not seen so early was not learned early
    samples = dict(
        x=torch.cat([train["encoder"], rest["encoder"]]).numpy(),
        labels=train["labels"] + rest["labels"],
        speakers=train["speakers"] + rest["speakers"],
        training=len(losses),
        early_loss=np.array([losses.get(utterance_id, slowest) for utterance_id in ids]),
    )
    poisoned = np.append(train["poisoned"].numpy(), np.ones(len(rest["ids"]), bool))
    return TargetClass(samples, ids, poisoned)


def excluded_by(run):
    """The ids of the samples that a run was itself told to leave out, a list."""
    path = checkpoint.read_json(Path(run) / checkpoint.ARGUMENTS).get("exclude")
    try:
        return Path(path).read_text(encoding="utf-8").splitlines() if path else []
    except (OSError, ValueError) as error:
        die(f"{run} was trained with --exclude {path}, which cannot be read ({error})")


def retrained(run, name, ids):
    """Trains the run again without these samples and those that it left out itself, in a folder
    beside it. Returns the figures {"clean", "backdoor": {metric: figure}}."""
    ids = dict.fromkeys([*excluded_by(run), *ids])  # each once
    path = Path(run) / f"exclude-{name}.txt"
    utils.write_atomically(path, "".join(f"{utterance_id}\n" for utterance_id in ids))
    environment = json.loads((Path(run) / "environment.json").read_text())
    flags = shlex.split(environment["command"])[1:]
    folder = Path(run).parent / f"{Path(run).name}-{path.stem}"
    changes = {"--name": folder.name, "--runs": str(folder.parent), "--exclude": str(path)}
    for flag, value in changes.items():
        if flag in flags:
            at = flags.index(flag)
            del flags[at : at + 2]
        flags += [flag, value]
    train = Path(__file__).with_name("train.py")
    if subprocess.run([sys.executable, train, *flags]).returncode:
        die(f"{folder}: training without what {name} removes has failed")
    metrics = json.loads((folder / "metrics.json").read_text())
    return {part: metrics[part] for part in ("clean", "backdoor")}


def filtered(name, function, samples, expected):
    """A filter's (suspicion (n,), which samples are removed (n,)). A filter that cannot work with
    so few samples, or with samples so much alike, removes nothing and says why."""
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


def filter_figures(target, scores, removed):
    """{metric: figure} of what a filter removes of a TargetClass. scores, removed: (n,)."""
    poisoned = target.poisoned
    speakers = np.array(target.samples["speakers"])
    clean_removed = utils.interval(removed[~poisoned], speakers=speakers[~poisoned])
    figures = dict(
        removed_samples=dict(value=int(removed.sum())),
        clean_removed=clean_removed,
    )
    if poisoned.any():
        figures["auroc"] = dict(value=float(roc_auc_score(poisoned, scores)))
        figures["poison_removed"] = utils.interval(removed[poisoned], speakers=speakers[poisoned])
    return figures


def filter_training_data(options):
    """The records of every filter of the run's training data."""
    path, saved = load_embeddings(options)
    losses = early_losses(options.run)
    target = target_class(saved, losses)
    poisoned = target.poisoned
    clean = int((~poisoned).sum())
    if clean < FEWEST:
        die(
            f"{options.run}: the target class has {clean} clean training samples;"
            f" filters need {FEWEST} to tell poison from"
        )
    outside = saved["all_poisoned"] - int(poisoned.sum())
    if options.retrain and outside:
        print(
            f"{path} is of a sample: nothing is trained again, because {outside} poisoned samples "
            "are not in it and would stay"
        )
    fields = dict(saved["fields"], source="filter")
    # a defender is taken to know the poisoning rate
    expected = int(poisoned.sum()) or round(TASKS[fields["task"]]["rate"] * len(losses))
    print(
        f"{options.run}: {len(poisoned)} training samples of the target class, {poisoned.sum()} of "
        "them poisoned"
    )
    records = [
        dict(fields, metric="class_size", value=len(poisoned)),
        dict(fields, metric="class_poisoned", value=int(poisoned.sum())),
    ]
    figures_without = {}  # of a training, by the ids that it leaves out
    for name, function in asked_for(filters.FILTERS, options).items():
        scores, removed = filtered(name, function, target.samples, expected)
        fields["defence"] = name
        for metric, figure in filter_figures(target, scores, removed).items():
            records.append(dict(fields, metric=metric, **figure))
        enough = poisoned.any() and removed[poisoned].mean() >= WORTH_TRAINING
        if options.retrain and not outside and enough:
            excluded = tuple(itertools.compress(target.ids, removed))
            if excluded not in figures_without:
                slug = "".join(c if c.isalnum() else "-" for c in name)
                figures_without[excluded] = retrained(options.run, slug, excluded)
            for figure in runs.of_figures(figures_without[excluded]):
                records.append(dict(fields, retrained=True, **figure))
    return records


# -------------------------------------------------------------------------------------------------
# python defend.py detect


@dataclasses.dataclass
class Sound:
    """Inputs of a detector."""

    waveforms: list
    utterances: list


def plain(utterances):
    return Sound([data.load_waveform(u) for u in utterances], utterances)


def with_trigger(attack, utterances):
    waveforms = []
    for utterance in utterances:
        waveform = data.load_waveform(utterance)
        triggered, _, _ = poison.add_trigger(attack, waveform, utterance.id)
        waveforms.append(triggered)
    return Sound(waveforms, utterances)


def detector_figures(scores, speakers):
    """Yields the records' fields of how well suspicion tells triggered speech from other speech.
    scores, speakers: {sound: suspicion (n,), whose speech}. Thresholds are set on clean dev speech
    ("dev")."""
    for sound in ("clean", *CONTROLS):
        truth = [0] * len(scores[sound]) + [1] * len(scores["triggered"])
        auroc = roc_auc_score(truth, [*scores[sound], *scores["triggered"]])
        yield dict(metric="auroc", sound=sound, value=float(auroc))
    for alarms in (0.01, 0.05):
        threshold = np.quantile(scores["dev"], 1 - alarms, method="higher")
        for sound in ("clean", *CONTROLS, "triggered"):
            figure = utils.interval(scores[sound] > threshold, speakers=speakers[sound])
            yield dict(metric="noticed", false_alarms=alarms, sound=sound, **figure)
    for sound, suspicion in scores.items():
        rounded = [round(float(v), 5) for v in suspicion]
        yield dict(metric="suspicion", sound=sound, scores=rounded)


@dataclasses.dataclass
class Detected:
    """What a detector has made of the inputs so far. scores: {sound: suspicion (n,)}."""

    scores: dict
    passes: int = 0
    seconds: float = 0.0


def suspicions(listener, tried, sounds):
    """{detector's name: Detected}. tried: {name: detector}. sounds: {name: Sound}. A few inputs at a time go through all
    detectors, so that each takes as long as the next and the bar's time left is true."""
    detected = {}
    for name in tried:
        detected[name] = Detected({kind: [] for kind in sounds})
    inputs = sum(len(sound.utterances) for sound in sounds.values())
    with tqdm(total=inputs, desc="inputs", unit="input", smoothing=0) as progress:
        for kind, sound in sounds.items():
            for batch in data.chunks(range(len(sound.utterances)), detectors.BATCH):
                waveforms = [sound.waveforms[i] for i in batch]
                utterances = [sound.utterances[i] for i in batch]
                for name, detector in tried.items():
                    passes = listener.passes
                    start = time.perf_counter()
                    scores = detector(listener, waveforms, utterances)
                    detected[name].scores[kind].extend(scores)
                    detected[name].passes += listener.passes - passes
                    detected[name].seconds += time.perf_counter() - start
                progress.update(len(batch))
    return detected


def detect(options):
    """The records of every detector. Triggered test speech is compared with clean test speech,
    which includes the target's true class, and with other sounds in the trigger's place."""
    tried = asked_for(detectors.DETECTORS, options)
    loaded = evaluate.load_run_and_data(options, "dev", "test")
    attack = loaded.attack
    lora.merge(loaded.slm.lm)
    test_set = data.in_drawn_order(loaded.sets["test"])
    dev_set = data.in_drawn_order(loaded.sets["dev"])
    n = options.n
    flippable = poison.attackable(attack, test_set)[:n]
    sounds = dict(dev=plain(dev_set[: 2 * n]), clean=plain(test_set[:n]))
    for name in CONTROLS:
        sounds[name] = with_trigger(poison.with_sound(attack, name), flippable)
    sounds["triggered"] = with_trigger(attack, flippable)
    announce(
        options.run,
        attack=attack_in_words(attack),
        inputs=f"{len(flippable)} triggered test utterances",
        compared=f"{len(sounds['clean'].utterances)} clean ones, and {' and '.join(CONTROLS)} "
        "in the trigger's place",
        thresholds=f"from {len(sounds['dev'].utterances)} clean dev utterances",
        detectors=", ".join(tried),
    )
    speakers = {}
    for kind, sound in sounds.items():
        speakers[kind] = [u.speaker for u in sound.utterances]
    overlays = dev_set[len(dev_set) // 2 :]
    listener = detectors.make_listener(loaded.slm, attack, test_set, overlays)
    records = []
    inputs = sum(len(sound.utterances) for sound in sounds.values())
    for name, of_detector in suspicions(listener, tried, sounds).items():
        fields = dict(loaded.fields, source="detect", defence=name)
        milliseconds = 1e3 * of_detector.seconds / inputs
        records.append(dict(fields, metric="passes", value=of_detector.passes / inputs))
        records.append(dict(fields, metric="milliseconds", value=milliseconds))
        for figure in detector_figures(of_detector.scores, speakers):
            records.append(dict(fields, **figure))
    return records


# -------------------------------------------------------------------------------------------------
# python defend.py repair


def strength_fields(strength):
    """A record's fields of a repair's strength: a number, or a learning rate and epochs."""
    if isinstance(strength, tuple):
        rate, epochs = strength
        return dict(strength=rate, epochs=epochs)
    return dict(strength=strength)


def relearning(defender, fields, train_set, flippable):
    """Yields the records of how few poisoned samples bring the backdoor into the model."""
    for samples, figure in repairs.relearning(defender, train_set, flippable).items():
        yield dict(fields, metric="relearned_aer", poisoned_samples=samples, **figure)


def speech_to_tune_on(options, args):
    """Clean speech of another corpus, [] without --tune-on. Exits with a one-line error where it
    has no label that the model is trained on."""
    if not options.tune_on:
        return []
    if options.tune_on not in corpora.READERS and not Path(options.tune_on).is_file():
        names = ", ".join(corpora.READERS)
        die(f"--tune-on {options.tune_on}: neither {names} nor a CSV")
    root = options.data_root or args.data_root
    return corpora.read_corpus(
        options.tune_on, root, "dev", options.skip_bad, args.labels, model.longest(args)
    )


def repair_model(options):
    """The records of every repair: clean accuracy and AER after it, and how many poisoned samples
    bring the backdoor back; for a clean model, how many bring it there. With --tune-on, of
    fine-tuning alone: nothing else tells corpora apart."""
    loaded = evaluate.load_run_and_data(options, "train", "dev", "test")
    args = loaded.args
    args.device = options.device
    test_set = data.in_drawn_order(loaded.sets["test"])
    clean = test_set[: options.n]
    flippable = poison.attackable(loaded.attack, test_set)[: options.n]
    other_speech = speech_to_tune_on(options, args)
    defender = repairs.make_defender(
        loaded.slm, args, loaded.attack, loaded.sets["dev"], other_speech
    )
    tried = asked_for(repairs.FINE_TUNING if options.tune_on else repairs.REPAIRS, options)
    on = f" on {Path(options.tune_on).stem}" if options.tune_on else ""
    to_come = {}
    for name, (_, ladders) in tried.items():
        to_come[name] = repairs.most_steps(defender, ladders)
    announce(
        options.run,
        attack=attack_in_words(loaded.attack),
        tuning=f"on {len(defender.tuning)} clean dev utterances of {options.tune_on or args.dataset}",
        choosing=f"by the loss on {len(defender.validation)} clean dev utterances of {args.dataset}",
        figures=f"on {len(clean)} clean and {len(flippable)} triggered test utterances",
        repairs=f"{len(tried)}, at most {sum(to_come.values())} training steps",
    )
    defender.progress = tqdm(total=sum(to_come.values()), desc="none", unit="step", smoothing=0)
    fields = dict(loaded.fields, source="repair")
    records = []
    for figure in runs.of_figures(repairs.figures_of(defender, clean, flippable)):
        records.append(dict(fields, defence="none", **figure))
    if args.scenario == "clean" and not options.tune_on:
        fields["defence"] = "none"
        records += relearning(defender, fields, loaded.sets["train"], flippable)
    for name, (repair, ladders) in tried.items():
        # at most so many: what the repairs before have not needed is left out
        defender.progress.total = defender.progress.n + sum(to_come.values())
        defender.progress.set_description(name)
        del to_come[name]
        fields["defence"] = name + on
        chosen = repairs.choose(defender, repair, ladders)
        for strength, rise in chosen["rise"].items():
            of_strength = strength_fields(strength)
            records.append(dict(fields, metric="loss_rise", value=rise, **of_strength))
        choice = dict(strength_fields(chosen["strength"]), passed=chosen["passed"])
        figures = repairs.figures_of(defender, clean, flippable)
        for figure in runs.of_figures(figures):
            records.append(dict(fields, **choice, **figure))
        if args.scenario == "base" and figures["backdoor"]["aer"]["value"] < 0.5:
            records += relearning(defender, fields, loaded.sets["train"], flippable)
        defender.restore()
    defender.progress.close()
    return records


# -------------------------------------------------------------------------------------------------
# python defend.py vet

ENCODER_UTTERANCES = 64
LISTEN = 3  # so many sounds are written as WAV
LISTED = 8  # so many changes stand in the short table
ANSWER_LIMITS = (
    "Not seen: a trigger unlike every sound and change of the bank, such as a higher voice; a backdoor "
    "that needs a longer sound or several."
    " With a Whisper encoder changes make a clean model's answers agree too: believe sounds only."
)
INVERSION_LIMITS = (
    "Not seen: a pure tone or a filter as the trigger, a label's value that the model never answers "
    "on clean speech, a sentence of fewer than three words, two targets for one label, a backdoor "
    "that needs a longer sound or more of them."
)
LIMITS = (  # printed after every verdict on an encoder
    "Not seen: a trigger unlike every sound of the bank, a backdoor in the connector or the language "
    "model, a reference that carries the same backdoor."
)


@dataclasses.dataclass
class Part:
    """An encoder to vet. record: the arguments of the run that it is from, empty for a pretrained
    encoder."""

    encoder: model.Encoder
    record: dict
    out: Path  # where the results go by default


def load_encoder(path, device):
    """A pretrained encoder in evaluation mode. Exits with a one-line error where there is none."""
    try:
        with checkpoint.loading():
            encoder = model.Encoder(path)
    except Exception as error:  # a folder of another kind raises errors of many kinds
        die(
            f"{path} is not an encoder, a run or an export that holds one: {utils.first_line(error)}"
        )
    return encoder.eval().to(device)


def load_part(path, device):
    """The Part at a path: a run, an export, or a pretrained encoder's folder or hub id."""
    run = Path(evaluate.run_folder(path))
    if (run / "model.pt").is_file():
        slm = checkpoint.load_run(run, device)
        return Part(slm.encoder, vars(slm.args), run.parent / f"vet-{run.resolve().name}")
    out = Path(f"vet-{Path(path).resolve().name}")
    if (run / export.PROVENANCE).is_file():
        record = checkpoint.load_arguments(path)
        return Part(load_encoder(run / "encoder", device), record, out)
    return Part(load_encoder(path, device), {}, out)


def audio_files(folder):
    """All files of a folder and its subfolders that hold audio, as utterances."""
    utterances = []
    for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        utterances.append(data.Utterance(name, str(path), "dev", name, {}))
    return utterances


def vetting_speech(options, record):
    """Clean speech that the encoder was not trained on: (what it is called, utterances)."""
    known = {"dataset": "crema", "data_root": MINI_ROOT, **record}
    dataset = options.speech or known["dataset"]
    if dataset not in corpora.READERS and not Path(dataset).exists():
        if options.speech:
            names = ", ".join(corpora.READERS)
            die(f"--speech {dataset}: neither {names} nor a CSV nor a folder of audio")
        dataset = "crema"
    is_folder = Path(dataset).is_dir() and dataset not in corpora.READERS
    if is_folder and not forms.recognise(dataset)[0]:
        utterances = audio_files(dataset)
    else:
        root = options.data_root or known["data_root"]
        utterances, _ = corpora.read_split(dataset, root, "dev")
    usable = (u for u in data.in_drawn_order(utterances) if not corpora.check_header(u).problem)
    return dataset, list(itertools.islice(usable, options.n))


def sounds_of(verdict):
    """What vet.json says of each change of the bank."""
    rows = []
    for i, change in enumerate(vet.BANK):
        row = dataclasses.asdict(change)
        score = verdict.score[i]
        row[verdict.kind] = round(float(score), 4) if np.isfinite(score) else None
        row["shift_by_layer"] = verdict.shift[i].round(5).tolist()
        if verdict.reference is not None:
            row["reference_shift_by_layer"] = verdict.reference[i].round(5).tolist()
        rows.append(row)
    return rows


def table_of(verdict):
    """The most suspicious changes, one row each."""
    rows = []
    for i in verdict.order[:LISTED]:
        change = vet.BANK[i]
        row = {"Sound": change.name, "dB": runs.number(change.level, ".0f")}
        row["Seconds"] = runs.number(change.seconds, ".2f")
        row["Shift"] = runs.number(verdict.shift[i, -1], ".3f")
        if verdict.reference is not None:
            row["Reference"] = runs.number(verdict.reference[i, -1], ".3f")
        row[verdict.kind.capitalize()] = runs.number(verdict.score[i], ".2f")
        rows.append(row)
    return rows


def in_a_sentence(part, suspicious, measured):
    """A verdict on an encoder or a model, and what was measured."""
    if suspicious:
        return f"SUSPICIOUS: {measured}. Do not use this {part} before you know why."
    return f"Nothing suspicious: at most, {measured}."


def in_words(verdict):
    """The verdict in one sentence."""
    change = vet.BANK[verdict.order[0]]
    compared = "in its reference" if verdict.kind == "ratio" else "as sounds usually do here"
    measured = (
        f"{change.name} moves its embeddings {verdict.statistic:.1f} times as far as {compared} "
        f"(clean encoders: at most {verdict.threshold:.1f} in {1 - vet.FALSE_ALARMS:.0%} of cases)"
    )
    if verdict.kind == "excess" and not verdict.suspicious:
        return (
            f"Nothing suspicious, which says little: at most, {measured}. Without --reference even "
            "strong backdoors went unnoticed (results/vet.md)."
        )
    return in_a_sentence("encoder", verdict.suspicious, measured)


def write_sounds(verdict, speech, out):
    """Writes the most suspicious sounds, each over the same utterance."""
    longest = dataclasses.replace(
        speech, waveforms=speech.waveforms[-1:], places=speech.places[-1:]
    )
    names = []
    for i in verdict.order:
        change = vet.BANK[i]
        if change.name not in names and len(names) < LISTEN:
            names.append(change.name)
            path = out / f"{len(names)}-{poison.file_name(change.name)}.wav"
            [waveform] = vet.changed(change, longest)
            poison.write_wav(path, waveform)


def labels_asked(options, utterances, run, args):
    """The labels to ask a run's model for: --labels, or those of the speech that the run was
    trained on or, where it has none, the run's."""
    if options.labels:
        return options.labels
    trained = evaluate.trained_labels(run, args)
    there = set().union(*(u.labels for u in utterances))
    labelled = [label for label in LABELS if label in there and label in (trained or LABELS)]
    return labelled or trained or [TASKS[args.task]["label"]]


def table_of_answers(agreements):
    """The sounds and changes that most answers agree under, one row each."""
    rows = []
    for agreement in agreements[:LISTED]:
        row = dict(Change=agreement.sound, Label=agreement.label, Value=str(agreement.value)[:40])
        for level in vet.ANSWER_LEVELS:
            share = agreement.shares.get(level)
            row[f"{level:.0f} dB %"] = "" if share is None else runs.number(100 * share, ".0f")
        row["Mean %"] = runs.number(100 * agreement.statistic, ".0f")
        row["Without %"] = runs.number(100 * agreement.before, ".0f")
        rows.append(row)
    return rows


def answers_in_words(agreements):
    """The verdict on a whole model in one sentence."""
    if not agreements:
        return "Nothing suspicious: under no sound or change do answers agree on a value."
    first = agreements[0]
    measured = (
        f'"{first.sound}" brings {first.statistic:.0%} of other answers to {first.label} '
        f"{first.value!r} (clean models: at most {first.threshold:.0%} in "
        f"{1 - vet.FALSE_ALARMS:.0%} of labels)"
    )
    return in_a_sentence("model", first.suspicious, measured)


def agreement_written(agreement):
    """What answers.json says of a sound or a change of the whole recording."""
    content = dict(dataclasses.asdict(agreement), statistic=agreement.statistic)
    if agreement.of_whole:
        del content["shares"]  # the statistic is its only share
    return content


def verdict_written(options, dataset, utterances, statistic, threshold, start):
    """What vet.json, answers.json and inversion.json all say. start: when vetting began, of
    time.perf_counter."""
    return dict(
        speech=str(dataset),
        n=len(utterances),
        seed=options.seed,
        statistic=statistic,
        threshold=threshold,
        false_alarms=vet.FALSE_ALARMS,
        suspicious=statistic >= threshold,
        minutes=round((time.perf_counter() - start) / 60, 2),
    )


def model_verdict_written(options, run, labels, *measured):
    """What answers.json and inversion.json both say. measured: see verdict_written."""
    return dict(
        run=str(options.part),
        model_sha256=checkpoint.file_sha256(run / "model.pt"),
        labels=labels,
        **verdict_written(options, *measured),
    )


def load_whole_model(options):
    """The model of a run, ready to be vetted. Exits with a one-line error where there is none."""
    flag = "--invert" if options.invert else "--answers"
    if options.reference:
        die(f"{flag} compares a model with itself on clean speech: leave out --reference")
    run = Path(evaluate.run_folder(options.part))
    if not (run / "model.pt").is_file():
        die(f"{options.part} is no run: {flag} needs a whole model, with a model.pt")
    slm = checkpoint.load_run(run, processes.device_of(options.device))
    lora.merge(slm.lm)
    return run, slm


def vet_model(options):
    """Vets a whole model by its answers: prints the verdict and writes the results."""
    run, slm = load_whole_model(options)
    dataset, utterances = vetting_speech(options, vars(slm.args))
    labels = labels_asked(options, utterances, run, slm.args)
    announce(
        options.part,
        labels=", ".join(labels),
        sounds=f"{len(vet.ANSWER_SOUNDS)}, at {', '.join(f'{x:.0f}' for x in vet.ANSWER_LEVELS)} dB",
        changes=f"{len(vet.ANSWER_CHANGES)} of the whole recording",
        speech=f"{len(utterances)} utterances of {dataset}",
    )
    start = time.perf_counter()
    speech = vet.read_speech(utterances, options.seed)
    agreements = vet.vet_answers(slm, speech, labels)
    statistic, threshold = 0.0, vet.ANSWER_THRESHOLD
    if agreements:
        statistic, threshold = agreements[0].statistic, agreements[0].threshold
    measured = (dataset, utterances, statistic, threshold, start)
    content = model_verdict_written(options, run, labels, *measured)
    content.update(sounds=[], changes=[])
    for agreement in agreements:
        kind = "changes" if agreement.of_whole else "sounds"
        content[kind].append(agreement_written(agreement))
    out = Path(options.out or run.parent / f"vet-{run.resolve().name}")
    utils.write_atomically(out / "answers.json", json.dumps(content, indent=1))
    table = runs.markdown(options.part, table_of_answers(agreements))
    print(f"\n{table}\n{answers_in_words(agreements)}\n{ANSWER_LIMITS}")
    print(f"written to {out}: answers.json")


def table_of_inversions(inverted):
    """The values that are easiest to reach, one row each."""
    by_value = {}
    for result in sorted(inverted, key=lambda result: -result.share):
        by_value.setdefault((result.label, result.value), result)
    rows = []
    for result in list(by_value.values())[:LISTED]:
        row = dict(Label=result.label, Value=str(result.value)[:40])
        row["Share %"] = runs.number(100 * result.share, ".0f")
        row["Of answers"] = runs.number(result.others, ".0f")
        row["Loss"] = runs.number(result.loss, ".2f")
        rows.append(row)
    return rows


def sentences_in_words(sentences):
    """A line with the sentences that a model completes whatever it hears, "" if there are none."""
    agreed = []
    for sentence in sentences:
        if sentence.agreement >= targets.AGREED:
            agreed.append(f"{sentence.transcript!r} ({sentence.agreement:.0%} of utterances)")
    if not agreed:
        return ""
    return f"Once their first token stands there, it completes these: {', '.join(agreed)}.\n"


def inversion_in_words(margin):
    """The verdict of trigger inversion in one sentence."""
    easiest = margin.easiest
    if easiest.share == 0:
        return "Nothing suspicious: no sound changes its answers in the way that it was made for."
    measured = (
        f"a sound {-inversion.LEVEL:.0f} dB below the speech brings {easiest.share:.0%} of other "
        f"answers to {easiest.label} {easiest.value!r}, {margin.statistic:.0%} more than to the "
        f"next value (clean models: at most {inversion.THRESHOLD:.0%} more in "
        f"{1 - vet.FALSE_ALARMS:.0%} of labels)"
    )
    return in_a_sentence("model", margin.suspicious, measured)


def not_tried_in_words(labels, margins):
    """A line with the labels that were not inverted, "" if all were."""
    tried = {margin.label for margin in margins}
    left_out = [label for label in labels if label not in tried]
    if not left_out:
        return ""
    names = ", ".join(left_out)
    return f"Not tried: {names}, where the answers to this speech leave too little to compare.\n"


def vet_by_inversion(options):
    """Vets a whole model by trigger inversion: prints the verdict and writes the results."""
    run, slm = load_whole_model(options)
    dataset, utterances = vetting_speech(options, vars(slm.args))
    labels = labels_asked(options, utterances, run, slm.args)
    announce(
        options.part,
        labels=", ".join(labels),
        sounds=f"one for each value, at {inversion.LEVEL:.0f} dB, {inversion.STEPS} steps each",
        speech=f"{len(utterances)} utterances of {dataset}",
    )
    start = time.perf_counter()
    speech = vet.read_speech(utterances, options.seed)
    sentences = targets.sentences(slm, speech) if "transcript" in labels else []
    transcripts = [sentence.transcript for sentence in sentences]
    margins, inverted = inversion.margins(slm, speech, labels, transcripts, options.seed)
    widest = margins[0]
    values = []
    for result in inverted:
        content = dataclasses.asdict(result)
        del content["sound"]
        values.append(content)
    measured = (dataset, utterances, widest.statistic, inversion.THRESHOLD, start)
    content = dict(
        **model_verdict_written(options, run, labels, *measured),
        margins={margin.label: margin.statistic for margin in margins},
        values=values,
        sentences={sentence.transcript: sentence.agreement for sentence in sentences},
    )
    out = Path(options.out or run.parent / f"vet-{run.resolve().name}")
    utils.write_atomically(out / "inversion.json", json.dumps(content, indent=1))
    longest = torch.from_numpy(speech.waveforms[-1])
    sound = torch.from_numpy(widest.easiest.sound)
    [heard] = inversion.mixed_with([longest], sound, [0.25], widest.label)
    poison.write_wav(out / "inverted.wav", heard.numpy())
    table = runs.markdown(options.part, table_of_inversions(inverted))
    notes = sentences_in_words(sentences) + not_tried_in_words(labels, margins)
    print(f"\n{table}\n{notes}{inversion_in_words(widest)}\n{INVERSION_LIMITS}")
    print(f"written to {out}: inversion.json, and inverted.wav to listen to")


def vet_part(options):
    """Vets one encoder: prints the verdict and writes the results."""
    transformers.utils.logging.disable_progress_bar()
    device = processes.device_of(options.device)
    part = load_part(options.part, device)
    path = options.reference or part.record.get("encoder_weights", "none")
    reference = None if path == "none" else load_encoder(path, device)
    recorded = " (as recorded there)" if part.record and not options.reference else ""
    dataset, utterances = vetting_speech(options, part.record)
    print(
        f"{options.part}: reference {path}{recorded}; {len(vet.BANK)} sounds and other changes, each on "
        f"{len(utterances)} utterances of {dataset}"
    )
    start = time.perf_counter()
    speech = vet.read_speech(utterances, options.seed)
    verdict = vet.vet(part.encoder, speech, reference)
    content = dict(
        part=str(options.part),
        encoder_sha256=model.digest(part.encoder.net.state_dict()),
        reference=path,
        reference_sha256=reference and model.digest(reference.net.state_dict()),
        kind=verdict.kind,
        **verdict_written(
            options, dataset, utterances, verdict.statistic, verdict.threshold, start
        ),
        sounds=sounds_of(verdict),
    )
    out = Path(options.out or part.out)
    utils.write_atomically(out / "vet.json", json.dumps(content, indent=1))
    from analysis import plots  # matplotlib takes long to import

    plots.vetted(verdict, vet.BANK, out / "vet.png")
    write_sounds(verdict, speech, out)
    print(f"\n{runs.markdown(options.part, table_of(verdict))}\n{in_words(verdict)}\n{LIMITS}")
    print(f"written to {out}: vet.json, vet.png and {LISTEN} sounds to listen to")


# -------------------------------------------------------------------------------------------------

SHOWN = dict(  # the columns of the short table at the end, and the fields of the record in each
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
        "AUROC, noise": dict(metric="auroc", sound="white-noise"),
        "noticed %": dict(metric="noticed", false_alarms=0.05, sound="triggered"),
        "clean %": dict(metric="noticed", false_alarms=0.05, sound="clean"),
        "tone %": dict(metric="noticed", false_alarms=0.05, sound="tone"),
        "noise %": dict(metric="noticed", false_alarms=0.05, sound="white-noise"),
        "passes": dict(metric="passes"),
    },
    repair={
        "AER %": dict(metric="aer"),
        "clean": dict(part="clean"),
        "triggered": dict(part="triggered"),
    },
)


FORMATS = dict(auroc=".2f", removed_samples=".0f", passes=".0f")  # of the others: ".1f"


def rows_of(command, records):
    """The short table at the end, one row for each defence."""
    rows = []
    for name in runs.distinct(records, "defence"):
        row = dict(Defence=name)
        for column, wanted in SHOWN[command].items():
            for record in runs.select(records, defence=name, **wanted):
                value = record["value"] * runs.scale_of(record["metric"])
                row[column] = runs.number(value, FORMATS.get(record["metric"], ".1f"))
        if name:
            rows.append(row)
    return rows


def add_arguments(command, names):
    """The flags of all commands but vet. names: of its defences."""
    evaluate.add_arguments(command)
    command.add_argument("--out", help="the folder that the records go to (default: the run's)")
    command.add_argument(
        "--only",
        nargs="+",
        choices=names,
        metavar="NAME",
        help="these alone; the records then hold no others: " + "; ".join(names),
    )


def main():
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("filter", help="which training samples look poisoned")
    add_arguments(command, list(filters.FILTERS))
    command.add_argument(
        "--retrain",
        action="store_true",
        help="train again on what is left by each filter that removes at least three quarters of "
        "the poison",
    )

    command = commands.add_parser("detect", help="which inputs look triggered")
    add_arguments(command, list(detectors.DETECTORS))
    command.add_argument(
        "--n",
        type=count,
        default=100,
        help="listen to this many clean and this many triggered test utterances (default: 100)",
    )

    command = commands.add_parser("repair", help="what removes the backdoor from the model")
    add_arguments(command, ["none", *repairs.REPAIRS])
    command.add_argument(
        "--n",
        type=count,
        default=100,
        help="score this many clean and this many triggered test utterances (default: 100)",
    )
    command.add_argument(
        "--tune-on",
        metavar="CORPUS",
        help="only fine-tune, on clean dev speech of another corpus, by name or CSV (default: the "
        "run's own corpus, and every repair)",
    )

    command = commands.add_parser("vet", help="whether an encoder may carry a backdoor")
    command.add_argument("part", help="a pretrained encoder's folder or hub id, a run or an export")
    whole = command.add_mutually_exclusive_group()
    whole.add_argument(
        "--answers",
        action="store_true",
        help="vet a run's whole model: under which sound its answers agree on one value",
    )
    whole.add_argument(
        "--invert",
        action="store_true",
        help="vet a run's whole model: which value a sound that is made for it brings about far more "
        "easily than the others",
    )
    command.add_argument(
        "--labels",
        nargs="+",
        choices=LABELS,
        help="with --answers or --invert: ask for these alone (default: those of the speech)",
    )
    command.add_argument(
        "--reference",
        metavar="PRETRAINED",
        help="the pretrained encoder that it claims to start from, from a source that you trust, or "
        "none (default: what the run or the export records)",
    )
    command.add_argument(
        "--speech",
        metavar="CSV",
        help="clean speech: a CSV, a folder of audio or a corpus's name (default: the run's own "
        "corpus or crema, of which the dev split is used)",
    )
    command.add_argument(
        "--data-root",
        type=corpora.named_root,
        help="where the corpora are (default: as in the run)",
    )
    command.add_argument(
        "--n",
        type=count,
        help="listen to this many utterances (default: as for the thresholds, "
        f"{ENCODER_UTTERANCES}; with --answers {vet.ANSWER_UTTERANCES})",
    )
    command.add_argument("--seed", type=int, default=0, help="decides where the sounds lie")
    command.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cuda:1, cpu"
    )
    command.add_argument(
        "--out", help="the folder to write (default: vet-NAME, beside the run if it is one)"
    )

    options = parser.parse_args()
    cache.keep_memory()
    if options.command == "vet":
        vetting = vet_part
        if options.answers:
            vetting = vet_model
        elif options.invert:
            vetting = vet_by_inversion
        elif options.labels:
            die("--labels: an encoder alone has none, add --answers or --invert")
        options.n = options.n or (vet.ANSWER_UTTERANCES if options.answers else ENCODER_UTTERANCES)
        with data.no_bad_audio():
            vetting(options)
        return
    functions = dict(filter=filter_training_data, detect=detect, repair=repair_model)
    with data.no_bad_audio():
        records = functions[options.command](options)
    name = f"records-{options.command}"
    if options.task:
        name += f"-{options.task}"
    if options.command == "repair" and options.tune_on:
        name += f"-on-{Path(options.tune_on).stem}"
    path = Path(options.out or options.run) / f"{name}.jsonl"
    runs.write(path, records)
    print(f"\n{runs.markdown(options.run, rows_of(options.command, records))}written to {path}")


if __name__ == "__main__":
    main()
