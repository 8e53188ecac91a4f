"""A partitioned vault behind one service a partition, with the face of laser_jax.vault.Vault."""

import concurrent.futures
import contextlib
import threading
from concurrent.futures import Future
from typing import Any

from laser_jax.schema import Schema
from laser_jax.vault.client import TIMEOUT_S, VaultClient
from laser_jax.vault.dictionary import Dictionary
from laser_jax.vault.errors import UnavailableError, VaultError
from laser_jax.vault.history import Histories
from laser_jax.vault.partitions import PartitionedVault, string_fields

#: Batches that are read from a partition at once.
_READS = 8


def connect(path: str, at: str | None = None, timeout_s: float = TIMEOUT_S) -> "VaultClient | ServedPartitions":
    """A client of the service, or of the partitions' services in order, that a path names."""
    urls = path.split(",")
    if len(urls) > 1:
        return ServedPartitions(path, at, timeout_s)
    client = VaultClient(path, at, timeout_s)
    if client.partition is not None and client.partition[1] > 1:
        number, count = client.partition
        raise VaultError(f"{path} serves partition {number} of {count}: name all services, in order, with commas")
    return client


class ServedPartitions(PartitionedVault):
    """A partitioned vault behind one service a partition. While a service is lost, only its users are.

    The first one also keeps the codes of strings: while it is lost, nobody learns or gives new ones.

    Attributes:
      path: URLs of the services in the order of the partitions, with commas.
    """

    local = False

    def __init__(self, path: str, at: str | None = None, timeout_s: float = TIMEOUT_S):
        self.path = path
        self.at = at
        self.timeout_s = timeout_s
        urls = path.split(",")
        if not all(urls):
            raise VaultError(f"{path}: need a URL between any two commas, grpc://host:port of each partition in order")
        self._whole: Any = None
        clients = [
            VaultClient(url, at, timeout_s, (number, len(urls)), self._check_whole) for number, url in enumerate(urls)
        ]
        self._schema: Schema | None = None
        lost = []
        for client in clients:
            try:
                self._schema = self._schema or client.schema
            except UnavailableError as error:
                lost.append(error)
        if self._schema is None:
            raise UnavailableError(f"none of the services {path} answers: {lost[0]}") from lost[0]
        self._hold(clients, _ServedCodes(clients[0], string_fields(self._schema)))

    def _threads(self) -> list[concurrent.futures.ThreadPoolExecutor]:
        """As many for each partition as any needs: one that does not answer keeps its own waiting."""
        return [
            concurrent.futures.ThreadPoolExecutor(_READS, f"vault-partition-{number}")
            for number in range(len(self.partitions))
        ]

    def _read(self, jobs: "list[tuple[Future[Histories], int]]") -> list[Histories]:
        waiting = concurrent.futures.wait([future for future, _ in jobs], self.timeout_s).not_done
        for future in waiting:
            future.cancel()
        for future, number in jobs:
            if future in waiting:
                raise UnavailableError(f"{self.partitions[number].path} did not answer in time")
        return super()._read(jobs)

    def _check_whole(self, url: str, found: dict[str, Any]) -> None:
        """Raises VaultError if what a service says of itself is not of the vault that the others serve."""
        schema = found["schema"]
        whole = found.get("vault"), schema.get("user"), schema.get("time_unit")
        self._whole = self._whole or whole
        if self._whole != whole:
            raise VaultError(f"{url} serves a partition of another vault than the other services of {self.path}")

    def __reduce__(self):
        return ServedPartitions, (self.path, self.at, self.timeout_s)

    def __repr__(self) -> str:
        return f"ServedPartitions({self.path!r})"

    @property
    def schema(self) -> Schema:
        """As it was when this handle was opened or refreshed."""
        return self._schema

    def evolve(self, schema: Schema) -> None:
        """As Vault.evolve, in each partition in turn: if it fails halfway, call it again."""
        for vault in self.partitions:
            if vault.schema != schema:
                vault.evolve(schema)
        self.refresh()

    def refresh(self) -> None:
        """Learns the schema and the strings anew; reads see what was written in any case."""
        super().refresh()
        self._schema = self.partitions[0].schema

    def _known_sequence(self, number: int) -> int:
        return self.partitions[number].known_sequence

    def _write_lock(self) -> None:
        """The services hold it."""


class _ServedCodes:
    """The face of a Codebook, which the first partition's service keeps."""

    def __init__(self, client: VaultClient, fields: list[str]):
        self.path = client.path
        self.dictionaries = {field: Dictionary() for field in fields}
        self._client = client
        self._lock = threading.Lock()
        with contextlib.suppress(UnavailableError):  # whoever needs the strings will ask again
            self.follow()

    def follow(self) -> None:
        """As Codebook.follow."""
        if not self.dictionaries:
            return
        with self._lock:
            sizes = {name: len(known) for name, known in self.dictionaries.items()}
            for name, values in self._client.action("codes", sizes=sizes).items():
                self.dictionaries.setdefault(name, Dictionary()).extend(sizes.get(name, 0), values)

    def add(self, values: dict[str, list[str]]) -> None:
        """As Codebook.add."""
        if self._new(values):
            self._client.insist(lambda _: self.follow())
            if new := self._new(values):
                self._client.insist(lambda _: self._client.action("add_codes", values=new))
                self._client.insist(lambda _: self.follow())

    def _new(self, values: dict[str, list[str]]) -> dict[str, list[str]]:
        new = {
            name: [value for value in dict.fromkeys(listed) if self.dictionaries[name].code(value) < 0]
            for name, listed in values.items()
        }
        return {name: listed for name, listed in new.items() if listed}
