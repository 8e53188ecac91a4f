"""Codes of string fields that hold for all partitions of a vault: a small append-only file beside them.

Every partition has codes of its own. A string gets its common code before any partition may store it, so that a reader
can always translate. The file holds records: u32 length, u32 crc32c, JSON [field, first code, values]; one that is cut
at the end was never used.
"""

import contextlib
import json
import os
import struct
import threading
from typing import Any

from laser_jax.vault.dictionary import Dictionary
from laser_jax.vault.errors import CorruptionError, UnavailableError
from laser_jax.vault.files import crc32c, sync_path

CODES = "codes.log"
_HEAD = struct.Struct("<II")
#: Bytes of a value in a record, at least.
_LEAST_BYTES = 4


class Codebook:
    """Dictionaries of the string fields of a partitioned vault. Safe to share among threads."""

    def __init__(self, path: str, fields: list[str]):
        self.path = path
        self.dictionaries = {field: Dictionary() for field in fields}
        self._offset = 0
        self._lock = threading.RLock()
        self.follow()

    def follow(self) -> None:
        """Takes in what was added to the file.

        Raises:
          CorruptionError: a record is damaged.
        """
        with self._lock:
            self._follow()

    def _follow(self) -> None:
        data = _read(self.path, self._offset)
        at = 0
        while at < len(data):
            body = _body_at(data, at)
            if body is None:
                if _is_cut(data, at):
                    break
                raise CorruptionError(f"{self.path}, byte {self._offset + at}: a record is damaged; see `repair`")
            field, code, values = json.loads(body)
            self.dictionaries.setdefault(field, Dictionary()).extend(code, values)
            at += _HEAD.size + len(body)
        self._offset += at

    def check(self, vault: Any) -> None:
        """Raises CorruptionError if strings of a partition have no code: who gives new ones would give theirs anew."""
        for field, dictionary in self.dictionaries.items():
            if field in vault.schema.names:
                missing = [value for value in vault.dictionary(field).tolist() if dictionary.code(value) < 0]
                if missing:
                    raise CorruptionError(
                        f"{self.path} is cut or missing: {len(missing)} strings of field {field!r} in {vault.path} "
                        f"have no code, such as {missing[0]!r}; see `repair`"
                    )

    def add(self, values: dict[str, list[str]]) -> None:
        """Gives codes to new values, durably. For the one writer.

        Raises:
          UnavailableError: the storage refused; no code was given.
        """
        with self._lock:
            self._add(values)

    def _add(self, values: dict[str, list[str]]) -> None:
        records = []
        for field, listed in values.items():
            dictionary = self.dictionaries[field]
            new = [value for value in dict.fromkeys(listed) if dictionary.code(value) < 0]
            if new:
                records.append(_record(field, len(dictionary), new))
        if not records:
            return
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            data = b"".join(records)
            if os.pwrite(descriptor, data, self._offset) != len(data):
                raise OSError("no room for new codes")
            os.ftruncate(descriptor, self._offset + len(data))
            os.fsync(descriptor)
            sync_path(os.path.dirname(self.path))
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, self._offset)
            raise UnavailableError(f"{self.path} cannot be written: {error}") from error
        finally:
            os.close(descriptor)
        self._follow()


def mended_codes(path: str, strings: dict[str, list[str]]) -> tuple[bytes, int, int]:
    """What a damaged codebook is to hold: no code gets another meaning.

    What is whole keeps its codes. A code whose string is lost means "<lost CODE>"; strings that have lost theirs get
    new ones, behind all that may have been given.

    Args:
      path: of the file.
      strings: of each string field, all that the partitions hold.

    Returns:
      The file's new bytes, how many codes are lost at most, and how many strings have new ones.

    Raises:
      CorruptionError: the file was cut or removed, so nobody can tell which codes were given.
    """
    data = _read(path, 0)
    records: list[bytes] = []
    known: dict[str, Dictionary] = {field: Dictionary() for field in strings}
    ends, lost = dict.fromkeys(strings, 0), dict.fromkeys(strings, 0)
    damaged: list[tuple[int, int]] = []

    def take(field: str, code: int, values: list[str]) -> None:
        if values:
            records.append(_record(field, code, values))
            known[field].extend(code, values)

    def lose(field: str, end: int) -> None:
        size = len(known[field])
        take(field, size, [f"<lost {code}>" for code in range(size, end)])
        lost[field] += len(known[field]) - size

    at, cut = 0, False
    while at < len(data):
        body = _body_at(data, at)
        end = _next_record(data, at + 1) if body is None else at + _HEAD.size + len(body)
        if body is None and _has_wrong_length(data[at:end]):
            body = data[at + _HEAD.size : end]
        if body is not None:
            field, code, values = json.loads(body)
            known.setdefault(field, Dictionary())
            lost.setdefault(field, 0)
            lose(field, code)
            take(field, code, values)
            ends[field] = end
        elif _is_cut(data, at):
            cut = True
        else:
            damaged.append((at, end))
        at = end
    without = 0
    for field, dictionary in known.items():
        # What a damaged stretch behind its last record held, it does not say for sure, nor how many.
        given = sum(stop - start for start, stop in damaged if start >= ends[field]) // _LEAST_BYTES
        missing = [value for value in strings.get(field, ()) if dictionary.code(value) < 0]
        if missing and (cut or len(missing) > lost[field] + given):
            raise CorruptionError(
                f"{path} is cut or missing: {len(missing)} strings of field {field!r} have lost their codes, such as "
                f"{missing[0]!r}, and nobody can tell which codes were given; put the file back from a backup that is "
                "as new as the vault, and repair again; without one, write the events of the partitions, each of which "
                "opens alone, into a new vault"
            )
        lose(field, len(dictionary) + given)
        take(field, len(dictionary), missing)
        without += len(missing)
    return b"".join(records), sum(lost.values()), without


def _read(path: str, offset: int) -> bytes:
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read()
    except FileNotFoundError:  # no string has a code yet
        return b""
    except OSError as error:
        raise UnavailableError(f"{path} cannot be read: {error}") from error


def _record(field: str, code: int, values: list[str]) -> bytes:
    body = json.dumps([field, code, values]).encode()
    return _HEAD.pack(len(body), crc32c(body)) + body


def _body_at(data: bytes, at: int) -> bytes | None:
    """What the record that begins at a byte says; None if no whole one does."""
    if at + _HEAD.size > len(data):
        return None
    size, checksum = _HEAD.unpack_from(data, at)
    if not size or at + _HEAD.size + size > len(data):  # the checksum of nothing would match zeros
        return None
    body = data[at + _HEAD.size : at + _HEAD.size + size]
    return body if crc32c(body) == checksum else None


def _next_record(data: bytes, at: int) -> int:
    """Where the next whole record begins, or the data end."""
    return next((place for place in range(at, len(data)) if _body_at(data, place) is not None), len(data))


def _has_wrong_length(record: bytes) -> bool:
    """Whether nothing but the length is damaged of a record."""
    return len(record) > _HEAD.size and crc32c(record[_HEAD.size :]) == _HEAD.unpack_from(record)[1]


def _is_cut(data: bytes, at: int) -> bool:
    """Whether what begins at a byte, and is no whole record, is one that a crash cut: no more of it was ever there."""
    if at + _HEAD.size > len(data):
        return True
    beyond = at + _HEAD.size + _HEAD.unpack_from(data, at)[0] > len(data)
    return beyond and _next_record(data, at + 1) == len(data) and not _has_wrong_length(data[at:])
