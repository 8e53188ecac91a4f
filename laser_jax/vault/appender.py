"""The one writer of a vault: appends to the log and the tail, and what goes on behind them."""

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

import numpy as np

from laser_jax.schema import Schema, SchemaError
from laser_jax.vault.columns import Coded, check_columns
from laser_jax.vault.dedup import Window
from laser_jax.vault.dictionary import Dictionary, NewValues
from laser_jax.vault.errors import UnavailableError, VaultError
from laser_jax.vault.files import writer_lock
from laser_jax.vault.log import Batch, LogFile, encode_record, log_numbers
from laser_jax.vault.log_writer import LogWriter, log_keys
from laser_jax.vault.maintenance import LogPiece, Maintenance, WriterOptions
from laser_jax.vault.manifest import HeldManifest
from laser_jax.vault.origins import MOST, Written, checked_origin, joined, newest, origins_of
from laser_jax.vault.state import State, build_state
from laser_jax.vault.storage import LocalStorage
from laser_jax.vault.tail import Tail

#: Bytes of events that append_async lets wait before it lends a hand.
_QUEUE_BYTES = 8 << 20


@dataclasses.dataclass
class _Item:
    """Events on their way to the log."""

    events: Mapping[str, Any]
    schema: Schema
    columns: dict[str, Any]
    size: int
    origin: tuple[str, int] | None
    future: "Future[int]"


class Appender:
    """Holds the writer's lock until `close`. Safe to share among threads."""

    def __init__(
        self,
        storage: LocalStorage,
        options: WriterOptions,
        dictionaries: dict[str, Dictionary],
        state: State,
        change: Callable[[State], None],
    ):
        """Takes the lock and brings the log in order.

        Args:
          storage: of the vault.
          options: see WriterOptions.
          dictionaries: of the string fields, shared with the reader.
          state: that the reader has.
          change: called with every new state.

        Raises:
          LockedError: there is another writer.
          CorruptionError: the log is damaged.
        """
        self._root = storage.root
        self._options = options
        self._dictionaries = dictionaries
        self._queue: list[_Item] = []
        self._queue_lock = threading.Lock()
        self._commit_lock = threading.RLock()
        self._broken: str | None = None
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._pieces: list[LogPiece] = []
        self._log = LogWriter(self._root, self.refuse)
        with contextlib.ExitStack() as stack:
            lock = stack.enter_context(writer_lock(self._root))
            held = HeldManifest(storage)
            state = build_state(storage, held, dictionaries, state, ())
            tail = self._log.recover(storage, state, dictionaries)
            self._origins = joined(origins_of(state.manifest), tail.origins)
            self._window = Window(state.schema, options.dedup_window)
            self._refill_window(state)
            self.maintenance = Maintenance(
                storage, options, dictionaries, state.with_tails((tail,)), self, change, lock
            )
            change(self.maintenance.state)
            self._held = stack.pop_all()

    @property
    def commit_lock(self) -> threading.RLock:
        """Held while events are being written; who holds it sees no append."""
        return self._commit_lock

    def append(self, events: Mapping[str, Any], origin: Any = None) -> int:
        """See Vault.append."""
        item = self._enqueue(events, origin)
        self._commit()
        return item.future.result()

    def append_async(self, events: Mapping[str, Any], origin: Any = None) -> "Future[int]":
        """See Vault.append_async."""
        item = self._enqueue(events, origin)
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._commit_forever, name="vault-append", daemon=True)
            self._thread.start()
        with self._queue_lock:
            waiting = sum(queued.size for queued in self._queue)
        if waiting > _QUEUE_BYTES:
            self._commit()
        with self._wake:
            self._wake.notify()
        return item.future

    def seal(self) -> list[LogPiece]:
        """Closes the tail and its log files, so that they can become a part; begins new ones. For maintenance."""
        with self._commit_lock:
            tail = self._state.tails[-1]
            if tail.size:
                self._pieces.append(LogPiece(tail, tuple(self._log.files)))
                self._begin(self._state.schema)
            return list(self._pieces)

    @property
    def pieces(self) -> list[LogPiece]:
        """Closed tails that are in no part yet."""
        return self._pieces

    def oldest_file(self, sequence: int, first: int) -> int:
        """The log file that holds the event of a sequence number, or the oldest one there is; at most `first`."""
        oldest = first
        for number in reversed([number for number in log_numbers(self._root) if number < first]):
            oldest = number
            with LogFile(self._root, number) as file:
                if file.first_sequence <= sequence:
                    break
        return oldest

    def flushed(self, pieces: list[LogPiece]) -> None:
        """These pieces are in a part now."""
        with self._commit_lock:
            self._pieces = [piece for piece in self._pieces if piece not in pieces]

    def begin_file(self) -> int:
        """The number of the log file that the next append goes to, a new one. Under the commit lock."""
        return self._log.begin_files()

    def forget_keys(self, users: list[Any]) -> None:
        """Events of these users are not taken for repeated ones any more."""
        with self._commit_lock:
            self._window.forget(set(users))

    def begin_schema(self, schema: Schema) -> None:
        """Begins a tail and a log file of another schema; the old tail is empty. Under the commit lock."""
        self._begin(schema)
        self._window = Window(schema, self._options.dedup_window)
        self._refill_window(self._state)

    def stats(self) -> dict[str, Any]:
        """Bytes written and what is under way."""
        return self.maintenance.stats() | {"log_bytes_written": self._log.bytes_written}

    def close(self) -> None:
        """Ends after what is under way, but for a merge, which is given up, and gives the lock back."""
        with self._queue_lock:
            self._closed = True  # from here on nothing comes into the queue
        with self._wake:
            self._wake.notify_all()
        if self._thread is not None:
            self._thread.join()
        self._commit()
        self.maintenance.close()
        with self._commit_lock:
            self._log.close()
            self._broken = "the vault was closed"
        self._held.close()

    @property
    def _state(self) -> State:
        return self.maintenance.state

    def _refill_window(self, state: State) -> None:
        """Reads the keys of the newest events from the log files that are kept for it."""
        if self._window.active:
            schemas = [Schema.from_json(schema) for schema in state.manifest["schemas"]]
            log_keys(self._root, state.manifest["log"]["kept"], schemas, self._dictionaries, self._window)

    def _enqueue(self, events: Mapping[str, Any], origin: Any) -> _Item:
        origin = checked_origin(origin)
        schema = self._state.schema
        columns = check_columns(schema, events)
        size = sum(_size_of(column) for column in columns.values())
        self.maintenance.wait_for_room()
        item = _Item(events, schema, columns, size, origin, Future())
        item.future.set_running_or_notify_cancel()  # from here on it cannot be cancelled
        with self._queue_lock:
            if not self._closed:
                self._queue.append(item)
                return item
        item.future.set_exception(
            UnavailableError(f"{self._root} was closed meanwhile: none of these events is written")
        )
        return item

    def _commit_forever(self) -> None:
        while not self._closed:
            with self._wake:
                if not self._queue and not self._closed:
                    self._wake.wait(0.05)
            self._commit()

    def _commit(self) -> None:
        """Writes everything that waits, in one go: many appends share a flush."""
        with self._commit_lock:
            with self._queue_lock:
                items, self._queue = self._queue, []
            try:
                items = [item for item in items if self._fits(item)]
                if not items:
                    return
                for item, result in zip(items, self._write(items), strict=True):
                    item.future.set_result(result)
            except (VaultError, OSError) as error:
                for item in items:
                    item.future.set_exception(_explained(error, self._root))
                return
            except BaseException as error:
                # A mistake in this code, or an interrupt: nobody may wait for ever because of it.
                for item in items:
                    if not item.future.done():
                        item.future.set_exception(_explained(error, self._root))
                raise
            tail = self._state.tails[-1]
            full = tail.num_bytes >= self._options.tail_bytes // 2
        if full:
            # These events are taken, whatever becomes of the part; if it cannot be made, the next ones hear of it.
            with contextlib.suppress(VaultError, OSError):
                self.maintenance.tail_is_full()

    def _fits(self, item: _Item) -> bool:
        """Checks what may be otherwise since they came, schema and origin; if they do not fit, their future says so."""
        schema = self._state.schema
        try:
            if item.schema is not schema and item.schema != schema:
                item.columns = check_columns(schema, item.events)
            if item.origin is not None:
                client, number = item.origin
                self._origins.get(client, Written()).check(number)
        except SchemaError as error:
            item.future.set_exception(error)
            return False
        return True

    def _write(self, items: list[_Item]) -> list[int]:
        self.check()
        tail, schema = self._state.tails[-1], self._state.schema
        strings = {name: NewValues(dictionary) for name, dictionary in self._dictionaries.items()}
        sequence = tail.next_sequence
        batches, results, keys = [], [], []
        origins: dict[str, Written] = {}
        pending: set[Any] = set()
        for item in items:
            client, number = item.origin or ("", 0)
            written = origins.get(client) or self._origins.get(client, Written())
            if client and written.has(number):
                results.append(written.sequence)  # sent again: its events are there
                continue
            batch, fresh = self._batch(schema, item.columns, sequence, pending, strings)
            batch.origin = item.origin
            if len(batch):
                batches.append(batch)
                keys.extend(fresh)
                sequence += len(batch)
            if client:
                origins[client] = written.adding([(number, number)], sequence)
            results.append(sequence)
        data = b"".join([encode_record(schema, batch) for batch in batches])
        try:
            if data:
                self._log.write(data, tail.next_sequence, sequence, len(self._state.manifest["schemas"]) - 1)
            # Only now may readers see them: what is not on the disk would be taken back by a crash.
            for new in strings.values():
                new.keep()
            for batch in batches:
                tail.append(batch.users, batch.columns, batch.origin)
            self._origins |= {client: written.trimmed() for client, written in origins.items()}
            if len(self._origins) > 2 * MOST:
                self._origins = newest(self._origins)
            if self._window.active:
                self._window.add(keys)
        except OSError:
            raise  # the log is as it was before, or has refused
        except BaseException as error:
            self.refuse(f"writing was broken off ({error!r}), and the log may hold events that memory does not")
            raise
        return results

    def refuse(self, why: str) -> None:
        """From now on nothing is written: memory and disk may not agree."""
        self._broken = why

    def check(self) -> None:
        """Raises UnavailableError once something was refused: neither events nor manifests are written any more."""
        if self._broken:
            raise UnavailableError(f"{self._root} cannot be written: {self._broken}; close it and open it again")

    def _batch(
        self,
        schema: Schema,
        columns: dict[str, Any],
        sequence: int,
        pending: set[Any],
        strings: dict[str, NewValues],
    ) -> tuple[Batch, list[Any]]:
        """Checked columns as a record's batch, without repeated events; and the keys of its events."""
        user = columns["user"]
        if isinstance(user, Coded):
            values = user.values
            users: list[Any] = [values[code] for code in user.codes.tolist()]
        else:
            users = user.tolist()
        rows = {name: columns[name] for name in ("time", *schema.names)}
        keys: list[Any] = []
        if self._window.active:
            plain = {
                name: [column.values[code] for code in column.codes.tolist()] if isinstance(column, Coded) else column
                for name, column in rows.items()
            }
            keys = self._window.keys(users, plain)
            fresh = self._window.fresh(keys, pending)
            if not fresh.all():
                chosen = np.flatnonzero(fresh)
                users = [users[row] for row in chosen.tolist()]
                keys = [keys[row] for row in chosen.tolist()]
                rows = {name: _taken(column, chosen) for name, column in rows.items()}
        new = {}
        for name, column in rows.items():
            if isinstance(column, Coded):
                values = strings[name]
                size = values.end
                rows[name] = values.encode(column)
                if values.end > size:
                    new[name] = (size, values.since(size))
        return Batch(sequence, users, rows, new), keys

    def _begin(self, schema: Schema) -> None:
        """A new tail and, with the next append, a new log file."""
        self._log.begin_files()
        self.maintenance.add_tail(Tail(schema, self._state.next_sequence))


def _taken(column: Any, rows: np.ndarray) -> Any:
    return Coded(column.codes[rows], column.values) if isinstance(column, Coded) else column[rows]


def _size_of(column: Any) -> int:
    return column.codes.nbytes + 8 * len(column) if isinstance(column, Coded) else column.nbytes


def _explained(error: BaseException, root: str) -> Exception:
    if isinstance(error, VaultError):
        return error
    if isinstance(error, OSError):
        return UnavailableError(f"{root} cannot be written: {error}")
    return UnavailableError(f"{root}: writing was broken off ({error!r}): these events may be written or not")
