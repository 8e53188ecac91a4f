"""What an event looks like: its columns and their types."""

import dataclasses
import json
import re
from typing import Any

import numpy as np

#: Column types and the numpy dtype of their values in memory; a string is an int32 code of the vault's
#: dictionary.
TYPES = {
    "bool": np.dtype(np.bool_),
    "int8": np.dtype(np.int8),
    "int16": np.dtype(np.int16),
    "int32": np.dtype(np.int32),
    "int64": np.dtype(np.int64),
    "uint8": np.dtype(np.uint8),
    "uint16": np.dtype(np.uint16),
    "uint32": np.dtype(np.uint32),
    "uint64": np.dtype(np.uint64),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
    "string": np.dtype(np.int32),
}
USER_TYPES = ("int64", "string")
#: One past the last valid time, 1 January 2100, in each unit: later values are a wrong unit or a broken
#: clock.
TIME_LIMIT = {"s": 4102444800, "ms": 4102444800000}
RESERVED = ("user", "time")
DUPLICATES = ("keep", "drop")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}")


class VaultError(Exception):
    """Base of every error that a vault raises on purpose."""


class SchemaError(VaultError, ValueError):
    """A schema that makes no sense, or events that do not fit their schema."""


@dataclasses.dataclass(frozen=True)
class Field:
    """One column of an event.

    Attributes:
      name: a plain identifier; `user` and `time` are taken.
      type: one of TYPES.
      size: None for a scalar, or k >= 1 for a vector of k values of that (not string) type.
      default: what events have that were written before the field was added (see Vault.evolve); None if the field has
        been there from the start.
    """

    name: str
    type: str
    size: int | None = None
    default: bool | int | float | str | None = None

    def __post_init__(self):
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise SchemaError(f"field name {self.name!r}: need an identifier of letters, digits and _ (at most 100)")
        if self.name in RESERVED:
            raise SchemaError(f"field name {self.name!r} is taken: every event has it, leave it out of the fields")
        if self.type not in TYPES:
            raise SchemaError(f"field {self.name!r}: unknown type {self.type!r}; known: {', '.join(TYPES)}")
        if self.default is not None:
            self._check_default()
        if self.size is None:
            return
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 1:
            raise SchemaError(f"field {self.name!r}: size {self.size!r} of a vector must be an integer >= 1")
        if self.type == "string":
            raise SchemaError(f"field {self.name!r}: a vector of strings is not supported; use a numeric type")

    def _check_default(self) -> None:
        kind, value = self.dtype.kind, self.default
        wanted = str if self.type == "string" else {"b": bool, "f": (int, float)}.get(kind, int)
        fits = isinstance(value, wanted) and (kind == "b" or not isinstance(value, bool))
        if fits and self.type != "string" and kind in "iu":
            fits = np.iinfo(self.dtype).min <= value <= np.iinfo(self.dtype).max
        if not fits:
            raise SchemaError(f"field {self.name!r}: default {value!r} is not a value of type {self.type}")

    @property
    def dtype(self) -> np.dtype:
        """Numpy dtype of one value in memory."""
        return TYPES[self.type]


@dataclasses.dataclass(frozen=True)
class Schema:
    """The columns of a log of events.

    Attributes:
      user: type of the user's id, "int64" or "string".
      time_unit: "s" or "ms"; times are integers since 1970 in it, 0 <= time < year 2100.
      fields: the other columns.
      event_key: name of an integer field that identifies an event of a user; breaks ties of time and finds
        duplicates.
      duplicates: "keep" all events, or "drop" repeated ones: the same user and event key or, without an event
        key, the same user, time and fields. The first in (time, order of writing) stays. `ingest`
        sorts the log, so that repeated events meet wherever they are; a bulk writer compares only events within
        one of its buffers, unless they come sorted (see laser_jax.vault.create); `append` compares with the newest
        events appended, as many as its window holds (see laser_jax.vault.WriterOptions).
    """

    user: str = "int64"
    time_unit: str = "s"
    fields: tuple[Field, ...] = ()
    event_key: str | None = None
    duplicates: str = "keep"

    def __post_init__(self):
        object.__setattr__(self, "fields", tuple(self.fields))
        for field in self.fields:
            if not isinstance(field, Field):
                raise SchemaError(f"fields must be Field(name, type, size=None), got {field!r}")
        if self.user not in USER_TYPES:
            raise SchemaError(f"user type {self.user!r} is not one of {', '.join(USER_TYPES)}")
        if self.time_unit not in TIME_LIMIT:
            raise SchemaError(f"time_unit {self.time_unit!r} is not one of {', '.join(TIME_LIMIT)}")
        if self.duplicates not in DUPLICATES:
            raise SchemaError(f"duplicates {self.duplicates!r} is not one of {', '.join(DUPLICATES)}")
        names = [field.name for field in self.fields]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise SchemaError(f"field {twice[0]!r} is declared twice")
        if self.event_key is not None:
            if self.event_key not in names:
                raise SchemaError(f"event_key {self.event_key!r} is not a field; the fields: {', '.join(names)}")
            key = self.field(self.event_key)
            if key.size is not None or key.dtype.kind not in "iu" or key.type == "string":
                raise SchemaError(f"event_key {self.event_key!r} must be an integer field; hash it to int64 first")

    @property
    def time_limit(self) -> int:
        """One past the last valid time, in this schema's unit."""
        return TIME_LIMIT[self.time_unit]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the fields, in order, without user and time."""
        return tuple(field.name for field in self.fields)

    @property
    def scalars(self) -> tuple[Field, ...]:
        """Fields with one value an event."""
        return tuple(field for field in self.fields if field.size is None)

    @property
    def vectors(self) -> tuple[Field, ...]:
        """Fields with a vector an event."""
        return tuple(field for field in self.fields if field.size is not None)

    def field(self, name: str) -> Field:
        """The field of that name; KeyError if there is none."""
        for field in self.fields:
            if field.name == name:
                return field
        raise KeyError(name)

    def to_json(self) -> dict[str, Any]:
        """This schema as plain JSON values, the inverse of from_json."""
        fields = []
        for field in self.fields:
            entry: dict[str, Any] = {"name": field.name, "type": field.type}
            if field.size is not None:
                entry["size"] = field.size
            if field.default is not None:
                entry["default"] = field.default
            fields.append(entry)
        return {
            "user": self.user,
            "time_unit": self.time_unit,
            "fields": fields,
            "event_key": self.event_key,
            "duplicates": self.duplicates,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Schema":
        """A schema from plain JSON values; SchemaError names a key that is missing or unknown."""
        entries = dict(_known_keys(value, cls, "schema"))
        fields = entries.get("fields", [])
        if not isinstance(fields, (list, tuple)):
            raise SchemaError(f"schema: fields must be a list, got {fields!r}")
        entries["fields"] = []
        for position, entry in enumerate(fields):
            where = f"schema: fields[{position}]"
            entry = _known_keys(entry, Field, where)
            for needed in ("name", "type"):
                if needed not in entry:
                    raise SchemaError(f"{where} has no {needed!r}: {entry!r}")
            entries["fields"].append(Field(**entry))
        return cls(**entries)

    @classmethod
    def load(cls, path: str) -> "Schema":
        """Reads a schema from a JSON file; SchemaError names the file and what is wrong with it."""
        with open(path, encoding="utf-8") as file:
            text = file.read()
        try:
            return cls.from_json(json.loads(text))
        except json.JSONDecodeError as error:
            raise SchemaError(f"{path} is not JSON: {error}") from error
        except SchemaError as error:
            raise SchemaError(f"{path}: {error}") from error


def _known_keys(value: Any, cls: type, where: str) -> dict[str, Any]:
    """`value` if it is a dict whose keys are attributes of the dataclass `cls`."""
    if not isinstance(value, dict):
        raise SchemaError(f"{where} must be an object, got {value!r}")
    known = [field.name for field in dataclasses.fields(cls)]
    unknown = sorted(set(value) - set(known), key=str)
    if unknown:
        raise SchemaError(f"{where}: unknown key {unknown[0]!r}; known: {', '.join(known)}")
    return value
