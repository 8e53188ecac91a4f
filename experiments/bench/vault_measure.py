"""How lookups are timed: interleaved blocks, medians of rounds; and what the kernel can say of files and reads."""

import dataclasses
import gc
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from experiments.bench.vault_build import tell


@dataclasses.dataclass
class Timing:
    """Of one store, a value a round.

    Attributes:
      p50, p99: microseconds of a lookup.
      cpu: milliseconds of all threads for 1000 lookups.
      disk_kb: read from the disk a lookup, what the kernel reads ahead included; NaN if it does not say.
    """

    p50: list[float] = dataclasses.field(default_factory=list)
    p99: list[float] = dataclasses.field(default_factory=list)
    cpu: list[float] = dataclasses.field(default_factory=list)
    disk_kb: list[float] = dataclasses.field(default_factory=list)

    def add(self, nanoseconds: np.ndarray, cpu_seconds: float, disk_bytes: float) -> None:
        """One round."""
        p50, p99 = np.percentile(nanoseconds, [50, 99]) / 1e3
        self.p50.append(p50)
        self.p99.append(p99)
        self.cpu.append(1e6 * cpu_seconds / len(nanoseconds))
        self.disk_kb.append(disk_bytes / len(nanoseconds) / 1e3)

    def median(self, what: str) -> float:
        """Median of rounds."""
        return float(np.median(getattr(self, what)))


def time_lookups(
    gets: dict[str, Callable[[int], Any]],
    rounds: list[list[int]],
    block: int = 500,
    before_block: Callable[[str], None] | None = None,
    quiet: bool = False,
) -> dict[str, Timing]:
    """Every store looks up the same users, in turn, some at a time.

    Args:
      gets: name -> lookup of a user.
      rounds: users of each round.
      block: lookups until the next store has its turn.
      before_block: is called with the name of a store before each of its turns, not timed.
      quiet: no line of progress for each round.
    """
    found = {name: Timing() for name in gets}
    names = list(gets)
    gc.collect()
    gc.freeze()  # what lives already is not looked at again by collections that JSON's many objects set off
    for number, users in enumerate(rounds):
        taken = {name: np.zeros(len(users), np.int64) for name in gets}
        cpu, disk = dict.fromkeys(gets, 0.0), dict.fromkeys(gets, 0.0)
        for begin in range(0, len(users), block):
            part = users[begin : begin + block]
            for name in names:
                if before_block:
                    before_block(name)
                disk[name] -= _io_counters()[2]
                start = time.process_time()
                taken[name][begin : begin + block] = _time_each(gets[name], part)
                cpu[name] += time.process_time() - start
                disk[name] += _io_counters()[2]
            names.append(names.pop(0))
        for name in gets:
            found[name].add(taken[name], cpu[name], disk[name])
        if not quiet:
            tell(
                f"round {number + 1} of {len(rounds)}: {', '.join(f'{n} {t.p50[-1]:.0f} us' for n, t in found.items())}"
            )
    gc.unfreeze()
    return found


def _time_each(get: Callable[[int], Any], users: list[int]) -> list[int]:
    clock = time.perf_counter_ns
    taken = []
    for user in users:
        start = clock()
        get(user)
        taken.append(clock() - start)
    return taken


def count_reads(get: Callable[[int], Any], users: list[int]) -> tuple[float, float]:
    """Read calls of the whole process a lookup and bytes that they brought, by the kernel's count; NaN without one.

    It sees what RocksDB reads, and not what a memory map touches.
    """
    idle = np.subtract(*(_io_counters() for _ in range(2)))
    before = _io_counters()
    for user in users:
        get(user)
    calls, size, _ = (np.array(_io_counters()) - before + idle) / len(users)
    return float(calls), float(size)


def _io_counters() -> tuple[float, float, float]:
    """Of this process: read calls, bytes that they brought, bytes read from the disk."""
    try:
        with open("/proc/self/io", encoding="ascii") as file:
            values = dict(line.split(": ") for line in file)
    except OSError:
        return float("nan"), float("nan"), float("nan")
    return int(values["syscr"]), int(values["rchar"]), int(values["read_bytes"])


def files_of(path: str) -> Iterator[str]:
    """All files below a directory."""
    for folder, _, names in os.walk(path):
        for name in names:
            yield os.path.join(folder, name)


def disk_bytes(path: str) -> int:
    """Sizes of all files, without logs written for people."""
    return sum(os.path.getsize(name) for name in files_of(path) if not os.path.basename(name).startswith("LOG"))


def pre_read(path: str) -> None:
    """Brings all files into the page cache."""
    for name in files_of(path):
        with open(name, "rb") as file:
            while file.read(1 << 22):
                pass


def evict(store: Any) -> None:
    """Drops a store's files from the page cache."""
    store.unmap()
    for name in files_of(store.path):
        descriptor = os.open(name, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
