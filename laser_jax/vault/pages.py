"""Events to pages and back: the one place that knows how a field's values become words."""

import dataclasses

import numpy as np

from laser_jax.vault.format import PAGE, PageLayout, Place

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


def time_deltas(time: np.ndarray, paging: Paging) -> np.ndarray:
    """Differences to the row before, int64 [N]; the first row of a page keeps its whole time."""
    deltas = np.empty_like(time)
    deltas[1:] = time[1:] - time[:-1]
    starts = paging.page_start[:-1]
    deltas[starts] = time[starts]
    return deltas


def pack(
    layout: PageLayout,
    deltas: np.ndarray,
    columns: dict[str, np.ndarray],
    paging: Paging,
    first: int,
    end: int,
) -> np.ndarray:
    """Pages first..end-1 as uint32 [end - first, words, PAGE].

    Args:
      layout: where fields go.
      deltas: from time_deltas, int64 [N].
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

    time = deltas[rows].view(np.uint32).reshape(-1, 2)
    for word in range(layout.time_words):
        put(word, time[:, word])
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


def page_times(layout: PageLayout, pages: np.ndarray) -> np.ndarray:
    """Times of all slots, int64 [P, PAGE]; 0 in unused slots."""
    deltas = pages[:, 0].astype(np.int64)
    if layout.time_words == 2:
        deltas += pages[:, 1].astype(np.int64) << 32
    return np.cumsum(deltas, axis=1, out=deltas)


class Unpacker:
    """Takes fields of chosen slots out of pages."""

    def __init__(self, pages: np.ndarray, slots: np.ndarray):
        """`pages` uint32 [P, words, PAGE], contiguous; `slots` int64 [N] into the pages laid end to end."""
        self._flat = pages.reshape(-1)
        self._words = slots + (slots >> 8) * ((pages.shape[1] - 1) * PAGE)
        self._shared: dict[int, np.ndarray] = {}

    def take(self, place: Place) -> np.ndarray:
        """Values [N] of one field."""
        if place.num_words == 2:
            halves = np.empty((len(self._words), 2), np.uint32)
            halves[:, 0] = self._word(place.word)
            halves[:, 1] = self._word(place.word + 1)
            return halves.reshape(-1).view(place.dtype)
        if place.dtype.itemsize == 4:
            return self._word(place.word).view(place.dtype)
        if place.word not in self._shared:
            self._shared[place.word] = self._word(place.word)
        return _narrow(self._shared[place.word], place)

    def _word(self, word: int) -> np.ndarray:
        return self._flat[word * PAGE :].take(self._words)


def run_of(pages: np.ndarray, place: Place, start: int, stop: int) -> np.ndarray:
    """Values of one field in slots start..stop-1 of the pages laid end to end."""
    if place.num_words == 2:
        halves = np.empty((stop - start, 2), np.uint32)
        halves[:, 0] = _run(pages, place.word, start, stop)
        halves[:, 1] = _run(pages, place.word + 1, start, stop)
        return halves.reshape(-1).view(place.dtype)
    words = _run(pages, place.word, start, stop)
    # A word of a single page is a view of it: a copy lets the other words go.
    return words.copy().view(place.dtype) if place.dtype.itemsize == 4 else _narrow(words, place)


def _run(pages: np.ndarray, word: int, start: int, stop: int) -> np.ndarray:
    return pages[:, word].reshape(-1)[start:stop]


def _narrow(words: np.ndarray, place: Place) -> np.ndarray:
    if place.shift:
        words = words >> np.uint32(place.shift)
    narrow = words.astype(_UNSIGNED[place.dtype.itemsize])
    return narrow.view(place.dtype)
