"""A vault opened: `get` for one user, `gather` for a batch, and the writing calls, which make the handle the writer."""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from laser_jax.schema import Schema, SchemaError
from laser_jax.vault import administration
from laser_jax.vault.appender import Appender
from laser_jax.vault.batch import BatchReader
from laser_jax.vault.dictionary import Dictionary
from laser_jax.vault.errors import CorruptionError, MissingError, UnavailableError, UnknownFieldError, VaultError
from laser_jax.vault.follower import Follower
from laser_jax.vault.format import PAGE
from laser_jax.vault.history import Histories, History
from laser_jax.vault.history_cache import Cached, HistoryCache
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


class Vault:
    """See laser_jax.vault.open.

    Attributes:
      path: absolute path of the vault, or its URL.
      schema: of its events.
      num_events: events in parts and tail; one that a merge has yet to drop counts twice.
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
        self._asked: dict[Any, Asked] = {}

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
        """Events in parts and tail; one that a merge has yet to drop counts twice."""
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
        """Codes of strings in a field's dictionary, int32 [N]; -1 for a value that is not in it."""
        self.dictionary(field)
        dictionary = self._dictionaries[field]
        listed = values.tolist() if isinstance(values, np.ndarray) else values
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
          before: strict bound on event time in the schema's unit; None reads everything.
          as_of: strict bound on the sequence number, that is on what had been written; None reads everything
            that has been acknowledged.
          fields: names of the fields to read; None reads all but the vectors. `time` always comes.
          where: field -> the value, or the values, that an event must have to count.
          max_scan: events to look back at, at most, with `where`; None for no limit.

        Returns:
          The history; its `as_of`, `scanned` and `exhausted` say what it saw. Arrays may be shared with other readers
          of the same user: they are read-only then.

        Raises:
          UnknownFieldError, CorruptionError, UnavailableError.
        """
        asked = self._fields(fields)
        n = _count(n)
        bound = NO_BOUND if before is None else _one_bound("before", before)
        hidden = NO_BOUND if as_of is None else _one_bound("as_of", as_of)
        if max_scan is not None and not where:
            raise VaultError("max_scan goes with `where`: without conditions n events are read, and no more")

        def read(state: State) -> History:
            key = _one_user(state.schema, user)
            seen = min(state.next_sequence, hidden)
            if key is None or not n:
                return History(_no_rows(asked), self._values, seen, n > 0)
            if where:
                return self._get_where(state, key, n, bound, seen, asked, where, max_scan)
            rows = self._newest(state, key, asked, bound, seen, n, as_of is not None)
            if rows is None:
                return History(_no_rows(asked), self._values, seen, True)
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
          UnknownFieldError, CorruptionError, UnavailableError.
        """
        asked = self._fields(fields)
        n = _count(n)
        keys, beyond = _many_users(self.schema, users)
        size = len(keys)
        bounds = np.full(size, NO_BOUND) if before is None else _bounds("before", before, size)
        hidden = np.full(size, NO_BOUND) if as_of is None else _bounds("as_of", as_of, size)
        if beyond is not None:
            bounds = np.where(beyond, np.iinfo(np.int64).min, bounds)

        def read(state: State) -> Histories:
            seen = state.next_sequence
            if not n or not size:
                return Histories(_no_rows(asked), np.zeros(size + 1, np.int64), self._values, seen, n)
            # Appends go on meanwhile: every user of the batch is read as of the same moment.
            columns, offsets = self._batch.read(state, keys, bounds, np.minimum(hidden, seen), n, asked)
            return Histories(columns, offsets, self._values, seen, n)

        return self._with_state(read)

    def append(self, events: Mapping[str, Any]) -> int:
        """Adds events: durable when it returns, and seen by the next read.

        Args:
          events: `user`, `time` and every field of the schema, one value (or vector) an event, in any order.

        Returns:
          The sequence number that the next event will get: a read with it as `as_of` sees these events and all before.

        Raises:
          SchemaError: the events do not fit the schema; none of them is taken.
          LockedError: another handle, here or in another process, is the writer.
          UnavailableError: the storage refused; none of them is taken.
        """
        return self._writer().append(events)

    def append_async(self, events: Mapping[str, Any]) -> "Future[int]":
        """As append, without waiting: the future's result is append's. Blocks only while too much is under way."""
        return self._writer().append_async(events)

    def flush(self) -> None:
        """Moves all events from the log and the tail into a part."""
        self._writer().maintenance.flush()

    def merge(self, progress: Callable[[str], None] | None = None) -> None:
        """Flushes, merges every user into one part, applies retention, and frees what nobody needs.

        `progress` is called with a line now and then.
        """
        self._writer().maintenance.merge(progress or (lambda line: None))

    def merge_in_background(self) -> None:
        """Begins at once what else begins when the tail is full: users in too many parts are merged."""
        writer = self._writer()
        if not self._writing.background:
            raise VaultError(f"{self.path}: this handle has no background; call merge()")
        writer.maintenance.wake()

    def snapshot(self, name: str | None = None) -> str:
        """Pins everything that has been acknowledged, to be opened by `open(path, at=name)`; returns the name."""
        return administration.snapshot(self._writer(), name)

    def snapshots(self) -> list[str]:
        """Names of the snapshots."""
        return snapshots(self._storage)

    def drop_snapshot(self, name: str) -> None:
        """Unpins a snapshot."""
        administration.unpin(self._writer(), name)

    def forget(self, users: Any) -> int:
        """Removes every event of some users, from old parts, log and snapshots too: no file holds them afterwards.

        Returns:
          Events removed, those of copies included.
        """
        keys, beyond = _many_users(self.schema, users)
        if self.schema.user == "int64":
            keys = (keys if beyond is None else keys[~beyond]).tolist()
        removed = administration.forget(self._writer(), keys)
        if self._cache is not None:
            self._cache.clear()
        return removed

    def evolve(self, schema: Schema) -> None:
        """Changes the schema: adds fields that have a default, widens numbers. What was written stays as it is."""
        administration.evolve(self._writer(), schema, self._dictionaries)

    def retain(self, events: int | None = None, age: int | None = None) -> None:
        """Sets what merges keep: a user's newest `events`, and those younger than `age` (in the schema's unit)."""
        administration.retain(self._writer(), events, age)

    def refresh(self) -> None:
        """Takes in what another handle or process has written since; nothing to do for the writer itself."""
        if self._appender is not None or self.at is not None:
            return
        with self._lock:
            if not self._state.held.is_current(self._storage):
                self._change(self._opened())
            elif self._follower is not None:
                if not self._follower.follow():
                    self._change(self._opened())

    def close(self) -> None:
        """Ends writing: waits for what is under way, and gives the lock back. Reading goes on."""
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
                if self.at is not None or not self._storage.local or held.is_current(self._storage):
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
                if self.at is None and self.local and not state.held.is_current(self._storage):
                    raise UnavailableError(
                        f"{self.path} has changed since this handle was opened or refreshed, and files of it are gone: "
                        "call refresh() and read again"
                    ) from error
                raise

    def _change(self, state: State) -> None:
        """Makes a state the one that reads start from."""
        self._fills.update(fill_values(state.schema, self._dictionaries))
        if state.schema != self._state.schema:
            self._asked.clear()
        self._state = state
        self._pages.forget(set(state.parts))

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

    def _newest(
        self, state: State, user: Any, asked: Asked, before: int, seen: int, n: int, bounded: bool
    ) -> dict[str, np.ndarray] | None:
        """RowReader.newest, through the cache; `bounded` is whether the caller set `seen`."""
        cache = self._cache
        if cache is None or asked.vectors or (bounded and seen < state.parts_end):
            return self._rows.newest(state, user, asked, before, seen, n)
        found = cache.find(user, state)
        if before == NO_BOUND and (found is None or not (found.complete or len(found.columns["time"]) >= n)):
            entries = state.entries(user)
            if entries:
                parts_only = state.with_tails(())
                rows = self._rows.newest(parts_only, user, self._fields(None), NO_BOUND, NO_BOUND, n, entries=entries)
                found = Cached(state.stamp, (state.epoch, entries), rows, len(rows["time"]) < n)
                cache.keep(user, found)
        if found is None:
            return self._rows.newest(state, user, asked, before, seen, n)
        columns = found.columns
        stop = size = len(columns["time"])
        if before != NO_BOUND:
            stop = int(np.searchsorted(columns["time"], before))
            if stop < n and not found.complete:
                return self._rows.newest(state, user, asked, before, seen, n)
        start = max(0, stop - n)
        if start or stop < size or asked is not self._asked.get(None):
            known = {name: columns[name][start:stop] for name in ("time", *asked.names)}
        else:
            known = dict(columns)
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
        max_scan: int | None,
    ) -> History:
        limit = NO_BOUND - 1 if max_scan is None else _count(max_scan)
        conditions = {name: self._allowed(name, value) for name, value in where.items()}
        names = asked.names
        needed = self._fields(tuple(dict.fromkeys((*names, *conditions))))
        scan = max(2 * n, PAGE)
        while True:
            scan = min(scan, limit)
            # One more than may be looked at, to know whether there is one.
            rows = self._rows.newest(state, user, needed, before, seen, scan + 1)
            if rows is None:
                return History(_no_rows(asked), self._values, seen, True, 0)
            exhausted = len(rows["time"]) <= scan
            rows = {name: column[-scan:] for name, column in rows.items()} if scan else _no_rows(needed)
            size = len(rows["time"])
            kept = np.ones(size, bool)
            for name, allowed in conditions.items():
                kept &= np.isin(rows[name], allowed)
            found = np.flatnonzero(kept)
            if len(found) >= n or exhausted or scan == limit:
                break
            scan *= 4
        found = found[len(found) - min(n, len(found)) :]
        if len(found) == n and n and found[0] > 0:
            # It need not have looked further back than that.
            size, exhausted = size - int(found[0]), False
        columns = {name: rows[name][found] for name in ("time", *names)}
        return History(columns, self._values, seen, exhausted, size)

    def _allowed(self, name: str, value: Any) -> np.ndarray:
        """The values of a field that a condition lets through; codes of a string field."""
        field = next(iter(self._fields((name,)).fields), None)
        if field is None or field.size is not None:
            raise UnknownFieldError(f"where={name!r}: conditions are on scalar fields, before bounds time")
        listed = list(value) if isinstance(value, (list, tuple, set, frozenset, np.ndarray)) else [value]
        if field.type == "string":
            if not all(isinstance(one, str) for one in listed):
                raise SchemaError(f"where={name!r}: {value!r}: this field holds strings")
            return self.encode(name, listed)
        kind = {"b": (bool, np.bool_), "f": (int, float, np.integer, np.floating)}.get(
            field.dtype.kind, (int, np.integer)
        )
        for one in listed:
            if not isinstance(one, kind) or (isinstance(one, bool) and field.dtype.kind != "b"):
                raise SchemaError(f"where={name!r}: {one!r}: this field holds {field.type}")
        if field.dtype.kind in "iu":
            # What does not fit is in no event; a common type of both could be a float, which rounds.
            limits = np.iinfo(field.dtype)
            listed = [int(one) for one in listed if limits.min <= one <= limits.max]
        return np.array(listed, field.dtype)

    def _fields(self, names: Sequence[str] | None) -> Asked:
        key = None if names is None else names if isinstance(names, (str, tuple)) else tuple(names)
        found = self._asked.get(key)
        if found is not None:
            return found
        if names is None:
            found = Asked(self.schema.scalars)
        elif isinstance(names, str):
            raise UnknownFieldError(f"fields={names!r}: give a sequence of names")
        else:
            unknown = [name for name in key if name != "time" and name not in self.schema.names]
            if unknown:
                known = ", ".join(("time", *self.schema.names))
                raise UnknownFieldError(f"{self.path} has no field {unknown[0]!r}; its fields: {known}")
            found = Asked(tuple(self.schema.field(name) for name in dict.fromkeys(key) if name != "time"))
        self._asked[key] = found
        return found


def _no_rows(asked: Asked) -> dict[str, np.ndarray]:
    columns = {"time": np.zeros(0, np.int64)}
    for field in asked.fields:
        columns[field.name] = np.zeros((0,) if field.size is None else (0, field.size), field.dtype)
    return columns


def _count(n: int) -> int:
    if type(n) is int and 0 <= n < NO_BOUND:
        return n
    if isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 0:
        raise SchemaError(f"n={n!r}: need the number of events, an integer >= 0")
    return min(int(n), NO_BOUND - 1)


def _one_bound(name: str, value: Any) -> int:
    if type(value) is int and -(2**63) <= value < 2**63:
        return value
    return int(_bounds(name, value, 1)[0])


def _bounds(name: str, value: Any, size: int) -> np.ndarray:
    array = np.asarray(value)
    if array.dtype.kind not in "iu" and array.size:
        raise SchemaError(f"{name} of type {array.dtype}: need integers (times in the schema's unit)")
    if array.ndim > 1 or (array.ndim == 1 and len(array) != size):
        raise SchemaError(f"{name} of shape {array.shape} for {size} users: need one number, or one for each")
    if array.dtype.kind == "u":
        array = np.minimum(array, np.uint64(NO_BOUND))
    return np.broadcast_to(array.astype(np.int64), (size,))


def _one_user(schema: Schema, user: Any) -> Any:
    if schema.user == "string":
        if not isinstance(user, str):
            raise SchemaError(f"user {user!r}: this vault's users are strings")
        return user
    if type(user) is int and -(2**63) <= user < 2**63:
        return user
    if type(user) is not int and (isinstance(user, bool) or not isinstance(user, (int, np.integer))):
        raise SchemaError(f"user {user!r}: this vault's users are int64")
    user = int(user)
    # An id beyond int64 is nobody's.
    return user if -(2**63) <= user < 2**63 else None


def _many_users(schema: Schema, users: Any) -> tuple[Any, np.ndarray | None]:
    """Keys as the schema has them, and which of them are beyond int64: these are nobody's."""
    if schema.user == "string":
        if isinstance(users, str):
            raise SchemaError(f"users {users!r}: need a sequence of strings")
        listed = users.tolist() if isinstance(users, np.ndarray) else list(users)
        for user in listed:
            if not isinstance(user, str):
                raise SchemaError(f"user {user!r}: this vault's users are strings")
        return listed, None
    array = np.asarray(users)
    if array.ndim != 1 or (array.dtype.kind not in "iu" and array.size):
        raise SchemaError(f"users of type {array.dtype} and shape {array.shape}: need int64 [B]")
    beyond = array > np.iinfo(np.int64).max
    return array.astype(np.int64), beyond if beyond.any() else None
