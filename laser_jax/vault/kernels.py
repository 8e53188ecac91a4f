"""Compiled loops over pages, hash tables and the in-memory tail. No thread holds Python's lock inside them."""

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
def newest_pages(first, end, first_time, last_time, last_sequence, count, before, as_of, horizon, n):
    """The pages of one user in one part that surely hold the newest n events before a bound.

    Args:
      first, end: pages of the user in the part.
      first_time, last_time, last_sequence, count: of every page of the vault's page table.
      before: strict bound on time. as_of: strict bound on the sequence number.
      horizon: events before that time are not wanted.
      n: events wanted.

    Returns:
      First page and one past the last page.
    """
    while end > first and first_time[end - 1] >= before:
        end -= 1
    begin = end
    sure = 0
    while begin > first and sure < n and last_time[begin - 1] >= horizon:
        begin -= 1
        if last_sequence[begin] < as_of:
            # Of a page that the bound cuts only its first event is sure to lie before it.
            sure += np.int64(count[begin]) if last_time[begin] < before else 1
    return begin, end


@njit(nogil=True, cache=True)
def _mix(key):
    z = np.uint64(key) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@njit(nogil=True, cache=True)
def build_table(keys, table):
    """Fills an open-addressing table, int32 [2^k] of -1, with the positions of `keys`, int64 [U], repeats included."""
    mask = np.uint64(len(table) - 1)
    for position in range(len(keys)):
        at = _mix(keys[position]) & mask
        while table[at] >= 0:
            at = (at + np.uint64(1)) & mask
        table[at] = position


@njit(nogil=True, cache=True)
def find_one(keys, table, key, skip):
    """Position of a key, or -1; `skip` matches are passed over."""
    mask = np.uint64(len(table) - 1)
    at = _mix(key) & mask
    while table[at] >= 0:
        position = table[at]
        if keys[position] == key:
            if skip == 0:
                return position
            skip -= 1
        at = (at + np.uint64(1)) & mask
    return -1


@njit(nogil=True, cache=True)
def find_many(keys, table, wanted, found):
    """Positions of many keys, -1 where there is none, into `found` int64 [B]."""
    mask = np.uint64(len(table) - 1)
    for row in range(len(wanted)):
        key = wanted[row]
        at = _mix(key) & mask
        found[row] = -1
        while table[at] >= 0:
            if keys[table[at]] == key:
                found[row] = table[at]
                break
            at = (at + np.uint64(1)) & mask


@njit(nogil=True, cache=True)
def group_keys(keys, table, group):
    """Gives equal keys one number, in order of first appearance: `group` int64 [N]; returns how many there are.

    `table` is int32 [2^k] of -1 with room for all keys; it ends holding the first position of every key.
    """
    mask = np.uint64(len(table) - 1)
    groups = 0
    for position in range(len(keys)):
        at = _mix(keys[position]) & mask
        while table[at] >= 0 and keys[table[at]] != keys[position]:
            at = (at + np.uint64(1)) & mask
        if table[at] < 0:
            table[at] = position
            group[position] = groups
            groups += 1
        else:
            group[position] = group[table[at]]
    return groups


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


@njit(nogil=True, cache=True)
def alive_entries(request, number, covers, alive):
    """Which entries still count, where newer parts stand for older ones; sorted by request, then part number."""
    reach = np.int64(0)
    for entry in range(len(request) - 1, -1, -1):
        if entry == len(request) - 1 or request[entry] != request[entry + 1]:
            reach = np.iinfo(np.int64).max
        alive[entry] = number[entry] < reach
        if alive[entry]:
            reach = min(reach, covers[entry])


@njit(nogil=True, cache=True)
def select_runs(request, first, end, first_time, last_time, last_sequence, count, before, as_of, n, low, high):
    """For each entry the pages that may hold some of its request's newest n events: pages low to high - 1.

    Entries are sorted by request, then part number; see newest_pages for the rest.
    """
    sure = 0
    horizon = np.iinfo(np.int64).min
    oldest = np.iinfo(np.int64).max
    for entry in range(len(request) - 1, -1, -1):
        owner = request[entry]
        if entry == len(request) - 1 or owner != request[entry + 1]:
            sure, horizon, oldest = 0, np.iinfo(np.int64).min, np.iinfo(np.int64).max
        bound, hidden = before[owner], as_of[owner]
        begin, stop = newest_pages(
            first[entry], end[entry], first_time, last_time, last_sequence, count, bound, hidden, horizon, n
        )
        low[entry], high[entry] = begin, stop
        for page in range(stop - 1, begin - 1, -1):
            if last_sequence[page] < as_of[owner]:
                sure += np.int64(count[page]) if last_time[page] < before[owner] else 1
                oldest = min(oldest, first_time[page])
            if sure >= n:
                # n events are not older than that: what is older is not wanted.
                horizon = max(horizon, oldest)
                break


@njit(nogil=True, cache=True)
def late_runs(low, high, last_sequence, as_of, late):
    """Which runs of pages hold an event that was written too late to be seen."""
    for run in range(len(low)):
        for page in range(low[run], high[run]):
            if last_sequence[page] >= as_of[run]:
                late[run] = True


@njit(nogil=True, cache=True)
def split_equal_hashes(group, first, data, start, end):
    """Entries whose key differs from that of the first of their group, though the hashes are equal: bool [E]."""
    other = np.zeros(len(group), np.bool_)
    for entry in range(len(group)):
        leader = first[group[entry]]
        size = end[entry] - start[entry]
        if size != end[leader] - start[leader]:
            other[entry] = True
            continue
        for byte in range(size):
            if data[start[entry] + byte] != data[start[leader] + byte]:
                other[entry] = True
                break
    return other


@njit(nogil=True, cache=True)
def plan_merges(request, size, most_parts, page, forced, take):
    """Which entries of each user are merged: the newest ones, back to where an older one is more than twice as large.

    A user is merged who lives in more than `most_parts` parts, or whose newer parts hold a page's worth of events.

    Args:
      request: int64 [E], whose entry it is; the entries of a user are adjacent, older before newer.
      size: int64 [E], events of each entry.
      most_parts: parts that a user may live in.
      page: events of a page.
      forced: bool [E], entries that must be merged, with all newer ones of the user.
      take: bool [E], filled.
    """
    begin = 0
    while begin < len(request):
        end = begin
        newer = np.int64(0)
        force = np.int64(-1)
        while end < len(request) and request[end] == request[begin]:
            if end > begin:
                newer += size[end]
            if forced[end] and force < 0:
                force = end
            end += 1
        count = end - begin
        start = end
        if count > most_parts or newer >= page:
            start = end - 1
            total = size[start]
            while start > begin and (size[start - 1] <= 2 * total or count - (end - start) + 1 > most_parts):
                start -= 1
                total += size[start]
            if end - start < 2:
                start = end
        if force >= 0:
            start = min(start, force)
        for entry in range(begin, end):
            take[entry] = entry >= start
        begin = end
