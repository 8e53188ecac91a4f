"""The order of a buffer of events, and which of them are repeated."""

import numpy as np

from laser_jax.schema import Schema


def sort_events(schema: Schema, rows: dict[str, np.ndarray]) -> np.ndarray | None:
    """Stable order by user, time and event key, int64 [N]; None if the rows are in that order already."""
    keys = [rows["user"], rows["time"]]
    if schema.event_key is not None:
        keys.append(rows[schema.event_key])
    in_order = np.ones(len(keys[0]) - 1, bool)
    for key in reversed(keys):
        in_order = (key[1:] > key[:-1]) | ((key[1:] == key[:-1]) & in_order)
    return None if in_order.all() else np.lexsort(keys[::-1])


def trailing_rows(user: np.ndarray, time: np.ndarray) -> int:
    """How many rows at the end of a full buffer should wait for the next one.

    On input grouped by user they are the last user's, who may go on in the next buffer: so that a user lives
    in one part. If one user fills the buffer, they are the rows of the last time, so that repeated events
    still meet.
    """
    for column in (user, time):
        others = np.flatnonzero(column != column[-1])
        if len(others):
            run = len(column) - 1 - others[-1]
            # Rows of this user further up mean that the input is not grouped: waiting would gain nothing.
            return 0 if (column[: len(column) - run] == column[-1]).any() else int(run)
    return 0


def repeated_events(schema: Schema, rows: dict[str, np.ndarray]) -> np.ndarray:
    """True where an event repeats an earlier one; bool [N], rows sorted by sort_events."""
    user, time = rows["user"], rows["time"]
    if schema.event_key is not None:
        candidates = np.arange(len(user))
        keys = [user, rows[schema.event_key]]
    else:
        tied = np.zeros(len(user) + 1, bool)
        tied[1:-1] = (user[1:] == user[:-1]) & (time[1:] == time[:-1])
        candidates = np.flatnonzero(tied[1:] | tied[:-1])
        keys = [user[candidates], time[candidates]]
        for field in schema.fields:
            keys.extend(_bit_keys(rows[field.name][candidates]))
    order = np.lexsort(keys[::-1])
    same = np.ones(max(len(order) - 1, 0), bool)
    for key in keys:
        same &= key[order[1:]] == key[order[:-1]]
    repeated = np.zeros(len(user), bool)
    repeated[candidates[order[1:][same]]] = True
    return repeated


def _bit_keys(column: np.ndarray) -> list[np.ndarray]:
    """Integer keys that are equal where values are equal bit for bit, so that NaN equals NaN."""
    bits = column.view(np.dtype(f"u{column.dtype.itemsize}"))
    return [bits] if bits.ndim == 1 else list(bits.T)
