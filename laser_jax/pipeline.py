"""From a data set on disk to batches: one element of the stream is one whole batch.

Batch k is a function of k alone, so the position in the data is the number of batches taken; nothing else needs saving
to go on exactly where a run stopped.
"""

import dataclasses
import os
from collections.abc import Iterator
from typing import Any, Protocol

import grain
import numpy as np

from laser_jax import vault as seqvault
from laser_jax.assembly import Assembly, ages, comparable, pad_events
from laser_jax.batch import Batch, Lines, Numbered, lay_out
from laser_jax.columns import check_columns, tell_unknown_codes
from laser_jax.features import FeatureConfig
from laser_jax.id_dictionary import Assigned
from laser_jax.requests import Requests, read_vocabulary
from laser_jax.row_placement import ALONE, DeviceShare, Wanted, bucket_size

SPLITS = ("train", "valid", "test")
PROBES = 8  # batches whose needs are looked at before the first
PROBED = 64  # requests whose codes are looked at
SEARCHED = 1000  # rows of the first epoch among which at least one must have a history


class Recipe(Protocol):
    """What turns raw logs into a data set directory; the modules of data/ hold them."""

    def prepare(self, path: str, progress: bool = True) -> str: ...


@dataclasses.dataclass
class DataConfig:
    """Which data, and how it is cut into batches.

    Attributes:
      path: data set directory (DIR/vault, DIR/requests/{train,valid,test}, DIR/vocab/FIELD where a field wants it).
      recipe: builds `path` when it does not exist yet; None: it must exist.
      snapshot: name of a snapshot of the vault to read from, so that a run sees the same events whatever is appended
        meanwhile; empty for the vault as it is when it is opened.
      history_length: L, the newest events of a user strictly before the request.
      batch_size: B, requests a training batch. candidates: C, candidates a row of a training batch at most; a request
        with more is spread over several rows, nothing is cut off.
      eval_batch_size, eval_candidates: the same for validation and test.
      epochs: passes over the training requests.
      shuffle_block: requests that stay neighbours on disk are shuffled in blocks of this size, then inside a window of
        64 blocks. cache_bytes: of decoded vault pages. threads, prefetch: of the input pipeline.
      seed: of the shuffle.
      vault: where the vault is, if not in DIR/vault: a directory, or what else laser_jax.vault.open opens, as
        grpc://host:port of a service.
    """

    path: str = ""
    recipe: Recipe | None = None
    snapshot: str = ""
    history_length: int = 1000
    batch_size: int = 32
    candidates: int = 10
    eval_batch_size: int = 32
    eval_candidates: int = 32
    epochs: int = 1
    shuffle_block: int = 256
    cache_bytes: int = 1 << 28
    threads: int = 2
    prefetch: int = 4
    seed: int = 0
    vault: str = ""

    @property
    def vault_path(self) -> str:
        """Where the vault is."""
        return self.vault or os.path.join(self.path, "vault")


class Peers(Protocol):
    """The processes that train together, each of which calls the same at the same batch."""

    def agree(self, values: list[int]) -> list[int]:
        """The largest of each value."""

    def union(self, ids: np.ndarray) -> np.ndarray:
        """The distinct ids of all, ascending."""


WINDOW_BLOCKS = 64


def epoch_order(num: int, seed: int, epoch: int, block: int) -> np.ndarray:
    """A shuffled order of 0 .. num-1: blocks are permuted, then rows inside windows of 64 blocks.

    Neighbours on disk stay near each other, and every epoch has an order of its own.
    """
    rng = np.random.default_rng([seed, epoch])
    blocks = rng.permutation(-(-num // block))
    order = (blocks[:, None] * block + np.arange(block)).ravel()
    order = order[order < num]
    window = WINDOW_BLOCKS * block
    for start in range(0, num, window):
        order[start : start + window] = rng.permutation(order[start : start + window])
    return order


@dataclasses.dataclass(frozen=True)
class _Read:
    """A batch before it is laid out: `numbered` is by table, `lines` by source; an entry a device."""

    number: int
    rows: np.ndarray
    requests: Any
    histories: Any
    numbered: dict[str, list[Numbered]]
    lines: dict[str, list[Lines]]


class BatchSource:
    """Random access to the batches of one split. Pickles to its arguments; safe for threads.

    Args:
      share: which part of every batch is this process's.

    Attributes:
      least: table -> smallest size of a bucket, source -> of distinct lines. Processes that train together must have
        the same.
      dictionaries: table -> its dictionary, where it has one. Splits of a run share them.
      seen: int64 [partitions], sequence numbers up to which the events of a vault that goes on are read; None: all that
        there are. Splits and processes of a run must have the same.
    """

    def __init__(self, data: DataConfig, features: FeatureConfig, split: str, share: DeviceShare = ALONE):
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is not one of {SPLITS}")
        self._args = (data, features, split, share)
        self.data, self.features, self.share = data, features, share
        self.training = split == "train"
        self.batch_size = data.batch_size if self.training else data.eval_batch_size
        self.num_columns = data.candidates if self.training else data.eval_candidates
        self.vault = seqvault.open(data.vault_path, data.cache_bytes, at=data.snapshot or None)
        # A service shows what is written while a run goes on; a local vault is as it was when it was opened.
        self.seen = None
        if not self.vault.local and not data.snapshot:
            self.seen = np.atleast_1d(np.array(self.vault.next_sequence, np.int64))
        self.requests = Requests.open(os.path.join(data.path, "requests", split))
        if not len(self.requests):
            raise ValueError(f"{self.requests.path} holds no request: there is nothing to run {split} on")
        self._seconds = 1000 if self.vault.schema.time_unit == "ms" else 1
        self.dictionaries = features.dictionaries()
        check_columns(self.vault, self.requests, features)
        self._assembly = Assembly(features, read_vocabularies(data, features))
        self._tables = self._assembly.tables
        counts = self.requests.counts()
        pieces = np.maximum(-(-counts // self.num_columns), 1)
        self._row_request = np.repeat(np.arange(len(counts)), pieces)
        first = np.cumsum(pieces) - pieces
        self._row_start = (np.arange(len(self._row_request)) - first[self._row_request]) * self.num_columns
        self._row_count = np.minimum(counts[self._row_request] - self._row_start, self.num_columns)
        # What a few batches need, and a bit more, fits nearly all: most runs compile one shape. A function of the data
        # alone, so that a resumed run pads as before.
        quantum = max(256 // share.num_devices, 8)
        self.least = dict.fromkeys(self._tables, quantum)
        probes = [self._read(k) for k in sorted({self.batches_per_epoch * i // PROBES for i in range(PROBES)})]
        for table in self._tables:
            fullest = max(self._fullest(table, part) for probe in probes for part in probe.numbered[table])
            self.least[table] = quantum * (1 + fullest * 5 // (4 * quantum))
        for source in self._assembly.lined:
            most = max(len(part.values) for probe in probes for part in probe.lines[source])
            self.least[source] = quantum * (1 + most * 5 // (4 * quantum))

    def _fullest(self, table: str, part: Numbered) -> int:
        """Rows in the fullest bucket; of ids that have no rows yet as if they had drawn them."""
        num_rows = self._tables[table][0]
        keys = part.keys
        if table in self.dictionaries:
            keys = np.random.default_rng(0).choice(num_rows, min(len(keys), num_rows), replace=False)
        return int(Wanted.of(keys, num_rows, self.share.num_devices)[0].counts.max())

    def __reduce__(self):
        return type(self), self._args

    def check_histories(self) -> None:
        """Raises ValueError if none of some requests has an event before it, though the vault holds events.

        All processes of a run look at the same ones, from all over the split.
        """
        rows = np.linspace(0, len(self._row_request) - 1, min(SEARCHED, len(self._row_request))).astype(np.int64)
        requests = self.requests.read(np.unique(self._row_request[rows]))
        found = self.vault.gather(requests.user, requests.time, 1, as_of=self._as_of(requests), fields=[])
        if found.num_events or not self.vault.num_events:
            return
        newest = self.vault.gather(requests.user, None, 1, fields=[])
        known = np.flatnonzero(np.diff(newest.offsets))
        if len(known):
            one = known[0]
            hidden = "" if requests.sequence is None else ", and with sequence numbers of this vault"
            why = (
                f"the newest event of user {requests.user[one]} has time {newest[one].columns['time'][0]}, its request "
                f"{requests.time[one]}; write requests in the unit of the vault's schema, which is "
                f"{self.vault.schema.time_unit!r}{hidden}"
            )
        else:
            why = f"it knows none of their users, such as {requests.user[0]}; write requests with the vault's users"
        raise ValueError(
            f"{self.requests.path}: none of {len(requests)} requests looked at has an event of its user before it in "
            f"{self.vault.path}: {why}. To train without histories on purpose, give a vault without events"
        )

    def tell_unknown_codes(self) -> None:
        """Warns of fields most of whose numbers have no row of their own, as far as some requests tell."""
        rows = np.linspace(0, len(self._row_request) - 1, min(PROBED, len(self._row_request))).astype(np.int64)
        requests, features = self.requests.read(np.unique(self._row_request[rows])), self.features
        fields = (*features.item, *features.event)
        histories = self.vault.gather(
            requests.user,
            requests.time,
            self.data.history_length,
            as_of=self._as_of(requests),
            fields=[field.name for field in fields],
        )
        tell_unknown_codes(self.vault, "events", fields, histories.columns)
        tell_unknown_codes(self.vault, "candidates", features.item, requests.candidates)
        tell_unknown_codes(self.vault, "context", features.context, requests.context)

    def users(self) -> np.ndarray:
        """The user of every row of the split, of all processes."""
        return self.requests.users(self._row_request)

    @property
    def batches_per_epoch(self) -> int:
        return -(-len(self._row_request) // self.batch_size)

    @property
    def num_batches(self) -> int:
        return self.batches_per_epoch * (self.data.epochs if self.training else 1)

    def rows(self, k: int) -> np.ndarray:
        """Rows (a request, or a piece of a wide one) of batch k, those of this process's devices.

        The last batch of an epoch may have fewer; the others are the same for any number of devices and processes.
        """
        rows = self._all_rows(k)
        if self.share.whole:
            return rows
        each = self.batch_size // self.share.num_devices
        return np.concatenate([rows[device * each : (device + 1) * each] for device in self.share.local])

    def _all_rows(self, k: int) -> np.ndarray:
        epoch, k = divmod(k, self.batches_per_epoch)
        low, high = k * self.batch_size, (k + 1) * self.batch_size
        if not self.training:
            return np.arange(low, min(high, len(self._row_request)))
        return self._order(epoch)[low:high]

    def _order(self, epoch: int) -> np.ndarray:
        cached = getattr(self, "_epoch_order", None)  # (epoch, order); replaced whole, so threads see one or the other
        if cached is None or cached[0] != epoch:
            order = epoch_order(len(self._row_request), self.data.seed, epoch, self.data.shuffle_block)
            cached = self._epoch_order = (epoch, order)
        return cached[1]

    def batch(self, k: int) -> Batch:
        """Reads, looks up, makes unique and pads batch k; ids that a dictionary does not know yet read row 0."""
        return self._lay_out(self._read(k))

    def _read(self, k: int) -> "_Read":
        """Batch k up to the point where dictionaries and sizes of buckets are needed."""
        rows = self.rows(k)
        requests = self.requests.read(self._row_request[rows], self._row_start[rows], self._row_count[rows])
        devices = len(self.share.local)
        each = self.batch_size // self.share.num_devices
        features, limit = self.features, self.vault.schema.time_limit
        if len(requests) and requests.time.max() >= limit:
            raise ValueError(
                f"{self.requests.path}: a request has time {requests.time.max()}, not below {limit} "
                f"{self.vault.schema.time_unit}: write requests in the unit of the vault's schema"
            )
        histories = self.vault.gather(
            requests.user,
            requests.time,
            self.data.history_length,
            as_of=self._as_of(requests),
            fields=[f.name for f in (*features.item, *features.event)],
        )
        looked_up = self._assembly.look_up(histories.columns, requests.candidates, requests.context)
        # Rows of the flat columns at which each device's requests begin.
        cuts = np.minimum(each * np.arange(devices + 1), len(rows))
        starts = {"history": histories.offsets[cuts], "candidates": requests.offsets[cuts], "context": cuts}
        parts = []
        for device in range(devices):
            columns = {
                (side, name): values[starts[side][device] : starts[side][device + 1]]
                for side, fields in looked_up.items()
                for name, values in fields.items()
            }
            parts.append(self._assembly.number(columns))
        numbered = {table: [part[0][table] for part in parts] for table in self._tables}
        lines = {source: [part[1][source] for part in parts] for source in self._assembly.lined}
        return _Read(k, rows, requests, histories, numbered, lines)

    def _as_of(self, requests: Requests) -> Any:
        """What the server had not seen at the time is kept out, though it happened before; so is what came since."""
        if self.seen is None:
            return requests.sequence
        seen = self.seen
        if len(seen) > 1:
            seen = seen[self.vault.partition_of(requests.user)]
        seen = np.broadcast_to(seen, len(requests))
        return seen if requests.sequence is None else np.minimum(requests.sequence, seen)

    def _lay_out(
        self, read: "_Read", assigned: dict[str, Assigned] | None = None, bucket_sizes: dict[str, int] | None = None
    ) -> Batch:
        """The batch of what was read.

        Args:
          assigned: table with a dictionary -> what all ids of the step, ascending, were given; by default the rows that
            they have.
          bucket_sizes: by table and source; by default what the batch needs.
        """
        asked = bucket_sizes or {}
        rows, requests, histories = read.rows, read.requests, read.histories
        devices = len(self.share.local)
        b, c = self.batch_size // self.share.num_devices * devices, self.num_columns
        length = self.data.history_length
        sizes = np.diff(histories.offsets)

        # Candidates [rows, C] as positions in the requests' flat columns.
        real = np.arange(c) < np.diff(requests.offsets)[:, None]
        flat = np.where(real, requests.offsets[:-1, None] + np.arange(c), 0)

        def pad_candidates(values, dtype=np.int32):
            out = np.zeros((b, c), dtype)
            out[: len(rows)] = np.where(real, values[flat], 0)
            return out

        age = ages(requests.time, histories.columns["time"], histories.offsets, self._seconds)
        step: dict[str, Any] = {
            "age": pad_events(age, histories.offsets, b, length),
            "length": np.pad(sizes, (0, b - len(rows))).astype(np.int32),
            "label": pad_candidates(requests.label, np.float32),
            "mask": pad_candidates(np.ones(len(requests.label), np.bool_), np.bool_),
            "unique": {},
            "fresh": {},
            "bags": {},
            "vectors": {},
        }
        columns: dict[str, dict[str, np.ndarray]] = {"history": {}, "candidates": {}, "context": {}}
        num_unique = {}
        for table, parts in read.numbered.items():
            laid = lay_out(
                parts,
                self._tables[table][0],
                self.share.num_devices,
                self.least[table],
                asked.get(table),
                self.dictionaries.get(table),
                (assigned or {}).get(table),
            )
            step["unique"][table], num_unique[table] = laid.unique, laid.num_unique
            if assigned and table in assigned:
                step["fresh"][table] = laid.fresh
            for side, name in parts[0].positions:
                at = [slots[part.positions[side, name]] for slots, part in zip(laid.slots, parts, strict=True)]
                columns[side][name] = np.concatenate(at)
            for source in parts[0].bags:
                bags = [part.bags[source].copy() for part in parts]
                for bag, slots in zip(bags, laid.slots, strict=True):
                    bag[bag >= 0] = slots[bag[bag >= 0]]
                step["bags"][source] = self._pad_lines(source, bags, -1, asked.get(source))
        for source, parts in read.lines.items():
            if not self._assembly.lined[source].bagged:
                vectors = [part.values for part in parts]
                step["vectors"][source] = self._pad_lines(source, vectors, 0, asked.get(source))
            for side, name in parts[0].positions:
                columns[side][name] = np.concatenate([part.positions[side, name] for part in parts])
        step["history"] = {
            name: pad_events(at, histories.offsets, b, length) for name, at in columns["history"].items()
        }
        step["candidates"] = {name: pad_candidates(at) for name, at in columns["candidates"].items()}
        step["context"] = {name: np.pad(at, (0, b - len(rows))) for name, at in columns["context"].items()}
        batch = Batch(
            step=step,
            users=np.asarray(requests.user),
            lengths=sizes,
            references={name: pad_candidates(v, np.float32) for name, v in requests.references.items()},
            num_unique=num_unique,
            tables=self._assembly.table_of,
        )
        step["side"] = {
            name: comparable(batch.known("candidates", name), at) for name, at in step["candidates"].items()
        }
        return batch

    def _pad_lines(self, source: str, parts: list[np.ndarray], fill: int, size: int | None) -> np.ndarray:
        """[G, m] of each device -> [devices, static size, m]."""
        if size is None:
            size = bucket_size(max(len(part) for part in parts), 2**31, self.least[source])
        out = np.full((len(parts), size, parts[0].shape[1]), fill, parts[0].dtype)
        for line, part in zip(out, parts, strict=True):
            line[: len(part)] = part
        return out

    def stream(self, start: int, stop: int, peers: Peers | None = None) -> Iterator[Batch]:
        """Iterates batches start .. stop-1, made ahead by threads. Batches of training grow the dictionaries.

        Args:
          peers: where several processes train together, which must give out the same rows and run programs of one
            shape.
        """
        options = grain.ReadOptions(num_threads=self.data.threads, prefetch_buffer_size=self.data.prefetch)
        numbers = grain.MapDataset.range(start, stop)
        if peers is None and not (self.training and self.dictionaries):
            return iter(numbers.map(self.batch).to_iter_dataset(options))
        made = iter(numbers.map(self._read).to_iter_dataset(options))
        return (self._in_turn(read, peers) for read in made)

    def _in_turn(self, read: "_Read", peers: Peers | None) -> Batch:
        """What must be done in the order of batches."""
        assigned = None
        if self.training:
            assigned = {table: self._assign(table, read, peers) for table in self.dictionaries}
        batch = self._lay_out(read, assigned)
        if peers is None:
            return batch
        step = batch.step
        sizes = {table: unique.shape[2] for table, unique in step["unique"].items()}
        sizes |= {source: lines.shape[1] for source, lines in (step["bags"] | step["vectors"]).items()}
        agreed = dict(zip(sizes, peers.agree(list(sizes.values())), strict=True))
        return batch if agreed == sizes else self._lay_out(read, assigned, agreed)  # seldom: sizes have room to spare

    def _assign(self, table: str, read: "_Read", peers: Peers | None) -> Assigned:
        ids = np.unique(np.concatenate([part.keys for part in read.numbered[table]]))
        if peers is not None:
            ids = peers.union(ids)
        return self.dictionaries[table].assign(ids, read.number + 1)

    def describe(self) -> dict[str, Any]:
        """What this split holds, for the log."""
        return {
            "requests": len(self.requests),
            "candidates": self.requests.num_candidates,
            "batches": self.num_batches,
            "candidate_fill": round(float(self._row_count.sum()) / (len(self._row_count) * self.num_columns), 3),
        }


def prepare(data: DataConfig) -> None:
    """Builds the data set if there is none yet.

    Raises:
      FileNotFoundError: there is none and no recipe to build it.
    """
    if not data.path:
        raise ValueError("data.path is empty: give the directory of the data set, --config.data.path=DIR")
    if data.recipe is not None:
        data.recipe.prepare(data.path)
        return
    wanted = ("requests",) if data.vault else ("vault", "requests")
    missing = [name for name in wanted if not os.path.isdir(os.path.join(data.path, name))]
    if missing:
        raise FileNotFoundError(
            f"{data.path} is no data set ({' and '.join(missing)} missing): ingest a vault and write requests there, "
            "or give the config a recipe"
        )


def read_vocabularies(data: DataConfig, features: FeatureConfig) -> dict[str, np.ndarray]:
    """Field -> sorted int64 ids, for fields with ids="vocab"."""
    return {
        field.name: read_vocabulary(os.path.join(data.path, "vocab", field.name))
        for field in (*features.item, *features.event, *features.context)
        if field.ids == "vocab"
    }
