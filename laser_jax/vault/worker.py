"""Runs tasks in a process of its own, so that making parts never takes Python's lock from those who read.

The process reads tasks from its input and answers each on its output; it ends when the input does. Both ends are one
program's, over a private pipe.
"""

import contextlib
import os
import pickle
import queue
import struct
import subprocess
import sys
import threading
from typing import Any, BinaryIO

from laser_jax.vault.errors import UnavailableError, VaultError

_SIZE = struct.Struct("<Q")
#: Below everything that answers somebody.
_NICENESS = 10


class Worker:
    """A worker process, started with the first task. One task at a time."""

    def __init__(self, lock_descriptor: int):
        """`lock_descriptor` is the writer's lock."""
        self._lock_descriptor = lock_descriptor
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def run(self, task: Any) -> Any:
        """The result of task.run() in the worker.

        Raises:
          VaultError: what the task raised.
          UnavailableError: the worker died.
        """
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                command = [sys.executable, "-c", "from laser_jax.vault.worker import main; main()"]
                # With the writer's lock in its hands: nobody else may write before this process has ended too.
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=(self._lock_descriptor,)
                )
            try:
                _send(self._process.stdin, task)
                done, value = _receive(self._process.stdout)
            except BaseException as error:
                # Its answer, if one still comes, must never be taken for that to the next task.
                self._process.kill()
                status = self._end()
                if isinstance(error, (OSError, EOFError)):
                    raise UnavailableError(f"the process that makes parts died (status {status})") from error
                raise
        if done:
            return value
        raise value

    def stop(self) -> None:
        """Ends the worker at once: the task at hand, if there is one, fails with UnavailableError."""
        process = self._process
        if process is not None:
            process.terminate()

    def close(self) -> None:
        """Ends the worker, after the task at hand."""
        with self._lock:
            if self._process is not None:
                self._end()

    def _end(self) -> int:
        """Closes the pipes; the process' status, once it has ended."""
        process = self._process
        with contextlib.suppress(BrokenPipeError):  # what it was not sent any more
            process.stdin.close()
        status = process.wait()
        process.stdout.close()
        self._process = None
        return status


def _send(stream: BinaryIO, value: Any) -> None:
    data = pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
    stream.write(_SIZE.pack(len(data)))
    stream.write(data)
    stream.flush()


def _receive(stream: BinaryIO) -> Any:
    header = stream.read(_SIZE.size)
    if len(header) < _SIZE.size:
        raise EOFError
    (size,) = _SIZE.unpack(header)
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return pickle.loads(data)


def main() -> None:
    """Answers tasks until the input ends."""
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    # Whatever is printed must not get among the answers.
    sys.stdout = sys.stderr
    os.nice(_NICENESS)
    tasks: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def listen() -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                tasks.put(_receive(requests))
        # The writer has closed the pipe, or is dead: what is half done is nobody's.
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    while True:
        task = tasks.get()
        try:
            answer = (True, task.run())
        except (VaultError, OSError) as error:
            answer = (False, error if isinstance(error, VaultError) else UnavailableError(str(error)))
        try:
            _send(answers, answer)
        except BrokenPipeError:  # the writer died before `listen` could see it
            os._exit(0)
