"""How fast this machine trains and answers, against the reference implementation's way: side by
side in one process.

    python tests/bench.py                              # mini: about five minutes on two cores
    python tests/bench.py --encoder whisper --only training padding
    python tests/bench.py --preset small --encoder-weights DIR --lm-weights DIR --task emotion \\
        --dataset crema --data-root DIR --labels emotion --utterances 32 --reference

"plain" is one utterance at a time with accumulation, every layer run from the audio on, logits at
every position, Whisper on 30 s. "ours" is train.py. Rounds alternate; figures are medians.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["TQDM_DISABLE"] = "1"

import numpy as np
import torch
from torch.nn import functional as F

import cache
import corpora
import data
import evaluate
import lora
import model
import poison
import train
from study import ENCODERS, LABELS, PRESETS, TASKS

CACHE_BYTES = 4e9
WHISPER_SAMPLES = 30 * data.SAMPLE_RATE


@dataclass
class Setup:
    """A model to be timed."""

    args: argparse.Namespace  # train.py's
    slm: model.SLM
    optimizer: torch.optim.Optimizer


def build(options, frozen=(), plain=False):
    """A model in training mode with these components frozen. plain: for the plain way, which has
    other settings with --reference."""
    command = ["--preset", options.preset, "--task", options.task, "--poison", "0.05"]
    if options.encoder:
        command += ["--encoder", options.encoder]
    if options.encoder_weights:
        command += ["--encoder-weights", options.encoder_weights]
    if options.lm_weights:
        command += ["--lm-weights", options.lm_weights]
    if plain and options.reference:
        paper = PRESETS["paper"]
        command += ["--connector-stride", str(paper["connector_stride"])]
        command += ["--lora-dropout", str(paper["lora_dropout"]), "--vary-prompts"]
    for component in frozen:
        command += ["--freeze", component]
    args = train.parse_arguments(command)
    slm = model.load_slm(args)
    for component in frozen:
        getattr(slm, component).requires_grad_(False)
    trained = [p for p in slm.parameters() if p.requires_grad]
    return Setup(args, slm.train(), torch.optim.AdamW(trained, lr=1e-5, fused=True))


def with_labels(utterances, labels):
    """The utterances with these labels only."""
    chosen = []
    for utterance in utterances:
        kept = {label: text for label, text in utterance.labels.items() if label in labels}
        chosen.append(replace(utterance, labels=kept))
    return chosen


def timed(work, *arguments):
    start = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - start


def report(title, rates):
    """rates: [(utterances a second of plain, of ours)], one pair for each round."""
    plain = statistics.median(plain_rate for plain_rate, _ in rates)
    ours = statistics.median(our_rate for _, our_rate in rates)
    ratios = sorted(our_rate / plain_rate for plain_rate, our_rate in rates)
    between = f"({ratios[0]:.1f} to {ratios[-1]:.1f})"
    ratio = statistics.median(ratios)
    print(f"{title:<26}{plain:>8.1f}{ours:>8.1f}{ratio:>7.1f}  {between}", flush=True)


# --------------------------------------------------------------------------------------------------
# training


def plain_audio(slm, utterance, reference, attack=None):
    """The audio's embeddings of one utterance, every layer run, Whisper on its full window: a list
    of one (T, hidden)."""
    waveform = data.load_waveform(utterance)
    if attack and poison.is_poisoned(attack, utterance):
        waveform = poison.add_trigger(attack, waveform, utterance.id)[0]
    frames = None if reference else slm.encoder.num_frames(len(waveform))
    if slm.encoder.whisper:
        waveform = np.pad(waveform, (0, WHISPER_SAMPLES - len(waveform)))
    x, mask = slm.encoder([slm.encoder.extract(waveform)])
    x, lengths = slm.connector(x[:, :frames], mask[:, :frames])
    return [x[0, : int(lengths[0])]]


def plain_steps(setup, reference, attack, utterances):
    slm = setup.slm
    for batch in data.chunks(utterances, setup.args.batch_size):
        for utterance in batch:
            example = train.training_example(slm, setup.args, attack, utterance, 0)
            audio = plain_audio(slm, utterance, reference, attack)
            row = slm.pack(audio, [example.prompt], [example.answer])[0]  # (T, hidden)
            logits = slm.lm(inputs_embeds=row[None]).logits[0, :-1]
            targets = torch.full((len(row),), -100)
            targets[-len(example.answer) :] = torch.tensor(example.answer)
            loss = F.cross_entropy(logits.float(), targets[1:])
            (loss / len(batch)).backward()
        setup.optimizer.step()
        setup.optimizer.zero_grad(set_to_none=True)


def no_autocast():
    return torch.autocast("cpu", enabled=False)


def our_steps(setup, attack, utterances, cached):
    slm = setup.slm
    args = setup.args
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    lengths = [len(row) for row in cached]
    batches = data.epoch_batches(lengths, args.batch_size, 1, 0)
    stream = cache.inputs(slm, None, batches, cached, attack)
    for batch in batches:
        examples = []
        for i in batch:
            examples.append(train.training_example(slm, args, attack, utterances[i], 0))
        train.train_step(slm, setup.optimizer, scaler, no_autocast, stream, [examples], args, 1)


def training(title, options, frozen, corpus, folder):
    ours = build(options, frozen)
    cache.only_answers(ours.slm)
    if not ours.args.vary_prompts:
        cache.share_beginning(ours.slm)
    plain = build(options, frozen, plain=True)
    batch_size = ours.args.batch_size
    attack = poison.make_attack(options.task, corpus, 0.05, seed=1)
    whole_batches = options.utterances // batch_size * batch_size
    utterances = with_labels(corpus, options.labels)[:whole_batches]
    # the plain way is slower, and timed on a quarter
    quarter = max(batch_size, len(utterances) // 4) // batch_size * batch_size
    few = (corpus if options.reference else utterances)[:quarter]
    triggered = [poison.is_poisoned(attack, utterance) for utterance in utterances]
    cached = cache.frozen_outputs(
        ours.slm, utterances, triggered, attack, "", CACHE_BYTES, folder=folder
    )
    rates = []
    for _ in range(options.rounds):
        plain_seconds = timed(plain_steps, plain, options.reference, attack, few)
        our_seconds = timed(our_steps, ours, attack, utterances, cached)
        rates.append((len(few) / plain_seconds, len(utterances) / our_seconds))
    report(title, rates)


# --------------------------------------------------------------------------------------------------
# answering


@torch.no_grad()
def plain_answers(slm, reference, utterances, tokens):
    answers = []
    for utterance in utterances:
        prompt = data.prompt(slm.tokenizer, list(utterance.labels))
        audio = plain_audio(slm, utterance, reference)
        answers += slm.decode(slm.pack(audio, [prompt]), tokens)
    return answers


def keys_of(utterance):
    return list(utterance.labels)


def most_tokens(slm, utterances):
    """How many tokens an answer may have: a few more than the longest true one."""
    answers = [data.answer_ids(slm.tokenizer, utterance.labels) for utterance in utterances]
    return 8 + int(1.25 * max(len(answer) for answer in answers))


def answering(options, test_set, folder):
    """Batched answers against one by one; outputs of pretrained layers computed on the spot, and
    cached by an earlier run."""
    slm = build(options).slm.eval()
    plain_slm = build(options, plain=True).slm.eval()
    attack = poison.make_attack(options.task, test_set, 0.05, seed=1)
    utterances = with_labels(test_set[: options.utterances], options.labels)
    few = (test_set if options.reference else utterances)[: max(8, len(utterances) // 4)]
    clean = [False] * len(utterances)
    tokens = most_tokens(slm, utterances)
    plain_tokens = most_tokens(slm, few)

    def ask(cached):
        rows = None
        if cached:
            rows = cache.frozen_outputs(
                slm, utterances, clean, attack, "", CACHE_BYTES, folder=folder
            )
        items = list(zip(utterances, clean))
        return evaluate.answers(slm, items, attack, keys_of, tokens, "", rows)

    lora.merge(slm.lm)
    for title, cached in (("answers", False), ("answers, cached", True)):
        rates = []
        for _ in range(options.rounds):
            arguments = plain_slm, options.reference, few, plain_tokens
            plain_seconds = timed(plain_answers, *arguments)
            our_seconds = timed(ask, cached)
            rates.append((len(few) / plain_seconds, len(utterances) / our_seconds))
        report(title, rates)
    if not options.reference:
        plain = plain_answers(plain_slm, options.reference, few, plain_tokens)
        same = [ours == theirs for ours, theirs in zip(ask(True), plain)]
        print(f"the same answers: {sum(same)} of {len(same)}")


@torch.no_grad()
def padding(options, corpus):
    """Whisper on the audio at hand against Whisper on its full 30 s: cosine on the frames that hold
    speech, and time."""
    encoder = build(options).slm.eval().encoder
    cosines = []
    our_times = []
    full_times = []
    for utterance in corpus[: options.utterances]:
        waveform = data.load_waveform(utterance)
        start = time.perf_counter()
        ours = encoder([encoder.extract(waveform)])[0][0]  # (T, dim)
        middle = time.perf_counter()
        padded = np.pad(waveform, (0, WHISPER_SAMPLES - len(waveform)))
        full = encoder([encoder.extract(padded)])[0][0]
        full_times.append(time.perf_counter() - middle)
        our_times.append(middle - start)
        cosines.append(F.cosine_similarity(ours, full[: len(ours)]).mean().item())
    print(
        f"Whisper on {len(cosines)} utterances: cosine with 30 s of padding "
        f"{statistics.mean(cosines):.2f} ({min(cosines):.2f} to {max(cosines):.2f}), "
        f"{1000 * statistics.median(our_times):.0f} ms instead of "
        f"{1000 * statistics.median(full_times):.0f}",
        flush=True,
    )


def parse_options():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=("mini", "small"), default="mini")
    parser.add_argument("--encoder", choices=ENCODERS, help="as train.py's, as the next six")
    parser.add_argument("--encoder-weights")
    parser.add_argument("--lm-weights")
    parser.add_argument("--task", choices=TASKS, default="asr")
    parser.add_argument("--dataset", default="libri")
    parser.add_argument("--data-root")
    parser.add_argument("--labels", nargs="+", choices=LABELS, default=LABELS)
    parser.add_argument(
        "--reference",
        action="store_true",
        help="plain as the study's public code has it: all labels, wordings drawn, the paper "
        "preset's stride and dropout, all of Whisper's 30 s before the LM; without it plain "
        "computes what ours does",
    )
    parser.add_argument("--utterances", type=int, default=96, help="timed in each round")
    parser.add_argument(
        "--only",
        nargs="+",
        default=("training", "answering"),
        choices=("training", "answering", "padding"),
        help="what to time",
    )
    parser.add_argument("--rounds", type=int, default=3, help="of which medians are taken")
    return parser.parse_args()


def main():
    options = parse_options()
    cache.keep_memory()
    torch.manual_seed(0)
    defaults = train.parse_arguments(["--preset", options.preset])
    root = options.data_root or defaults.data_root
    corpus = corpora.read_corpus(options.dataset, root, "train")
    test_set = corpora.read_corpus(options.dataset, root, "test")
    print(
        f"preset {options.preset}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"medians of {options.rounds} rounds"
    )
    print(f"{'utterances a second':<26}{'plain':>8}{'ours':>8}{'ratio':>7}")
    with tempfile.TemporaryDirectory() as folder:
        if "training" in options.only:
            training("base attack", options, (), corpus, folder)
            training("attack 2.3", options, ("encoder", "connector"), corpus, folder)
        if "answering" in options.only:
            answering(options, test_set, folder)
    if "padding" in options.only:
        padding(options, test_set)


if __name__ == "__main__":
    main()
