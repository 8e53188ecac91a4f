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

from laser_jax.vault.dictionary import Dictionary
from laser_jax.vault.errors import CorruptionError, UnavailableError
from laser_jax.vault.files import crc32c, sync_path

_HEAD = struct.Struct("<II")


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
        try:
            with open(self.path, "rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return
        except OSError as error:
            raise UnavailableError(f"{self.path} cannot be read: {error}") from error
        at = 0
        while at + _HEAD.size <= len(data):
            size, checksum = _HEAD.unpack_from(data, at)
            body = data[at + _HEAD.size : at + _HEAD.size + size]
            if len(body) < size:
                break
            if not size or crc32c(body) != checksum:  # zeros would match
                raise CorruptionError(f"{self.path}, byte {self._offset + at}: a record is damaged")
            field, code, values = json.loads(body)
            self.dictionaries.setdefault(field, Dictionary()).extend(code, values)
            at += _HEAD.size + size
        self._offset += at

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
                body = json.dumps([field, len(dictionary), new]).encode()
                records.append(_HEAD.pack(len(body), crc32c(body)) + body)
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
