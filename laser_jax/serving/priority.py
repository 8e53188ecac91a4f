"""Which of a server's threads go first."""

import os

import jax

#: What Linux says of the process's threads, and how those of XLA's pool are called.
_THREADS, _POOL = "/proc/self/task", "tf_XLAEigen"
#: Nice value of threads that compute: a third of the weight of the others.
_COMPUTING = 5


def let_others_first() -> int:
    """Has the threads that XLA computes with give way to those that hear calls and read histories.

    With every core busy, a thread that wants one for a fraction of a millisecond would wait some for it: the slice of
    time of one that computes.

    Returns:
      How many threads there are of it; none where this is not Linux.
    """
    jax.devices()  # makes them
    threads = os.listdir(_THREADS) if os.path.isdir(_THREADS) else []
    computing = [int(thread) for thread in threads if _name(thread) == _POOL]
    for thread in computing:
        os.setpriority(os.PRIO_PROCESS, thread, _COMPUTING)
    return len(computing)


def _name(thread: str) -> str:
    try:
        with open(os.path.join(_THREADS, thread, "comm")) as file:
            return file.read().strip()
    except FileNotFoundError:  # it has ended since
        return ""
