"""Files that are whole whenever they are there, whenever the process is killed."""

import contextlib
import os
from collections.abc import Iterator
from typing import BinaryIO


@contextlib.contextmanager
def replacing(path: str) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of `path` when the block ends; after an error nothing has changed.

    It outlives the process, not a machine that loses its power: a store's files are written otherwise.
    """
    draft = f"{path}.{os.getpid()}"
    try:
        with open(draft, "wb") as file:
            yield file
        os.replace(draft, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.remove(draft)
        raise
