"""One run at a time in a workdir: a second one would clear away the checkpoint that the first is writing."""

import fcntl
import logging
import os
import time

from laser_jax import hosts

logger = logging.getLogger(__name__)

NAME = "lock"
_PAUSE_S = 0.5


class WorkdirLock:
    """Held by the first process of a run until it ends, however it ends. Used as a context."""

    def __init__(self, workdir: str, peers: hosts.Peers):
        self._path, self._peers = os.path.join(workdir, NAME), peers
        self._descriptor = -1

    def __enter__(self) -> "WorkdirLock":
        """Waits while another run has it; all processes of this one come here.

        Raises:
          hosts.Stopped: SIGTERM came meanwhile.
          OSError: the workdir cannot be written, or its storage has no locks.
        """
        if hosts.is_first():
            os.makedirs(os.path.dirname(self._path), exist_ok=True)
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        told = False
        while self._peers.agree([int(not self._taken())]) != [0]:
            if self._peers.asked_to_stop:
                self.__exit__()
                raise hosts.Stopped(f"SIGTERM while another run held {self._path}")
            if hosts.is_first() and not told:
                told = True
                logger.warning("%s is held by another run in this workdir: waiting until that ends", self._path)
            time.sleep(_PAUSE_S)
        return self

    def __exit__(self, *error) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _taken(self) -> bool:
        if self._descriptor >= 0:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        return True
