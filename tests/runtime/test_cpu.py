from __future__ import annotations

import os

import pytest

from admth_runtime import cpu
from admth_runtime.cpu import cpu_flags, cpu_name, usable_cores


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with eight hyper-threads on four cores, written out as Linux shows it."""

    def write(name: str, text: str) -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")

    for thread in range(8):
        write(f"sys/devices/system/cpu/cpu{thread}/topology/thread_siblings_list", f"{thread % 4},{thread % 4 + 4}")
    monkeypatch.setattr(cpu, "_affinity", lambda: set(range(8)))
    return tmp_path, write


def test_hyper_threads_count_once(machine):
    assert usable_cores(machine[0]) == 4


@pytest.mark.parametrize(("allowed", "cores"), [({0}, 1), ({0, 4}, 1), ({0, 1, 4, 5}, 2), ({1, 2, 3}, 3)])
def test_affinity(machine, monkeypatch, allowed, cores):
    monkeypatch.setattr(cpu, "_affinity", lambda: allowed)
    assert usable_cores(machine[0]) == cores


@pytest.mark.parametrize(
    ("quota", "cores"), [("max 100000", 4), ("200000 100000", 2), ("150000 100000", 2), ("5000 100000", 1), ("", 4)]
)
def test_control_group_version_2(machine, quota, cores):
    root, write = machine
    write("proc/self/cgroup", "0::/user.slice/job")
    write("sys/fs/cgroup/user.slice/cpu.max", quota)
    assert usable_cores(root) == cores


def test_control_group_version_1_and_of_a_container(machine):
    root, write = machine
    write("proc/self/cgroup", "3:cpu,cpuacct:/docker/abc\n2:memory:/docker/abc")
    write("sys/fs/cgroup/cpu/cpu.cfs_quota_us", "300000")
    write("sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000")
    assert usable_cores(root) == 3
    write("sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1")
    assert usable_cores(root) == 4


def test_the_tightest_level_counts(machine):
    root, write = machine
    write("proc/self/cgroup", "0::/a/b")
    write("sys/fs/cgroup/a/cpu.max", "100000 100000")
    write("sys/fs/cgroup/a/b/cpu.max", "300000 100000")
    assert usable_cores(root) == 1


def test_a_system_that_says_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu, "_affinity", lambda: {0, 1, 2})
    assert usable_cores(tmp_path) == 3


def test_this_machine():
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)
    assert cpu_name()
    assert all(flag.islower() for flag in cpu_flags())
