"""A vault in P partitions by the hash of the user: each a vault of its own, all behind one face.

    partitions.json      number of partitions and a name for the whole that no other vault has; written last
    codes.log            codes of strings that hold for all partitions (see laser_jax.vault.codebook)
    partition-00000/     a vault

Partitions have sequence numbers of their own: `as_of` means that of the user's partition, or is a Sequences of all.
"""

import concurrent.futures
import contextlib
import itertools
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from laser_jax.schema import Schema, SchemaError
from laser_jax.vault.arguments import checked_bounds, checked_times, checked_users, checked_values
from laser_jax.vault.codebook import CODES, Codebook
from laser_jax.vault.columns import Coded, check_columns
from laser_jax.vault.errors import (
    CorruptionError,
    UnavailableError,
    UnknownFieldError,
    VaultError,
    VaultExistsError,
)
from laser_jax.vault.files import crc32c, dump, sync_path, writer_lock
from laser_jax.vault.history import Histories, History
from laser_jax.vault.maintenance import WriterOptions
from laser_jax.vault.origins import checked_origin
from laser_jax.vault.partitioning import FORMAT, PARTITIONS, partition_of, partition_path, read_count
from laser_jax.vault.reader import Vault
from laser_jax.vault.verification import verify
from laser_jax.vault.writer import VaultWriter


class Sequences(tuple):
    """A sequence number of each partition; given as `as_of` it bounds every user by its partition's."""


class PartitionedWriter:
    """Bulk writer of a partitioned vault, see laser_jax.vault.create: it exists once the `with` block ends well."""

    def __init__(self, path: str, schema: Schema, buffer_events: int, partitions: int):
        if isinstance(partitions, bool) or not isinstance(partitions, int) or partitions < 1:
            raise VaultError(f"partitions={partitions!r}: need an integer >= 1")
        self.path = os.path.abspath(path)
        self.schema = schema
        self._buffer_events = max(1, buffer_events // partitions)
        self._partitions = partitions
        if os.path.exists(os.path.join(self.path, PARTITIONS)):
            raise VaultExistsError(f"{self.path} already holds a vault: give another path, or remove it first")
        others = [name for name in _listed(self.path) if not _is_ours(name)]
        if others:
            raise VaultExistsError(f"{self.path} is not empty (it holds {min(others)!r}): give a new directory")

    def __enter__(self) -> "PartitionedWriter":
        with contextlib.ExitStack() as stack:
            try:
                os.makedirs(self.path, exist_ok=True)
                stack.enter_context(writer_lock(self.path))
                self._remove()  # what a killed writer left
            except OSError as error:
                raise UnavailableError(f"vault {self.path} cannot be created: {error}") from error
            self._codes = Codebook(os.path.join(self.path, CODES), string_fields(self.schema))
            self._writing = stack.enter_context(contextlib.ExitStack())
            self._writers = [
                self._writing.enter_context(
                    VaultWriter(partition_path(self.path, number), self.schema, self._buffer_events)
                )
                for number in range(self._partitions)
            ]
            self._locked = stack.pop_all()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        with self._locked, contextlib.ExitStack() as undo:
            undo.callback(self._remove)
            # The partitions' writers commit, or tidy up after the error; only `partitions.json` makes them a vault.
            self._writing.__exit__(kind, error, trace)
            if kind is not None:
                return
            self._commit()
            undo.pop_all()

    def write(self, columns: Mapping[str, Any]) -> None:
        """As VaultWriter.write."""
        checked = check_columns(self.schema, columns)
        self._codes.add({name: checked[name].values for name in string_fields(self.schema)})
        for number, rows in _split(self.schema, checked, self._partitions):
            self._writers[number].write(_taken(checked, rows))

    def _remove(self) -> None:
        for name in _listed(self.path):
            if name != "writer.lock" and _is_ours(name):
                target = os.path.join(self.path, name)
                if os.path.isdir(target):
                    shutil.rmtree(target)
                else:
                    os.remove(target)

    def _commit(self) -> None:
        content = {"format": FORMAT, "version": 1, "partitions": self._partitions, "vault": uuid.uuid4().hex}
        target = os.path.join(self.path, PARTITIONS)
        try:
            with open(target + ".draft", "wb") as file:
                file.write(dump(content | {"checksum": crc32c(dump(content))}))
                file.flush()
                os.fsync(file.fileno())
            os.replace(target + ".draft", target)
            sync_path(self.path)
        except OSError as error:
            raise UnavailableError(f"vault {self.path} cannot be written: {error}") from error


class PartitionedVault:
    """The face of laser_jax.vault.Vault over partitions; see there.

    What changes all partitions (`merge`, `snapshot`, `forget`, `evolve`, ...) goes through them in turn: if it fails
    halfway, call it again.

    Attributes:
      path: of the vault. partitions: the vaults.
    """

    local = True

    def __init__(self, path: str, cache_bytes: int, at: str | None = None, writing: WriterOptions | None = None):
        self.path = os.path.abspath(path)
        self.cache_bytes = cache_bytes
        self.at = at
        self._writing = writing
        count = read_count(self.path)
        share = cache_bytes // count
        vaults = [Vault(partition_path(self.path, number), share, at, writing) for number in range(count)]
        self._hold(vaults, Codebook(os.path.join(self.path, CODES), string_fields(vaults[0].schema)))

    def _hold(self, partitions: list[Any], codes: Any) -> None:
        """Takes the partitions, which have the face of a Vault, and their common codes, that of a Codebook."""
        self.partitions = partitions
        self._codes = codes
        self._translations: dict[tuple[int, str], np.ndarray] = {}
        self._pools = self._threads()
        self._lock: contextlib.ExitStack | None = None
        self._locking = threading.Lock()

    def _threads(self) -> list[concurrent.futures.ThreadPoolExecutor]:
        """Those that read each partition: the same for all, since what they wait for is a core."""
        threads = min(len(self.partitions), os.cpu_count() or 1)
        return [concurrent.futures.ThreadPoolExecutor(threads, "vault-partitions")] * len(self.partitions)

    def __reduce__(self):
        return PartitionedVault, (self.path, self.cache_bytes, self.at, self._writing)

    def __enter__(self) -> "PartitionedVault":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __len__(self) -> int:
        """Number of users."""
        return sum(len(vault) for vault in self.partitions)

    def __repr__(self) -> str:
        return f"PartitionedVault({self.path!r}, {len(self.partitions)} partitions, {self.num_events} events)"

    @property
    def schema(self) -> Schema:
        """Of the events, as it is today."""
        return self.partitions[0].schema

    @property
    def num_events(self) -> int:
        """Events of all partitions, see Vault.num_events."""
        return sum(vault.num_events for vault in self.partitions)

    @property
    def next_sequence(self) -> Sequences:
        """The number that the next event of each partition gets."""
        return Sequences(vault.next_sequence for vault in self.partitions)

    def users(self) -> np.ndarray:
        """All users in no particular order."""
        return np.concatenate([vault.users() for vault in self.partitions])

    def dictionary(self, field: str) -> np.ndarray:
        """Values of a string field; the position is the code, the same in all partitions."""
        if field not in self._codes.dictionaries:
            known = ", ".join(self._codes.dictionaries) or "none"
            raise UnknownFieldError(f"{self.path}: {field!r} is not a string field; string fields: {known}")
        return self._codes.dictionaries[field].array

    def encode(self, field: str, values: Sequence[str]) -> np.ndarray:
        """Codes of strings, int32 [N]; -1 for a value that has none."""
        self.dictionary(field)
        dictionary = self._codes.dictionaries[field]
        listed = checked_values(field, values)
        return np.fromiter((dictionary.code(value) for value in listed), np.int32, len(listed))

    def partition_of(self, users: Any) -> np.ndarray:
        """Partition of each user, int64 [B]."""
        return partition_of(self.schema, users, len(self.partitions))

    def get(self, user: Any, n: int = 1000, before: int | None = None, as_of: Any = None, **options: Any) -> History:
        """As Vault.get; `as_of` is a sequence number of the user's partition, or a Sequences."""
        keys = [user] if self.schema.user == "string" else np.array([_int64(user)], np.int64)
        if self.schema.user == "string" and not isinstance(user, str):
            raise SchemaError(f"user {user!r}: this vault's users are strings")
        number = int(partition_of(self.schema, keys, len(self.partitions))[0])
        if isinstance(as_of, Sequences):
            as_of = self._checked(as_of)[number]
        found = self.partitions[number].get(user, n, before, as_of, **options)
        columns = self._translated(number, found)
        return History(columns, self._values, found.as_of, found.exhausted, found.scanned)

    def gather(
        self, users: Any, before: Any = None, n: int = 1000, as_of: Any = None, fields: Sequence[str] | None = None
    ) -> Histories:
        """As Vault.gather; `as_of` holds for each user the sequence number of its partition, or is a Sequences."""
        schema = self.schema
        listed, beyond = checked_users(schema, users)
        if beyond is not None:
            listed = np.asarray(users)  # the partitions will tell these ids from those of users
        owner = partition_of(schema, listed, len(self.partitions))
        size = len(owner)
        bound = None if before is None else checked_times(schema, before, size)
        hidden = np.array(self._checked(as_of), np.int64)[owner] if isinstance(as_of, Sequences) else as_of
        hidden = None if hidden is None else checked_bounds("as_of", hidden, size)
        order = np.argsort(owner, kind="stable")
        jobs = []
        for number in np.unique(owner).tolist() or [0]:
            rows = order[owner[order] == number]
            keys = [listed[row] for row in rows.tolist()] if schema.user == "string" else listed[rows]
            bounds = [None if value is None else value[rows] for value in (bound, hidden)]
            jobs.append((number, rows, keys, bounds))

        def read(job: Any) -> Histories:
            number, _, keys, (bound, hidden) = job
            return self.partitions[number].gather(keys, bound, n, hidden, fields)

        if len(jobs) == 1:
            results = [read(jobs[0])]
        else:
            results = self._read([(self._pools[job[0]].submit(read, job), job[0]) for job in jobs])
        lengths = np.zeros(size, np.int64)
        for (_, rows, _, _), found in zip(jobs, results, strict=True):
            lengths[rows] = np.diff(found.offsets)
        offsets = np.concatenate(([0], np.cumsum(lengths)))
        # While `evolve` goes through the partitions, some have a field, or a wider type, that others have not yet.
        types = [{name: column.dtype for name, column in found.columns.items()} for found in results]
        common = {
            name: np.result_type(*(one[name] for one in types)) for name in types[0] if all(name in t for t in types)
        }
        columns: dict[str, np.ndarray] = {}
        for (number, rows, _, _), found in zip(jobs, results, strict=True):
            starts = offsets[rows]
            counts = np.diff(found.offsets)
            target = np.arange(found.num_events) + np.repeat(starts - found.offsets[:-1], counts)
            for name, column in self._translated(number, found).items():
                if name in common:
                    if name not in columns:
                        columns[name] = np.empty((int(offsets[-1]), *column.shape[1:]), common[name])
                    columns[name][target] = column
        seen = {number: found.as_of for (number, *_), found in zip(jobs, results, strict=True)}
        everywhere = (
            seen[number] if number in seen else self._known_sequence(number) for number in range(len(self.partitions))
        )
        return Histories(columns, offsets, self._values, Sequences(everywhere), n)

    def append(self, events: Mapping[str, Any], origin: tuple[str, int] | None = None) -> Sequences:
        """As Vault.append, in every partition that the events belong to at once.

        If one of them fails, those of the others are written all the same: whoever sends all of them again must give
        the same `origin` both times, or they are there twice.

        Returns:
          Bounds for `as_of` that show these events and all before; but not what other clients of its service have
          written in a partition since this handle last asked it, unless some of these events belong there.
        """
        return self.append_async(events, origin).result()

    def append_async(self, events: Mapping[str, Any], origin: tuple[str, int] | None = None) -> "Future[Sequences]":
        """As append, without waiting."""
        return _when_all_are_done(self._appended(events, origin), self._bounds)

    def begin_writing(self) -> None:
        """As Vault.begin_writing, of all partitions."""
        self._each(lambda vault: vault.begin_writing())

    def flush(self) -> None:
        """As Vault.flush."""
        self._each(lambda vault: vault.flush())

    def merge(self, progress: Callable[[str], None] | None = None) -> None:
        """As Vault.merge."""
        self._each(lambda vault: vault.merge(progress))

    def snapshot(self, name: str | None = None, replace: bool = False) -> str:
        """As Vault.snapshot: pins each partition under one name, one after the other; without one under a new name."""
        if name is None:
            taken = {one for vault in self.partitions for one in vault.snapshots()}
            first = f"{sum(self.next_sequence):012d}"
            further = (f"{first}-{number}" for number in itertools.count(1))
            name = next(one for one in itertools.chain([first], further) if one not in taken)
        # Of a call that failed halfway only some partitions have it.
        replace = replace or name not in self.snapshots()
        self._each(lambda vault: vault.snapshot(name, replace))
        return name

    def snapshots(self) -> list[str]:
        """Names of the snapshots that every partition has."""
        found = [set(vault.snapshots()) for vault in self.partitions]
        return sorted(set.intersection(*found))

    def drop_snapshot(self, name: str) -> None:
        """As Vault.drop_snapshot."""
        self._each(lambda vault: vault.drop_snapshot(name) if name in vault.snapshots() else None)

    def forget(self, users: Any) -> int:
        """As Vault.forget."""
        keys, beyond = checked_users(self.schema, users)
        keys = keys if beyond is None else keys[~beyond]
        return sum(self._each(lambda vault: vault.forget(keys)))

    def evolve(self, schema: Schema) -> None:
        """As Vault.evolve."""
        new = [field for field in schema.fields if field.type == "string"]
        for field in new:
            if field.name not in self._codes.dictionaries and field.default is not None:
                self._write_lock()
                self._codes = Codebook(self._codes.path, [*self._codes.dictionaries, field.name])
                self._codes.add({field.name: [field.default]})
        self._each(lambda vault: vault.evolve(schema) if vault.schema != schema else None)

    def retain(self, events: int | None = None, age: int | None = None) -> None:
        """As Vault.retain."""
        self._each(lambda vault: vault.retain(events, age))

    def refresh(self) -> None:
        """As Vault.refresh."""
        self._codes.follow()
        for vault in self.partitions:
            vault.refresh()

    def close(self) -> None:
        """As Vault.close."""
        for vault in self.partitions:
            vault.close()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def stats(self) -> dict[str, Any]:
        """Sums over the partitions, and each partition's own figures."""
        found = [vault.stats() for vault in self.partitions]
        summed = ("users", "events", "superseded_events", "parts", "pages", "bytes", "log_bytes", "index_bytes")
        summed += ("tail_events", "tail_bytes")
        return {"path": self.path} | {key: sum(one[key] for one in found) for key in summed} | {"partitions": found}

    def verify(self) -> list[str]:
        """As Vault.verify."""
        return verify(self.path)

    def _each(self, call: Callable[[Vault], Any]) -> list[Any]:
        self._write_lock()
        return [call(vault) for vault in self.partitions]

    def _write_lock(self) -> None:
        """Becomes the one writer of all partitions."""
        with self._locking:  # threads may write for the first time at once
            if self._lock is None:
                with contextlib.ExitStack() as stack:
                    stack.enter_context(writer_lock(self.path))
                    self._codes.follow()
                    for vault in self.partitions:
                        vault.refresh()
                        self._codes.check(vault)
                    self._lock = stack.pop_all()

    def _appended(self, events: Mapping[str, Any], origin: tuple[str, int] | None) -> "list[tuple[int, Future[int]]]":
        """(partition, what its append will give) of those that the events belong to."""
        self._write_lock()
        schema, origin = self.schema, checked_origin(origin)
        checked = check_columns(schema, events)
        self._codes.add({name: checked[name].values for name in string_fields(schema)})
        under_way = []
        for number, rows in _split(schema, checked, len(self.partitions)):
            try:
                future = self.partitions[number].append_async(_taken(checked, rows), origin)
            except VaultError as error:  # the others are written all the same
                future = Future()
                future.set_exception(error)
            under_way.append((number, future))
        return under_way

    def _bounds(self, written: dict[int, int]) -> Sequences:
        """Those of all partitions: of some, what an append to them has given."""
        return Sequences(
            written[number] if number in written else self._known_sequence(number)
            for number in range(len(self.partitions))
        )

    def _read(self, jobs: "list[tuple[Future[Histories], int]]") -> list[Histories]:
        """What was found in some partitions."""
        return [future.result() for future, _ in jobs]

    def _known_sequence(self, number: int) -> int:
        """A sequence number that everything lies below which this handle has written or seen in a partition."""
        return self.partitions[number].next_sequence

    def _values(self, field: str) -> np.ndarray | None:
        dictionary = self._codes.dictionaries.get(field)
        return None if dictionary is None else dictionary.array

    def _checked(self, as_of: Sequences) -> Sequences:
        if len(as_of) != len(self.partitions):
            raise SchemaError(f"as_of of {len(as_of)} partitions: this vault has {len(self.partitions)}")
        return as_of

    def _translated(self, number: int, found: History | Histories) -> dict[str, np.ndarray]:
        """What was found in a partition, with the codes that hold for all partitions."""
        columns = dict(found.columns)
        for field in columns:
            own = found.dictionary(field)
            if own is None:  # no strings
                continue
            table = self._translations.get((number, field))
            if table is None or len(table) < len(own):
                if field not in self._codes.dictionaries:  # it was added since these were learned
                    self._codes.follow()
                table = self.encode(field, own)
                if (table < 0).any():
                    self._codes.follow()
                    table = self.encode(field, own)
                if (table < 0).any():
                    lost = own[int(np.argmax(table < 0))]
                    raise CorruptionError(
                        f"{self._codes.path} has no code for {lost!r} of field {field!r}; see `repair`"
                    )
                self._translations[number, field] = table
            columns[field] = table[columns[field]]
        return columns


def _when_all_are_done(
    parts: "list[tuple[int, Future[int]]]", finish: Callable[[dict[int, int]], Sequences]
) -> "Future[Sequences]":
    """One future of several, for which no thread has to wait. What went wrong first counts, once all are done."""
    whole: Future[Sequences] = Future()
    whole.set_running_or_notify_cancel()  # events that are under way cannot be called back
    left, counting = [len(parts)], threading.Lock()

    def done(_: Any = None) -> None:
        with counting:
            left[0] -= 1
            if left[0] > 0:
                return
        try:
            whole.set_result(finish({number: part.result() for number, part in parts}))
        except Exception as error:  # whoever waits is to hear of it, whatever it is
            whole.set_exception(error)

    for _, part in parts:
        part.add_done_callback(done)
    if not parts:
        done()
    return whole


def _split(schema: Schema, checked: dict[str, Any], partitions: int) -> list[tuple[int, np.ndarray]]:
    """(partition, its rows) of checked columns."""
    user = checked["user"]
    if isinstance(user, Coded):
        owner = partition_of(schema, user.values, partitions)[user.codes]
    else:
        owner = partition_of(schema, user, partitions)
    return [(number, np.flatnonzero(owner == number)) for number in np.unique(owner).tolist()]


def _taken(checked: dict[str, Any], rows: np.ndarray) -> dict[str, Any]:
    return {
        name: Coded(column.codes[rows], column.values) if isinstance(column, Coded) else column[rows]
        for name, column in checked.items()
    }


def _listed(path: str) -> list[str]:
    return os.listdir(path) if os.path.isdir(path) else []


def _is_ours(name: str) -> bool:
    return name.startswith("partition-") or name in ("writer.lock", CODES, PARTITIONS + ".draft")


def string_fields(schema: Schema) -> list[str]:
    return [field.name for field in schema.fields if field.type == "string"]


def _int64(user: Any) -> int:
    if isinstance(user, bool) or not isinstance(user, (int, np.integer)):
        raise SchemaError(f"user {user!r}: this vault's users are int64")
    # An id beyond int64 is nobody's, in any partition.
    return int(user) if -(2**63) <= user < 2**63 else 0
