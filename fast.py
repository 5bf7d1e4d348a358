"""What exists for speed alone; results/speed.md has the measurements. Leaving it out gives the same figures, slower."""
import contextlib
import ctypes


def keep_memory():
    """Freed memory stays with the process (glibc) instead of going back to the kernel: every step asks for the same tensors
    again, and fresh pages have to be zeroed first."""
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_TRIM_THRESHOLD, -1)
        libc.mallopt(M_MMAP_MAX, 0)
