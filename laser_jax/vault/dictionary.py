"""Codes of a string field, given out in order of first appearance; they are never taken back."""

from collections.abc import Iterable

import numpy as np

from laser_jax.vault.columns import Coded
from laser_jax.vault.errors import CorruptionError


class Dictionary:
    """Values of a string field; the position is the code. Grows only."""

    def __init__(self, values: Iterable[str] = ()):
        self._codes: dict[str, int] = {}
        self._store = np.empty(16, object)
        self.extend(0, list(values))

    def __len__(self) -> int:
        return len(self._codes)

    @property
    def array(self) -> np.ndarray:
        """Values, str objects [V], read-only."""
        found = self._store[: len(self._codes)]
        found.flags.writeable = False
        return found

    def since(self, code: int) -> list[str]:
        """Values with that code or a greater one."""
        return self._store[code : len(self._codes)].tolist()

    def extend(self, code: int, values: list[str]) -> None:
        """Takes over values whose codes begin at `code`; those that are known already are compared.

        Raises:
          CorruptionError: they are not those that are known, leave a gap, or have other codes already.
        """
        size = len(self._codes)
        known = self._store[code:size].tolist()[: len(values)]
        if code > size or values[: len(known)] != known:
            raise CorruptionError(f"dictionary values from code {code} on do not follow the {size} known ones")
        for value in values[len(known) :]:
            if value in self._codes:
                raise CorruptionError(
                    f"dictionary value {value!r} has code {self._codes[value]}, and now {len(self._codes)} too; if "
                    "`repair` has made codes anew since, open the vault again"
                )
            self._add(value)

    def encode(self, column: Coded) -> np.ndarray:
        """Codes int32 [N] of a column; new values get new codes."""
        new = NewValues(self)
        codes = new.encode(column)
        new.keep()
        return codes

    def code(self, value: str) -> int:
        """Code of a value, -1 if it has none."""
        return self._codes.get(value, -1)

    def _add(self, value: str) -> None:
        size = len(self._codes)
        if size == len(self._store):
            grown = np.empty(2 * size, object)
            grown[:size] = self._store
            self._store = grown
        self._store[size] = value
        # The code comes last: whoever sees it finds the value.
        self._codes[value] = size


class NewValues:
    """Codes of values that are being written: nobody else is told of them before they are kept."""

    def __init__(self, dictionary: Dictionary):
        """`dictionary` must not grow otherwise until then."""
        self._dictionary = dictionary
        self._codes: dict[str, int] = {}
        self._first = len(dictionary)

    @property
    def end(self) -> int:
        """The code that the next new value gets."""
        return self._first + len(self._codes)

    def encode(self, column: Coded) -> np.ndarray:
        """Codes int32 [N] of a column; new values get new codes."""
        used = np.zeros(len(column.values), bool)
        used[column.codes] = True
        codes = np.full(len(column.values), -1, np.int32)
        for position in np.flatnonzero(used).tolist():
            value = column.values[position]
            known = self._dictionary.code(value)
            codes[position] = known if known >= 0 else self._codes.setdefault(value, self.end)
        return codes[column.codes]

    def since(self, code: int) -> list[str]:
        """The new values with that code or a greater one."""
        return list(self._codes)[code - self._first :]

    def keep(self) -> None:
        """The dictionary has them from now on."""
        self._dictionary.extend(self._first, list(self._codes))
