"""What exists for speed alone; results/speed.md has the measurements. Leaving it out gives the same figures, slower."""
import contextlib
import ctypes
import functools


def keep_memory():
    """Freed memory stays with the process (glibc) instead of going back to the kernel: every step asks for the same tensors
    again, and fresh pages have to be zeroed first."""
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_TRIM_THRESHOLD, -1)
        libc.mallopt(M_MMAP_MAX, 0)


def only_answers(slm):
    """In training, what the last LM layer does token by token (its MLP, queries and output projection) is done at the tokens whose
    logits are needed and nowhere else. LoRA's dropout, where there is any, then draws other numbers."""
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
