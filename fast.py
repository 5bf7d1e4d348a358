"""Code that is only there for speed; results/speed.md says what it is worth. Without it the figures are the same, later."""

import contextlib
import ctypes
import functools

import torch
from transformers import DynamicCache

import model


def keep_memory():
    """Freed memory stays with the process (glibc) instead of going back to the kernel: every step asks for the same tensors
    again, and fresh pages have to be zeroed first."""
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_TRIM_THRESHOLD, -1)
        libc.mallopt(M_MMAP_MAX, 0)


@torch.no_grad()
def fits(slm):
    """Whether training, but for dropout, computes the logits that evaluation computes."""
    embeddings = slm.lm.get_input_embeddings().weight
    rows = embeddings[:16].reshape(2, 8, -1).clone()
    rows[1, :4] = rows[0, :4]  # a common beginning
    wanted = torch.zeros(2, 8, dtype=torch.bool, device=rows.device)
    wanted[:, 6:] = True
    training = slm.training
    slm.train()
    slm.lm.eval()
    try:
        quick = slm.logits(rows, wanted)
        slm.training = False
        plain = slm.logits(rows, wanted)
    except Exception:  # a layer that takes or returns something else fails in its own way
        return False
    finally:
        slm.train(training)
    apart = (quick - plain).float().abs().max()
    return bool(apart <= 0.05 * plain.float().std())  # bf16 rounds; a wrong path is further off


def only_answers(slm):
    """In training, the last LM layer's MLP, queries and output projection, which work token by
    token, are computed only at the tokens whose logits are needed. LoRA's dropout, if any, then
    draws other numbers. An LM with other layers is left as it is."""

    def at_answers(plain, x):
        if not slm.training:
            return plain(x)
        wanted = plain(x[slm.answered])
        out = wanted.new_zeros(*x.shape[:2], wanted.shape[-1])
        out[slm.answered] = wanted
        return out

    last = model.layers_of(slm.lm)[-1]
    names = {name for name, _ in last.named_modules()}
    parts = [
        last.get_submodule(name)
        for name in ("mlp", "self_attn.q_proj", "self_attn.o_proj")
        if name in names
    ]
    for part in parts:
        part.forward = functools.partial(at_answers, part.forward)
    if not fits(slm):
        for part in parts:
            del part.forward


def share_beginning(slm):
    """In training, the tokens that all rows of a batch begin with (the prompt up to the audio, where
    prompts do not vary) go through the LM once instead of once per row. An LM that keeps something
    else than keys and values is left as it is."""
    plain = slm.logits

    def shared(x, wanted):
        n = 0
        if slm.training:
            same = (x == x[:1]).all(-1).all(0) & ~wanted.any(0)
            n = int(same.cumprod(0).sum())
        if n == 0 or len(x) == 1:
            return plain(x, wanted)
        cache = DynamicCache()
        plain(x[:1, :n], wanted[:1, :n], cache)
        cache.batch_repeat_interleave(len(x))
        return plain(x[:, n:], wanted[:, n:], cache)

    slm.logits = shared
    if not fits(slm):
        slm.logits = plain
