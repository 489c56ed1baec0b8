"""Keeps freed memory in the process, so that every step finds the pages of the step before."""

from __future__ import annotations

import ctypes
import functools
import platform

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # of <malloc.h>
_BLOCK = 32 << 20
"""Larger blocks go back to the system as soon as they are freed, so that one large array does not stay for good."""


@functools.cache
def keep_freed_memory() -> bool:
    """Tells glibc's malloc to keep what is freed; returns whether it could be told.

    By default malloc gives the top of its heap back whenever it may, and a training step then has thousands of its pages
    handed out and cleared anew. No number depends on where tensors lie.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    told = [ctypes.CDLL(None).mallopt(option, value) for option, value in ((_MMAP_THRESHOLD, _BLOCK), (_TRIM_THRESHOLD, (1 << 31) - 1), (_TOP_PAD, _BLOCK))]
    return all(told)
