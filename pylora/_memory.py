"""Memory straight from the system, for what is larger than an allocator's blocks."""

from __future__ import annotations

import contextlib
import mmap


def anonymous(size: int, large_pages: bool = False) -> mmap.mmap:
    """Zeros, at least `size` bytes, which the system backs as they are first written.

    Args:
        size: Bytes.
        large_pages: Ask for pages of 2 MB where there are any. For memory that is written again and again: fresh ones
            have to be found and cleared, which for memory that is filled once takes longer than it saves (docs/log.md).
    """
    # Private: what a forked process writes is its own.
    memory = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if large_pages and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a system without
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
