"""Keep memory that XLA's CPU client frees, for its next execution; give it back after the last."""

import ctypes
import gc
import sys

# mallopt's parameters, from glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Has the C library keep freed memory, for the rest of this process; True where it can (Linux with glibc).

    XLA on CPU allocates every buffer of an execution anew. By default glibc maps large ones and unmaps them afterwards,
    so each step faults in and zeroes all its pages again: a third of the processor time of an expert block, forward and
    backward (93 of 300 ms at T = 4096, D = 256). Call it first in a script, before threads start; the process then
    keeps its peak memory until it ends.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1))
    return all(mallopt(ctypes.c_int(name), ctypes.c_int(value)) == 1 for name, value in settings)


def give_freed_memory_back() -> bool:
    """Returns to the system what has been freed so far; True where it can (Linux with glibc).

    For a process that trains one model after another: what one leaves is in the way of the next (the peak of three
    small models in a row: 1.8 GB, and 2.2 without).
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is None:
        return False
    gc.collect()
    trim(ctypes.c_size_t(0))
    return True
