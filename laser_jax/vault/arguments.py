"""Arguments of reads: checked, and as the code wants them."""

from typing import Any

import numpy as np

from laser_jax.schema import Schema, SchemaError
from laser_jax.vault.merging import NO_BOUND
from laser_jax.vault.unpacking import Asked


def no_rows(asked: Asked) -> dict[str, np.ndarray]:
    """Columns of a history without events."""
    columns = {"time": np.zeros(0, np.int64)}
    for field in asked.fields:
        columns[field.name] = np.zeros((0,) if field.size is None else (0, field.size), field.dtype)
    return columns


def checked_count(n: int) -> int:
    """A number of events as an int; SchemaError if it is none."""
    if type(n) is int and 0 <= n < NO_BOUND:
        return n
    if isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 0:
        raise SchemaError(f"n={n!r}: need the number of events, an integer >= 0")
    return min(int(n), NO_BOUND - 1)


def checked_bound(name: str, value: Any) -> int:
    """One bound on times or sequence numbers, as an int64."""
    if type(value) is int and -(2**63) <= value < 2**63:
        return value
    return int(checked_bounds(name, value, 1)[0])


def checked_bounds(name: str, value: Any, size: int) -> np.ndarray:
    """A bound for each of `size` users, int64 [size]."""
    array = np.asarray(value)
    if array.dtype.kind not in "iu" and array.size:
        raise SchemaError(f"{name} of type {array.dtype}: need integers (times in the schema's unit)")
    if array.ndim > 1 or (array.ndim == 1 and len(array) != size):
        raise SchemaError(f"{name} of shape {array.shape} for {size} users: need one number, or one for each")
    if array.dtype.kind == "u":
        array = np.minimum(array, np.uint64(NO_BOUND))
    return np.broadcast_to(array.astype(np.int64), (size,))


def checked_time(schema: Schema, before: Any) -> int:
    """A bound on times as an int64; SchemaError if no event of this schema can have such a time.

    Milliseconds given to a vault of seconds would bound nothing, and show the future. NO_BOUND and what is beyond int64
    bound nothing on purpose.
    """
    bound = checked_bound("before", before)
    if schema.time_limit < bound < NO_BOUND:
        raise _impossible(schema, bound)
    return bound


def checked_times(schema: Schema, before: Any, size: int) -> np.ndarray:
    """As checked_time, for each of `size` users, int64 [size]."""
    bounds = checked_bounds("before", before, size)
    wrong = (bounds > schema.time_limit) & (bounds < NO_BOUND)
    if wrong.any():
        raise _impossible(schema, int(bounds[wrong.argmax()]))
    return bounds


def _impossible(schema: Schema, bound: int) -> SchemaError:
    unit = schema.time_unit
    return SchemaError(
        f"before={bound}: need an integer <= {schema.time_limit} in {unit} since 1970 (is the unit right?)"
    )


def checked_values(field: str, values: Any) -> list[Any]:
    """Strings to be encoded, as a list; SchemaError for one string, whose letters nobody means."""
    if isinstance(values, (str, bytes)):
        raise SchemaError(f"values {values!r} of {field!r}: need a sequence of strings, such as [{values!r}]")
    return values.tolist() if isinstance(values, np.ndarray) else list(values)


def checked_user(schema: Schema, user: Any) -> Any:
    """A key as the schema has it; None for an id beyond int64, which is nobody's."""
    if schema.user == "string":
        if not isinstance(user, str):
            raise SchemaError(f"user {user!r}: this vault's users are strings")
        return user
    if type(user) is int and -(2**63) <= user < 2**63:
        return user
    if type(user) is not int and (isinstance(user, bool) or not isinstance(user, (int, np.integer))):
        raise SchemaError(f"user {user!r}: this vault's users are int64")
    user = int(user)
    return user if -(2**63) <= user < 2**63 else None


def checked_users(schema: Schema, users: Any) -> tuple[Any, np.ndarray | None]:
    """Keys as the schema has them, and which of them are beyond int64: these are nobody's."""
    if schema.user == "string":
        if isinstance(users, str):
            raise SchemaError(f"users {users!r}: need a sequence of strings")
        listed = users.tolist() if isinstance(users, np.ndarray) else list(users)
        for user in listed:
            if not isinstance(user, str):
                raise SchemaError(f"user {user!r}: this vault's users are strings")
        return listed, None
    array = np.asarray(users)
    if array.ndim != 1 or (array.dtype.kind not in "iu" and array.size):
        raise SchemaError(f"users of type {array.dtype} and shape {array.shape}: need int64 [B]")
    beyond = array > np.iinfo(np.int64).max
    return array.astype(np.int64), beyond if beyond.any() else None
