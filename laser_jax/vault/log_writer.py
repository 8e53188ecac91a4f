"""Writes log files, durably; and brings in order what a crash left of them."""

import contextlib
import mmap
import os
from collections.abc import Callable
from typing import Any

from laser_jax.vault.dictionary import Dictionary
from laser_jax.vault.errors import CorruptionError, UnavailableError
from laser_jax.vault.files import sync_path
from laser_jax.vault.follower import Follower
from laser_jax.vault.format import LOG
from laser_jax.vault.log import (
    FILE_HEADER,
    Acknowledged,
    LogFile,
    encode_acknowledged,
    encode_header,
    log_numbers,
    log_path,
)
from laser_jax.vault.state import State
from laser_jax.vault.storage import LocalStorage
from laser_jax.vault.tail import Tail


class LogWriter:
    """The end of the log.

    Attributes:
      files: (number, bytes) of the files since `begin_files`.
      bytes_written: of records.
    """

    def __init__(self, root: str, refuse: Callable[[str], None]):
        """`refuse` is called if it is no longer known what is on the disk."""
        self._root = root
        self._refuse = refuse
        self._descriptor = -1
        self._mark: mmap.mmap | None = None
        self._number = 0
        self._offset = 0
        self.files: list[tuple[int, int]] = []
        self.bytes_written = 0

    def recover(self, storage: LocalStorage, state: State, dictionaries: dict[str, Dictionary]) -> Tail:
        """The tail that the log holds; cuts off what a crash left of an event that nobody was told of.

        Raises:
          CorruptionError: an acknowledged record is damaged or missing.
          UnavailableError: the storage refused.
        """
        first = state.manifest["log"]["first"]
        follower = Follower(storage, state.manifest, state.schema, dictionaries)
        try:
            numbers = [number for number in log_numbers(self._root) if number >= first]
            if numbers and os.path.getsize(log_path(self._root, numbers[-1])) < FILE_HEADER:
                # Its header was not yet whole: nothing was ever acknowledged there.
                os.remove(log_path(self._root, numbers.pop()))
            if not follower.follow():
                raise CorruptionError(f"{log_path(self._root, follower.file)} is missing; see `repair`")
            ends = follower.replay(numbers)
            if numbers:
                path = log_path(self._root, numbers[-1])
                if os.path.getsize(path) > ends[numbers[-1]]:
                    os.truncate(path, ends[numbers[-1]])
                sync_path(path)
                self._acknowledge(Acknowledged(numbers[-1], ends[numbers[-1]], follower.tail.next_sequence))
        except OSError as error:
            raise UnavailableError(f"{self._root}: its log cannot be read: {error}") from error
        self.files = [(number, ends[number]) for number in numbers]
        self._number = max([first, *(number + 1 for number in log_numbers(self._root))])
        return follower.tail

    def write(self, data: bytes, first_sequence: int, next_sequence: int, schema: int) -> None:
        """Appends records: all of them, durably, or none and an error.

        Args:
          data: the records.
          first_sequence: of the first of them. next_sequence: behind the last.
          schema: position of their schema in the manifest.

        Raises:
          OSError: the storage refused.
        """
        if self._descriptor < 0:
            self._open_file(first_sequence, schema)
        try:
            view, at = memoryview(data), self._offset
            while view:
                written = os.pwrite(self._descriptor, view, at)
                view, at = view[written:], at + written
        except OSError:
            try:
                os.ftruncate(self._descriptor, self._offset)
            except OSError as error:
                self._refuse(f"its log could not be put right after a failed write ({error})")
            raise
        try:
            os.fdatasync(self._descriptor)
        except OSError as error:
            # What is on the disk now is unknown: nothing after it may be acknowledged. The records are cut off, so that
            # whoever writes these events again does not write them twice.
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, self._offset)
            self._refuse(f"its log could not be flushed ({error})")
            raise
        self._offset = at
        self.bytes_written += len(data)
        self.files[-1] = (self._number, self._offset)
        self._acknowledge(Acknowledged(self._number, self._offset, next_sequence))

    def begin_files(self) -> int:
        """What is written next goes into a new file; its number."""
        self._close_file()
        if self.files and self.files[-1][0] >= self._number:
            self._number = self.files[-1][0] + 1
        self.files = []
        return self._number

    def close(self) -> None:
        """Closes everything."""
        self._close_file()
        if self._mark is not None:
            self._mark.close()
            self._mark = None

    def _open_file(self, first_sequence: int, schema: int) -> None:
        path = log_path(self._root, self._number)
        header = encode_header(self._number, first_sequence, schema)
        folder = os.path.dirname(path)
        os.makedirs(folder, exist_ok=True)
        # Before the file is there: without it a reader takes every whole record for acknowledged.
        self._acknowledge(Acknowledged(self._number, 0, first_sequence))
        if os.path.exists(path):
            raise OSError(f"{path} is there already")
        descriptor = _create(path, header)
        try:
            sync_path(folder)
            sync_path(self._root)
        except OSError:
            os.close(descriptor)
            os.remove(path)
            raise
        self._descriptor, self._offset = descriptor, len(header)
        self.files.append((self._number, self._offset))

    def _acknowledge(self, value: Acknowledged) -> None:
        """Says how far readers may read; needs no flush, see laser_jax.vault.log."""
        data = encode_acknowledged(value)
        if self._mark is None:
            path = os.path.join(self._root, LOG, "acknowledged")
            if os.path.exists(path) and os.path.getsize(path) == len(data):
                descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            else:
                descriptor = _create(path, data)
            try:
                # Mapped: a write would change the file's time, which the next flush of the log would have to record.
                self._mark = mmap.mmap(descriptor, len(data))
            finally:
                os.close(descriptor)
        self._mark[:] = data

    def _close_file(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _create(path: str, data: bytes) -> int:
    """Creates a file that is never seen without its content; gives its descriptor."""
    unfinished = os.path.join(os.path.dirname(path), "unfinished")
    descriptor = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        if os.pwrite(descriptor, data, 0) != len(data):
            raise OSError(f"no room for the first bytes of {path}")
        os.fsync(descriptor)
        os.rename(unfinished, path)
    except OSError:
        os.close(descriptor)
        os.remove(unfinished)
        raise
    return descriptor


def log_keys(root: str, kept: int, schemas: list[Any], dictionaries: dict[str, Dictionary], window: Any) -> None:
    """Takes the keys of the events in the log files from number `kept` on into a window of repeated events."""
    for number in log_numbers(root):
        if number < kept:
            continue
        with LogFile(root, number) as file:
            if file.schema < len(schemas) - 1 and schemas[-1].event_key is None:
                continue  # events of other fields: none of today's can repeat one
            # All that is there at this point is closed: an end inside a record is damage.
            for batch, _ in file.batches(schemas[file.schema], FILE_HEADER, file.size):
                columns: dict[str, Any] = dict(batch.columns)
                for name, dictionary in dictionaries.items():
                    if name in columns:
                        columns[name] = dictionary.array[columns[name]].tolist()
                window.add(window.keys(batch.users, columns))
