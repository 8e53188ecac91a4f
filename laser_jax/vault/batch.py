"""Histories of many users in one read: pages are fetched and decoded by several threads, straight into the columns."""

import concurrent.futures
import os
from typing import Any

import numpy as np

from laser_jax.vault import index_kernels, kernels
from laser_jax.vault.format import PAGE
from laser_jax.vault.merging import RowReader, wrong_times
from laser_jax.vault.state import State
from laser_jax.vault.unpacking import Asked

#: Pages of a task; some milliseconds of work.
_TASK_PAGES = 256


class BatchReader:
    """The training path. Safe to share among threads."""

    def __init__(self, rows: RowReader, threads: int | None = None):
        self._rows = rows
        self._threads = threads or min(os.cpu_count() or 1, 16)
        self._pool: concurrent.futures.ThreadPoolExecutor | None = None

    def read(
        self, state: State, users: Any, before: np.ndarray, as_of: np.ndarray, n: int, asked: Asked
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """The newest n events of every user before a bound.

        Args:
          state: to read from.
          users: int64 [B], or B strings.
          before, as_of: int64 [B], bounds on time and sequence number.
          n: events of a user at most, >= 1.
          asked: fields.

        Returns:
          Columns of all users' events one after the other, and offsets int64 [B + 1].
        """
        size = len(before)
        plan = _Plan(state, self._rows, users, before, as_of, n, asked)
        tasks = [_Task(plan, runs) for runs in plan.tasks()]
        keys = users.tolist() if isinstance(users, np.ndarray) else users
        slow = np.flatnonzero(plan.slow).tolist()

        def one(request: int) -> dict[str, np.ndarray] | None:
            return self._rows.newest(state, keys[request], asked, int(before[request]), int(as_of[request]), n)

        self._run([task.decode for task in tasks])
        histories = dict(zip(slow, self._map(one, slow), strict=True))
        taken = plan.trim(n)
        lengths = np.bincount(plan.request, weights=taken, minlength=size).astype(np.int64)
        for request, found in histories.items():
            lengths[request] = 0 if found is None else len(found["time"])
        offsets = np.concatenate(([0], np.cumsum(lengths)))
        plan.place(taken, offsets)
        columns, buffer, begins = plan.allocate(int(offsets[-1]))
        for task in tasks:
            task.target(columns, buffer, begins)
        self._run([task.unpack for task in tasks])
        for request, found in histories.items():
            if found is not None:
                rows = slice(offsets[request], offsets[request + 1])
                for name, column in columns.items():
                    column[rows] = found[name]
        return {name: columns[name] for name in ("time", *asked.names)}, offsets

    def _run(self, jobs: list[Any]) -> None:
        self._map(lambda job: job(), jobs)

    def _map(self, function: Any, items: list[Any]) -> list[Any]:
        if len(items) < 2 or self._threads < 2:
            return [function(item) for item in items]
        if self._pool is None:
            self._pool = concurrent.futures.ThreadPoolExecutor(self._threads, "vault-gather")
        return list(self._pool.map(function, items))


class _Plan:
    """The runs of pages that a batch needs.

    Attributes:
      request, part, low, high: int64 [R], a run of adjacent pages of the page table and whose it is; by request, older
        before newer.
      start, stop: int64 [R], slots of the run to take; filled by the tasks.
      row: int64 [R], where the run's rows go.
      slow: bool [B], requests to be read one by one: they have events in a tail, in parts that overlap in time, or
        events that their as_of hides.
    """

    def __init__(self, state: State, rows: RowReader, users: Any, before: Any, as_of: Any, n: int, asked: Any):
        self.state, self.rows, self.before, self.asked = state, rows, before, asked
        table = state.table
        request, number, first, end = state.entries_of(users)
        low, high = np.empty(len(request), np.int64), np.empty(len(request), np.int64)
        index_kernels.select_runs(
            request,
            first,
            end,
            table.first_time,
            table.last_time,
            table.last_sequence,
            table.count,
            before,
            as_of,
            n,
            low,
            high,
        )
        kept = np.flatnonzero(high > low)
        request, number, low, high = request[kept], number[kept], low[kept], high[kept]
        self.slow = np.zeros(len(before), bool)
        tails = [tail for tail in state.tails if tail.size]
        if tails:
            keys = users.tolist() if isinstance(users, np.ndarray) else users
            self.slow[:] = [any(user in tail for tail in tails) for user in keys]
        late = np.zeros(len(request), bool)
        if (as_of < state.parts_end).any():
            index_kernels.late_runs(low, high, table.last_sequence, as_of[request], late)
        inexact = [
            number for number, part in state.by_number.items() if not rows.unpacking(part, asked, sequence=False).exact
        ]
        if inexact:
            late |= np.isin(number, inexact)
        self.slow[request[late]] = True
        begins = table.first_time[low]
        order = np.lexsort((begins, request))
        request, number, low, high, begins = (array[order] for array in (request, number, low, high, begins))
        # Parts that do not overlap in time follow one another; others have to be merged event by event.
        mixed = (request[1:] == request[:-1]) & (table.last_time[high[:-1] - 1] >= begins[1:])
        self.slow[request[1:][mixed]] = True
        fast = np.flatnonzero(~self.slow[request])
        self.request, self.number, self.low, self.high = (array[fast] for array in (request, number, low, high))
        self.start, self.stop = np.zeros(len(fast), np.int64), np.zeros(len(fast), np.int64)
        self.row = np.zeros(len(fast), np.int64)

    def tasks(self) -> list[np.ndarray]:
        """Runs of each task, int64 [.]: all of one layout."""
        layouts: dict[tuple[int, bool], list[int]] = {}
        for number, part in self.state.by_number.items():
            layouts.setdefault((part.entry["schema"], part.entry["sequence"]), []).append(number)
        found = []
        for numbers in layouts.values():
            runs = np.flatnonzero(np.isin(self.number, numbers)) if len(layouts) > 1 else np.arange(len(self.number))
            if not len(runs):
                continue
            pages = np.cumsum(self.high[runs] - self.low[runs])
            cuts = np.searchsorted(pages, np.arange(_TASK_PAGES, pages[-1] + _TASK_PAGES, _TASK_PAGES), side="left") + 1
            found.extend(piece for piece in np.split(runs, cuts[:-1]) if len(piece))
        return found

    def trim(self, n: int) -> np.ndarray:
        """How many of each run's events are among the newest n of their request, int64 [R]; moves `start`."""
        held = self.stop - self.start
        total = np.cumsum(held)
        last = np.ones(len(held), bool)
        last[:-1] = self.request[1:] != self.request[:-1]
        of_request = np.repeat(total[last], np.diff(np.flatnonzero(last), prepend=-1))
        taken = np.clip(n - (of_request - total), 0, held)
        self.start = self.stop - taken
        return taken

    def place(self, taken: np.ndarray, offsets: np.ndarray) -> None:
        """Fills `row`, given where each request's events begin."""
        before = np.cumsum(taken) - taken
        first = np.ones(len(taken), bool)
        first[1:] = self.request[1:] != self.request[:-1]
        within = before - np.repeat(before[first], np.diff(np.append(np.flatnonzero(first), len(taken))))
        self.row = offsets[self.request] + within

    def allocate(self, rows: int) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
        """Columns of the result, the buffer that the scalar ones lie in, and where they begin there."""
        unpacking = self.rows.result_unpacking(self.state, self.asked)
        buffer = unpacking.allocate(rows)
        columns = unpacking.columns(buffer, rows, rows)
        for field in self.asked.vectors:
            columns[field.name] = np.empty((rows, field.size), field.dtype)
        return columns, buffer, unpacking.prefix * rows


class _Task:
    """Some runs of one layout, decoded and then unpacked in one go."""

    def __init__(self, plan: _Plan, runs: np.ndarray):
        self._plan, self._runs = plan, runs

    def decode(self) -> None:
        """Fetches the pages, and finds which slots lie before the bound."""
        plan, runs = self._plan, self._runs
        state, table = plan.state, plan.state.table
        numbers = plan.number[runs].tolist()
        self._layout = state.by_number[numbers[0]].layout
        parts = [state.by_number[number] for number in numbers]
        bases = np.array([table.base[part.name] for part in parts])
        self._pages = plan.rows.pages.words(parts, plan.low[runs] - bases, plan.high[runs] - bases)
        low, high = plan.low[runs], plan.high[runs]
        pages = high - low
        self._first = np.cumsum(pages) - pages
        start, stop = np.empty(len(runs), np.int64), np.empty(len(runs), np.int64)
        page = np.repeat(low - self._first, pages) + np.arange(len(self._pages))
        bad = kernels.run_bounds(
            self._pages,
            self._layout.time_words == 2,
            self._first,
            pages,
            table.count[low].astype(np.int64),
            table.first_time[low],
            table.last_time[page],
            plan.before[plan.request[runs]],
            start,
            stop,
        )
        if bad >= 0:
            part = state.by_number[numbers[int(np.searchsorted(self._first, bad, side="right")) - 1]]
            raise wrong_times(part, int(page[bad]) - table.base[part.name])
        plan.start[runs], plan.stop[runs] = start, stop

    def target(self, columns: dict[str, np.ndarray], buffer: np.ndarray, begins: np.ndarray) -> None:
        """Where `unpack` puts the values."""
        self._columns, self._buffer, self._begins = columns, buffer, begins

    def unpack(self) -> None:
        """Takes the fields out of the pages."""
        plan, runs = self._plan, self._runs
        state, layout = plan.state, self._layout
        part = state.by_number[int(plan.number[runs[0]])]
        start, stop, row = plan.start[runs], plan.stop[runs], plan.row[runs]
        kernels.unpack_runs(
            self._pages,
            layout.time_words == 2,
            self._first,
            start,
            stop,
            row,
            plan.rows.unpacking(part, plan.asked, sequence=False).plan,
            self._buffer,
            self._begins,
        )
        vectors = plan.asked.vectors
        if not vectors:
            return
        for run, begin, end, target in zip(runs.tolist(), start.tolist(), stop.tolist(), row.tolist(), strict=True):
            if begin == end:
                continue
            part = state.by_number[int(plan.number[run])]
            base = state.table.base[part.name]
            first = int(plan.low[run]) - base + begin // PAGE
            last = int(plan.low[run]) - base + -(-end // PAGE)
            skipped = begin // PAGE * PAGE
            for field in vectors:
                values = plan.rows.vectors(part, field, first, last)
                self._columns[field.name][target : target + end - begin] = values[begin - skipped : end - skipped]
