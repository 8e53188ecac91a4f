"""What was asked and answered, line by line: all that it takes to ask again, and to train on it.

    DIR/20261125T204210-000000.jsonl    {"user": 4711, "time": ..., "as_of": ..., "candidates": {field: [...]},
                                         "context": {field: value}, "logits": [...], "model": ..., "version": ...}

No history is kept: (user, time, as_of) says which events were seen. Strings are kept as they are, since their codes are
a vault's own; "unknown": {"candidates.FIELD": [places]} names those that the vault had never met.
"""

import contextlib
import errno
import glob
import json
import os
import queue
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from laser_jax.serving.ranker import CheckedRequest, Ranking

#: What a line holds.
_KINDS = {
    "user": (int, str),
    "time": (int,),
    "as_of": (int,),
    "candidates": (dict,),
    "context": (dict,),
    "logits": (list,),
    "model": (str,),
    "version": (str,),
}
_FILE_BYTES = 64 << 20
_WAITING = 10_000


class RequestLog:
    """Writes lines in a thread of its own, so that nobody who ranks waits for a disk.

    Attributes:
      written, lost: lines so far; lost are those for which there was no room in the queue, or on the disk.
    """

    def __init__(self, folder: str):
        """Raises OSError: nothing can be written into `folder`."""
        self.folder, self.written, self.lost = folder, 0, 0
        self._queue: queue.Queue = queue.Queue(_WAITING)
        self._number = 0
        self._file: Any = None  # unbuffered
        self._end = 0  # of its last whole line
        self._begin_file()
        self._thread = threading.Thread(target=self._run, name="request-log", daemon=True)
        self._thread.start()

    def add(self, request: CheckedRequest, answer: Ranking, model: str, version: str) -> None:
        """One request, its answer, and whose it is. Never waits."""
        try:
            self._queue.put_nowait((request, answer, {"model": model, "version": version}))
        except queue.Full:
            self.lost += 1

    def close(self) -> None:
        """Writes what waits."""
        self._queue.put(None)
        self._thread.join()
        self._end_file()

    def _run(self) -> None:
        while (entry := self._queue.get()) is not None:
            try:
                self._write(self._line(*entry).encode())
                self.written += 1
            except OSError:
                self.lost += 1

    def _write(self, line: bytes) -> None:
        """Adds a line: whole, or not at all."""
        # A file without a name is one that somebody has removed.
        if self._file is None or self._end > _FILE_BYTES or not os.fstat(self._file.fileno()).st_nlink:
            self._begin_file()
        try:
            done = self._file.write(line)
            if done < len(line):
                raise OSError(errno.ENOSPC, f"{done} of {len(line)} bytes were written")
        except OSError:
            self._cut()
            raise
        self._end += len(line)

    def _cut(self) -> None:
        """Takes away what there is of a line; where that fails, it stays the last one of its file."""
        try:
            self._file.truncate(self._end)
            self._file.seek(self._end)
        except OSError:
            self._end_file()

    def _begin_file(self) -> None:
        self._end_file()
        name = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{os.getpid()}-{self._number:06d}.jsonl"
        self._number += 1
        os.makedirs(self.folder, exist_ok=True)
        self._file, self._end = open(os.path.join(self.folder, name), "xb", buffering=0), 0

    def _end_file(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):  # nothing is buffered
                file.close()

    def _line(self, request: CheckedRequest, answer: Ranking, said: dict[str, str]) -> str:
        asked = {
            side: {name: request.texts.get((side, name), values).tolist() for name, values in columns.items()}
            for side, columns in (("candidates", request.candidates), ("context", request.context))
        }
        entry: dict[str, Any] = {
            "user": int(request.user) if isinstance(request.user, np.integer) else request.user,
            "time": answer.time,
            "as_of": answer.as_of,
            "candidates": asked["candidates"],
            "context": {name: values[0] for name, values in asked["context"].items()},
            "logits": [float(f"{logit:.9g}") for logit in answer.logits.tolist()],
        }
        if request.unknown:
            entry["unknown"] = {f"{side}.{name}": places for (side, name), places in request.unknown.items()}
        return json.dumps(entry | said, default=int) + "\n"


def read_log(folder: str) -> Iterator[dict[str, Any]]:
    """The lines of all files, oldest first. A line that a crash cut at the end of a file is left out.

    Raises:
      ValueError: a line is damaged; it names the file and the line.
    """
    names = sorted(glob.glob(os.path.join(folder, "*.jsonl")))
    if not names:
        raise ValueError(f"{folder} holds no request log (*.jsonl)")
    for name in names:
        with open(name, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    yield _entry(line)
                except ValueError as error:
                    raise ValueError(f"{name}, line {number} is damaged: {error}") from error


def _entry(line: bytes) -> dict[str, Any]:
    """One line; ValueError if it is none of ours."""
    entry = json.loads(line.decode())
    if not isinstance(entry, dict):
        raise ValueError(f"{line.decode().strip()!r} is no JSON object")
    for name, kinds in _KINDS.items():
        if type(entry.get(name)) not in kinds:
            raise ValueError(f"its {name!r} is {entry.get(name)!r}")
    return entry
