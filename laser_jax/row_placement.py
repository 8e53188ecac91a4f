"""Where embedding rows lie on devices, and how a device asks for those that its requests meet.

Rows of a table are spread over all devices. The row that an id gets says nothing about who owns it: a multiplication
modulo the number of rows (coprime to it, near the golden section) scatters neighbours, so that popular ids, which often
have small codes, do not meet on one device. The place does not depend on the number of devices: a checkpoint fits any.

Knows no jax: the pipeline's threads do this on the host.
"""

import dataclasses
import functools
import math

import numpy as np
from numba import njit

from laser_jax.vault.hashing import splitmix64

MULTIPLE = 3 * 2**10  # tables are padded to a multiple of it, so that any such number of devices shares them evenly


@dataclasses.dataclass(frozen=True)
class DeviceShare:
    """The devices that a batch is split over, evenly and in order, and which of them are this process's."""

    num_devices: int = 1
    local: tuple[int, ...] = (0,)

    @property
    def whole(self) -> bool:
        """Whether one process has all devices."""
        return len(self.local) == self.num_devices


ALONE = DeviceShare()  # one process, one device


def padded_rows(num_rows: int) -> int:
    """Rows that a table of `num_rows` takes."""
    return -(-num_rows // MULTIPLE) * MULTIPLE


def rows_per_device(num_rows: int, num_devices: int) -> int:
    """Rows of a padded table on each device.

    Raises:
      ValueError: they do not divide evenly.
    """
    if padded_rows(num_rows) % num_devices:
        raise ValueError(
            f"a table of {padded_rows(num_rows)} rows does not divide over {num_devices} devices: use a number that "
            f"divides {MULTIPLE}"
        )
    return padded_rows(num_rows) // num_devices


@functools.cache
def _factor(num_rows: int) -> int:
    """Coprime to the padded number of rows, near its golden section."""
    size = padded_rows(num_rows)
    factor = round(size * (math.sqrt(5) - 1) / 2)
    while math.gcd(factor, size) != 1:
        factor += 1
    return factor


def places(rows: np.ndarray, num_rows: int) -> np.ndarray:
    """Places in the padded table, int64, of rows in [0, num_rows); row 0 lies at place 0, one to one."""
    return rows.astype(np.int64) * _factor(num_rows) % padded_rows(num_rows)


def rows_at(found: np.ndarray, num_rows: int) -> np.ndarray:
    """The rows that lie at these places: `places` backwards."""
    size = padded_rows(num_rows)
    return found.astype(np.int64) * pow(_factor(num_rows), -1, size) % size


@njit(nogil=True, cache=True)
def _number(keys, positions, unique):
    """Numbers distinct keys in order of first appearance.

    Args:
      keys: int64 [N]. positions: int32 [N], filled: the number of each key. unique: int64 [N], filled.

    Returns:
      How many distinct keys there are.
    """
    bits = 4
    while (1 << bits) < 2 * len(keys):
        bits += 1
    mask = (1 << bits) - 1
    slots = np.full(1 << bits, -1, np.int32)
    count = 0
    for i in range(len(keys)):
        # The high bits of a product with the golden section: neighbours and multiples do not collide.
        slot = np.int64((np.uint64(keys[i]) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(64 - bits))
        while slots[slot] >= 0 and unique[slots[slot]] != keys[i]:
            slot = (slot + 1) & mask
        if slots[slot] < 0:
            slots[slot] = count
            unique[count] = keys[i]
            count += 1
        positions[i] = slots[slot]
    return count


def unique_keys(parts: list[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
    """The distinct values of several arrays, and each array as positions among them.

    Args:
      parts: integer arrays of any shape.

    Returns:
      unique: int64 [U], in order of first appearance; positions: int32, shaped like parts; unique[positions[i]] equals
      parts[i].
    """
    keys = np.concatenate([np.zeros(0, np.int64), *(part.ravel() for part in parts)]).astype(np.int64)
    positions, unique = np.empty(len(keys), np.int32), np.empty(len(keys), np.int64)
    count = _number(keys, positions, unique)
    cuts = np.cumsum([part.size for part in parts])[:-1]
    pieces = np.split(positions, cuts) if parts else []
    return unique[:count].copy(), [piece.reshape(part.shape) for piece, part in zip(pieces, parts, strict=True)]


def distinct_lines(parts: list[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
    """The distinct lines of several arrays, and each array as positions among them.

    Lines are compared by a 64-bit hash of their bytes.

    Args:
      parts: [n, m] of one type, each with its own n.

    Returns:
      lines: [G, m] in order of first appearance; positions: int32 [n] for each part.
    """
    lines = np.ascontiguousarray(np.concatenate(parts))
    words = lines.view(np.uint8).reshape(len(lines), lines.shape[1] * lines.itemsize)
    words = np.pad(words, ((0, 0), (0, -words.shape[1] % 8))).view(np.int64)
    key = np.zeros(len(lines), np.int64)
    for word in words.T:
        key = splitmix64(key ^ word).view(np.int64)
    unique, (at,) = unique_keys([key])
    first = np.empty(len(unique), np.int64)
    first[at[::-1]] = np.arange(len(lines))[::-1]
    return lines[first], np.split(at, np.cumsum([len(part) for part in parts])[:-1])


@dataclasses.dataclass(frozen=True)
class Wanted:
    """The distinct rows that one device's requests meet in one table, grouped by owner.

    Attributes:
      places: int64 [U], ascending. counts: int64 [N], how many of them each of the N devices owns.
    """

    places: np.ndarray
    counts: np.ndarray

    @staticmethod
    def of(rows: np.ndarray, num_rows: int, num_devices: int) -> tuple["Wanted", np.ndarray]:
        """Also returns the rank [U] of each of the distinct `rows` [U] among the places."""
        found = places(rows, num_rows)
        order = np.argsort(found)
        rank = np.empty(len(order), np.int32)
        rank[order] = np.arange(len(order), dtype=np.int32)
        found = found[order]
        share = rows_per_device(num_rows, num_devices)
        bounds = np.searchsorted(found, share * np.arange(num_devices + 1))
        return Wanted(found, np.diff(bounds)), rank

    def buckets(self, size: int, share: int) -> tuple[np.ndarray, np.ndarray]:
        """One bucket of static size an owner.

        Args:
          size: slots of a bucket. share: rows on each device.

        Returns:
          local: int32 [N, size], rows as their owner counts them, ascending and distinct; unused slots count on from
          `share`, beyond the owner's table. slots: int32 [U], where each place lies in the flattened buckets.
        """
        owner = np.repeat(np.arange(len(self.counts)), self.counts)
        start = np.cumsum(self.counts) - self.counts
        slots = (np.arange(len(owner)) + (size * np.arange(len(start)) - start)[owner]).astype(np.int32)
        local = np.tile(share + np.arange(size, dtype=np.int32), (len(start), 1))
        local.reshape(-1)[slots] = self.places - owner * share
        return local, slots


def bucket_size(count: int, share: int, least: int) -> int:
    """A static size for a bucket of `count` rows: few different ones, so that few shapes are compiled.

    Args:
      share: rows on each device, which no bucket exceeds. least: the smallest size; larger ones are 1.5 times apart.
    """
    size = least
    while size < count:
        size = max(size * 3 // 2, size + 1)
    return min(size, share)
