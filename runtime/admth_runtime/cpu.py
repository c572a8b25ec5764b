"""How many cores this process may use, and what the processor can do."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterator
from pathlib import Path

__all__ = ["cpu_flags", "cpu_name", "usable_cores"]

_FLAGS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "amx_int8", "asimd", "asimddp", "i8mm")
"""Vector instructions that decide how fast FP32 and INT8 run, by Linux's names for x86-64 and ARM."""


def usable_cores(root: Path = Path("/")) -> int:
    """Return the number of physical cores that this process may keep busy, at least 1.

    It is the smallest of: cores in the scheduling affinity, with hyper-threads of one core counted once; and the
    processor quota of the process's control group, rounded up, which is what a container's ``--cpus`` sets.

    Args:
        root: where ``/sys`` and ``/proc`` are found.
    """
    allowed = _affinity()
    cores = {_siblings(root, cpu) for cpu in allowed}
    quotas = [math.ceil(quota) for quota in _quotas(root)]
    return max(1, min([len(cores), *quotas]))


def cpu_name() -> str:
    """Return the processor's name, such as ``"AMD EPYC 9654"``; the architecture where the system does not say."""
    names = [value for key, value in _cpuinfo() if key in ("model name", "Model", "Hardware")]
    return names[0] if names else platform.processor() or platform.machine()


def cpu_flags() -> tuple[str, ...]:
    """Return the vector instruction sets that matter for inference; empty where the system does not say."""
    present = {flag for key, value in _cpuinfo() if key in ("flags", "Features") for flag in value.split()}
    return tuple(flag for flag in _FLAGS if flag in present)


def _affinity() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _siblings(root: Path, cpu: int) -> str:
    """Name the physical core of a logical one by the list of its hyper-threads."""
    return _read(root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") or f"cpu {cpu}"


def _quotas(root: Path) -> Iterator[float]:
    """Yield the processor quotas, in cores, of the process's control group and of all above it."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, group = [*line.split(":", 2), "", ""][:3]
        version1 = "cpu" in controllers.split(",")
        if controllers and not version1:
            continue
        base = root / ("sys/fs/cgroup/cpu" if version1 else "sys/fs/cgroup")
        # In a container the path is the host's and its own group is the mount's root, so look at every level.
        for folder in [base, *(base / part for part in _prefixes(group))]:
            if version1:
                quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
            else:
                quota, period = [*_read(folder / "cpu.max").split(), "", ""][:2]
            if quota.isdigit() and period.isdigit() and int(quota) > 0 and int(period) > 0:
                yield int(quota) / int(period)


def _prefixes(group: str) -> Iterator[str]:
    parts = [part for part in group.split("/") if part not in ("", "..")]
    for count in range(1, len(parts) + 1):
        yield "/".join(parts[:count])


def _cpuinfo() -> Iterator[tuple[str, str]]:
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        key, separator, value = line.partition(":")
        if separator:
            yield key.strip(), value.strip()


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""
