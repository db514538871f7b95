"""How many cores this process may use: the affinity mask and the control group's quota, not the machine's size."""

from __future__ import annotations

import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def available_cores(cgroup: Path = CGROUP) -> int:
    """Cores that this process may keep busy, at least 1.

    A container that is granted 2 of 64 cores by quota sees 64 in `os.cpu_count()`; started with 64 workers it is
    throttled. Version 2 of control groups has the quota in `cpu.max`, version 1 in two files
    (Documentation/admin-guide/cgroup-v2.rst of the Linux kernel, section CPU).
    """
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        cores = os.cpu_count() or 1
    quota = _quota(cgroup)
    return max(1, min(cores, round(quota) if quota and quota >= 1 else cores if quota is None else 1))


def _quota(cgroup: Path) -> float | None:
    """The quota in cores, None where there is none."""
    for quota_file, period_file in (("cpu.max", None), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            words = (cgroup / quota_file).read_text().split()
            if period_file is not None:
                words += (cgroup / period_file).read_text().split()
            quota, period = float(words[0]), float(words[1])
        except (OSError, ValueError, IndexError):  # no such file, or `max`: no quota
            continue
        if quota > 0 and period > 0:
            return quota / period
    return None
