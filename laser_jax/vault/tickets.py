"""What clients of a service send as JSON, checked."""

import json
from typing import Any

from laser_jax.vault.errors import SchemaError

#: Keys of a ticket for one user's history, and of a command for batches.
GET = ("user", "n", "before", "as_of", "fields", "where", "max_scan", "at", "coded")
GATHER = ("n", "as_of", "fields", "at", "coded")


def parse(data: bytes | None, known: tuple[str, ...] | None) -> dict[str, Any]:
    """An object from a client; SchemaError says what is wrong with it."""
    if data is None:
        raise SchemaError("a descriptor with a path: need one with a command")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise SchemaError(f"{data[:100]!r} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise SchemaError(f"{data[:100]!r} is not a JSON object")
    if known is not None and set(value) - set(known):
        raise SchemaError(f"{sorted(set(value) - set(known))[0]!r} is not one of {', '.join(known)}")
    if value.get("list", "users") != "users":
        raise SchemaError(f"list={value['list']!r}: only users can be listed")
    for name in ("before", "as_of"):
        if known is not None and value.get(name) is not None and type(value[name]) is not int:
            raise SchemaError(f"{name}={value[name]!r}: need an integer")
    if type(value.get("coded", False)) is not bool:
        raise SchemaError(f"coded={value['coded']!r}: need true or false")
    return value


def field_names(fields: Any) -> tuple[str, ...] | None:
    """Names of fields as a tuple; None for all."""
    if fields is None:
        return None
    if not isinstance(fields, list) or not all(isinstance(name, str) for name in fields):
        raise SchemaError(f"fields={fields!r}: need a list of names")
    return tuple(fields)
