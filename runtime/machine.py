"""What a machine has."""

import os
from pathlib import Path

_MEMORY_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def memory() -> int:
    """Bytes that the processes of this machine may use, or of its container where that has a limit."""
    limits = [path.read_text(encoding="utf-8").strip() for path in _MEMORY_LIMITS if path.is_file()]
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([whole, *(int(limit) for limit in limits if limit.isdigit())])  # "max": none
