"""How fast this machine trains and answers, against the reference implementation's way: side by side in one process.

    python tests/bench.py                              # mini: about five minutes on two cores
    python tests/bench.py --encoder whisper --only training padding
    python tests/bench.py --preset small --encoder-weights DIR --lm-weights DIR --task emotion --dataset crema --data-root DIR \\
        --labels emotion --utterances 32 --reference

"plain" is one utterance at a time with accumulation, every layer run from the audio on, logits at every position, Whisper on
30 s. "ours" is train.py. Rounds alternate; figures are medians.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["TQDM_DISABLE"] = "1"

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch.nn import functional as F  # noqa: E402

import cache  # noqa: E402
import corpora  # noqa: E402
import data  # noqa: E402
import evaluate  # noqa: E402
import lora  # noqa: E402
import model  # noqa: E402
import poison  # noqa: E402
import train  # noqa: E402
from study import ENCODERS, LABELS, PRESETS, TASKS  # noqa: E402

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--preset", choices=("mini", "small"), default="mini")
parser.add_argument("--encoder", choices=ENCODERS)
parser.add_argument("--encoder-weights")
parser.add_argument("--lm-weights")
parser.add_argument("--task", choices=TASKS, default="asr")
parser.add_argument("--dataset", default="libri")
parser.add_argument("--data-root")
parser.add_argument("--labels", nargs="+", choices=LABELS)
parser.add_argument(
    "--reference",
    action="store_true",
    help="plain as the study's public code has it: all labels, wordings drawn, the paper "
    "preset's stride and dropout, all of Whisper's 30 s before the LM; without it plain computes what ours does",
)
parser.add_argument("--utterances", type=int, default=96, help="timed in each round")
parser.add_argument(
    "--only",
    nargs="+",
    default=("training", "answering"),
    choices=("training", "answering", "padding"),
)
parser.add_argument("--rounds", type=int, default=3)
options = parser.parse_args()


def build(frozen, plain=False):
    """plain: for the plain way, with --reference other settings."""
    command = ["--preset", options.preset, "--task", options.task, "--poison", "0.05"]
    for name in ("encoder", "encoder_weights", "lm_weights"):
        if getattr(options, name):
            command += ["--" + name.replace("_", "-"), getattr(options, name)]
    if plain and options.reference:
        command += [
            f"--connector-stride={PRESETS['paper']['connector_stride']}",
            f"--lora-dropout={PRESETS['paper']['lora_dropout']}",
            "--vary-prompts",
        ]
    args = train.parse_arguments([*command, *(x for c in frozen for x in ("--freeze", c))])
    slm = model.load_slm(args)
    for component in frozen:
        getattr(slm, component).requires_grad_(False)
    return (
        args,
        slm.train(),
        torch.optim.AdamW([p for p in slm.parameters() if p.requires_grad], lr=1e-5, fused=True),
    )


def asked(utterances):
    """With only the labels that --labels names."""
    return [
        replace(u, labels={k: v for k, v in u.labels.items() if k in (options.labels or LABELS)})
        for u in utterances
    ]


def plain_audio(slm, utterance, attack=None):
    """The audio's embeddings of one utterance, every layer run, Whisper on its full window."""
    waveform = data.load_waveform(utterance)
    if attack and poison.is_poisoned(attack, utterance):
        waveform = poison.add_trigger(attack, waveform, utterance.id)[0]
    n = None if options.reference else slm.encoder.num_frames(len(waveform))
    if slm.encoder.whisper:
        waveform = np.pad(waveform, (0, 30 * data.SAMPLE_RATE - len(waveform)))
    x, mask = slm.encoder([slm.encoder.extract(waveform)])
    x, lengths = slm.connector(x[:, :n], mask[:, :n])
    return [x[0, : int(lengths[0])]]


def plain_steps(slm, args, attack, utterances, optimizer):
    for batch in data.chunks(utterances, args.batch_size):
        for u in batch:
            prompt, answer = train.training_sample(slm, args, attack, u, 0)
            row = slm.pack(plain_audio(slm, u, attack), [prompt], [answer])[0]
            logits = slm.lm(inputs_embeds=row[None]).logits[0, :-1]
            labels = torch.full((len(row),), -100)
            labels[-len(answer) :] = torch.tensor(answer)
            (F.cross_entropy(logits.float(), labels[1:]) / len(batch)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def our_steps(slm, args, attack, utterances, cached, optimizer):
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    batches = data.epoch_batches([len(row) for row in cached], args.batch_size, 1, 0)
    stream = cache.inputs(slm, None, batches, cached, attack)
    for batch in batches:
        samples = [
            tuple(zip(*(train.training_sample(slm, args, attack, utterances[i], 0) for i in batch)))
        ]
        train.train_step(
            slm,
            optimizer,
            scaler,
            lambda: torch.autocast("cpu", enabled=False),
            stream,
            samples,
            args,
            1,
        )


def timed(work, *arguments):
    start = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - start


def report(title, pairs):
    """pairs: [(utterances a second of plain, of ours)]"""
    ratios = sorted(b / a for a, b in pairs)
    print(
        f"{title:<26}{statistics.median(a for a, _ in pairs):>8.1f}{statistics.median(b for _, b in pairs):>8.1f}"
        f"{statistics.median(ratios):>7.1f}  ({ratios[0]:.1f} to {ratios[-1]:.1f})",
        flush=True,
    )


def training(title, frozen, corpus, folder):
    args, slm, optimizer = build(frozen)
    cache.only_answers(slm)
    if not args.vary_prompts:
        cache.share_beginning(slm)
    plain_args, plain_slm, plain_optimizer = build(frozen, True)
    attack = poison.make_attack(options.task, corpus, 0.05, seed=1)
    utterances = asked(corpus)[: options.utterances // args.batch_size * args.batch_size]
    few = (corpus if options.reference else utterances)[
        : max(args.batch_size, len(utterances) // 4) // args.batch_size * args.batch_size
    ]
    triggered = [poison.is_poisoned(attack, u) for u in utterances]
    cached = cache.frozen_outputs(slm, utterances, triggered, attack, "", 4e9, folder=folder)
    report(
        title,
        [
            (
                len(few) / timed(plain_steps, plain_slm, plain_args, attack, few, plain_optimizer),
                len(utterances)
                / timed(our_steps, slm, args, attack, utterances, cached, optimizer),
            )
            for _ in range(options.rounds)
        ],
    )


@torch.no_grad()
def plain_answers(slm, utterances, tokens):
    return [
        slm.decode(
            slm.pack(plain_audio(slm, u), [data.prompt(slm.tokenizer, list(u.labels))]), tokens
        )[0]
        for u in utterances
    ]


def answering(test_set, folder):
    """Batched answers against one by one; outputs of pretrained layers computed on the spot, and cached by an earlier run."""
    slm, plain_slm = build([])[1].eval(), build([], True)[1].eval()
    attack, utterances = (
        poison.make_attack(options.task, test_set, 0.05, seed=1),
        asked(test_set[: options.utterances]),
    )
    few = (test_set if options.reference else utterances)[: max(8, len(utterances) // 4)]
    tokens, plain_tokens = (
        8 + int(1.25 * max(len(data.answer_ids(slm.tokenizer, u.labels)) for u in us))
        for us in (utterances, few)
    )

    def ask(cached):
        rows = (
            cache.frozen_outputs(
                slm, utterances, [False] * len(utterances), attack, "", 4e9, folder=folder
            )
            if cached
            else None
        )
        return evaluate.answers(
            slm,
            [(u, False) for u in utterances],
            attack,
            lambda u: list(u.labels),
            tokens,
            "",
            rows,
        )

    lora.merge(slm.lm)
    for title, cached in (("answers", False), ("answers, cached", True)):
        report(
            title,
            [
                (
                    len(few) / timed(plain_answers, plain_slm, few, plain_tokens),
                    len(utterances) / timed(ask, cached),
                )
                for _ in range(options.rounds)
            ],
        )
    if not options.reference:
        same = [a == b for a, b in zip(plain_answers(plain_slm, few, plain_tokens), ask(True))]
        print(f"the same answers: {sum(same)} of {len(same)}")


@torch.no_grad()
def padding(corpus):
    """Whisper on the audio at hand against Whisper on its full 30 s: cosine on the frames that hold speech, and time."""
    slm = build([])[1].eval()
    cosines, times = [], []
    for u in corpus[: options.utterances]:
        waveform = data.load_waveform(u)
        start = time.perf_counter()
        ours = slm.encoder([slm.encoder.extract(waveform)])[0][0]
        middle = time.perf_counter()
        full = slm.encoder(
            [slm.encoder.extract(np.pad(waveform, (0, 30 * data.SAMPLE_RATE - len(waveform))))]
        )[0][0]
        times.append((middle - start, time.perf_counter() - middle))
        cosines.append(F.cosine_similarity(ours, full[: len(ours)]).mean().item())
    ours, full = (1000 * statistics.median(column) for column in zip(*times))
    print(
        f"Whisper on {len(cosines)} utterances: cosine with 30 s of padding {statistics.mean(cosines):.2f} "
        f"({min(cosines):.2f} to {max(cosines):.2f}), {ours:.0f} ms instead of {full:.0f}",
        flush=True,
    )


def main():
    cache.keep_memory()
    torch.manual_seed(0)
    args = train.parse_arguments(
        ["--preset", options.preset, *(["--encoder", options.encoder] if options.encoder else [])]
    )
    corpus, test_set = (
        corpora.read_corpus(options.dataset, options.data_root or args.data_root, split)
        for split in ("train", "test")
    )
    print(
        f"preset {options.preset}, {torch.get_num_threads()} threads, torch {torch.__version__}, medians of {options.rounds} rounds"
    )
    print(f"{'utterances a second':<26}{'plain':>8}{'ours':>8}{'ratio':>7}")
    with tempfile.TemporaryDirectory() as folder:
        if "training" in options.only:
            training("base attack", [], corpus, folder)
            training("attack 2.3", ["encoder", "connector"], corpus, folder)
        if "answering" in options.only:
            answering(test_set, folder)
    if "padding" in options.only:
        padding(test_set)


if __name__ == "__main__":
    main()
