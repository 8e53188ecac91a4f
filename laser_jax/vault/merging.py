"""Rows of one user from several places -> one history, in order of (time, sequence number)."""

from typing import Any

import numpy as np

from laser_jax.schema import Field
from laser_jax.vault import index_kernels
from laser_jax.vault.format import PAGE, PageLayout
from laser_jax.vault.lookup import damage
from laser_jax.vault.part import Part
from laser_jax.vault.state import State
from laser_jax.vault.unpacking import SEQUENCE, Asked, Unpacking

#: No bound on time or sequence numbers.
NO_BOUND = np.iinfo(np.int64).max
_ANY_TIME = np.iinfo(np.int64).min


class RowReader:
    """Reads the newest rows of a user from the pages of a state."""

    def __init__(self, pages: Any, fills: dict[str, int]):
        """`pages` is a LocalPages or RemotePages; `fills` the values that events lack from before a field was added."""
        self.pages = pages
        self._fills = fills

    def unpacking(self, part: Part, asked: Asked, sequence: bool) -> Unpacking:
        """The plan for the scalar fields of the pages of a part; made once."""
        key = (part.entry["schema"], part.layout.sequence_word, sequence)
        found = asked.plans.get(key)
        if found is None:
            scalars = [field for field in asked.fields if field.size is None]
            found = asked.plans[key] = Unpacking(part.layout, scalars, sequence, self._fills)
        return found

    def result_unpacking(self, state: State, asked: Asked) -> Unpacking:
        """The plan for the scalar fields of a page as today's schema would write it."""
        found = asked.plans.get(None)
        if found is None:
            scalars = [field for field in asked.fields if field.size is None]
            found = asked.plans[None] = Unpacking(PageLayout(state.schema), scalars, False, self._fills)
        return found

    def newest(
        self,
        state: State,
        user: Any,
        asked: Asked,
        before: int,
        as_of: int,
        n: int,
        sequence: bool = False,
        entries: list[tuple[int, int, int]] | None = None,
        known: dict[str, np.ndarray] | None = None,
    ) -> dict[str, np.ndarray] | None:
        """The newest n events of a user with time < before and sequence number < as_of, oldest first.

        Args:
          state: to read from.
          user: the key.
          asked: fields, vectors included.
          before, as_of: bounds, NO_BOUND for none.
          n: events at most, >= 1.
          sequence: whether sequence numbers are wanted.
          entries: of the user in parts, newest part first, if they are known.
          known: what is to be taken for all that the parts hold: columns within the bounds, without sequence numbers;
            those of a tail are greater.

        Returns:
          Columns, with `sequence` also one of sequence numbers; None if there are no such events.
        """
        if known is not None:
            entries = []
        elif entries is None:
            entries = state.entries(user)
        in_parts = NO_BOUND if as_of >= state.parts_end else as_of  # often nothing in the parts is hidden
        names = asked.names
        if len(entries) == 1 and not sequence and known is None and not any([tail.size for tail in state.tails]):
            rows = self._run(state, entries[0], asked, before, in_parts, _ANY_TIME, n, False)
            return self._ordered(rows, asked)
        runs = [
            rows for tail in state.tails if tail.size and (rows := tail.read(user, names, before, as_of, n)) is not None
        ]
        if known is not None:
            runs.insert(0, dict(known) | {SEQUENCE: np.full(len(known["time"]), -1)})
        several = sequence or len(runs) + len(entries) > 1
        total = sum(len(rows["time"]) for rows in runs)
        for entry in entries:
            horizon = _ANY_TIME
            if total >= n:
                # The newest n are not older than that.
                times = np.concatenate([rows["time"] for rows in runs])
                horizon = int(np.partition(times, total - n)[total - n])
            rows = self._run(state, entry, asked, before, in_parts, horizon, n, several)
            if rows is not None:
                runs.append(rows)
                total += len(rows["time"])
        if not runs:
            return None
        rows = runs[0]
        if len(runs) > 1:
            rows = {name: np.concatenate([run[name] for run in runs]) for name in ("time", SEQUENCE, *names)}
            # Stable: events that are `known` are in order already.
            order = np.lexsort((rows[SEQUENCE], rows["time"]))[-n:]
            rows = {name: column[order] for name, column in rows.items()}
        return rows if sequence else self._ordered(rows, asked)

    def newest_of(
        self, state: State, entry: tuple[int, int, int], asked: Asked, n: int
    ) -> dict[str, np.ndarray] | None:
        """The newest n events that one part holds of a user; `asked` has no vectors."""
        return self._run(state, entry, asked, NO_BOUND, NO_BOUND, _ANY_TIME, n, False)

    def _ordered(self, rows: dict[str, np.ndarray] | None, asked: Asked) -> dict[str, np.ndarray] | None:
        """The asked columns in the order in which they were asked for."""
        if rows is not None and (asked.vectors or SEQUENCE in rows):
            return {name: rows[name] for name in ("time", *asked.names)}
        return rows

    def _run(
        self,
        state: State,
        entry: tuple[int, int, int],
        asked: Asked,
        before: int,
        as_of: int,
        horizon: int,
        n: int,
        sequence: bool,
    ) -> dict[str, np.ndarray] | None:
        """The newest n events that one part holds of a user."""
        number, first, end = entry
        table = state.table
        if before == NO_BOUND and as_of == NO_BOUND and horizon == _ANY_TIME:
            low, high = max(first, end - -(-n // PAGE)), end  # every page but the oldest is full
        else:
            low, high = index_kernels.newest_pages(
                first,
                end,
                table.first_time,
                table.last_time,
                table.last_sequence,
                table.count,
                before,
                as_of,
                horizon,
                n,
            )
        if low == high:
            return None
        part = state.by_number[number]
        # Some events of these pages may have been written too late to be seen.
        filtered = as_of != NO_BOUND and bool((table.last_sequence[low:high] >= as_of).any())
        sequence |= filtered
        unpacking = self.unpacking(part, asked, sequence)
        capacity = (high - low - 1) * PAGE + table.count.item(low)
        if not filtered:
            capacity = min(capacity, n)
        buffer = unpacking.allocate(capacity)
        bad, start, rows = self.pages.unpack(
            part, table, low, high, before, capacity, unpacking.plan, buffer, unpacking.prefix
        )
        if bad >= 0:
            raise wrong_times(part, low - table.base[part.name] + bad)
        columns = unpacking.columns(buffer, capacity, rows)
        if not (asked.vectors or sequence):
            return columns if rows else None
        base = table.base[part.name]
        for field in asked.vectors:
            columns[field.name] = self.vectors(part, field, low - base, high - base)[start : start + rows]
        if sequence and part.layout.sequence_word < 0:
            # The bulk writer's events are numbered as they lie.
            last = int(table.last_sequence[high - 1]) - ((high - low) * PAGE - 1)
            columns[SEQUENCE] = np.arange(last + start, last + start + rows)
        if filtered:
            seen = np.flatnonzero(columns[SEQUENCE] < as_of)[-n:]
            columns = {name: column[seen] for name, column in columns.items()}
        return columns if len(columns["time"]) else None

    def vectors(self, part: Any, field: Field, first: int, end: int) -> np.ndarray:
        """A vector field of pages of a part laid end to end, [slots, size], as today's schema has it."""
        if field.name not in part.schema.names:
            fill = 0 if field.default is None else field.default
            return np.full(((end - first) * PAGE, field.size), fill, field.dtype)
        stored = part.schema.field(field.name)
        return self.pages.vectors(part, stored, first, end).reshape(-1, field.size).astype(field.dtype, copy=False)


def wrong_times(part: Any, page: int) -> Exception:
    """The error for a page whose times are not those of the directory: zarr reads a lost shard as zeros."""
    return damage(part, "pages", page, "its times are not those of the directory; is a shard file missing?")
