"""Several processes that train together: how they start, agree, and learn that one of them is gone.

Everything here does nothing, at no cost, where there is one process.
"""

import faulthandler
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

logger = logging.getLogger(__name__)

EXIT_LOST_PEER = 75  # EX_TEMPFAIL: give the same commands again
OWN_FAULTS = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED")
RESTART = "start all processes again with the same commands: they go on from the newest checkpoint"


def connect(coordinator: str | None, num_processes: int | None, process_id: int | None, heartbeat_s: int) -> None:
    """Joins the other processes, if there are any; before anything else touches jax.

    Args:
      coordinator: HOST:PORT of process 0, with the number of processes and the own one. Without it the cluster is asked
        (TPU pods, SLURM, Open MPI, GKE), if the environment names one.
      heartbeat_s: seconds after which a process that is not heard of is dead.

    Raises:
      ValueError: only some of the three are given.
    """
    given = [coordinator is not None, num_processes is not None, process_id is not None]
    if any(given) and not all(given):
        raise ValueError("give --coordinator, --num_processes and --process_id together, or none of them")
    if not any(given) and not _in_cluster(os.environ):
        return
    jax.distributed.initialize(
        coordinator, num_processes, process_id, heartbeat_timeout_seconds=heartbeat_s, shutdown_timeout_seconds=30
    )
    logger.info("process %d of %d, %d devices", jax.process_index(), jax.process_count(), jax.device_count())


def _in_cluster(environment: dict[str, str]) -> bool:
    """Whether a scheduler started several of us."""
    several = ["OMPI_COMM_WORLD_SIZE", "MEGASCALE_NUM_SLICES"]
    if "SLURM_STEP_NODELIST" in environment:  # by srun; a batch script alone is one process
        several.append("SLURM_NTASKS")
    if any(environment.get(name, "1").isdigit() and int(environment.get(name, "1")) > 1 for name in several):
        return True
    return "," in environment.get("TPU_WORKER_HOSTNAMES", "")


def is_first() -> bool:
    """Whether this process writes logs, reports and what else there is one of."""
    return jax.process_index() == 0


def agree(values: list[int]) -> list[int]:
    """The largest of each value over all processes, which all call this."""
    if jax.process_count() == 1:
        return values
    return multihost_utils.process_allgather(np.asarray(values, np.int32)).max(axis=0).tolist()


def of_first(numbers: np.ndarray) -> np.ndarray:
    """int64 [N]: those of the first process; all call with as many."""
    # As halves: jax would cut int64 to 32 bits.
    return gather(numbers.view(np.uint32))[0].view(np.int64)


def gather(array: np.ndarray) -> np.ndarray:
    """[processes, ...]: what each process has, which all call with the same shape."""
    if jax.process_count() == 1:
        return array[None]
    return multihost_utils.process_allgather(array)


def local(array: jax.Array) -> np.ndarray:
    """This process's part of an array whose leading dimension lies over all devices, in their order."""
    if jax.process_count() == 1:
        return np.asarray(array)
    shards = sorted(array.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    return np.concatenate([np.asarray(shard.data) for shard in shards])


class Stopped(Exception):
    """SIGTERM came, and the run ended in order; the message says where it goes on."""


class Peers:
    """The processes of this run. SIGTERM to any of them asks all to save and stop, at the same batch.

    Used as a context; only the main thread can install the handler.
    """

    def __init__(self):
        self._asked = False
        self._agreed = False

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(self, *error):
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._before)

    def _handle(self, number, frame):
        self._asked = True

    def agree(self, values: list[int]) -> list[int]:
        """The largest of each value over all; says with it whether this one was asked to stop."""
        *agreed, asked = agree([*values, int(self._asked)])
        self._agreed = bool(asked)
        return agreed

    def union(self, ids: np.ndarray) -> np.ndarray:
        """The distinct ids [U] of all, int64, ascending."""
        (longest,) = agree([len(ids)])
        # As halves: jax would cut int64 to 32 bits. What fills up is the count of real ones, in front.
        block = np.zeros((longest + 1, 2), np.uint32)
        block[0, 0] = len(ids)
        block[1 : len(ids) + 1] = np.ascontiguousarray(ids, np.int64).view(np.uint32).reshape(-1, 2)
        found = [part[1 : int(part[0, 0]) + 1] for part in gather(block)]
        return np.unique(np.ascontiguousarray(np.concatenate(found)).view(np.int64).ravel())

    @property
    def asked_to_stop(self) -> bool:
        """Alike on all processes, as of the newest `agree`."""
        return self._agreed if jax.process_count() > 1 else self._asked


class Watchdog:
    """Ends this process when nothing has moved for too long: a peer hangs, or its machine went away in silence.

    Args:
      limit_s: seconds without a call of `moved`.
      stop: what ends the process.
    """

    def __init__(self, limit_s: float, stop: Callable[[int], None] = os._exit):
        self._limit, self._stop = limit_s, stop
        self._since, self._what = time.monotonic(), "start"
        self._closed = threading.Event()

    def __enter__(self):
        threading.Thread(target=self._watch, daemon=True, name="watchdog").start()
        return self

    def __exit__(self, *error):
        self._closed.set()

    def moved(self, what: str) -> None:
        """Something was done; `what` is what begins now."""
        self._since, self._what = time.monotonic(), what

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self._limit / 4)):
            still = time.monotonic() - self._since
            if still > self._limit:
                sys.stderr.write(
                    f"process {jax.process_index()} of {jax.process_count()}: nothing has moved for {still:.0f} s in "
                    f"'{self._what}' (train.patience_s={self._limit:g}): another process hangs or is gone; {RESTART}\n"
                )
                faulthandler.dump_traceback(file=sys.stderr)
                sys.stderr.flush()
                self._stop(EXIT_LOST_PEER)
                return


class LastWords:
    """Says why, if this process ends without a word: its runtime aborts it, in one way or another, once a peer is gone.

    A small process holds the other end of a pipe. If the pipe closes before `__exit__`, it speaks.
    """

    def __enter__(self):
        text = (
            f"process {jax.process_index()} of {jax.process_count()} ended without a word: it was killed, or its "
            f"runtime ended it because another process is gone; {RESTART}"
        )
        script = "import sys\nif sys.stdin.read() != 'bye': print(sys.argv[1], file=sys.stderr, flush=True)"
        self._speaker = subprocess.Popen(
            [sys.executable, "-S", "-c", script, text], stdin=subprocess.PIPE, text=True, start_new_session=True
        )
        return self

    def __exit__(self, *error):
        self._speaker.communicate("bye")


def lost_peer(error: Exception) -> None:
    """Ends this process, with a message, after a collective failed because another process is gone.

    At once: the runtime's own orderly end would wait for the dead. What is no other's fault is left to be raised.
    """
    if any(kind in str(error) for kind in OWN_FAULTS):
        return
    traceback.print_exception(error)
    sys.stderr.write(
        f"process {jax.process_index()} of {jax.process_count()}: another process is gone ({_first_line(error)}); "
        f"{RESTART}\n"
    )
    sys.stderr.flush()
    os._exit(EXIT_LOST_PEER)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:300] if str(error) else type(error).__name__
