"""The format of a vault on disk: names, versions, zarr metadata and where a field lies inside a page.

    manifest.json                  what belongs to the vault; where readers start (replaced atomically)
    manifest.copy.json             the same, for repair
    manifests/N.json               manifest number N while it is the newest, or while a reader holds it (by flock)
    snapshots/NAME.json            manifests that were pinned
    writer.lock                    held by the one writer
    log/N.log, log/acknowledged    events that are in no part yet (see laser_jax.vault.log)
    damaged/                       what `repair` gave up (see laser_jax.vault.set_aside); no reader looks there
    dictionaries/FIELD-N-HEX/      values of a string field: plain zarr v3 arrays `bytes`, `offsets`
    parts/part-N-HEX/              a zarr v3 group, written whole, never edited; a name is never used again
      pages                        [pages, words, 256] uint32, sharded; a page = 256 events of one user
      vectors/FIELD                [pages, 256, size], sharded, same page numbers
      users | user_bytes, user_offsets, user_hashes      keys of the users, int64 | UTF-8
      user_first_page              [users + 1] pages of user u: user_first_page[u] to user_first_page[u + 1]
      page_count, page_first_time, page_last_time        [pages]
      page_last_sequence           [pages] largest sequence number; parts with sequence numbers of their own only
      user_covers                  [users] merged parts only: what this part holds of user u stands for all of the
                                   user's events in parts numbered from user_covers[u] up to this part's own number

A user's pages are adjacent and in order of time. Events fill a page from its end: only the oldest page of a
user is partly filled, its unused leading slots are zero, so the events of adjacent pages are one unbroken
run. Time is stored as the difference to the event before; the first event of a page holds its whole time, so
times of a page are a running sum. Sequence numbers (the order of writing) are stored in the same way, as differences
modulo 2^64, in parts made from the log; a part of the bulk writer has none, its events are numbered as they lie from
the entry's `first_sequence` on.

Version 2 added what is about the log, merged parts and changed schemas. Version 3 has fewer pages in a shard where
pages are large (how many, the array's zarr.json says), and records of an array's chunk the checksum that it ends in. A
vault of an earlier version is read as it is and becomes one of version 3 with the first write.
"""

import dataclasses
from typing import Any

import numpy as np

from laser_jax.schema import Schema, SchemaError

FORMAT = "laser_jax.vault"
VERSION = 3
MANIFEST = "manifest.json"
MANIFEST_COPY = "manifest.copy.json"
MANIFESTS = "manifests"
SNAPSHOTS = "snapshots"
LOG = "log"
LOCK = "writer.lock"
PARTS = "parts"
DICTIONARIES = "dictionaries"
DAMAGED = "damaged"
#: Events in a page.
PAGE = 256
#: Pages in a shard file at most, and their bytes before compression: a writer holds a few shards in memory.
MAX_SHARD_PAGES = 4096
MAX_SHARD_BYTES = 64 << 20
#: A shard ends in an index of (offset, length) uint64 pairs and their crc32c; both 2^64 - 1 means "not
#: stored".
INDEX_ENTRY = 16
CHECKSUM = 4
#: Levels of blosc's zstd: for parts that are soon merged into others, and for parts that stay.
LEAST_LEVEL, MOST_LEVEL = 1, 4
#: Words of a page at most: whoever reads one event's scalar fields decodes a page.
MAX_WORDS = 1000

_WORD = np.dtype(np.uint32)
_CRC = {"name": "crc32c"}
_BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
_SINGLE_BYTES = {"name": "bytes"}


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a field lies in a page: one word, two words (low, high), or some bits of one word."""

    dtype: np.dtype
    word: int
    shift: int = 0

    @property
    def num_words(self) -> int:
        """Words that the field touches."""
        return 2 if self.dtype.itemsize == 8 else 1


class PageLayout:
    """The words of a page for one schema.

    Time comes first (1 word in seconds, 2 in milliseconds), then the 8-byte fields as low and high word, the
    4-byte fields, and the 2-byte and 1-byte fields packed together, from the low bits up. With `sequence`, two words of
    sequence numbers follow the time.

    Attributes:
      schema: of the events.
      time_words: words of the time.
      sequence_word: first word of the sequence numbers, -1 without them.
      places: where each scalar field lies.
      num_words: words of a page.
    """

    def __init__(self, schema: Schema, sequence: bool = False):
        self.schema = schema
        self.time_words = 1 if schema.time_unit == "s" else 2
        self.sequence_word = self.time_words if sequence else -1
        self.places: dict[str, Place] = {}
        word = self.time_words + 2 * sequence
        for size in (8, 4):
            for field in schema.scalars:
                if field.dtype.itemsize == size:
                    self.places[field.name] = Place(field.dtype, word)
                    word += size // 4
        byte = word * 4
        for size in (2, 1):
            for field in schema.scalars:
                if field.dtype.itemsize == size:
                    self.places[field.name] = Place(field.dtype, byte // 4, byte % 4 * 8)
                    byte += size
        self.num_words = -(-byte // 4)
        if self.num_words > MAX_WORDS:
            raise SchemaError(
                f"a page of this schema has {self.num_words} words, at most {MAX_WORDS} are possible: store wide data "
                "as vector fields"
            )

    @property
    def page_bytes(self) -> int:
        """Bytes of a decoded page."""
        return self.num_words * PAGE * 4

    def to_json(self) -> dict[str, Any]:
        """The layout for readers that know nothing of this code: attributes of a part's group."""
        places: dict[str, Any] = {"time": {"type": "delta", "word": 0, "words": self.time_words, "shift": 0}}
        if self.sequence_word >= 0:
            # No field can be called so: a name holds no blank.
            places["log sequence"] = {"type": "delta", "word": self.sequence_word, "words": 2, "shift": 0}
        for name, place in self.places.items():
            places[name] = {
                "type": place.dtype.name,
                "word": place.word,
                "words": place.num_words,
                "shift": place.shift,
            }
        return {
            "format": FORMAT,
            "version": VERSION,
            "page_events": PAGE,
            "num_words": self.num_words,
            "fields": places,
        }


def group_metadata(attributes: dict[str, Any]) -> dict[str, Any]:
    """zarr.json of a group."""
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes}


def plain_metadata(array: np.ndarray) -> dict[str, Any]:
    """zarr.json of a 1-d array stored as one checksummed chunk."""
    codec = _SINGLE_BYTES if array.dtype.itemsize == 1 else _BYTES
    return _array_metadata(array.shape, array.dtype, array.shape, [codec, _CRC])


def packed_metadata(array: np.ndarray) -> dict[str, Any]:
    """zarr.json of a 1-d array stored as one compressed and checksummed chunk."""
    codec = _SINGLE_BYTES if array.dtype.itemsize == 1 else _BYTES
    return _array_metadata(array.shape, array.dtype, array.shape, [codec, _blosc(array.dtype, MOST_LEVEL), _CRC])


def pages_metadata(
    num_pages: int, num_words: int, level: int, shard_bytes: int | None = MAX_SHARD_BYTES
) -> dict[str, Any]:
    """zarr.json of the pages array [num_pages, num_words, PAGE], compressed at a level of blosc.

    Args:
      num_pages, num_words, level: as above.
      shard_bytes: of a shard's pages, at most; None as versions 1 and 2 had it, without this bound.
    """
    return _sharded_metadata((num_pages, num_words, PAGE), _WORD, level, shard_bytes)


def vector_metadata(
    num_pages: int, size: int, dtype: np.dtype, level: int, shard_bytes: int | None = MAX_SHARD_BYTES
) -> dict[str, Any]:
    """zarr.json of a vector field's array [num_pages, PAGE, size]; arguments as for pages_metadata."""
    return _sharded_metadata((num_pages, PAGE, size), dtype, level, shard_bytes)


def shard_pages(metadata: dict[str, Any]) -> int:
    """Pages in a shard, the last one apart, as the zarr.json of a sharded array says."""
    return metadata["chunk_grid"]["configuration"]["chunk_shape"][0]


def shard_path(array: str, shard: int) -> str:
    """Path of a shard file inside the part."""
    return f"{array}/c/{shard}/0/0"


def vector_path(field: str) -> str:
    """Path of a vector field's array inside the part."""
    return f"vectors/{field}"


def _blosc(dtype: np.dtype, level: int) -> dict[str, Any]:
    configuration = {
        "cname": "zstd",
        "clevel": level,
        "shuffle": "noshuffle" if dtype.itemsize == 1 else "shuffle",
        "typesize": dtype.itemsize,
        "blocksize": 0,
    }
    return {"name": "blosc", "configuration": configuration}


def _sharded_metadata(
    shape: tuple[int, int, int], dtype: np.dtype, level: int, shard_bytes: int | None
) -> dict[str, Any]:
    pages = min(shape[0], MAX_SHARD_PAGES)  # a small part has one shard of its own size
    if shard_bytes is not None:
        pages = min(pages, max(1, shard_bytes // (shape[1] * shape[2] * dtype.itemsize)))
    single = dtype.itemsize == 1
    sharding = {
        "name": "sharding_indexed",
        "configuration": {
            "chunk_shape": [1, *shape[1:]],
            "codecs": [
                _SINGLE_BYTES if single else _BYTES,
                _blosc(dtype, level),
                _CRC,
            ],
            "index_codecs": [_BYTES, _CRC],
            "index_location": "end",
        },
    }
    return _array_metadata(shape, dtype, (pages, *shape[1:]), [sharding])


def _array_metadata(
    shape: tuple[int, ...], dtype: np.dtype, chunk: tuple[int, ...], codecs: list[dict[str, Any]]
) -> dict[str, Any]:
    fill: Any = {"b": False, "f": 0.0}.get(dtype.kind, 0)
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": fill,
        "codecs": codecs,
    }
