"""Compiled loops over the index: hash tables, entries of users, which pages to read, which entries to merge."""

import numpy as np
from numba import njit


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
def find_entry(keys, table, key, entry_start, first_page, end_page, number):
    """The number of entries of a key, and the first one: part number, first page, one past the last page."""
    position = find_one(keys, table, key, 0)
    if position < 0:
        return 0, 0, 0, 0
    entry = entry_start[position]
    return entry_start[position + 1] - entry, number[entry], first_page[entry], end_page[entry]


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
def late_runs(low, high, last_sequence, as_of, late):
    """Which runs of pages hold an event that was written too late to be seen."""
    for run in range(len(low)):
        for page in range(low[run], high[run]):
            if last_sequence[page] >= as_of[run]:
                late[run] = True


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
