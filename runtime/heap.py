"""What glibc's malloc does with memory that was freed, on a CPU: kept within a step, returned after an evaluation."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
KEPT = 1 << 30  # bytes, of one array, and at the end of the heap


def keep_freed_memory(most: int = KEPT) -> None:
    """Makes malloc reuse the memory of freed arrays of up to `most` bytes.

    By default glibc maps every array above 32 MiB anew, and the kernel then zeroes its pages. The logits of 256
    sequences are such an array, for every token that they generate.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option:  # only glibc has it
        for option in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            set_option(option, most)


def release_free_memory() -> None:
    """Returns free memory to the system: glibc keeps it in ever smaller pieces, 60 MB more per 100 steps on a CPU."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:  # only glibc has it
        trim(0)
