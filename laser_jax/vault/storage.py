"""Where the files of a vault lie: a local directory, or any key-value store that tensorstore can open."""

import json
import os
from typing import Any

from laser_jax.vault.errors import MissingError, NotAVaultError, UnavailableError

_SCHEMES = ("memory", "s3", "gs", "http", "https")


class LocalStorage:
    """Files below a directory.

    Attributes:
      root: its absolute path.
    """

    local = True

    def __init__(self, root: str):
        self.root = os.path.abspath(root)

    def path(self, name: str) -> str:
        """Path of a file, also for messages."""
        return os.path.join(self.root, name)

    def read(self, name: str) -> bytes | None:
        """All bytes of a file; None if there is none."""
        try:
            with open(self.path(name), "rb") as file:
                return file.read()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise UnavailableError(f"{self.path(name)} cannot be read: {error}") from error

    def size(self, name: str) -> int | None:
        """Size of a file; None if there is none."""
        try:
            return os.stat(self.path(name)).st_size
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise UnavailableError(f"{self.path(name)} cannot be read: {error}") from error

    def tail_of(self, name: str, size: int, count: int) -> bytes:
        """The last `count` bytes of a file of that size; fewer if it is shorter."""
        try:
            with open(self.path(name), "rb") as file:
                file.seek(max(size - count, 0))
                return file.read(count)
        except FileNotFoundError as error:
            raise MissingError(f"{self.path(name)} is missing") from error
        except OSError as error:
            raise UnavailableError(f"{self.path(name)} cannot be read: {error}") from error

    def kvstore(self, name: str) -> dict[str, Any]:
        """Tensorstore's spec of the directory `name`."""
        return {"driver": "file", "path": self.path(name) + "/"}


class KvStorage:
    """Files below a place in a tensorstore key-value store; see laser_jax.vault.open for the kinds.

    Attributes:
      root: the URL or JSON spec.
    """

    local = False

    def __init__(self, root: str):
        import tensorstore as ts

        self.root = root.rstrip("/")
        try:
            self._store = ts.KvStore.open(_spec_of(root), context=shared_context()).result()
        except (ValueError, NotImplementedError) as error:
            raise NotAVaultError(f"{root} cannot be opened as a key-value store: {error}") from error

    def path(self, name: str) -> str:
        """URL of a file, for messages."""
        return f"{self.root}/{name}"

    def read(self, name: str) -> bytes | None:
        """All bytes of a file; None if there is none."""
        result = self._do("read", self._store.read(name), name)
        return bytes(result.value) if result.state == "value" else None

    def size(self, name: str) -> int | None:
        """Unknown without reading: a store's objects are whole or absent; every page has its own checksum."""
        return None

    def write(self, name: str, data: bytes, if_absent: bool = False) -> bool:
        """Writes a whole file; with `if_absent` only if there is none. Returns whether it was written."""
        condition = {}
        if if_absent:
            found = self._do("read", self._store.read(name), name)
            if found.state == "value":
                return False
            condition = {"if_equal": found.stamp.generation}
        return bool(self._do("write", self._store.write(name, data, **condition), name).generation)

    def remove(self, prefix: str) -> None:
        """Removes everything below `prefix`."""
        import tensorstore as ts

        self._do("remove", self._store.delete_range(ts.KvStore.KeyRange(prefix, prefix + "\xff")), prefix)

    def kvstore(self, name: str) -> Any:
        """Tensorstore's spec of the directory `name`."""
        return (self._store / (name + "/")).spec().to_json()

    def _do(self, what: str, future: Any, name: str) -> Any:
        try:
            return future.result()
        except (ValueError, NotImplementedError) as error:  # any failure of the store
            raise UnavailableError(f"{self.path(name)}: {what} failed: {error}") from error


_CONTEXT: list[Any] = []
#: Five more tries take half a minute: whoever throttles or restarts is met again, whoever is not there is told of.
_RETRIES = {name: {"max_retries": 5} for name in ("http_request_retries", "s3_request_retries", "gcs_request_retries")}


def shared_context() -> Any:
    """One tensorstore context a process: memory:// is a store of it, and connections are shared."""
    import tensorstore as ts

    if not _CONTEXT:
        _CONTEXT.append(ts.Context(_RETRIES))
    return _CONTEXT[0]


def _spec_of(root: str) -> Any:
    """What tensorstore opens for a URL or JSON spec; S3 minds AWS_ENDPOINT_URL and AWS_REGION."""
    if root.startswith("{"):
        spec = json.loads(root)
        spec["path"] = spec.get("path", "").rstrip("/") + "/"
        return spec
    endpoint = os.environ.get("AWS_ENDPOINT_URL")
    if root.startswith("s3://") and endpoint:
        bucket, _, path = root[len("s3://") :].partition("/")
        region = os.environ.get("AWS_REGION", "us-east-1")
        spec = {"driver": "s3", "bucket": bucket, "path": path.rstrip("/") + "/", "endpoint": endpoint}
        return spec | {"aws_region": region}
    return root.rstrip("/") + "/"


def is_url(path: str) -> bool:
    """Whether a path names a key-value store: a URL, or tensorstore's spec as JSON."""
    return path.startswith("{") or path.partition("://")[0] in _SCHEMES and "://" in path


def plain_path(path: str) -> str:
    """The directory that a file:// URL names; anything else as it is."""
    return path.removeprefix("file://")


def storage_of(path: str) -> LocalStorage | KvStorage:
    """The storage that a path or URL names."""
    path = plain_path(path)
    return KvStorage(path) if is_url(path) else LocalStorage(path)


def must_read(storage: LocalStorage | KvStorage, name: str) -> bytes:
    """All bytes of a file that the manifest promises."""
    data = storage.read(name)
    if data is None:
        raise MissingError(f"{storage.path(name)} is missing")
    return data
