"""What a run would cost, counted on a model that has shapes but no values: `python train.py --dry-run ...`."""

from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import corpora
import data
import model
from study import COMPONENTS

PEAK_FLOPS = 312e12  # a second, dense bf16: one NVIDIA A100 (an H100: 989e12)
PUBLISHED = {  # training utterances, their mean seconds, and the labels of a typical one
    "libri": (
        104014,
        12.6,
        dict(transcript="some thirty words of a book " * 5 + "of them all", gender="female"),
    ),
    "crema": (
        5972,
        2.5,
        dict(transcript="i would like a new alarm clock", gender="female", age=36, emotion="happy"),
    ),
    # 1,521 of 1,690 videos, of 7.5 utterances each (VoxCeleb2: 1,128,246 of 150,480 videos, 2,442 h)
    "vox": (11404, 7.8, dict(gender="female", age=36)),
}


def count_work(slm, seconds, batch, prompt_tokens, answer_tokens):
    """The cost of training on `batch` utterances of `seconds` s, counted on an SLM on the meta device: (FLOPs of the frozen parts below
    the first one that trains, FLOPs of the rest forward and backward, bytes kept for the backward pass).

    A multiply-add is 2 FLOPs; matrix products, convolutions and attention count. The backward pass costs what autograd does: twice
    the forward pass for what trains, once where gradients only pass through (the base LM). Kept values are assumed to be as wide as
    the LM's weights, 2 bytes in bf16; only WavLM's attention is assumed to keep its matrices.
    """
    kept, weights = {}, {p.untyped_storage()._cdata for p in slm.parameters()}
    width = slm.lm.get_input_embeddings().weight.itemsize

    def keep(t):
        matrix = (
            t.dim() > 2
            and t.shape[-1] == t.shape[-2]
            and not (slm.encoder.relative and t.shape[-1] == frames)
        )
        if not matrix and t.untyped_storage()._cdata not in weights:
            kept[t.untyped_storage()._cdata] = (
                t.untyped_storage().nbytes() // t.itemsize * min(width, t.itemsize)
            )
        return t

    def keep_input(
        layer, inputs
    ):  # gradient checkpointing holds it, which autograd's hooks do not see
        keep(inputs[0])

    for layer in slm.layers_with_a_graph():
        layer.register_forward_pre_hook(keep_input)
    features = slm.encoder.extract(np.zeros(int(seconds * data.SAMPLE_RATE), np.float32)).to("meta")
    with FlopCounterMode(display=False) as below, torch.no_grad():
        x, mask = slm.encoder.pretrained_part([features] * batch)
        frames = x.shape[1]
        x, mask = slm.frozen_part(x, mask)
    with (
        FlopCounterMode(display=False) as above,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t),
    ):
        x = x if "encoder" in slm.frozen else slm.encoder.trained_part(x, mask)
        x = x if "connector" in slm.frozen else slm.connector(x, mask)[0]
        embed = slm.lm.get_input_embeddings()
        text = embed(
            torch.zeros(batch, prompt_tokens + answer_tokens, dtype=torch.long, device="meta")
        )
        rows = torch.cat([x.to(text.dtype), text], 1)
        # given explicitly: transformers' own mask code looks at values
        causal = torch.ones(1, 1, rows.shape[1], rows.shape[1], dtype=torch.bool, device="meta")
        logits = slm.lm(
            inputs_embeds=rows,
            attention_mask=causal,
            use_cache=False,
            logits_to_keep=answer_tokens,
        ).logits
        F.cross_entropy(
            logits.float().transpose(1, 2),
            torch.zeros(batch, answer_tokens, dtype=torch.long, device="meta"),
        ).backward()
    return below.get_total_flops(), above.get_total_flops(), sum(kept.values())


def training_data(args):
    """(training utterances, their mean seconds, labels of some, the source of these figures)."""
    if args.preset == "paper" and args.dataset in PUBLISHED and not Path(args.data_root).exists():
        n, seconds, labels = PUBLISHED[args.dataset]
        labels = {k: v for k, v in labels.items() if args.labels is None or k in args.labels}
        return min(n, args.limit or n), seconds, [labels], "published sizes"
    train_set = corpora.read_corpus(
        args.dataset, args.data_root, "train", args.skip_bad, args.labels, model.longest(args)
    )
    train_set = corpora.limit(train_set, args.limit)
    some = corpora.limit(train_set, 300)
    seconds = sum(map(data.num_samples, some)) / len(some) / data.SAMPLE_RATE
    return len(train_set), seconds, [u.labels for u in some], f"length of {len(some)} of them"


def dry_run(args):
    """Prints what the run would cost. Memory is one GPU's. Evaluation and padding are left out."""
    n, seconds, labels, source = training_data(args)
    with torch.device("meta"):
        slm = model.load_slm(args, "meta")
    for spec in args.freeze:
        getattr(slm, spec.partition(":")[0]).requires_grad_(False)
    if args.gradient_checkpointing:
        slm.checkpoint_gradients()
    prompt = round(
        sum(len(part) for a in labels for part in data.prompt(slm.tokenizer, list(a))) / len(labels)
    )
    answer = round(sum(len(data.answer_ids(slm.tokenizer, a)) for a in labels) / len(labels))
    piece = max(1, min(args.batch_size, int(args.batch_seconds / seconds)))
    below, above, kept = (
        count / piece for count in count_work(slm.train(), seconds, piece, prompt, answer)
    )
    epoch_steps = n // args.batch_size
    frames = (
        n * (1 + args.poison) * slm.encoder.num_frames(int(seconds * data.SAMPLE_RATE))
    )  # poisoned ones are kept twice
    passes = 1 if 4 * slm.encoder.dim * frames <= args.cache_gb * 1e9 else args.epochs
    work = (below * passes + above * args.epochs) * epoch_steps * args.batch_size
    trained = {c: sum(p.numel() for p in slm.parameters_of(c)) for c in COMPONENTS}
    print(
        f"dry run of {args.name}: preset {args.preset}, encoder {args.encoder}, with --amp bf16 on a GPU\n"
        f"data {args.dataset}: {n:,} train utterances of {seconds:.1f} s ({source}), prompt {prompt} and answer {answer} "
        f"tokens\n{'':12}{'parameters':>16}{'trained':>16}"
    )
    for c in COMPONENTS:
        print(
            f"  {c:<10}{sum(p.numel() for p in getattr(slm, c).parameters()):>16,}{trained[c]:>16,}"
        )
    # autocast keeps a bf16 copy of what trains; the gradients are float32, and so are AdamW's two averages
    total = sum(trained.values())
    sizes = dict(
        weights=sum(p.numel() * p.itemsize for p in slm.parameters()) + 2 * total,
        gradients=4 * total,
        optimiser=8 * total,
        activations=kept * piece,
    )
    print(
        f"memory {sum(sizes.values()) / 1e9:.1f} GB with {piece} utterances in one pass: "
        + ", ".join(f"{name} {size / 1e9:.2f}" for name, size in sizes.items())
    )
    print(
        f"a step of {args.batch_size}: {(below + above) * args.batch_size / 1e12:.4g} TFLOP, of them "
        f"{below * args.batch_size / 1e12:.4g} in frozen layers below, which run "
        + ("in every epoch" if passes > 1 else "once and are cached")
    )
    print(
        f"{args.epochs * epoch_steps:,} steps, {args.epochs} epochs: {work / 1e18:.4g} EFLOP, "
        f"{work / PEAK_FLOPS / args.utilisation / 3600:.2f} GPU-hours at {args.utilisation:.0%} of "
        f"{PEAK_FLOPS / 1e12:.0f} TFLOP/s"
    )
