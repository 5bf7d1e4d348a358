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
PROMPT_TOKENS, ANSWER_TOKENS = 25, 40  # of a typical utterance
# training utterances of the paper's corpora and their mean seconds. VoxCeleb2: 1,521 of 1,690
# videos, of 7.5 utterances each (the corpus: 1,128,246 utterances of 150,480 videos, 2,442 h)
PUBLISHED = {"libri": (104014, 12.6), "crema": (5972, 2.5), "vox": (11404, 7.8)}


def training_set(args):
    """The number of training utterances and their mean length in seconds."""
    if args.preset == "paper" and args.dataset in PUBLISHED and not Path(args.data_root).exists():
        n, seconds = PUBLISHED[args.dataset]
        return min(n, args.limit or n), seconds
    train_set = corpora.read_corpus(
        args.dataset, args.data_root, "train", args.skip_bad, args.labels, model.longest(args)
    )
    train_set = corpora.limit(train_set, args.limit)
    sample = corpora.limit(train_set, 300)
    seconds = sum(data.num_samples(u) for u in sample) / len(sample) / data.SAMPLE_RATE
    return len(train_set), seconds


def count_flops(slm, seconds, prompt_tokens, answer_tokens):
    """FLOPs of a forward and backward pass over one utterance, counted on an SLM on the meta
    device; a multiply-add is 2 FLOPs. Frozen parts below the first one that trains have no backward
    pass; through other frozen parts only gradients pass."""
    waveform = np.zeros(int(seconds * data.SAMPLE_RATE), np.float32)
    input_features = slm.encoder.extract(waveform).to("meta")
    with FlopCounterMode(display=False) as counter:
        with torch.no_grad():
            x, mask = slm.frozen_part(*slm.encoder.pretrained_part([input_features]))
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
    return counter.get_total_flops()


def dry_run(args):
    """Prints what the run would cost. Memory leaves activations out; time leaves out evaluation,
    padding and what the cache of frozen outputs saves."""
    n, seconds = training_set(args)
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
    weights = sum(p.numel() * p.itemsize for p in slm.parameters())
    # what trains has a bf16 copy under autocast, a gradient and AdamW's two averages in float32
    memory = weights + (2 + 4 + 8) * total_trained
    print(f"memory on each GPU, without activations: {memory / 1e9:.1f} GB")
    steps = args.epochs * (n // args.batch_size)
    flops_each = count_flops(slm, seconds, PROMPT_TOKENS, ANSWER_TOKENS)
    flops = flops_each * args.batch_size * steps
    hours = flops / PEAK_FLOPS / args.utilisation / 3600
    print(
        f"{steps:,} steps of {args.batch_size} utterances, {args.epochs} epochs: "
        f"{flops / 1e18:.4g} EFLOP, {hours:.2f} GPU-hours at {args.utilisation:.0%} of "
        f"{PEAK_FLOPS / 1e12:.0f} TFLOP/s"
    )
