"""A vault as a network service by Arrow Flight: any Flight client in any language can read and append.

    python -m laser_jax.vault serve DIR --port=8815

DoGet     ticket {"user": 7}, also "n", "before", "as_of", "fields", "where", "max_scan" as for Vault.get, and "at", a
          snapshot. Answers a row an event, oldest first. The schema's metadata says `as_of`, `exhausted`, `scanned`.
          The ticket {"list": "users"} answers every user.
DoExchange command {"n": 1000}, also "fields", "as_of", "at". The client writes record batches of `user` and, if wanted,
          `before` and `as_of` (int64, null for none); each is answered by a batch with a row a user, whose columns are
          lists, and metadata {"as_of": ...}.
DoPut     command {"origin": [client, number]} or {}. The client writes record batches of `user`, `time` and every
          field; each is answered by metadata {"next_sequence": ...} when it is durable. The first batch has the number
          given, the next ones the numbers behind it; see Vault.append for what an origin is good for.
DoAction  a call by name with a JSON object of arguments, answered by JSON; `list_actions` says which there are.

Columns travel compressed by ZSTD. With "coded": true strings travel as codes of the service's dictionary.
Errors are UNAVAILABLE, INTERNAL (damage) or UNKNOWN (what callers do wrong), with the error's name before the text.
"""

import contextlib
import dataclasses
import hmac
import json
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from pyarrow import flight

from laser_jax.schema import Schema
from laser_jax.vault import wire
from laser_jax.vault.codebook import CODES, Codebook
from laser_jax.vault.errors import SchemaError, UnavailableError, UnknownFieldError, VaultError
from laser_jax.vault.files import writer_lock
from laser_jax.vault.maintenance import WriterOptions
from laser_jax.vault.merging import NO_BOUND
from laser_jax.vault.partitioning import is_partitioned, partition_path, read_count, read_partitions
from laser_jax.vault.reader import Vault
from laser_jax.vault.storage import LocalStorage
from laser_jax.vault.tickets import GATHER, GET, field_names, parse
from laser_jax.vault.verification import damaged_codes
from laser_jax.vault.warm_up import warm_up

#: Seconds after which a service that only reads looks for what was written.
_FOLLOW_S = 0.1
_SECONDS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 5)
#: Snapshots that stay open.
_SNAPSHOTS = 8


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a service answers at most.

    Attributes:
      events: of one user.
      users: in one batch.
      put_bytes: of one batch of events.
      in_flight: calls at once; one more is refused, so that a crowd is told at once and not late.
    """

    events: int = 100_000
    users: int = 4096
    put_bytes: int = 64 << 20
    in_flight: int = 128


class VaultService(flight.FlightServerBase):
    """Serves one vault, which may be a partition; use as a context manager.

    Attributes:
      vault: that is served.
      registry: its Prometheus metrics.
    """

    def __init__(
        self,
        path: str,
        location: str = "grpc://127.0.0.1:0",
        cache_bytes: int = 256 << 20,
        read_only: bool = False,
        token: str | None = None,
        tls: tuple[bytes, bytes] | None = None,
        limits: Limits | None = None,
        writing: WriterOptions | None = None,
    ):
        """Opens the vault, becomes its writer, and listens.

        Args:
          path: directory of a vault or of a partition of one.
          location: `grpc://host:port`, or `grpc+tls://` with `tls`; port 0 takes a free one.
          cache_bytes: see laser_jax.vault.open.
          read_only: does not become the writer, but follows who is.
          token: that clients must send as `authorization: Bearer TOKEN`; None lets everybody in.
          tls: certificate and key, PEM.
          limits: what is answered at most.
          writing: see WriterOptions.

        Raises:
          LockedError: somebody else is the writer.
          VaultError: the path holds no vault, or one in partitions: each of these has its own service. Or the location
            cannot be listened on.
        """
        if is_partitioned(path):
            raise VaultError(
                f"{path} is in {read_count(path)} partitions: serve each, such as {partition_path(path, 0)}"
            )
        self.vault = Vault(path, cache_bytes, writing=writing)
        self.limits = limits or Limits()
        registry = self.registry = CollectorRegistry()
        self._seconds = Histogram("seqvault_call_seconds", "of calls", ["call"], buckets=_SECONDS, registry=registry)
        self._events = Counter("seqvault_events", "read or written", ["call"], registry=registry)
        self._errors = Counter("seqvault_errors", "by kind", ["call", "error"], registry=registry)
        self._in_flight = Gauge("seqvault_calls_in_flight", "calls under way", registry=registry)
        for name, text, value in (
            ("seqvault_next_sequence", "sequence number of the next event", lambda: self.vault.next_sequence),
            ("seqvault_tail_events", "events in no part yet", lambda: sum(t.size for t in self.vault.state.tails)),
        ):
            Gauge(name, text, registry=registry).set_function(value)
        self._slots = threading.BoundedSemaphore(self.limits.in_flight)
        self._snapshots: dict[str, Vault] = {}
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._read_only = read_only
        self._partition = _partition_of(self.vault.path)
        parent = os.path.dirname(self.vault.path)
        self._identity = None if self._partition is None else read_partitions(parent).get("vault")
        self._codes: Codebook | None = None
        with contextlib.ExitStack() as stack:
            stack.callback(self.vault.close)
            if not read_only:
                self.vault.begin_writing()
            warm_up(self.vault.schema)
            if self._partition is not None and self._partition[0] == 0:
                if not read_only:
                    # The first partition's service gives all partitions' strings their codes.
                    stack.enter_context(writer_lock(parent))
                strings = [field.name for field in self.vault.schema.fields if field.type == "string"]
                self._codes = Codebook(os.path.join(parent, CODES), strings)
                if not read_only:
                    self._codes.check(self.vault)
            middleware = {"token": _TokenCheck(token)} if token else None
            try:
                super().__init__(location, tls_certificates=[tls] if tls else None, middleware=middleware)
            except (OSError, ValueError, pa.ArrowException) as error:
                raise VaultError(f"{location} cannot be listened on: {error}") from error
            self._held = stack.pop_all()
        if read_only:
            self._follower = threading.Thread(target=self._follow, name="vault-follow", daemon=True)
            self._follower.start()

    def close(self, patience_s: float | None = None) -> bool:
        """Answers calls that are under way, and gives up the vault.

        Args:
          patience_s: seconds for that; then the vault is given up all the same. None: as long as it takes.

        Returns:
          Whether all calls have ended. Those that have not hold threads for as long as their clients like.
        """
        self._closing.set()
        ending = threading.Thread(target=self.shutdown, name="vault-shutdown", daemon=True)
        ending.start()
        ending.join(patience_s)
        self._held.close()
        return not ending.is_alive()

    def __exit__(self, *_: Any) -> None:
        self.close()

    # Flight's calls. Their names and arguments are pyarrow's.

    def get_flight_info(self, context: Any, descriptor: flight.FlightDescriptor) -> flight.FlightInfo:
        """Where to read what a descriptor's command, a ticket, asks for: here."""
        with self._answering("info"):
            asked = parse(descriptor.command, (*GET, "list"))
            if "list" in asked:
                kind = pa.schema([("user", pa.int64() if self.vault.schema.user == "int64" else pa.string())])
            else:
                kind = self._get({**asked, "n": 0}).schema
            endpoint = flight.FlightEndpoint(descriptor.command, [])
            return flight.FlightInfo(kind.remove_metadata(), descriptor, [endpoint], -1, -1)

    def do_get(self, context: Any, ticket: flight.Ticket) -> flight.RecordBatchStream:
        """One user's history, see above."""
        with self._answering("get"):
            asked = parse(ticket.ticket, (*GET, "list"))
            if "list" in asked:
                users = pa.array(self.vault.users(), pa.int64() if self.vault.schema.user == "int64" else pa.string())
                return flight.RecordBatchStream(pa.table({"user": users}), options=wire.ZSTD)
            table = self._get(asked)
            self._events.labels("get").inc(table.num_rows)
            return flight.RecordBatchStream(table, options=wire.ZSTD)

    def do_exchange(self, context: Any, descriptor: flight.FlightDescriptor, reader: Any, writer: Any) -> None:
        """Batches of histories, see above."""
        with self._answering("gather"):
            asked = parse(descriptor.command, GATHER)
            vault, coded = self._at(asked.get("at")), asked.get("coded", False)
            n, fields = self._count(asked.get("n", 1000)), field_names(asked.get("fields"))
            nobody = [] if vault.schema.user == "string" else np.zeros(0, np.int64)
            vault.gather(nobody, None, 0, None, fields)  # a wrong field is an error before the first answer
            writer.begin(wire.history_type(vault.schema, fields, coded), options=wire.ZSTD)
        while True:
            try:
                chunk = reader.read_chunk()
            except StopIteration:
                return
            with self._answering("gather"):
                batch = wire.checked(chunk.data)
                users, before, as_of = self._asked_users(batch, vault.schema, asked.get("as_of"))
                found = vault.gather(users, before, n, as_of, fields)
                self._events.labels("gather").inc(found.num_events)
                answer = wire.histories_batch(found, vault.schema, coded)
                said = {"as_of": found.as_of, "sizes": self._sizes(vault, answer.schema.names)}
                writer.write_with_metadata(answer, json.dumps(said).encode())

    def do_put(self, context: Any, descriptor: flight.FlightDescriptor, reader: Any, writer: Any) -> None:
        """Appends events, see above."""
        with self._answering("append"):
            self._must_write()
            origin = parse(descriptor.command, ("origin",)).get("origin")
            if origin is not None and (not isinstance(origin, list) or len(origin) != 2 or type(origin[1]) is not int):
                raise SchemaError(f"origin {origin!r}: need [client, number]")
        while True:
            try:
                chunk = reader.read_chunk()
            except StopIteration:
                return
            with self._answering("append"):
                batch = wire.checked(chunk.data)
                if batch.nbytes > self.limits.put_bytes:
                    raise SchemaError(
                        f"a batch of {batch.num_rows} events, {batch.nbytes} bytes; at most {self.limits.put_bytes} "
                        "bytes are taken at once: send smaller ones"
                    )
                sequence = self.vault.append(wire.columns_of(batch), None if origin is None else tuple(origin))
                self._events.labels("append").inc(batch.num_rows)
                if origin is not None:
                    origin[1] += 1
                writer.write(pa.py_buffer(json.dumps({"next_sequence": sequence}).encode()))

    def list_actions(self, context: Any) -> list[tuple[str, str]]:
        """Names of the actions and what they do."""
        return [(name, (call.__doc__ or "").split("\n")[0]) for name, call in self._actions().items()]

    def do_action(self, context: Any, action: flight.Action) -> Iterator[flight.Result]:
        """A call by name."""
        with self._answering("action"):
            calls = self._actions()
            if action.type not in calls:
                raise SchemaError(f"action {action.type!r} is not one of {', '.join(calls)}")
            arguments = parse(action.body.to_pybytes() or b"{}", None)
            try:
                result = calls[action.type](**arguments)
            except TypeError as error:
                raise SchemaError(f"action {action.type!r} with {arguments}: {error}") from error
            return iter([flight.Result(pa.py_buffer(json.dumps(result).encode()))])

    # Actions.

    def _actions(self) -> dict[str, Callable[..., Any]]:
        return (
            {
                "health": self._health,
                "describe": self._describe,
                "dictionary": self._dictionary,
                "codes": self._codes_since,
                "add_codes": self._add_codes,
                "stats": self.vault.stats,
                "verify": self._verify,
                "snapshots": self.vault.snapshots,
            }
            | {
                name: self._writing(getattr(self.vault, name))
                for name in ("flush", "merge", "snapshot", "drop_snapshot", "forget", "retain")
            }
            | {"evolve": self._evolve}
        )

    def _health(self) -> dict[str, Any]:
        """{"status": "ok"} while the vault answers."""
        return {"status": "ok", "writer": not self._read_only}

    def _describe(self, at: str | None = None) -> dict[str, Any]:
        """Schema, sizes, limits, and which partition of how many this is."""
        vault = self._at(at)
        return {
            "schema": vault.schema.to_json(),
            "next_sequence": vault.next_sequence,
            "events": vault.num_events,
            "users": len(vault),
            "sizes": self._sizes(vault, vault.schema.names),
            "partition": self._partition,
            "vault": self._identity,
            "limits": dataclasses.asdict(self.limits),
        }

    def _dictionary(self, field: str, start: int = 0) -> list[str]:
        """Values of a string field from a code on."""
        if type(start) is not int or start < 0:
            raise SchemaError(f"start={start!r}: need a code, 0 or more")
        return self.vault.dictionary(field)[start:].tolist()

    def _codes_since(self, sizes: dict[str, int]) -> dict[str, list[str]]:
        """Strings that hold for all partitions, from a code on for each field; the first partition's service knows."""
        codes = self._codebook()
        codes.follow()
        return {name: known.array[sizes.get(name, 0) :].tolist() for name, known in codes.dictionaries.items()}

    def _add_codes(self, values: dict[str, list[str]]) -> None:
        """Gives strings codes that hold for all partitions, durably."""
        self._must_write()
        codes = self._codebook()
        for name in values:
            if name not in codes.dictionaries:
                raise UnknownFieldError(f"{self.vault.path}: {name!r} is not a string field")
        codes.add(values)

    def _evolve(self, schema: dict[str, Any]) -> None:
        """Changes the schema."""
        self._must_write()
        wanted = Schema.from_json(schema)
        if self._codes is not None:
            new = [field for field in wanted.fields if field.type == "string" and field.default is not None]
            new = [field for field in new if field.name not in self._codes.dictionaries]
            if new:
                names = [*self._codes.dictionaries, *(field.name for field in new)]
                self._codes = Codebook(self._codes.path, names)
                self._codes.add({field.name: [field.default] for field in new})
        self.vault.evolve(wanted)

    def _verify(self) -> list[str]:
        """Reads everything and names every damage; the first partition's service also looks at the common codes."""
        damages = self.vault.verify()
        if self._codes is not None:
            damages += damaged_codes(os.path.dirname(self.vault.path))
        return damages

    # Parts of the above.

    def _get(self, asked: dict[str, Any]) -> pa.Table:
        if "user" not in asked:
            raise SchemaError('a ticket without "user"')
        vault, coded = self._at(asked.get("at")), asked.get("coded", False)
        where = asked.get("where")
        if where is not None and not isinstance(where, dict):
            raise SchemaError(f"where={where!r}: need an object of field and value")
        found = vault.get(
            asked["user"],
            self._count(asked.get("n", 1000)),
            asked.get("before"),
            asked.get("as_of"),
            field_names(asked.get("fields")),
            where,
            asked.get("max_scan"),
        )
        said = {"as_of": found.as_of, "exhausted": found.exhausted, "scanned": found.scanned}
        if coded:
            said["sizes"] = self._sizes(vault, found.columns)
        return wire.history_table(
            found, vault.schema, coded, {name.encode(): json.dumps(value).encode() for name, value in said.items()}
        )

    def _asked_users(self, batch: pa.RecordBatch, schema: Schema, as_of: Any) -> tuple[Any, Any, Any]:
        if batch.num_rows > self.limits.users:
            raise SchemaError(f"{batch.num_rows} users in a batch; at most {self.limits.users} are answered at once")
        names = batch.schema.names
        if "user" not in names or set(names) - {"user", "before", "as_of"}:
            raise SchemaError(f"columns {', '.join(names)}: need user and, if wanted, before and as_of")
        bounds: dict[str, Any] = {"before": None, "as_of": as_of}
        for name in ("before", "as_of"):
            if name in names:
                column = batch.column(name)
                if not pa.types.is_integer(column.type) and column.null_count < len(column):
                    raise SchemaError(f"{name} has Arrow type {column.type}; need int64")
                bounds[name] = column.cast(pa.int64()).fill_null(NO_BOUND).to_numpy(zero_copy_only=False)
        users = batch.column("user")
        if users.null_count:
            raise SchemaError("column 'user' holds a null")
        if schema.user == "string":
            return users.to_pylist(), bounds["before"], bounds["as_of"]
        return users.to_numpy(zero_copy_only=False), bounds["before"], bounds["as_of"]

    def _count(self, n: Any) -> int:
        if type(n) is not int or not 0 <= n <= self.limits.events:
            raise SchemaError(f"n={n!r}: need an integer from 0 to {self.limits.events}, this service's limit")
        return n

    def _sizes(self, vault: Vault, names: Any) -> dict[str, int]:
        """How many codes a client must know to read these columns."""
        strings = [field.name for field in vault.schema.fields if field.type == "string"]
        return {name: len(vault.dictionary(name)) for name in strings if name in names}

    def _at(self, name: str | None) -> Vault:
        if name is None:
            return self.vault
        with self._lock:
            found = self._snapshots.pop(name, None)
            if found is None:
                found = Vault(self.vault.path, 0, at=name)
            else:
                found.refresh()  # it may have been changed by forgetting, made anew, or dropped
            self._snapshots[name] = found
            if len(self._snapshots) > _SNAPSHOTS:
                del self._snapshots[next(iter(self._snapshots))]
            return found

    def _codebook(self) -> Codebook:
        if self._codes is None:
            raise VaultError(f"{self.vault.path} is not the first of some partitions: it keeps no common codes")
        return self._codes

    def _must_write(self) -> None:
        if self._read_only:
            raise VaultError(f"{self.vault.path} is served read-only")

    def _writing(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def checked(**arguments: Any) -> Any:
            self._must_write()
            try:
                return call(**arguments)
            finally:
                self._give_up_snapshots()

        checked.__doc__ = call.__doc__
        return checked

    def _give_up_snapshots(self) -> None:
        """Holds no files that a snapshot does not name any more: forgotten users are to leave the disk."""
        with self._lock:
            for name, found in list(self._snapshots.items()):
                if not found.state.held.is_current(LocalStorage(self.vault.path)):
                    del self._snapshots[name]

    def _follow(self) -> None:
        while not self._closing.wait(_FOLLOW_S):
            # What is wrong, the calls that read will say.
            with contextlib.suppress(VaultError):
                self.vault.refresh()
            self._give_up_snapshots()

    @contextlib.contextmanager
    def _answering(self, call: str) -> Iterator[None]:
        """Counts a call, times it, and says what went wrong as Flight does."""
        if not self._slots.acquire(blocking=False):
            self._errors.labels(call, "busy").inc()
            busy = UnavailableError(f"{self.limits.in_flight} calls are under way: try again in a moment")
            raise wire.error_to_send(busy)
        started = time.perf_counter()
        self._in_flight.inc()
        try:
            yield
        except VaultError as error:
            self._errors.labels(call, type(error).__name__).inc()
            raise wire.error_to_send(error) from error
        except flight.FlightError as error:  # of the connection
            self._errors.labels(call, type(error).__name__).inc()
            raise
        except pa.ArrowException as error:  # columns of another kind than they must be
            self._errors.labels(call, type(error).__name__).inc()
            raise wire.error_to_send(SchemaError(str(error))) from error
        except Exception as error:
            # A mistake in this code: the caller is told that it is none of theirs, and nothing of the insides.
            self._errors.labels(call, "mistake").inc()
            traceback.print_exc()
            told = f"a mistake in the service ({type(error).__name__}); its log has more"
            raise flight.FlightInternalError(told) from error
        finally:
            self._in_flight.dec()
            self._slots.release()
            self._seconds.labels(call).observe(time.perf_counter() - started)


class _TokenCheck(flight.ServerMiddlewareFactory):
    """Lets in who sends the token."""

    def __init__(self, token: str):
        super().__init__()
        self._wanted = f"Bearer {token}".encode()

    def start_call(self, info: Any, headers: dict[str, list[str]]) -> None:
        given = [value for name, values in headers.items() if name.lower() == "authorization" for value in values]
        if not any(hmac.compare_digest(value.encode(), self._wanted) for value in given):
            raise flight.FlightUnauthenticatedError("the token is missing or wrong")


def _partition_of(path: str) -> tuple[int, int] | None:
    """(number, count) if a vault is a partition."""
    parent = os.path.dirname(path)
    if not is_partitioned(parent):
        return None
    count = read_count(parent)
    return next(((number, count) for number in range(count) if partition_path(parent, number) == path), None)
