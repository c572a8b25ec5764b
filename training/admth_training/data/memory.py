"""How much memory this process may still take, containers included."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

__all__ = ["available_memory_bytes"]


def available_memory_bytes() -> int:
    """Return the bytes of memory that are free for use: the least of what the machine and its cgroup leave.

    Page cache that the kernel would give back counts as free. Where the system does not say what is free, half of
    the physical memory is returned.
    """
    limits = [_machine_available()]
    for files in (_CGROUP_V2, _CGROUP_V1):
        with suppress(OSError, ValueError):
            limits.append(_cgroup_available(*files))
    return max(0, min(limits))


_CGROUP_V2 = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat")
_CGROUP_V1 = (
    "/sys/fs/cgroup/memory/memory.limit_in_bytes",
    "/sys/fs/cgroup/memory/memory.usage_in_bytes",
    "/sys/fs/cgroup/memory/memory.stat",
)


def _machine_available() -> int:
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    with suppress(OSError, ValueError, AttributeError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return 2 << 30


def _cgroup_available(limit_file: str, usage_file: str, stat_file: str) -> int:
    """Return what a cgroup leaves; "max" raises ValueError, which means that it sets no limit."""
    limit = int(Path(limit_file).read_text(encoding="ascii"))
    usage = int(Path(usage_file).read_text(encoding="ascii"))
    statistics = dict(line.split(" ", 1) for line in Path(stat_file).read_text(encoding="ascii").splitlines())
    inactive = statistics.get("total_inactive_file", statistics.get("inactive_file", "0"))
    return limit - usage + int(inactive)
