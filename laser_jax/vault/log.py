"""The log of appended events: files of checksummed records, and how far they have been acknowledged.

    log/000000012.log     a header, then records; the files follow one another without a gap of sequence numbers
    log/acknowledged      number of the newest file, how many of its bytes are acknowledged, the next sequence number

A record is written whole and flushed before anybody hears of its events. So a file that ends inside a record was
cut by a crash, before that record was acknowledged; any other record whose checksum does not match is damage.
`acknowledged` is not flushed: after a crash of the machine it may lag behind the files, it never runs ahead of them.

All integers are little-endian:
  file header   8 s magic "LJXVLOG1", u64 number, u64 first sequence number, u32 schema, u32 crc32c of these
  record        u32 magic, u32 rows, u64 first sequence number, u64 body bytes, u32 crc32c of the body, u32 crc32c of
                these; body: u32 length and JSON {"new": {field: [first code, [values]]}, "origin": [client, number]},
                both if there is one, then columns: users (int64, or u32 lengths and UTF-8), time int64, and the
                schema's fields in order, strings as int32 codes
"""

import contextlib
import dataclasses
import json
import os
import re
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np

from laser_jax.schema import Schema
from laser_jax.vault.errors import CorruptionError, UnavailableError
from laser_jax.vault.files import crc32c
from laser_jax.vault.format import LOG

_FILE_MAGIC = b"LJXVLOG1"
_FILE = struct.Struct("<8sQQI")
_RECORD_MAGIC = 0x1DA7E5
_RECORD = struct.Struct("<IIQQI")
_ACKNOWLEDGED = struct.Struct("<8sQQQ")
_CRC = struct.Struct("<I")
_NAME = re.compile(r"\d{9,}\.log")
FILE_HEADER = _FILE.size + _CRC.size
RECORD_HEADER = _RECORD.size + _CRC.size


@dataclasses.dataclass
class Batch:
    """Events of one record.

    Attributes:
      first_sequence: sequence number of the first row; the others follow.
      users: keys of the N rows.
      columns: `time` int64 [N] and every field, strings as int32 codes.
      new: field -> (first code, values): dictionary values that appear here for the first time.
      origin: (client, number) that the batch came with, see laser_jax.vault.origins.
    """

    first_sequence: int
    users: list[Any]
    columns: dict[str, np.ndarray]
    new: dict[str, tuple[int, list[str]]]
    origin: tuple[str, int] | None = None

    def __len__(self) -> int:
        return len(self.users)


@dataclasses.dataclass(frozen=True)
class Acknowledged:
    """How far the log is acknowledged: bytes of the newest file, and the next sequence number."""

    file: int
    offset: int
    next_sequence: int


def log_path(root: str, number: int) -> str:
    """Path of a log file."""
    return os.path.join(root, LOG, f"{number:09d}.log")


def log_numbers(root: str) -> list[int]:
    """Numbers of the log files that are there, ascending."""
    folder = os.path.join(root, LOG)
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted(int(name[: -len(".log")]) for name in names if _NAME.fullmatch(name))


def log_size(root: str) -> int:
    """Bytes of the log files that are there."""
    total = 0
    for number in log_numbers(root):
        with contextlib.suppress(FileNotFoundError):  # its events have become a part meanwhile
            total += os.path.getsize(log_path(root, number))
    return total


def encode_header(number: int, first_sequence: int, schema: int) -> bytes:
    """A file's header; `schema` is the position of the schema in the manifest."""
    header = _FILE.pack(_FILE_MAGIC, number, first_sequence, schema)
    return header + _CRC.pack(crc32c(header))


def encode_record(schema: Schema, batch: Batch) -> bytes:
    """A record's bytes."""
    extra: dict[str, Any] = {"new": {name: list(value) for name, value in batch.new.items()}} if batch.new else {}
    if batch.origin is not None:
        extra["origin"] = list(batch.origin)
    meta = json.dumps(extra).encode()
    pieces = [_CRC.pack(len(meta)), meta]
    if schema.user == "int64":
        pieces.append(np.array(batch.users, np.int64).tobytes())
    else:
        texts = [user.encode() for user in batch.users]
        pieces.append(np.array([len(text) for text in texts], np.uint32).tobytes())
        pieces.extend(texts)
    pieces.append(batch.columns["time"].tobytes())
    pieces.extend(np.ascontiguousarray(batch.columns[field.name]).tobytes() for field in schema.fields)
    body = b"".join(pieces)
    header = _RECORD.pack(_RECORD_MAGIC, len(batch), batch.first_sequence, len(body), crc32c(body))
    return header + _CRC.pack(crc32c(header)) + body


def decode_body(schema: Schema, body: bytes, rows: int, first_sequence: int) -> Batch:
    """The events of a record whose checksum matches."""
    (size,) = _CRC.unpack_from(body)
    meta = json.loads(body[4 : 4 + size])
    at = 4 + size
    if schema.user == "int64":
        users = np.frombuffer(body, np.int64, rows, at).tolist()
        at += 8 * rows
    else:
        ends = np.cumsum(np.frombuffer(body, np.uint32, rows, at), dtype=np.int64)
        at += 4 * rows
        text = body[at : at + int(ends[-1])]
        users = [text[a:b].decode() for a, b in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True)]
        at += len(text)
    columns = {"time": np.frombuffer(body, np.int64, rows, at)}
    at += 8 * rows
    for field in schema.fields:
        count = rows * (field.size or 1)
        values = np.frombuffer(body, field.dtype, count, at)
        columns[field.name] = values if field.size is None else values.reshape(rows, field.size)
        at += count * field.dtype.itemsize
    new = {name: (code, values) for name, (code, values) in meta.get("new", {}).items()}
    origin = meta.get("origin")
    return Batch(first_sequence, users, columns, new, None if origin is None else (origin[0], origin[1]))


class LogFile:
    """A log file opened for reading.

    Attributes:
      number: of the file. first_sequence: of its first record. schema: position of its schema in the manifest.
    """

    def __init__(self, root: str, number: int):
        """Opens the file and reads its header.

        Raises:
          FileNotFoundError: there is none.
          CorruptionError: the header is damaged, or shorter than one.
        """
        self.path = log_path(root, number)
        try:
            self._file = open(self.path, "rb")
        except FileNotFoundError:
            raise
        except OSError as error:
            raise UnavailableError(f"{self.path} cannot be read: {error}") from error
        try:
            self._read_header(number)
        except BaseException:
            self._file.close()
            raise

    def _read_header(self, number: int) -> None:
        data = self._file.read(FILE_HEADER)
        if len(data) < FILE_HEADER:
            raise CorruptionError(f"{self.path}: its header is cut")
        magic, self.number, self.first_sequence, self.schema = _FILE.unpack_from(data)
        if magic != _FILE_MAGIC or _CRC.unpack_from(data, _FILE.size)[0] != crc32c(data[: _FILE.size]):
            raise CorruptionError(f"{self.path}: its header is damaged")
        if self.number != number:
            raise CorruptionError(f"{self.path}: its header says that it is file {self.number}")

    def batches(self, schema: Schema, offset: int, end: int | None = None) -> Iterator[tuple[Batch, int]]:
        """Records from `offset` on, each with the offset behind it.

        Args:
          schema: of the file.
          offset: where a record begins.
          end: where to stop; None reads as far as there are whole records.

        Raises:
          CorruptionError: a record is damaged, or `end` lies beyond the file or inside a record.
        """
        while end is None or offset < end:
            self._file.seek(offset)
            header = self._file.read(RECORD_HEADER)
            if len(header) < RECORD_HEADER:
                break
            magic, rows, first, size, checksum = _RECORD.unpack_from(header)
            if magic != _RECORD_MAGIC or _CRC.unpack_from(header, _RECORD.size)[0] != crc32c(header[: _RECORD.size]):
                raise CorruptionError(f"{self.path}, byte {offset}: the header of a record is damaged; see `repair`")
            body = self._file.read(size)
            if len(body) < size:
                break
            if crc32c(body) != checksum:
                raise CorruptionError(
                    f"{self.path}, byte {offset}: the record of events {first} to {first + rows - 1} is damaged; see "
                    "`repair`"
                )
            offset += RECORD_HEADER + size
            yield decode_body(schema, body, rows, first), offset
        if end is not None and offset != end:
            raise CorruptionError(
                f"{self.path}: {end} bytes of it were acknowledged, whole records are there only up to byte {offset}: "
                "acknowledged events are missing; see `repair`"
            )

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def __enter__(self) -> "LogFile":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def scan_records(path: str) -> Iterator[tuple[int, int, bytes | None]]:
    """(rows, first sequence number, body) of every record of a log file, wherever it lies; for `repair`.

    The body is None if it is all there but damaged. A record that the file's end cuts is left out.
    """
    with open(path, "rb") as file:
        data = file.read()
    at = FILE_HEADER
    magic = _CRC.pack(_RECORD_MAGIC)
    while (at := data.find(magic, at)) >= 0:
        header = data[at : at + RECORD_HEADER]
        if len(header) == RECORD_HEADER and _CRC.unpack_from(header, _RECORD.size)[0] == crc32c(header[: _RECORD.size]):
            _, rows, first, size, checksum = _RECORD.unpack_from(header)
            body = data[at + RECORD_HEADER : at + RECORD_HEADER + size]
            if len(body) == size and crc32c(body) == checksum:
                yield rows, first, body
                at += RECORD_HEADER + size
                continue
            if len(body) == size:
                yield rows, first, None
        at += 1


def encode_acknowledged(value: Acknowledged) -> bytes:
    """The content of `acknowledged`."""
    data = _ACKNOWLEDGED.pack(b"LJXVACK1", value.file, value.offset, value.next_sequence)
    return data + _CRC.pack(crc32c(data))


def read_acknowledged(root: str) -> Acknowledged | None:
    """How far the log is acknowledged; None if that is not known.

    It is not if nothing was ever appended, if the file was lost with a crash of the machine, if it is damaged, or if
    the writer was stopped amid changing it. In all these cases what is in whole records was durable.
    """
    path = os.path.join(root, LOG, "acknowledged")
    # The writer changes it in place: a read may meet half of a change.
    for _ in range(100):
        try:
            with open(path, "rb") as file:
                data = file.read()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UnavailableError(f"{path} cannot be read: {error}") from error
        if len(data) == _ACKNOWLEDGED.size + _CRC.size:
            magic, number, offset, sequence = _ACKNOWLEDGED.unpack_from(data)
            if magic == b"LJXVACK1" and _CRC.unpack_from(data, _ACKNOWLEDGED.size)[0] == crc32c(data[:-4]):
                return Acknowledged(number, offset, sequence)
    return None
