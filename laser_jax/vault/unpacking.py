"""Which columns to take out of the pages of one layout, as the plan that the compiled loops follow."""

from typing import Any

import numpy as np

from laser_jax.schema import Field, Schema
from laser_jax.vault import kernels
from laser_jax.vault.dictionary import Dictionary
from laser_jax.vault.format import PageLayout

#: Name under which sequence numbers are among the columns of a read; no field can be called so.
SEQUENCE = "log sequence"


class Asked:
    """Fields that a read asks for; made once for each choice, and compared by identity.

    Attributes:
      fields: of today's schema. names: their names. vectors: those that hold vectors.
      event_bytes: of an event's time and scalar fields.
      plans: unpackings by what they depend on; see RowReader.unpacking.
    """

    def __init__(self, fields: tuple[Field, ...]):
        self.fields = fields
        self.names = [field.name for field in fields]
        self.vectors = [field for field in fields if field.size is not None]
        self.event_bytes = 8 + sum(field.dtype.itemsize for field in fields if field.size is None)
        self.plans: dict[Any, Unpacking] = {}


class Unpacking:
    """A plan for `time`, the sequence numbers if asked for, and scalar fields, as today's schema has them.

    Attributes:
      plan: int64 [F, PLAN_WIDTH], see laser_jax.vault.kernels.unpack_runs.
      prefix: int64 [F], bytes of an event in the columns before each column of the plan.
      exact: whether every column comes out as today's schema has it; a float that was stored narrower is converted by
        `columns`.
    """

    def __init__(self, layout: PageLayout, asked: list[Field], sequence: bool, fills: dict[str, int]):
        """`asked` are scalar fields of today's schema; `fills` the bits of values that old events lack."""
        named = [("time", np.dtype(np.int64), (kernels.TIME, 0, 0, 8, 0, 8, 0))]
        if sequence and layout.sequence_word >= 0:
            named.append((SEQUENCE, np.dtype(np.int64), (kernels.SEQUENCE, layout.sequence_word, 0, 8, 0, 8, 0)))
        self._wanted = {}
        for field in asked:
            place, dtype = layout.places.get(field.name), field.dtype
            if place is None:
                row = (kernels.FILL, 0, 0, 0, 0, dtype.itemsize, fills[field.name])
            else:
                stored = place.dtype
                signed = stored.kind == "i"
                if dtype.kind == "f" and stored != dtype:
                    self._wanted[field.name] = dtype
                    dtype = stored
                row = (kernels.BITS, place.word, place.shift // 8, stored.itemsize, signed, dtype.itemsize, 0)
            named.append((field.name, dtype, row))
        self.exact = not self._wanted
        # Wide columns first: every column begins at a multiple of its size.
        ordered = sorted(named, key=lambda column: -column[1].itemsize)
        self.plan = np.array([row for _, _, row in ordered], np.int64)
        sizes = [dtype.itemsize for _, dtype, _ in ordered]
        prefix = np.concatenate(([0], np.cumsum(sizes)))
        self._width = int(prefix[-1])
        self.prefix = prefix[:-1].astype(np.int64)
        begins = {name: int(start) for (name, _, _), start in zip(ordered, prefix, strict=False)}
        self._columns = [(name, dtype, begins[name]) for name, dtype, _ in named]

    def allocate(self, rows: int) -> np.ndarray:
        """A buffer for that many rows; column i begins at prefix[i] * rows."""
        return np.empty(rows * self._width, np.uint8)

    def columns(self, buffer: np.ndarray, capacity: int, rows: int) -> dict[str, np.ndarray]:
        """The columns in a buffer that was allocated for `capacity` rows, as views of it."""
        array = np.ndarray  # looked up once
        found = {name: array(rows, dtype, buffer, begin * capacity) for name, dtype, begin in self._columns}
        for name, dtype in self._wanted.items():
            found[name] = found[name].astype(dtype)
        return found


def fill_values(schema: Schema, dictionaries: dict[str, Dictionary]) -> dict[str, int]:
    """Bits, as an int64, of the value that events have from before a field was added."""
    found = {}
    for field in schema.scalars:
        if field.type == "string":
            value: Any = dictionaries[field.name].code(field.default or "")
        else:
            value = 0 if field.default is None else field.default
        bits = np.zeros(8, np.uint8)
        bits[: field.dtype.itemsize] = np.array([value], field.dtype).view(np.uint8)
        found[field.name] = int(bits.view(np.int64)[0])
    return found
