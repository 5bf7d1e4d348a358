"""Code that is only there for speed; results/speed.md says what it is worth. Without it the figures are the same, later."""

import contextlib
import ctypes
import functools

from transformers import DynamicCache


def keep_memory():
    """Freed memory stays with the process (glibc) instead of going back to the kernel: every step asks for the same tensors
    again, and fresh pages have to be zeroed first."""
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_TRIM_THRESHOLD, -1)
        libc.mallopt(M_MMAP_MAX, 0)


def only_answers(slm):
    """In training, the last LM layer's MLP, queries and output projection, which work token by token, are computed only at the tokens
    whose logits are needed. LoRA's dropout, if any, then draws other numbers."""

    def at_answers(plain, x):
        if not slm.training:
            return plain(x)
        wanted = plain(x[slm.answered])
        out = wanted.new_zeros(*x.shape[:2], wanted.shape[-1])
        out[slm.answered] = wanted
        return out

    last = slm.lm.model.layers[-1]
    for part in (last.mlp, last.self_attn.q_proj, last.self_attn.o_proj):
        part.forward = functools.partial(at_answers, part.forward)


def share_beginning(slm):
    """In training, the tokens that all rows of a batch begin with (the prompt up to the audio, where prompts do not vary) go through the
    LM once instead of once per row."""
    plain = slm.lm.model.forward

    def shared(inputs_embeds=None, **kwargs):
        n = 0
        if slm.training:
            same = (inputs_embeds == inputs_embeds[:1]).all(-1).all(0) & ~slm.answered.any(0)
            n = int(same.cumprod(0).sum())
        if n == 0 or len(inputs_embeds) == 1:
            return plain(inputs_embeds=inputs_embeds, **kwargs)
        answered, past = slm.answered, DynamicCache()
        slm.answered = answered[:1, :n]
        plain(inputs_embeds=inputs_embeds[:1, :n], past_key_values=past, use_cache=True)
        past.batch_repeat_interleave(len(inputs_embeds))
        slm.answered = answered[:, n:]
        return plain(inputs_embeds=inputs_embeds[:, n:], past_key_values=past, use_cache=True)

    slm.lm.model.forward = shared
