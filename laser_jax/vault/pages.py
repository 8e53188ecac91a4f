"""Events to pages: how the sorted rows of a part are cut into pages, and how values become words."""

import dataclasses

import numpy as np

from laser_jax.vault.format import PAGE, PageLayout

_UNSIGNED = {1: np.dtype(np.uint8), 2: np.dtype(np.uint16)}


@dataclasses.dataclass(frozen=True)
class Paging:
    """How the sorted rows of a part fall into pages.

    Attributes:
      user_start: int64 [U + 1], first row of each user.
      user_first_page: int64 [U + 1].
      slot: int64 [N], place of each row when all pages are laid end to end; ascending.
      page_start: int64 [P + 1], first row of each page.
    """

    user_start: np.ndarray
    user_first_page: np.ndarray
    slot: np.ndarray
    page_start: np.ndarray

    @classmethod
    def of(cls, user_start: np.ndarray) -> "Paging":
        """Cuts each user's rows into pages, newest first: only the oldest page is partly filled."""
        counts = np.diff(user_start)
        first_page = np.zeros(len(counts) + 1, np.int64)
        np.cumsum(-(-counts // PAGE), out=first_page[1:])
        slot = np.arange(user_start[-1]) + np.repeat(first_page[1:] * PAGE - user_start[1:], counts)
        page_start = np.searchsorted(slot, np.arange(first_page[-1] + 1) * PAGE)
        return cls(user_start, first_page, slot, page_start)

    @property
    def num_pages(self) -> int:
        """Number of pages P."""
        return len(self.page_start) - 1


def deltas(values: np.ndarray, paging: Paging) -> np.ndarray:
    """Differences to the row before, int64 [N]; the first row of a page keeps its whole value."""
    found = np.empty_like(values)
    found[1:] = values[1:] - values[:-1]
    starts = paging.page_start[:-1]
    found[starts] = values[starts]
    return found


def pack(
    layout: PageLayout,
    times: np.ndarray,
    sequences: np.ndarray | None,
    columns: dict[str, np.ndarray],
    paging: Paging,
    first: int,
    end: int,
) -> np.ndarray:
    """Pages first..end-1 as uint32 [end - first, words, PAGE].

    Args:
      layout: where fields go.
      times: deltas of the times, int64 [N].
      sequences: deltas of the sequence numbers, int64 [N], if the layout has them.
      columns: scalar fields of the sorted rows, [N] each.
      paging: of the same rows.
      first: first page.
      end: one past the last page.
    """
    rows = slice(paging.page_start[first], paging.page_start[end])
    slot = paging.slot[rows] - first * PAGE
    pages = np.zeros((end - first, layout.num_words, PAGE), np.uint32)

    def put(word: int, values: np.ndarray) -> None:
        plane = np.zeros((end - first) * PAGE, np.uint32)
        plane[slot] = values
        pages[:, word] |= plane.reshape(-1, PAGE)

    time = times[rows].view(np.uint32).reshape(-1, 2)
    for word in range(layout.time_words):
        put(word, time[:, word])
    if sequences is not None:
        halves = sequences[rows].view(np.uint32).reshape(-1, 2)
        put(layout.sequence_word, halves[:, 0])
        put(layout.sequence_word + 1, halves[:, 1])
    for name, place in layout.places.items():
        values = np.ascontiguousarray(columns[name][rows])
        if place.num_words == 2:
            halves = values.view(np.uint32).reshape(-1, 2)
            put(place.word, halves[:, 0])
            put(place.word + 1, halves[:, 1])
        elif values.dtype.itemsize == 4:
            put(place.word, values.view(np.uint32))
        else:
            bits = values.view(_UNSIGNED[values.dtype.itemsize]).astype(np.uint32)
            put(place.word, bits << np.uint32(place.shift))
    return pages


def pack_vectors(values: np.ndarray, paging: Paging, first: int, end: int) -> np.ndarray:
    """Pages first..end-1 of a vector field: [N, size] -> [end - first, PAGE, size]."""
    rows = slice(paging.page_start[first], paging.page_start[end])
    pages = np.zeros(((end - first) * PAGE, values.shape[1]), values.dtype)
    pages[paging.slot[rows] - first * PAGE] = values[rows]
    return pages.reshape(end - first, PAGE, -1)
