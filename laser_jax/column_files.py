"""One column in one zarr v3 array, one dimension long: what requests and vocabularies are stored in.

A shard (one file) holds 2^18 values in chunks of 2^12, each with its own checksum, so that one request of a column too
large for memory costs one small chunk.
"""

import hashlib
import os

import numpy as np
import tensorstore as ts

SHARD = 1 << 18
CHUNK = 1 << 12


class RequestsError(ValueError):
    """Requests that cannot be written or read; the message names the column, the value and the place."""


class ColumnWriter:
    """One growing zarr array, written whole shards at a time."""

    def __init__(self, path, dtype):
        inner = [
            {"name": "bytes", "configuration": {"endian": "little"}},
            {"name": "zstd", "configuration": {"level": 1, "checksum": False}},
            {"name": "crc32c"},
        ]
        sharding = {"name": "sharding_indexed", "configuration": {"chunk_shape": [CHUNK], "codecs": inner}}
        # Without store_data_equal_to_fill_value a shard of zeros would not exist, as if it were lost.
        self._array = ts.open(
            {
                "driver": "zarr3",
                "kvstore": {"driver": "file", "path": path + os.sep},
                "create": True,
                "store_data_equal_to_fill_value": True,
                "metadata": {
                    "shape": [0],
                    "data_type": dtype,
                    "codecs": [sharding],
                    "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [SHARD]}},
                },
            }
        ).result()
        self._waiting, self._buffered, self._written = [], 0, 0
        self._sum = hashlib.sha256()

    def add(self, values):
        self._waiting.append(values)
        self._buffered += len(values)
        if self._buffered >= SHARD:
            self._flush(self._buffered - self._buffered % SHARD)

    def close(self):
        self._flush(self._buffered)

    @property
    def checksum(self):
        """Of all values that were written, however they were handed over."""
        return self._sum.hexdigest()[:16]

    def _flush(self, count):
        if count:
            values = np.concatenate(self._waiting)
            self._waiting, self._buffered = [values[count:].copy()], len(values) - count
            begin, self._written = self._written, self._written + count
            self._sum.update(values[:count].astype(values.dtype.newbyteorder("<"), copy=False).tobytes())
            self._array = self._array.resize(exclusive_max=[self._written]).result()
            self._array[begin : self._written].write(values[:count]).result()


def open_column(place, name, context):
    """A handle to the column `name` of the directory `place`; RequestsError where there is none."""
    store = {"driver": "file", "path": os.path.join(place, name, "")}
    try:
        return ts.open(
            {"driver": "zarr3", "kvstore": store, "recheck_cached_data": "open", "fill_missing_data_reads": False},
            open=True,
            read=True,
            context=context,
        ).result()
    except ValueError as error:
        raise RequestsError(f"column {name!r} of {place} cannot be opened: {error}") from error


def read_column(view, place, name):
    """The values of a view of a column; RequestsError where they are damaged."""
    try:
        return view.read().result()
    except ValueError as error:
        raise RequestsError(f"column {name!r} of {place} is damaged: {error}") from error


def sync_directory(path):
    """Makes the names in a directory durable (fsync)."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
