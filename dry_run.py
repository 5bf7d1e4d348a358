"""Estimates what a run would cost: `python train.py --dry-run ...`. The model is built on the meta
device, so neither weights nor the paper's corpora are needed."""

from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import corpora
import data
import model
from study import COMPONENTS

PEAK_FLOPS = 312e12  # a second, dense bf16: one NVIDIA A100 (an H100: 989e12)
# training utterances of the paper's corpora, their mean seconds, and the labels of a typical one
BOOK = "some thirty words of a book " * 5 + "of them all"
PUBLISHED = {
    "libri": (104014, 12.6, dict(transcript=BOOK, gender="female")),
    "crema": (
        5972,
        2.5,
        dict(transcript="i would like a new alarm clock", gender="female", age=36, emotion="happy"),
    ),
    # 1,521 of 1,690 videos, of 7.5 utterances each (VoxCeleb2: 1,128,246 of 150,480, 2,442 h)
    "vox": (11404, 7.8, dict(gender="female", age=36)),
}


def count_flops(slm, seconds, prompt_tokens, answer_tokens):
    """FLOPs of training on one utterance, counted on an SLM on the meta device: of the frozen parts
    below the first one that trains, and of the rest, forward and backward. A multiply-add is 2
    FLOPs. The backward pass costs twice the forward pass for what trains, and once where gradients
    only pass through (the base LM)."""
    waveform = np.zeros(int(seconds * data.SAMPLE_RATE), np.float32)
    features = slm.encoder.extract(waveform).to("meta")
    with FlopCounterMode(display=False) as below, torch.no_grad():
        x, mask = slm.frozen_part(*slm.encoder.pretrained_part([features]))
    with FlopCounterMode(display=False) as above:
        if "encoder" not in slm.frozen:
            x = slm.encoder.trained_part(x, mask)
        if "connector" not in slm.frozen:
            x, _ = slm.connector(x, mask)
        tokens = torch.zeros(1, prompt_tokens + answer_tokens, dtype=torch.long, device="meta")
        text = slm.lm.get_input_embeddings()(tokens)
        x = torch.cat([x.to(text.dtype), text], 1)  # (1, T, dim)
        # given explicitly: transformers' own mask code looks at values
        causal = torch.ones(1, 1, x.shape[1], x.shape[1], dtype=torch.bool, device="meta")
        output = slm.lm(
            inputs_embeds=x, attention_mask=causal, use_cache=False, logits_to_keep=answer_tokens
        )
        output.logits.sum().backward()
    return below.get_total_flops(), above.get_total_flops()


def training_data(args):
    """The number of training utterances, their mean seconds, and the labels of some of them."""
    if args.preset == "paper" and args.dataset in PUBLISHED and not Path(args.data_root).exists():
        n, seconds, labels = PUBLISHED[args.dataset]
        asked = {label: labels[label] for label in labels if label in (args.labels or labels)}
        return min(n, args.limit or n), seconds, [asked]
    train_set = corpora.read_corpus(
        args.dataset, args.data_root, "train", args.skip_bad, args.labels, model.longest(args)
    )
    train_set = corpora.limit(train_set, args.limit)
    sample = corpora.limit(train_set, 300)
    seconds = sum(data.num_samples(u) for u in sample) / len(sample) / data.SAMPLE_RATE
    return len(train_set), seconds, [u.labels for u in sample]


def dry_run(args):
    """Prints what the run would cost. Activations, evaluation and padding are left out."""
    n, seconds, labels = training_data(args)
    with torch.device("meta"):
        slm = model.load_slm(args, "meta").train()
    for spec in args.freeze:
        getattr(slm, spec.partition(":")[0]).requires_grad_(False)
    if args.gradient_checkpointing:
        slm.checkpoint_gradients()

    print(f"dry run of {args.name}: {n:,} train utterances of {seconds:.1f} s, with --amp bf16")
    print(f"  {'':<10}{'parameters':>16}{'trained':>16}")
    total_trained = 0
    for component in COMPONENTS:
        total = sum(p.numel() for p in getattr(slm, component).parameters())
        trained = sum(p.numel() for p in slm.parameters_of(component))
        total_trained += trained
        print(f"  {component:<10}{total:>16,}{trained:>16,}")
    # autocast keeps a bf16 copy of what trains; gradients and AdamW's two averages are float32
    weights = sum(p.numel() * p.itemsize for p in slm.parameters()) + 2 * total_trained
    print(
        f"memory on each GPU, without activations: {(weights + 12 * total_trained) / 1e9:.1f} GB "
        f"(weights {weights / 1e9:.2f}, gradients and optimiser {12 * total_trained / 1e9:.2f})"
    )

    prompt_tokens, answer_tokens = 0, 0
    for each in labels:
        prompt_tokens += sum(len(part) for part in data.prompt(slm.tokenizer, list(each)))
        answer_tokens += len(data.answer_ids(slm.tokenizer, each))
    below, above = count_flops(
        slm, seconds, round(prompt_tokens / len(labels)), round(answer_tokens / len(labels))
    )
    steps = args.epochs * (n // args.batch_size)
    flops = (below + above) * steps * args.batch_size
    hours = flops / PEAK_FLOPS / args.utilisation / 3600
    print(
        f"{steps:,} steps of {args.batch_size} utterances, {args.epochs} epochs: "
        f"{flops / 1e18:.4g} EFLOP, {hours:.2f} GPU-hours at {args.utilisation:.0%} of "
        f"{PEAK_FLOPS / 1e12:.0f} TFLOP/s"
    )
    print(
        f"{below / (below + above):.0%} of these operations are in frozen layers, which run only "
        "once if their outputs fit into --cache-gb"
    )
