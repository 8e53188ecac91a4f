"""A partitioned vault behind one service a partition, with the face of laser_jax.vault.Vault."""

import concurrent.futures
import contextlib
import threading
from concurrent.futures import Future
from typing import Any

from laser_jax.schema import Schema
from laser_jax.vault.client import HEALTH_S, TIMEOUT_S, VaultClient
from laser_jax.vault.dictionary import Dictionary
from laser_jax.vault.errors import UnavailableError, VaultError
from laser_jax.vault.history import Histories
from laser_jax.vault.merging import NO_BOUND
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
        self._comparing = threading.Lock()
        clients = [
            VaultClient(url, at, timeout_s, (number, len(urls)), self._check_whole) for number, url in enumerate(urls)
        ]
        self._asked = self._ask(clients)
        late = UnavailableError("it has not answered yet")
        errors = [one.exception() if one.done() else late for one in self._asked]
        for error in errors:
            if error is not None and not isinstance(error, UnavailableError):
                raise error  # what is wrong with a service that answers does not go by
        if None not in errors:
            raise UnavailableError(f"none of the services {path} answers: {errors[0]}") from errors[0]
        self._schema: Schema = clients[errors.index(None)].schema
        self._hold(clients, _ServedCodes(clients[0], string_fields(self._schema)))
        if errors[0] is None:
            with contextlib.suppress(UnavailableError):  # whoever needs the strings will ask again
                self._codes.follow()

    def _ask(self, clients: list[VaultClient]) -> list[Future[Any]]:
        """Has all services describe themselves at once: there is no more waiting for several than for one.

        Those that are there have HEALTH_S to say so, one that is not keeps nobody longer, unless none has answered.
        """
        pool = concurrent.futures.ThreadPoolExecutor(len(clients), "vault-partitions-open")
        asked = [pool.submit(client.refresh) for client in clients]
        pool.shutdown(wait=False)
        concurrent.futures.wait(asked, min(self.timeout_s, HEALTH_S))
        for one in concurrent.futures.as_completed(asked):
            if not isinstance(one.exception(), UnavailableError):
                break
        return asked

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
        with self._comparing:
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

    def verify(self) -> list[str]:
        """As Vault.verify."""
        return [damage for vault in self.partitions for damage in vault.verify()]

    def refresh(self) -> None:
        """Learns the schema and the strings anew; reads see what was written in any case."""
        super().refresh()
        self._schema = self.partitions[0].schema

    def _known_sequence(self, number: int) -> int:
        client = self.partitions[number]
        if client.known_sequence is None and self._asked[number].done():
            with contextlib.suppress(VaultError):  # it was not there when this handle was opened
                client.refresh()
        # Of one that never answered nothing is known: a bound would hide what is there.
        return NO_BOUND if client.known_sequence is None else client.known_sequence

    def _write_lock(self) -> None:
        """The services hold it."""


class _ServedCodes:
    """The face of a Codebook, which the first partition's service keeps."""

    def __init__(self, client: VaultClient, fields: list[str]):
        self.path = client.path
        self.dictionaries = {field: Dictionary() for field in fields}
        self._client = client
        self._lock = threading.Lock()

    def follow(self) -> None:
        """As Codebook.follow."""
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
            name: [value for value in dict.fromkeys(listed) if self._code(name, value) < 0]
            for name, listed in values.items()
        }
        return {name: listed for name, listed in new.items() if listed}

    def _code(self, name: str, value: str) -> int:
        """Code of a value, -1 if it has none, or if its field was added since these were learned."""
        return self.dictionaries[name].code(value) if name in self.dictionaries else -1
