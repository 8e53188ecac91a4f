"""What a server does about memory when a model has come or gone."""

import ctypes
import gc

#: glibc's numbers of settings: how much free memory at the end is kept, and how large a piece is mapped by itself.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
#: The largest that glibc takes for the latter.
_LARGEST_MMAP_THRESHOLD = 32 << 20


def keep_pages() -> None:
    """Has the allocator keep what one batch has needed for the next one, until `settle`.

    Given back and taken anew, every page would have to be cleared and mapped again: twice the time of a batch.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # of glibc alone
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        mallopt(_TRIM_THRESHOLD, 1 << 30)


def settle() -> None:
    """Collects what nobody needs any more, gives its memory back, and leaves alone from now on what is there.

    Compiling a model leaves hundreds of MiB that the allocator would keep. And every now and then Python looks through
    all its objects, some 100 ms long with those that jax has, in which no call is answered: what is there now is not
    looked at again until the next model comes.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc alone
    if trim is not None:
        trim(0)
