"""Interleaved timing: every contender in turn, several rounds, medians. Noise of a shared machine hits all alike."""

import os
import sys
import time
from collections.abc import Callable

import numpy as np


def use_huge_pages(module: str) -> None:
    """Starts the benchmark anew with huge pages for large allocations, unless the environment already says how.

    Otherwise every contender pays tens of milliseconds a call for first touches of fresh memory, and the ratio is that
    of the kernel's page faults. glibc reads the setting only when a process starts.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]])


def interleave(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each contender; each must block until its result is there. One warm-up round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: float(np.median(values)) for name, values in seconds.items()}
