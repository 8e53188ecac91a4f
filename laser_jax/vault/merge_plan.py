"""Which users are merged, and from which parts."""

import dataclasses
from typing import Any

import numpy as np

from laser_jax.vault import index_kernels
from laser_jax.vault.format import PAGE
from laser_jax.vault.part import Part
from laser_jax.vault.state import State

#: Events of a part that merging makes, about.
MERGE_EVENTS = 1 << 20
#: Parts with fewer live events than half of that are small; more than so many of them are merged into one.
_MOST_SMALL = 8
#: A part of which less than that share is alive is emptied.
_LEAST_ALIVE = 0.5


@dataclasses.dataclass(frozen=True)
class Piece:
    """Work for one MergeTask, see there; `parts` are the numbers of the parts."""

    parts: list[int]
    part: np.ndarray
    first: np.ndarray
    end: np.ndarray
    user: np.ndarray
    users: list[Any]
    covers: np.ndarray


@dataclasses.dataclass(frozen=True)
class MergePlan:
    """Pieces of work, and names of parts that hold nothing once they are done."""

    pieces: list[Piece]
    emptied: set[str]


@dataclasses.dataclass(frozen=True)
class Entries:
    """Entries of some users that count; those of a user are adjacent, older parts before newer.

    Attributes:
      request: int64 [E], whose entry it is. key: a function from that number to the user's key.
      number, first, end, covers, size: int64 [E], part, pages in the page table, see laser_jax.vault.format, events.
    """

    request: np.ndarray
    key: Any
    number: np.ndarray
    first: np.ndarray
    end: np.ndarray
    covers: np.ndarray
    size: np.ndarray
    live_pages: dict[Part, int]


def all_entries(state: State) -> Entries:
    """Entries of every user, and how many live pages each part has."""
    index = state.whole_index()
    owner = np.repeat(np.arange(len(index)), np.diff(index.entry_start))
    numbers = np.fromiter(state.by_number, np.int64, len(state.by_number))
    number, covers = index.number.astype(np.int64), index.covers.astype(np.int64)
    lost = ~np.isin(number, numbers)
    alive = np.empty(len(owner), bool)
    index_kernels.alive_entries(owner, number, np.where(lost, number, covers), alive)
    alive &= ~lost
    first, end = index.first_page[alive], index.end_page[alive]
    number = number[alive]
    live = np.bincount(number, weights=end - first, minlength=int(numbers.max(initial=0)) + 1)
    live_pages = {part: int(live[part.number]) for part in state.parts.values()}
    size = _sizes(state, first, end)
    return Entries(owner[alive], index.key, number, first, end, covers[alive], size, live_pages)


def plan_newest(state: State, new: list[str], most_parts: int) -> MergePlan | None:
    """What to merge after some parts were added; None if nothing needs it."""
    if len(state.parts) < 2:
        return None
    entries = all_entries(state)
    small, dead = [], []
    for part, pages in entries.live_pages.items():
        if part.num_pages and pages < _LEAST_ALIVE * part.num_pages:
            dead.append(part.number)
        elif part.entry["events"] < MERGE_EVENTS // 2:
            small.append(part.number)
    if len(small) > _MOST_SMALL:
        dead.extend(small)
    forced = np.isin(entries.number, dead)
    take = np.zeros(len(forced), bool)
    index_kernels.plan_merges(entries.request, entries.size, most_parts, PAGE, forced, take)
    return _plan(state, entries, take) if take.any() else None


def plan_everything(state: State, trim: bool) -> MergePlan:
    """Merges every user who lives in several parts; with `trim` every user, and no part stays."""
    entries = all_entries(state)
    take = np.zeros(len(entries.request), bool)
    if trim:
        take[:] = True
    else:
        several = np.bincount(entries.request)[entries.request] > 1 if len(take) else take
        dead = [
            part.number
            for part, pages in entries.live_pages.items()
            if part.num_pages and pages < _LEAST_ALIVE * part.num_pages
        ]
        take = several | np.isin(entries.number, dead)
    plan = _plan(state, entries, take)
    return MergePlan(plan.pieces, set(state.parts)) if trim else plan


def _plan(state: State, entries: Entries, take: np.ndarray) -> MergePlan:
    """Cuts the work into pieces of about MERGE_EVENTS events."""
    chosen = np.flatnonzero(take)
    if not len(chosen):
        return MergePlan([], set())
    request = entries.request[chosen]
    new = np.append(True, request[1:] != request[:-1])
    total = np.cumsum(entries.size[chosen])
    # A piece ends with a user.
    piece_of_user = (total[np.flatnonzero(new)] - entries.size[chosen][new]) // MERGE_EVENTS
    piece = piece_of_user[np.cumsum(new) - 1]
    bounds = np.append(np.flatnonzero(np.append(True, piece[1:] != piece[:-1])), len(piece)).tolist()
    bases = {part.number: state.table.base[part.name] for part in state.parts.values()}
    pieces = []
    for a, b in zip(bounds[:-1], bounds[1:], strict=True):
        rows = chosen[a:b]
        numbers, part = np.unique(entries.number[rows], return_inverse=True)
        base = np.array([bases[number] for number in numbers.tolist()])[part]
        owners, user = np.unique(entries.request[rows], return_inverse=True)
        covers = np.full(len(owners), np.iinfo(np.int32).max, np.int64)
        np.minimum.at(covers, user, entries.covers[rows])
        users = [entries.key(owner) for owner in owners.tolist()]
        pieces.append(
            Piece(numbers.tolist(), part, entries.first[rows] - base, entries.end[rows] - base, user, users, covers)
        )
    return MergePlan(pieces, set())


def _sizes(state: State, first: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Events of each entry: all pages but the oldest are full."""
    held = np.maximum(end - first - 1, 0) * PAGE
    return held + np.where(end > first, state.table.count[np.minimum(first, max(state.table.size - 1, 0))], 0)
