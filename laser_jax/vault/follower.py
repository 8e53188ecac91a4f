"""Reads the log of a vault that somebody else may be writing: everything acknowledged, as a tail in memory."""

import os
from typing import Any

from laser_jax.schema import Schema
from laser_jax.vault.dictionary import Dictionary
from laser_jax.vault.errors import CorruptionError
from laser_jax.vault.log import FILE_HEADER, LogFile, log_numbers, log_path, read_acknowledged
from laser_jax.vault.storage import LocalStorage
from laser_jax.vault.tail import Tail


class Follower:
    """Follows the log from where a manifest says that parts end.

    Attributes:
      tail: the events read so far.
      file, offset: how far the log was read; the next record begins there.
    """

    def __init__(
        self, storage: LocalStorage, manifest: dict[str, Any], schema: Schema, dictionaries: dict[str, Dictionary]
    ):
        self._root = storage.root
        self._schema = schema
        self._current = len(manifest["schemas"]) - 1
        self._dictionaries = dictionaries
        self.tail = Tail(schema, manifest["next_sequence"])
        self.file: int = manifest["log"]["first"]
        self.offset = FILE_HEADER

    def follow(self) -> bool:
        """Takes in what has been acknowledged since; False if the log has moved on and the manifest must be read anew.

        Raises:
          CorruptionError: an acknowledged record is damaged or missing.
        """
        end = read_acknowledged(self._root)
        if end is None:
            numbers = [number for number in log_numbers(self._root) if number >= self.file]
            # Once more: a vault's first writer makes it, and the first log file after it.
            end = read_acknowledged(self._root)
            if end is None:
                # Gone with a crash of the machine, perhaps: it is not flushed. Whole records were durable then.
                self.replay(numbers)
                return True
        if end.file < self.file:
            return True
        while self.file <= end.file:
            last = self.file == end.file
            if last and end.offset <= self.offset and end.next_sequence == self.tail.next_sequence:
                return True
            try:
                self._read(end.offset if last else None)
            except FileNotFoundError:
                return False
            if last:
                break
            self.file += 1
            self.offset = FILE_HEADER
        if self.tail.next_sequence != end.next_sequence:
            raise CorruptionError(
                f"{log_path(self._root, self.file)}: the log ends before event {self.tail.next_sequence}, acknowledged "
                f"were events up to {end.next_sequence - 1}; see `repair`"
            )
        return True

    def replay(self, numbers: list[int]) -> dict[int, int]:
        """Takes in whole records beyond what was acknowledged too: they are durable, the crash came before the word.

        Args:
          numbers: of the log files from `file` on, in order.

        Returns:
          Where the last whole record of each file ends.

        Raises:
          CorruptionError: a file is missing, a record damaged, or cut where it cannot have been by a crash.
        """
        ends = {number: self._end_of(number) for number in numbers if number < self.file}
        for number in numbers:
            if number < self.file:
                continue
            if number > self.file:
                self.file, self.offset = number, FILE_HEADER
            try:
                self._read(None)
            except FileNotFoundError as error:
                raise CorruptionError(f"{log_path(self._root, number)} is not a log file of this vault") from error
            ends[number] = self.offset
            if number != numbers[-1] and self.offset != self._end_of(number):
                raise CorruptionError(
                    f"{log_path(self._root, number)} is cut at byte {self.offset}, though another one follows; see "
                    "`repair`"
                )
        return ends

    def _end_of(self, number: int) -> int:
        return os.path.getsize(log_path(self._root, number))

    def _read(self, end: int | None) -> None:
        """Reads on in the current file."""
        with LogFile(self._root, self.file) as file:
            if self.offset == FILE_HEADER and file.first_sequence != self.tail.next_sequence:
                raise CorruptionError(
                    f"{file.path}: begins with event {file.first_sequence}, the log before it ends before event "
                    f"{self.tail.next_sequence}; see `repair`"
                )
            if file.schema != self._current:
                # Written after the schema changed: the manifest is not the newest.
                raise FileNotFoundError(file.path)
            for batch, offset in file.batches(self._schema, self.offset, end):
                if batch.first_sequence != self.tail.next_sequence:
                    raise CorruptionError(
                        f"{file.path}, byte {self.offset}: events {self.tail.next_sequence} to "
                        f"{batch.first_sequence - 1} are missing; see `repair`"
                    )
                for name, (code, values) in batch.new.items():
                    self._dictionaries[name].extend(code, values)
                self.tail.append(batch.users, batch.columns, batch.origin)
                self.offset = offset
