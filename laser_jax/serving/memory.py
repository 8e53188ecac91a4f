"""What a server does about memory when a model has come or gone."""

import ctypes
import gc


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
