"""Which batches of which clients were written: what makes it harmless to send one again.

A client numbers its batches, and may send them in any order. The log keeps (client, number) with the events; what has
left the log is kept in the manifest: client -> [last number, sequence number], and where others than all numbers up to
the last one were written, also the runs of those that were (the first number, then by turns how far it is to the run's
last one and to the next run's first), and the number from which on this is known.
"""

import bisect
import dataclasses
import itertools
import re
from collections.abc import Iterable, Mapping
from typing import Any

from laser_jax.vault.errors import SchemaError

#: Clients that are remembered: those who wrote last.
MOST = 4096
#: Runs of numbers that are remembered of a client in any case: the highest ones.
MOST_RUNS = 64
#: Numbers up to a client's highest of which it is known in any case whether they were written: a partition of a vault
#: gets every P-th one, so that there are as many gaps as numbers.
WINDOW = 1024
_CLIENT = re.compile(r"[\x21-\x7e]{1,100}")


@dataclasses.dataclass(frozen=True)
class Written:
    """What is known of one client's batches.

    Attributes:
      runs: (first, last) of numbers that were written, ascending, with gaps between them.
      sequence: the sequence number behind the events of the one written last.
      known_from: of lower numbers it was forgotten which were written.
    """

    runs: tuple[tuple[int, int], ...] = ()
    sequence: int = 0
    known_from: int = 0

    def has(self, number: int) -> bool:
        """Whether it is known that a batch was written."""
        place = bisect.bisect_right(self.runs, (number, 2**63)) - 1
        return place >= 0 and number <= self.runs[place][1]

    def check(self, number: int) -> None:
        """Raises SchemaError if it was forgotten whether a batch was written."""
        if number < self.known_from and not self.has(number):
            raise SchemaError(
                f"origin: number {number} is far below the client's last one, {self.runs[-1][1]}, and it was forgotten "
                "which of those were written: number batches as they are sent, or give each stream a client of its own"
            )

    def adding(self, runs: Iterable[tuple[int, int]], sequence: int, known_from: int = 0) -> "Written":
        """With more runs, and what is known of them."""
        runs = tuple(runs)
        if len(runs) == 1 and self.runs and runs[0][0] > self.runs[-1][1] + 1:  # as most often, where there are gaps
            return Written(self.runs + runs, max(self.sequence, sequence), max(self.known_from, known_from))
        joined: list[tuple[int, int]] = []
        for first, last in sorted([*self.runs, *runs]):
            if joined and first <= joined[-1][1] + 1:
                joined[-1] = joined[-1][0], max(joined[-1][1], last)
            else:
                joined.append((first, last))
        return Written(tuple(joined), max(self.sequence, sequence), max(self.known_from, known_from))

    def trimmed(self) -> "Written":
        """Without the runs that lie below WINDOW, but for the highest MOST_RUNS."""
        if len(self.runs) <= MOST_RUNS:
            return self
        below = bisect.bisect_left(self.runs, self.runs[-1][1] - WINDOW, key=lambda run: run[1])
        first = min(below, len(self.runs) - MOST_RUNS)
        if not first:
            return self
        return Written(self.runs[first:], self.sequence, max(self.known_from, self.runs[first - 1][1] + 1))


def checked_origin(origin: Any) -> tuple[str, int] | None:
    """(client, number) as given to `append`.

    Raises:
      SchemaError: it is not a pair of a name (1 to 100 printable ASCII characters without blanks) and an integer >= 0.
    """
    if origin is None:
        return None
    if isinstance(origin, (tuple, list)) and len(origin) == 2:
        client, number = origin
        known = isinstance(client, str) and _CLIENT.fullmatch(client)
        if known and isinstance(number, int) and not isinstance(number, bool) and 0 <= number < 2**63:
            return client, number
    raise SchemaError(
        f"origin={origin!r}: need (client, number), a name of 1 to 100 printable ASCII characters without blanks and "
        "an integer >= 0, another one for every batch of that client"
    )


def joined(first: Mapping[str, Written], second: Mapping[str, Written]) -> dict[str, Written]:
    """What two know together."""
    found = dict(first)
    for client, written in second.items():
        before = found.get(client, Written())
        found[client] = before.adding(written.runs, written.sequence, written.known_from).trimmed()
    return found


def newest(origins: dict[str, Written]) -> dict[str, Written]:
    """Those of the clients who wrote last, at most MOST."""
    if len(origins) <= MOST:
        return origins
    return dict(sorted(origins.items(), key=lambda entry: entry[1].sequence)[-MOST:])


def origins_of(manifest: dict[str, Any]) -> dict[str, Written]:
    """Those that a manifest keeps: of events in parts."""
    return {client: _written(*entry) for client, entry in manifest.get("origins", {}).items()}


def to_manifest(origins: dict[str, Written]) -> dict[str, list[Any]]:
    """As a manifest keeps them."""
    return {
        client: [written.runs[-1][1], written.sequence]
        + ([] if written.runs[0][0] == 0 and len(written.runs) == 1 else [_steps(written.runs), written.known_from])
        for client, written in origins.items()
    }


def _steps(runs: tuple[tuple[int, int], ...]) -> list[int]:
    ends = [end for run in runs for end in run]
    return ends[:1] + [after - before for before, after in itertools.pairwise(ends)]


def _written(last: int, sequence: int, runs: Any = None, known_from: int = 0) -> Written:
    if runs is None:
        return Written(((0, last),), sequence, known_from)
    if isinstance(runs[0], list):  # as they were written once
        return Written(tuple((a, b) for a, b in runs), sequence, known_from)
    ends = list(itertools.accumulate(runs))
    return Written(tuple(zip(ends[::2], ends[1::2], strict=True)), sequence, known_from)
