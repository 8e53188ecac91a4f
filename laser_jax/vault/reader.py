"""A vault opened: `get` for one user, `gather` for a batch, and the writing calls, which make the handle the writer."""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from laser_jax.schema import Schema
from laser_jax.vault import administration
from laser_jax.vault.appender import Appender
from laser_jax.vault.arguments import (
    checked_bound,
    checked_bounds,
    checked_count,
    checked_time,
    checked_times,
    checked_user,
    checked_users,
    checked_values,
    no_rows,
)
from laser_jax.vault.batch import BatchReader
from laser_jax.vault.conditions import allowed_values, newest_that_meet
from laser_jax.vault.dictionary import Dictionary
from laser_jax.vault.errors import CorruptionError, MissingError, UnavailableError, UnknownFieldError, VaultError
from laser_jax.vault.follower import Follower
from laser_jax.vault.history import Histories, History
from laser_jax.vault.history_cache import HistoryCache
from laser_jax.vault.log import log_path
from laser_jax.vault.lookup import LocalPages, RemotePages
from laser_jax.vault.maintenance import WriterOptions
from laser_jax.vault.manifest import HeldManifest, snapshots
from laser_jax.vault.merging import NO_BOUND, RowReader
from laser_jax.vault.state import State, build_state
from laser_jax.vault.storage import storage_of
from laser_jax.vault.unpacking import Asked, fill_values

#: Memory for decoded histories of hot users.
CACHE_BYTES = 64 << 20
_OPEN_TRIES = 5
_SMALLEST = -NO_BOUND - 1


class Vault:
    """See laser_jax.vault.open.

    Attributes:
      path: absolute path of the vault, or its URL.
      schema: of its events.
      num_events: events in parts and tail; one that a merge has written anew counts twice while its old part is there
        (`stats` counts those that can be read).
      next_sequence: sequence number that the next event written gets.
    """

    def __init__(
        self,
        path: str,
        cache_bytes: int = CACHE_BYTES,
        at: str | None = None,
        writing: WriterOptions | None = None,
    ):
        self._storage = storage_of(path)
        self.path = self._storage.root
        self.cache_bytes = cache_bytes
        self.at = at
        self._writing = writing or WriterOptions()
        self._dictionaries: dict[str, Dictionary] = {}
        self._fills: dict[str, int] = {}
        self._lock = threading.RLock()
        self._appender: Appender | None = None
        self._follower: Follower | None = None
        self._state = self._opened()
        if self._storage.local:
            self._pages: Any = LocalPages()
        else:
            self._pages = RemotePages(max(cache_bytes, 1))
        self._cache = HistoryCache(cache_bytes) if cache_bytes else None
        self._rows = RowReader(self._pages, self._fills)
        self._batch = BatchReader(self._rows)
        self._asked: tuple[Schema, dict[Any, Asked]] = (self.schema, {})
        self._key_type = int if self.schema.user == "int64" else str

    def __reduce__(self):
        return Vault, (self.path, self.cache_bytes, self.at, self._writing)

    def __enter__(self) -> "Vault":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __len__(self) -> int:
        """Number of users."""
        return self._state.num_users()

    def __repr__(self) -> str:
        return f"Vault({self.path!r}, {self.num_events} events)"

    @property
    def local(self) -> bool:
        """Whether the vault lies in a local directory."""
        return self._storage.local

    @property
    def schema(self) -> Schema:
        """Of the events, as it is today."""
        return self._state.schema

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest that is read from."""
        return self._state.manifest

    @property
    def state(self) -> State:
        """Parts, index and tails as a read would find them now."""
        return self._state

    @property
    def num_events(self) -> int:
        """Events in parts and tail; one that a merge has written anew counts twice while its old part is there."""
        state = self._state
        return sum(part["events"] for part in state.manifest["parts"]) + sum(tail.size for tail in state.tails)

    @property
    def next_sequence(self) -> int:
        """Sequence number that the next event written gets."""
        return self._state.next_sequence

    def users(self) -> np.ndarray:
        """All users in no particular order, int64 [U] or str objects [U]."""
        found = self._state.users()
        if self.schema.user == "int64":
            return np.array(found, np.int64)
        keys = np.empty(len(found), object)
        keys[:] = found
        return keys

    def dictionary(self, field: str) -> np.ndarray:
        """Values of a string field, str objects; the position is the code."""
        if field not in self._dictionaries:
            known = ", ".join(self._dictionaries) or "none"
            raise UnknownFieldError(f"{self.path}: {field!r} is not a string field; string fields: {known}")
        return self._dictionaries[field].array

    def encode(self, field: str, values: Sequence[str]) -> np.ndarray:
        """Codes of strings in a field's dictionary, int32 [N]; -1 for a value that is not in it.

        Raises:
          SchemaError: `values` is one string; give a list of it.
        """
        self.dictionary(field)
        dictionary = self._dictionaries[field]
        listed = checked_values(field, values)
        return np.fromiter((dictionary.code(value) for value in listed), np.int32, len(listed))

    def get(
        self,
        user: int | str,
        n: int = 1000,
        before: int | None = None,
        as_of: int | None = None,
        fields: Sequence[str] | None = None,
        where: Mapping[str, Any] | None = None,
        max_scan: int | None = None,
    ) -> History:
        """The newest n events of one user, oldest first; of equal times the one written first comes first.

        Args:
          user: an int64 or a string, as the schema says; an unknown user has an empty history.
          n: events at most.
          before: strict bound on event time in the schema's unit; None reads everything. A time that no event can have
            is refused: its unit is wrong.
          as_of: strict bound on the sequence number, that is on what had been written; None reads everything
            that has been acknowledged.
          fields: names of the fields to read; None reads all but the vectors. `time` always comes.
          where: field -> the value, or the values, that an event must have to count.
          max_scan: events to look back at, at most, with `where`; None for no limit.

        Returns:
          The history; its `as_of`, `scanned` and `exhausted` say what it saw. Arrays may be shared with other readers
          of the same user: they are read-only then.

        Raises:
          SchemaError, UnknownFieldError, CorruptionError, UnavailableError.
        """
        if before is None and as_of is None and fields is None and not where and max_scan is None:
            found = self._latest(user, n)
            if found is not None:
                return found
        n = checked_count(n)
        bound = NO_BOUND if before is None else checked_time(self.schema, before)
        hidden = NO_BOUND if as_of is None else checked_bound("as_of", as_of)
        if max_scan is not None and not where:
            raise VaultError("max_scan goes with `where`: without conditions n events are read, and no more")

        def read(state: State) -> History:
            asked = self._fields(fields, state.schema)
            key = checked_user(state.schema, user)
            seen = min(state.next_sequence, hidden)
            if key is None or not n:
                return History(no_rows(asked), self._values, seen, n > 0)
            if where:
                limit = NO_BOUND - 1 if max_scan is None else checked_count(max_scan)
                return self._get_where(state, key, n, bound, seen, asked, where, limit)
            rows = self._newest(state, key, asked, bound, seen, n, as_of is not None)
            if rows is None:
                return History(no_rows(asked), self._values, seen, True)
            return History(rows, self._values, seen, len(rows["time"]) < n)

        return self._with_state(read)

    def gather(
        self,
        users: Any,
        before: Any = None,
        n: int = 1000,
        as_of: Any = None,
        fields: Sequence[str] | None = None,
    ) -> Histories:
        """The newest n events of every user of a batch, in one read.

        Args:
          users: int64 [B] or B strings, repeats allowed; an unknown user has an empty history.
          before: strict bound on event time for all (a number) or each (int64 [B]) of them, or None.
          n: events of a user at most.
          as_of: strict bound on the sequence number for all or each of them, or None.
          fields: as for get.

        Raises:
          SchemaError, UnknownFieldError, CorruptionError, UnavailableError.
        """
        n = checked_count(n)
        keys, beyond = checked_users(self.schema, users)
        size = len(keys)
        bounds = np.full(size, NO_BOUND) if before is None else checked_times(self.schema, before, size)
        hidden = np.full(size, NO_BOUND) if as_of is None else checked_bounds("as_of", as_of, size)
        if beyond is not None:
            bounds = np.where(beyond, np.iinfo(np.int64).min, bounds)

        def read(state: State) -> Histories:
            asked = self._fields(fields, state.schema)
            seen = state.next_sequence
            if not n or not size:
                return Histories(no_rows(asked), np.zeros(size + 1, np.int64), self._values, seen, n)
            # Appends go on meanwhile: every user of the batch is read as of the same moment.
            columns, offsets = self._batch.read(state, keys, bounds, np.minimum(hidden, seen), n, asked)
            return Histories(columns, offsets, self._values, seen, n)

        return self._with_state(read)

    def append(self, events: Mapping[str, Any], origin: tuple[str, int] | None = None) -> int:
        """Adds events: durable when it returns, and seen by the next read.

        Args:
          events: `user`, `time` and every field of the schema, one value (or vector) an event, in any order.
          origin: (client, number) for who may have to send a batch again, not knowing whether it was written. Every
            batch of a client has a number of its own, best one after the other; a batch with the number of one that was
            written is taken for that one, and nothing is written. This outlives crashes, for the 4096 clients who wrote
            last. They may send several batches at a time, and numbers may be left out; of numbers below the client's
            64 highest runs it is forgotten which were written.

        Returns:
          The sequence number that the next event will get: a read with it as `as_of` sees these events and all before.

        Raises:
          SchemaError: the events do not fit the schema, or it was forgotten whether the batch was written; none of them
            is taken.
          LockedError: another handle, here or in another process, is the writer.
          UnavailableError: the storage refused; none of them is taken.
        """
        return self._write(lambda writer: writer.append(events, origin))

    def append_async(self, events: Mapping[str, Any], origin: tuple[str, int] | None = None) -> "Future[int]":
        """As append, without waiting: the future's result is append's. Blocks only while too much is under way."""
        return self._write(lambda writer: writer.append_async(events, origin))

    def begin_writing(self) -> None:
        """Becomes the vault's one writer now, and not with the first call that writes; LockedError if there is one."""
        self._write(lambda writer: None)

    def flush(self) -> None:
        """Moves all events from the log and the tail into a part."""
        self._write(lambda writer: writer.maintenance.flush())

    def merge(self, progress: Callable[[str], None] | None = None) -> None:
        """Flushes, merges every user into one part, applies retention, and frees what nobody needs.

        `progress` is called with a line now and then.
        """
        self._write(lambda writer: writer.maintenance.merge(progress or (lambda line: None)))

    def merge_in_background(self) -> None:
        """Begins at once what else begins when the tail is full: users in too many parts are merged."""
        writer = self._writer()
        if not self._writing.background:
            raise VaultError(f"{self.path}: this handle has no background; call merge()")
        writer.maintenance.wake()

    def snapshot(self, name: str | None = None, replace: bool = False) -> str:
        """Pins everything that has been acknowledged, to be opened by `open(path, at=name)`; returns the name.

        Args:
          name: of the snapshot; None calls it by the number of the next event, and never moves one that is there.
          replace: moves the snapshot of that name, if there is one, to what is there now.

        Raises:
          VaultError: there is one of another state, and `replace` is not set.
        """
        return self._write(lambda writer: administration.snapshot(writer, name, replace))

    def snapshots(self) -> list[str]:
        """Names of the snapshots."""
        return snapshots(self._storage)

    def drop_snapshot(self, name: str) -> None:
        """Unpins a snapshot."""
        self._write(lambda writer: administration.unpin(writer, name))

    def forget(self, users: Any) -> int:
        """Removes every event of some users, from old parts, log and snapshots too: no file holds them afterwards.

        What `repair` has set aside in `damaged/` is deleted, all of it: it cannot be told whose events these are. The
        values that string fields have ever had stay in their dictionaries, since codes are never taken back; they do
        not tell whose they were.

        Returns:
          Events removed, those of copies included.
        """
        keys, beyond = checked_users(self.schema, users)
        if self.schema.user == "int64":
            keys = (keys if beyond is None else keys[~beyond]).tolist()
        removed = self._write(lambda writer: administration.forget(writer, keys))
        if self._cache is not None:
            self._cache.clear()
        return removed

    def evolve(self, schema: Schema) -> None:
        """Changes the schema: adds fields that have a default, widens numbers. What was written stays as it is."""
        self._write(lambda writer: administration.evolve(writer, schema, self._dictionaries))

    def retain(self, events: int | None = None, age: int | None = None) -> None:
        """Sets what merges keep: a user's newest `events`, and those younger than `age`.

        Args:
          age: in the schema's unit, counted from the vault's newest event or from now, whichever is earlier.
        """
        self._write(lambda writer: administration.retain(writer, events, age))

    def refresh(self) -> None:
        """Takes in what another handle or process has written since; nothing to do for the writer itself.

        At a snapshot: who was forgotten since, and one that was made anew under the same name; VaultError if it was
        dropped.
        """
        if self._appender is not None:
            return
        with self._lock:
            if not self._state.held.is_current(self._storage):
                self._change(self._opened())
            elif self._follower is not None:
                if not self._follower.follow():
                    self._change(self._opened())

    def close(self) -> None:
        """Ends writing: waits for what is under way, but for merges, which are given up, and gives the lock back.

        Reading goes on.
        """
        with self._lock:
            appender, self._appender = self._appender, None
        if appender is not None:
            appender.close()
            with self._lock:
                self._change(self._opened())

    def stats(self) -> dict[str, Any]:
        """Sizes and shape of the vault; see laser_jax.vault.inspection.stats."""
        from laser_jax.vault import inspection

        found = inspection.stats(self)
        found["cache"] = self._cache.stats() if self._cache else None
        if self._appender is not None:
            found["writer"] = self._appender.stats()
        return found

    def verify(self) -> list[str]:
        """Reads everything and names every damage; empty if the vault is whole."""
        from laser_jax.vault import inspection

        return inspection.verify(self.path)

    def _opened(self) -> State:
        """A state from what is on disk now."""
        before = getattr(self, "_state", None)
        for _ in range(_OPEN_TRIES):
            held = HeldManifest(self._storage, self.at)
            try:
                state = build_state(self._storage, held, self._dictionaries, before, ())
                self._fills.update(fill_values(state.schema, self._dictionaries))
                if self.at is None and self._storage.local:
                    follower = Follower(self._storage, held.content, state.schema, self._dictionaries)
                    if not follower.follow():
                        raise CorruptionError(f"{log_path(self.path, follower.file)} is missing")
                    self._follower = follower
                    state = state.with_tails((follower.tail,))
                return state
            except (CorruptionError, UnavailableError):
                # Forgetting removes files even from under a manifest that is held.
                if not self._storage.local or held.is_current(self._storage):
                    raise
        raise UnavailableError(f"{self.path} changes all the time: try again")

    def _with_state(self, read: Callable[[State], Any]) -> Any:
        """What `read` returns for the newest state; tried again with a newer one if files go in the meantime."""
        state = self._state
        while True:
            try:
                return read(state)
            except MissingError as error:
                newest = self._state
                if newest.stamp != state.stamp:
                    state = newest
                    continue
                if self.local and not state.held.is_current(self._storage):
                    raise UnavailableError(
                        f"{self.path} has changed since this handle was opened or refreshed, and files of it are gone: "
                        "call refresh() and read again"
                    ) from error
                raise

    def _change(self, state: State) -> None:
        """Makes a state the one that reads start from."""
        self._fills.update(fill_values(state.schema, self._dictionaries))
        self._state = state
        self._pages.forget(set(state.parts))

    def _write(self, call: Callable[[Appender], Any]) -> Any:
        """What a writing call returns; the storage's refusals become errors of the vault."""
        try:
            return call(self._writer())
        except OSError as error:
            raise UnavailableError(f"{self.path} cannot be written: {error}") from error

    def _writer(self) -> Appender:
        if self._appender is None:
            with self._lock:
                if self._appender is None:
                    if self.at is not None:
                        raise VaultError(f"{self.path} was opened at snapshot {self.at!r}, which cannot be written")
                    if not self._storage.local:
                        raise VaultError(f"{self.path}: appending and merging need a vault in a local directory")
                    self._appender = Appender(
                        self._storage, self._writing, self._dictionaries, self._state, self._change
                    )
        return self._appender

    def _values(self, field: str) -> np.ndarray | None:
        dictionary = self._dictionaries.get(field)
        return None if dictionary is None else dictionary.array

    def _latest(self, user: Any, n: Any) -> History | None:
        """The newest n events of a user by the shortest way that there is; None if that takes more than this."""
        state = self._state
        if type(user) is not self._key_type or type(n) is not int or n < 1:
            return None
        seen = state.next_sequence
        for tail in state.tails:
            if tail.size and user in tail:
                return None
        cache = self._cache
        found = None if cache is None else cache.find(user, state)
        if found is not None:
            size = found.rows
            if size == n or (size < n and found.complete):
                return History(found.columns, self._values, seen, size < n, size)
            if size > n:
                columns = {name: column[size - n :] for name, column in found.columns.items()}
                return History(columns, self._values, seen, False, n)
        if self._key_type is int and not _SMALLEST <= user <= NO_BOUND:
            return None
        entries = state.entries(user)
        if not entries:
            return None
        asked = self._fields(None, state.schema)
        try:
            if len(entries) == 1:
                rows = self._rows.newest_of(state, entries[0], asked, n)
            else:
                rows = self._rows.newest(state, user, asked, NO_BOUND, seen, n, entries=entries)
        except MissingError:
            return None
        if rows is None:
            return None
        size = len(rows["time"])
        if cache is not None:
            cache.keep(user, state, entries, rows, size < n, asked.event_bytes)
        return History(rows, self._values, seen, size < n, size)

    def _newest(
        self, state: State, user: Any, asked: Asked, before: int, seen: int, n: int, bounded: bool
    ) -> dict[str, np.ndarray] | None:
        """RowReader.newest, through the cache; `bounded` is whether the caller set `seen`."""
        cache = self._cache
        if cache is None or asked.vectors or (bounded and seen < state.parts_end):
            return self._rows.newest(state, user, asked, before, seen, n)
        found = cache.find(user, state)
        if found is not None:
            columns, size, complete = found.columns, found.rows, found.complete
        if before == NO_BOUND and (found is None or not (complete or size >= n)):
            entries = state.entries(user)
            every, parts_only = self._fields(None, state.schema), state.with_tails(())
            rows = self._rows.newest(parts_only, user, every, NO_BOUND, NO_BOUND, n, entries=entries)
            if rows is None:
                return self._rows.newest(state, user, asked, before, seen, n)
            columns, size = rows, len(rows["time"])
            complete = size < n
            cache.keep(user, state, entries, rows, complete, every.event_bytes)
        elif found is None:
            return self._rows.newest(state, user, asked, before, seen, n)
        stop = size
        if before != NO_BOUND:
            stop = int(np.searchsorted(columns["time"], before))
            if stop < n and not complete:
                return self._rows.newest(state, user, asked, before, seen, n)
        start = max(0, stop - n)
        known = columns
        if start or stop < size or asked is not self._fields(None, state.schema):
            known = {name: columns[name][start:stop] for name in ("time", *asked.names)}
        for tail in state.tails:
            if tail.size and user in tail:
                return self._rows.newest(state, user, asked, before, seen, n, known=known)
        return known

    def _get_where(
        self,
        state: State,
        user: Any,
        n: int,
        before: int,
        seen: int,
        asked: Asked,
        where: Mapping[str, Any],
        limit: int,
    ) -> History:
        conditions = {}
        for name, value in where.items():
            field = next(iter(self._fields((name,), state.schema).fields), None)
            conditions[name] = allowed_values(name, field, value, self.encode)
        needed = self._fields(tuple(dict.fromkeys((*asked.names, *conditions))), state.schema)

        def read(count: int) -> dict[str, np.ndarray] | None:
            return self._rows.newest(state, user, needed, before, seen, count)

        rows, scanned, exhausted = newest_that_meet(read, conditions, n, limit)
        columns = no_rows(asked) if rows is None else {name: rows[name] for name in ("time", *asked.names)}
        return History(columns, self._values, seen, exhausted, scanned)

    def _fields(self, names: Sequence[str] | None, schema: Schema) -> Asked:
        """What is asked for by these names, of a state with this schema."""
        known_of, known = self._asked
        if schema is not known_of:
            known = known if schema == known_of else {}
            self._asked = schema, known
        key = None if names is None else names if isinstance(names, (str, tuple)) else tuple(names)
        found = known.get(key)
        if found is not None:
            return found
        if names is None:
            found = Asked(schema.scalars)
        elif isinstance(names, str):
            raise UnknownFieldError(f"fields={names!r}: give a sequence of names")
        else:
            unknown = [name for name in key if name != "time" and name not in schema.names]
            if unknown:
                fields = ", ".join(("time", *schema.names))
                raise UnknownFieldError(f"{self.path} has no field {unknown[0]!r}; its fields: {fields}")
            found = Asked(tuple(schema.field(name) for name in dict.fromkeys(key) if name != "time"))
        known[key] = found
        return found
