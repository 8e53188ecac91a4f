"""A vault behind a service, with the face of laser_jax.vault.Vault."""

import concurrent.futures
import contextlib
import json
import math
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import flight

from laser_jax.schema import Schema
from laser_jax.vault import wire
from laser_jax.vault.arguments import checked_bounds, checked_user, checked_users, checked_values
from laser_jax.vault.columns import check_columns
from laser_jax.vault.credentials import token_from
from laser_jax.vault.dictionary import Dictionary
from laser_jax.vault.errors import SchemaError, UnavailableError, UnknownFieldError, VaultError
from laser_jax.vault.history import Histories, History
from laser_jax.vault.merging import NO_BOUND
from laser_jax.vault.origins import checked_origin
from laser_jax.vault.outage import Outage
from laser_jax.vault.partitions import string_fields

SCHEMES = ("grpc", "grpc+tcp", "grpc+tls")
TIMEOUT_S = 10.0
#: A service that comes back is found again in half a second, not in gRPC's two minutes.
_RECONNECT = [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 500)]
_LONGEST_PAUSE = 0.5
#: Appends under way at once, of append_async.
_APPENDS = 8
#: Seconds that a service has to say that it is there.
HEALTH_S = 1.0
#: Actions that take as long as they take.
_LONG = ("merge", "flush", "verify", "forget", "snapshot", "stats")


def is_service(path: str) -> bool:
    """Whether a path names services: grpc://host:port, several of them with commas."""
    return path.partition("://")[0] in SCHEMES


class VaultClient:
    """See laser_jax.vault.open and, for the methods, laser_jax.vault.Vault. Safe to share among threads.

    Appends are sent again until the time-out while the service does not answer, each written once. Reads fail at once;
    of a service that did not answer one in time, so do the next ones until it answers (see Outage). Merging and the
    like take as long as they take, while the service answers others.

    Attributes:
      path: URL of the service. at: snapshot that is read from. timeout_s: seconds that a call may take.
    """

    local = False

    def __init__(
        self,
        path: str,
        at: str | None = None,
        timeout_s: float = TIMEOUT_S,
        partition: tuple[int, int] | None = None,
        check: Callable[[str, dict[str, Any]], None] | None = None,
    ):
        """
        Args:
          path, at, timeout_s: as said.
          partition: (number, count) that the service must say that it is.
          check: is given what else it says of itself, and raises VaultError if it is the wrong one.

        Raises:
          VaultError: arguments that make no sense.
        """
        if not isinstance(timeout_s, (int, float)) or isinstance(timeout_s, bool) or not 0 < timeout_s < math.inf:
            raise VaultError(f"timeout_s={timeout_s!r}: need a number of seconds above 0")
        self.path = path
        self.at = at
        self.timeout_s = timeout_s
        self._wanted, self._check = partition, check
        token = token_from("SEQVAULT_TOKEN")
        self._headers = [] if token is None else [(b"authorization", f"Bearer {token}".encode())]
        self._options = self._within(timeout_s)
        self._patient = flight.FlightCallOptions(headers=self._headers)
        authority = os.environ.get("SEQVAULT_CA")
        try:
            roots = None
            if authority:
                with open(authority, "rb") as file:
                    roots = file.read()
            client = flight.FlightClient(path, tls_root_certs=roots, generic_options=_RECONNECT)
        except (OSError, pa.ArrowException) as error:
            raise VaultError(f"{path} cannot be used: {error}") from error
        self._client, health = client, self._within(min(timeout_s, HEALTH_S))
        self._outage = Outage(path, lambda: list(client.do_action(flight.Action("health", b""), health)))
        self._described: dict[str, Any] | None = None
        self._schema: Schema | None = None
        self._lock = threading.Lock()
        self._dictionaries: dict[str, Dictionary] = {}
        self._sizes: dict[str, int] = {}
        self._origins: list[list[Any]] = []
        self._pool: concurrent.futures.ThreadPoolExecutor | None = None
        #: The newest sequence number that this handle has heard of; None if the service never answered.
        self.known_sequence: int | None = None

    def __reduce__(self):
        return VaultClient, (self.path, self.at, self.timeout_s, self._wanted)

    def __enter__(self) -> "VaultClient":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __len__(self) -> int:
        return self._describe()["users"]

    def __repr__(self) -> str:
        return f"VaultClient({self.path!r})"

    @property
    def schema(self) -> Schema:
        """As it was when this handle first asked or was refreshed."""
        if self._schema is None:
            self._describe()
        return self._schema

    @property
    def partition(self) -> tuple[int, int] | None:
        """(number, count) if the service serves a partition."""
        found = (self._described or self._describe())["partition"]
        return None if found is None else tuple(found)

    @property
    def num_events(self) -> int:
        """As Vault.num_events."""
        return self._describe()["events"]

    @property
    def next_sequence(self) -> int:
        """As Vault.next_sequence."""
        return self._describe()["next_sequence"]

    def users(self) -> np.ndarray:
        """As Vault.users."""
        table = self._while_there(lambda: self._client.do_get(_ticket(list="users"), self._patient).read_all())
        if self.schema.user == "int64":
            return table["user"].to_numpy()
        keys = np.empty(len(table), object)
        keys[:] = table["user"].to_pylist()
        return keys

    def dictionary(self, field: str) -> np.ndarray:
        """As Vault.dictionary, with at least the values of everything that was read through this handle."""
        if field not in self._sizes:  # of a field that is newer than the schema known here, reads tell
            self._check_string(field)
        known = self._dictionaries.setdefault(field, Dictionary())
        if len(known) < self._sizes.get(field, 0):
            with self._lock:
                while len(known) < self._sizes.get(field, 0):
                    values = self.action("dictionary", field=field, start=len(known))
                    if not values:
                        raise UnavailableError(
                            f"{self.path} has {len(known)} values of {field!r}, and spoke of {self._sizes[field]} "
                            "before: if an older vault was put in its place, open it again"
                        )
                    known.extend(len(known), values)
        return known.array

    def encode(self, field: str, values: Sequence[str]) -> np.ndarray:
        """As Vault.encode."""
        self.dictionary(field)
        known = self._dictionaries[field]
        listed = checked_values(field, values)
        codes = np.fromiter((known.code(value) for value in listed), np.int32, len(listed))
        if (codes >= 0).all():  # a code never changes
            return codes
        self._describe()
        self.dictionary(field)
        return np.fromiter((known.code(value) for value in listed), np.int32, len(listed))

    def get(
        self,
        user: Any,
        n: int = 1000,
        before: int | None = None,
        as_of: int | None = None,
        fields: Sequence[str] | None = None,
        where: Mapping[str, Any] | None = None,
        max_scan: int | None = None,
    ) -> History:
        """As Vault.get."""
        key = checked_user(self.schema, user)
        asked: dict[str, Any] = {"user": int(user) if key is None else key, "n": n, "before": before, "as_of": as_of}
        asked |= {"fields": _listed(fields), "where": where, "max_scan": max_scan, "at": self.at}
        ticket = _ticket(**{name: value for name, value in asked.items() if value is not None}, coded=True)
        table = self._read(lambda: self._client.do_get(ticket, self._options).read_all())
        said = {name.decode(): json.loads(value) for name, value in table.schema.metadata.items()}
        self._heard(said)
        batches = table.combine_chunks().to_batches()
        columns = wire.columns_of(batches[0] if batches else _no_rows(table.schema))
        return History(columns, self._values, said["as_of"], said["exhausted"], said["scanned"])

    def gather(
        self,
        users: Any,
        before: Any = None,
        n: int = 1000,
        as_of: Any = None,
        fields: Sequence[str] | None = None,
    ) -> Histories:
        """As Vault.gather."""
        keys, beyond = checked_users(self.schema, users)
        size = len(keys)
        bounds = np.full(size, NO_BOUND) if before is None else checked_bounds("before", before, size)
        if beyond is not None:
            bounds = np.where(beyond, np.iinfo(np.int64).min, bounds)
        hidden = np.full(size, NO_BOUND) if as_of is None else checked_bounds("as_of", as_of, size)
        command = {"n": n, "fields": _listed(fields), "at": self.at}
        descriptor = flight.FlightDescriptor.for_command(_dumped({**command, "coded": True}))
        most = (self._described or self._describe())["limits"]["users"]

        def read() -> tuple[list[dict[str, np.ndarray]], list[np.ndarray], int]:
            columns, lengths, seen = [], [], NO_BOUND
            writer, reader = self._client.do_exchange(descriptor, self._options)
            with contextlib.ExitStack() as stack:
                stack.callback(writer.close)
                for start in range(0, max(size, 1), most):
                    rows = slice(start, start + most)
                    # Appends go on meanwhile: all are read as of the first answer.
                    batch = _asked(self.schema, keys[rows], bounds[rows], np.minimum(hidden[rows], seen))
                    if not start:
                        writer.begin(batch.schema)
                    writer.write_batch(batch)
                    chunk = reader.read_chunk()
                    said = json.loads(chunk.app_metadata.to_pybytes())
                    self._heard(said)
                    found, offsets = wire.split_lists(chunk.data)
                    columns.append(found)
                    lengths.append(np.diff(offsets))
                    seen = min(seen, said["as_of"])
                writer.done_writing()
            return columns, lengths, seen

        columns, lengths, seen = self._read(read)
        joined = columns[0]
        if len(columns) > 1:
            joined = {name: np.concatenate([part[name] for part in columns]) for name in joined}
        offsets = np.concatenate(([0], np.cumsum(np.concatenate(lengths)))).astype(np.int64)
        return Histories(joined, offsets, self._values, seen, n)

    def append(self, events: Mapping[str, Any], origin: tuple[str, int] | None = None) -> int:
        """As Vault.append.

        Raises:
          UnavailableError: the service did not answer in time. The events may have been written: who sends them again
            must give the same `origin` both times.
        """
        return self._append(self._batch(events), checked_origin(origin))

    def append_async(self, events: Mapping[str, Any], origin: tuple[str, int] | None = None) -> "Future[int]":
        """As append, without waiting; appends of one handle may be written in another order than given."""
        batch, origin = self._batch(events), checked_origin(origin)
        with self._lock:
            if self._pool is None:
                self._pool = concurrent.futures.ThreadPoolExecutor(_APPENDS, "vault-append")
            return self._pool.submit(self._append, batch, origin)

    def flush(self) -> None:
        """As Vault.flush."""
        self.action("flush")

    def merge(self, progress: Callable[[str], None] | None = None) -> None:
        """As Vault.merge, without progress."""
        self.action("merge")

    def snapshot(self, name: str | None = None, replace: bool = False) -> str:
        """As Vault.snapshot."""
        given = {} if name is None else {"name": name}
        return self.action("snapshot", **given | ({"replace": True} if replace else {}))

    def snapshots(self) -> list[str]:
        """As Vault.snapshots."""
        return self.action("snapshots")

    def drop_snapshot(self, name: str) -> None:
        """As Vault.drop_snapshot."""
        self.action("drop_snapshot", name=name)

    def forget(self, users: Any) -> int:
        """As Vault.forget."""
        keys, beyond = checked_users(self.schema, users)
        return self.action("forget", users=keys if beyond is None else keys[~beyond])

    def evolve(self, schema: Schema) -> None:
        """As Vault.evolve."""
        self.action("evolve", schema=schema.to_json())
        self._describe()

    def retain(self, events: int | None = None, age: int | None = None) -> None:
        """As Vault.retain."""
        self.action("retain", events=events, age=age)

    def refresh(self) -> None:
        """Learns the schema anew; reads see what was written in any case."""
        self._describe()

    def stats(self) -> dict[str, Any]:
        """As Vault.stats."""
        return self.action("stats")

    def verify(self) -> list[str]:
        """As Vault.verify."""
        return self.action("verify")

    def close(self) -> None:
        """Waits for appends that are under way. Reading goes on."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown()

    def _describe(self) -> dict[str, Any]:
        found = self.action("describe", **({} if self.at is None else {"at": self.at}))
        partition = None if found["partition"] is None else tuple(found["partition"])
        if self._wanted is not None and partition != self._wanted:
            serves = "no partition" if partition is None else f"partition {partition[0]} of {partition[1]}"
            number, count = self._wanted
            raise VaultError(f"{self.path} serves {serves}; by its place it must serve partition {number} of {count}")
        if self._check is not None:
            self._check(self.path, found)
        self._schema = Schema.from_json(found["schema"])
        self._described = found
        self._heard({"sizes": found["sizes"], "as_of": found["next_sequence"]})
        return found

    def _heard(self, said: dict[str, Any]) -> None:
        with self._lock:
            self.known_sequence = max(self.known_sequence or 0, said["as_of"])
            for name, size in said.get("sizes", {}).items():
                self._sizes[name] = max(size, self._sizes.get(name, 0))

    def _check_string(self, field: str) -> None:
        strings = string_fields(self.schema)
        if field not in strings:
            known = ", ".join(strings) or "none"
            raise UnknownFieldError(f"{self.path}: {field!r} is not a string field; string fields: {known}")

    def _values(self, field: str) -> np.ndarray | None:
        return self.dictionary(field) if field in self._sizes else None

    def _within(self, seconds: float) -> flight.FlightCallOptions:
        return flight.FlightCallOptions(timeout=seconds, headers=self._headers, read_options=wire.PLAIN_READ)

    def _read(self, call: Callable[[], Any]) -> Any:
        """What a call that changes nothing returns: tried twice, for a connection may be that of an earlier service."""
        for last in (False, True):
            self._outage.check()
            try:
                return call()
            except (flight.FlightError, pa.ArrowException, StopIteration) as error:
                if last or not isinstance(error, flight.FlightUnavailableError):
                    raise self._received(error) from error

    def _received(self, error: Exception) -> Exception:
        """What a call's error says; one that says nothing makes the service suspect."""
        if isinstance(error, flight.FlightTimedOutError):
            self._outage.suspect()
        return wire.error_received(error, self.path)

    def _while_there(self, call: Callable[[], Any]) -> Any:
        """What a call returns that takes as long as it takes, while the service answers others meanwhile.

        Raises:
          UnavailableError: it does not, asked twice. What was called for may be done all the same.
        """
        result: Future[Any] = Future()

        def run() -> None:
            try:
                result.set_result(self._read(call))
            except Exception as error:  # whoever waits is to hear of it, whatever it is
                result.set_exception(error)

        # A thread of its own that nobody has to wait for: there is no other way to give such a call up.
        threading.Thread(target=run, name="vault-call", daemon=True).start()
        silent = 0
        while not concurrent.futures.wait([result], self.timeout_s).done:
            silent = 0 if self._outage.answers() else silent + 1
            if silent == 2:
                raise UnavailableError(f"{self.path} does not answer any more")
        return result.result()

    def action(self, name: str, /, **arguments: Any) -> Any:
        """What an action of the service answers; see laser_jax.vault.service."""
        action = flight.Action(name, _dumped(arguments))
        if name in _LONG:
            results = self._while_there(lambda: list(self._client.do_action(action, self._patient)))
        else:
            results = self._read(lambda: list(self._client.do_action(action, self._options)))
        return json.loads(results[0].body.to_pybytes())

    @contextlib.contextmanager
    def _own_origin(self) -> Iterator[tuple[str, int]]:
        """A client's name and its next number, which nobody else uses meanwhile: they go up one after the other."""
        with self._lock:
            origin = self._origins.pop() if self._origins else [uuid.uuid4().hex, 0]
        try:
            yield origin[0], origin[1]
        finally:
            origin[1] += 1
            with self._lock:
                self._origins.append(origin)

    def insist(self, call: Callable[[float], Any]) -> Any:
        """What a call that may be repeated returns: tried again while the service does not answer and there is time.

        Args:
          call: is given the seconds that are left.
        """
        deadline = time.monotonic() + self.timeout_s
        pause = 0.02
        while True:
            try:
                self._outage.check()
                return call(max(deadline - time.monotonic(), pause))
            except (flight.FlightError, pa.ArrowException, StopIteration, UnavailableError) as error:
                received = self._received(error)
                if not isinstance(received, UnavailableError) or time.monotonic() + pause > deadline:
                    raise received from error
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _batch(self, events: Mapping[str, Any]) -> pa.RecordBatch:
        """Events as they travel, in memory of their own: the caller may fill theirs anew meanwhile."""
        return wire.events_batch(self.schema, check_columns(self.schema, events))

    def _append(self, batch: pa.RecordBatch, origin: tuple[str, int] | None) -> int:
        if origin is not None:
            return self.insist(lambda seconds: self._put(batch, origin, seconds))
        with self._own_origin() as own:
            return self.insist(lambda seconds: self._put(batch, own, seconds))

    def _put(self, batch: pa.RecordBatch, origin: tuple[str, int], seconds: float) -> int:
        descriptor = flight.FlightDescriptor.for_command(_dumped({"origin": list(origin)}))
        writer, reader = self._client.do_put(descriptor, batch.schema, self._within(seconds))
        with contextlib.ExitStack() as stack:
            stack.callback(writer.close)
            writer.write_batch(batch)
            writer.done_writing()
            answer = reader.read()
            if answer is None:
                stack.pop_all().close()  # says what was wrong
                raise UnavailableError(f"{self.path} took no notice of the events")
        sequence = json.loads(answer.to_pybytes())["next_sequence"]
        self._heard({"as_of": sequence})
        return sequence


def _asked(schema: Schema, users: Any, before: np.ndarray, as_of: np.ndarray) -> pa.RecordBatch:
    kind = pa.int64() if schema.user == "int64" else pa.string()
    columns = [pa.array(users, kind), *(pa.array(bound, pa.int64()) for bound in (before, as_of))]
    return pa.record_batch(columns, ["user", "before", "as_of"])


def _no_rows(schema: pa.Schema) -> pa.RecordBatch:
    return pa.record_batch([pa.array([], kind) for kind in schema.types], schema.names)


def _listed(fields: Sequence[str] | None) -> list[str] | None:
    if isinstance(fields, str):
        raise UnknownFieldError(f"fields={fields!r}: give a sequence of names")
    return None if fields is None else list(fields)


def _ticket(**asked: Any) -> flight.Ticket:
    return flight.Ticket(_dumped(asked))


def _dumped(value: Any) -> bytes:
    return json.dumps(value, default=_plain).encode()


def _plain(value: Any) -> Any:
    """What JSON has no word for, as numpy's scalars and arrays."""
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    if isinstance(value, (set, frozenset, tuple, range)):
        return list(value)
    raise SchemaError(f"{value!r} of type {type(value).__name__} cannot be sent to a service")
