"""Compiled loops over pages and the in-memory tail. No thread holds Python's lock inside them."""

import numpy as np
from numba import njit

from laser_jax.vault.format import PAGE

#: Kinds of a column in an unpacking plan.
TIME, SEQUENCE, BITS, FILL = 0, 1, 2, 3
#: Columns of a plan, see unpack_runs.
KIND, WORD, SHIFT, STORED, SIGNED, SIZE, VALUE = range(7)
PLAN_WIDTH = 7


@njit(nogil=True, cache=True)
def _running_sum(page, word, wide, out):
    """Sums of a delta column over a whole page, uint32 [words, PAGE]."""
    total = np.int64(0)
    if wide:
        for slot in range(PAGE):
            total += np.int64(page[word, slot]) | np.int64(page[word + 1, slot]) << 32
            out[slot] = total
    else:
        for slot in range(PAGE):
            total += np.int64(page[word, slot])
            out[slot] = total


@njit(nogil=True, cache=True)
def run_bounds(pages, wide, run_page, run_pages, run_count, run_first, last_time, before, start, stop):
    """Where the valid slots of each run of pages lie, and whether its times are those of the directory.

    Args:
      pages: uint32 [P, words, PAGE].
      wide: whether times have two words.
      run_page, run_pages: int64 [R], first page and number of pages of each run.
      run_count: int64 [R], events in the run's first page.
      run_first: int64 [R], time of the first event of the run by the directory.
      last_time: int64 [P], time of the last event of each page by the directory.
      before: int64 [R], strict bound on time.
      start, stop: int64 [R], filled: valid slots when the run's pages are laid end to end.

    Returns:
      The first page whose times are not those of the directory, or -1.
    """
    times = np.empty(PAGE, np.int64)
    for run in range(len(run_page)):
        first, count = run_page[run], run_pages[run]
        start[run] = PAGE - run_count[run]
        stop[run] = count * PAGE
        for number in range(count):
            page = first + number
            _running_sum(pages[page], 0, wide, times)
            if times[PAGE - 1] != last_time[page]:
                return page
            if number == 0 and times[PAGE - run_count[run]] != run_first[run]:
                return page
            if number == count - 1 and times[PAGE - 1] >= before[run]:
                # Unused slots lead the first page and hold time 0: all slots together are in order.
                stop[run] = number * PAGE + np.searchsorted(times, before[run])
        if stop[run] < start[run]:
            stop[run] = start[run]
    return -1


@njit(nogil=True, cache=True)
def _unpack_bits(page, word, shift, stored, signed, size, begin, end, target):
    """Slots begin..end-1 of one field of one page into `target`, uint8 [(end - begin) * size]."""
    rows = end - begin
    low = page[word, begin:end]
    if stored == size:
        if size == 8:
            high = page[word + 1, begin:end]
            wide = target.view(np.uint64)
            for row in range(rows):
                wide[row] = np.uint64(low[row]) | np.uint64(high[row]) << np.uint64(32)
        elif size == 4:
            target.view(np.uint32)[:] = low
        elif size == 2:
            half = target.view(np.uint16)
            for row in range(rows):
                half[row] = np.uint16(low[row] >> np.uint32(8 * shift))
        else:
            for row in range(rows):
                target[row] = np.uint8(low[row] >> np.uint32(8 * shift))
        return
    # An integer that was stored narrower than it is now.
    for row in range(rows):
        value = np.uint64(low[row] >> np.uint32(8 * shift))
        if stored < 4:
            value &= (np.uint64(1) << np.uint64(8 * stored)) - np.uint64(1)
        if signed and value >> np.uint64(8 * stored - 1):
            value |= ~((np.uint64(1) << np.uint64(8 * stored)) - np.uint64(1))
        for byte in range(size):
            target[row * size + byte] = np.uint8(value >> np.uint64(8 * byte))


@njit(nogil=True, cache=True)
def unpack_runs(pages, wide, run_page, start, stop, run_row, plan, out, base):
    """Columns of runs of pages into one buffer.

    Args:
      pages: uint32 [P, words, PAGE].
      wide: whether times have two words.
      run_page: int64 [R], first page of each run.
      start, stop: int64 [R], slots of the run to take.
      run_row: int64 [R], where the run's rows go in every column.
      plan: int64 [F, PLAN_WIDTH], for each column: kind, word, shift in bytes, stored bytes, whether signed, bytes of
        the result, and for FILL the value's bits.
      out: uint8, all columns.
      base: int64 [F], where each column begins in `out`, aligned to its size.
    """
    sums = np.empty(PAGE, np.int64)
    for run in range(len(run_page)):
        slot = start[run]
        row = run_row[run]
        while slot < stop[run]:
            number = slot // PAGE
            page = pages[run_page[run] + number]
            begin = slot - number * PAGE
            end = min(PAGE, stop[run] - number * PAGE)
            rows = end - begin
            for column in range(len(plan)):
                size = plan[column, SIZE]
                at = base[column] + row * size
                target = out[at : at + rows * size]
                kind = plan[column, KIND]
                if kind == TIME or kind == SEQUENCE:
                    _running_sum(page, plan[column, WORD], wide or kind == SEQUENCE, sums)
                    target.view(np.int64)[:] = sums[begin:end]
                elif kind == BITS:
                    _unpack_bits(
                        page,
                        plan[column, WORD],
                        plan[column, SHIFT],
                        plan[column, STORED],
                        plan[column, SIGNED],
                        size,
                        begin,
                        end,
                        target,
                    )
                else:
                    value = np.uint64(plan[column, VALUE])
                    for position in range(rows * size):
                        target[position] = np.uint8(value >> np.uint64(8 * (position % size)))
            slot += rows
            row += rows


@njit(nogil=True, cache=True)
def unpack_run(pages, wide, count, first_time, last_time, before, n, plan, out, prefix):
    """run_bounds and unpack_runs for one run, whose newest n events before a bound go into `out`.

    Args:
      pages, wide, plan, out: as for unpack_runs; `out` has room for n events.
      count, first_time, last_time: of the run's pages by the directory.
      before, n: as said.
      prefix: int64 [F], bytes of an event in the columns before each column.

    Returns:
      The first page whose times are not those of the directory, or -1; the first slot taken; the number of events.
    """
    run_page = np.zeros(1, np.int64)
    start, stop = np.empty(1, np.int64), np.empty(1, np.int64)
    bad = run_bounds(
        pages,
        wide,
        run_page,
        np.full(1, len(pages)),
        np.full(1, np.int64(count[0])),
        np.full(1, first_time[0]),
        last_time,
        np.full(1, before),
        start,
        stop,
    )
    if bad >= 0:
        return bad, 0, 0
    start[0] = max(start[0], stop[0] - n)
    unpack_runs(pages, wide, run_page, start, stop, run_page, plan, out, prefix * n)
    return -1, start[0], stop[0] - start[0]


@njit(nogil=True, cache=True)
def chain_rows(slots, first_row, time, previous, newest, count, ordered):
    """Links the rows of a batch, first_row onwards, to the rows of the same users before them."""
    for position in range(len(slots)):
        slot = slots[position]
        row = first_row + position
        before = newest[slot]
        previous[row] = before
        if before >= 0 and time[row] < time[before]:
            ordered[slot] = False
        newest[slot] = row
        count[slot] += 1


@njit(nogil=True, cache=True)
def walk_rows(newest, ordered, count, previous, time, before, end_row, n):
    """Rows of one user in the tail with time < before and row < end_row, the newest n in order of (time, row)."""
    found = np.empty(count, np.int64)
    size = 0
    row = newest
    while row >= 0:
        if row < end_row and time[row] < before:
            found[size] = row
            size += 1
            if ordered and size >= n:
                break
        row = previous[row]
    rows = found[:size][::-1].copy()
    if not ordered:
        rows = rows[np.argsort(time[rows], kind="mergesort")]
    return rows[max(0, len(rows) - n) :]
