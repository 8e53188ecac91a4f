"""From a data set on disk to batches: one element of the stream is one whole batch.

Batch k is a function of k alone, so the position in the data is the number of batches taken; nothing else needs saving
to go on exactly where a run stopped.
"""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import grain
import numpy as np

from laser_jax import vault as seqvault
from laser_jax.features import FeatureConfig, FieldConfig, rows_of, table_of
from laser_jax.requests import MANIFEST, Requests, read_vocabulary
from laser_jax.row_placement import DeviceShare, Wanted, bucket_size, rows_at, rows_per_device, unique_keys
from laser_jax.vault.partitioning import is_partitioned, partition_paths

SPLITS = ("train", "valid", "test")


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
class Batch:
    """One batch on the host: the requests of this process's devices.

    Attributes:
      step: what the model's step takes: `unique` (table -> int32 [devices, N, size], rows that each of this process's
        devices wants of each of the N devices, see row_placement), `history` (field -> int32 [B, L], positions among
        what its device wants), `candidates` ([B, C]), `context` ([B]), `length` [B], `age` [B, L], `label` and `mask`
        [B, C].
      users: the user of each real row. references: name -> float32 [B, C] scores stored beside the labels.
      lengths: events before the request, of each real row, at most L.
      num_unique: table -> distinct rows, summed over this process's devices. fullest: table -> rows in the fullest
        bucket.
      tables: field -> (table, its rows).
    """

    step: dict[str, Any]
    users: np.ndarray
    lengths: np.ndarray
    references: dict[str, np.ndarray]
    num_unique: dict[str, int]
    fullest: dict[str, int]
    tables: dict[str, tuple[str, int]]

    @property
    def num_events(self) -> int:
        return int(self.lengths.sum())

    def unique_fill(self) -> str:
        """Real over padded unique rows, by table."""
        sizes = {table: unique.size for table, unique in self.step["unique"].items()}
        return " ".join(f"{table} {self.num_unique[table]}/{size}" for table, size in sizes.items())

    def rows(self, side: str, field: str) -> np.ndarray:
        """Embedding rows behind the indices of a field, for what is compared on the host; shaped like the indices.

        Args:
          side: "history", "candidates" or "context".
        """
        table, num_rows = self.tables[field]
        wanted, index = self.step["unique"][table], self.step[side][field]
        devices, owners, _ = wanted.shape
        first = rows_per_device(num_rows, owners) * np.arange(owners)[:, None]
        flat = (wanted + first).reshape(devices, -1)
        device = np.arange(len(index)) // (len(index) // devices)
        return rows_at(flat[device.reshape(-1, *[1] * (index.ndim - 1)), index], num_rows)


class BatchSource:
    """Random access to the batches of one split. Pickles to its arguments; safe for threads.

    Args:
      share: which part of every batch is this process's.

    Attributes:
      least: table -> smallest size of a bucket. Processes that train together must have the same.
    """

    def __init__(self, data: DataConfig, features: FeatureConfig, split: str, share: DeviceShare = DeviceShare()):
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is not one of {SPLITS}")
        self._args = (data, features, split, share)
        self.data, self.features, self.share = data, features, share
        self.training = split == "train"
        self.batch_size = data.batch_size if self.training else data.eval_batch_size
        self.num_columns = data.candidates if self.training else data.eval_candidates
        self.vault = seqvault.open(os.path.join(data.path, "vault"), data.cache_bytes, at=data.snapshot or None)
        self.requests = Requests.open(os.path.join(data.path, "requests", split))
        if not len(self.requests):
            raise ValueError(f"{self.requests.path} holds no request: there is nothing to run {split} on")
        self._seconds = 1000 if self.vault.schema.time_unit == "ms" else 1
        self._tables = features.tables()
        self._check_columns()
        self._vocabularies = {
            field.name: read_vocabulary(os.path.join(data.path, "vocab", field.name))
            for field in features.item + features.event + features.context
            if field.ids == "vocab"
        }
        for field in (*features.item, *features.event, *features.context):
            known = self._vocabularies.get(field.name, ())
            if len(known) >= field.rows:
                raise ValueError(
                    f"{data.path}: the vocabulary of {field.name!r} has {len(known)} ids, its table {field.rows} rows: "
                    f"give it at least {len(known) + 1}"
                )
        counts = self.requests.counts()
        pieces = np.maximum(-(-counts // self.num_columns), 1)
        self._row_request = np.repeat(np.arange(len(counts)), pieces)
        first = np.cumsum(pieces) - pieces
        self._row_start = (np.arange(len(self._row_request)) - first[self._row_request]) * self.num_columns
        self._row_count = np.minimum(counts[self._row_request] - self._row_start, self.num_columns)
        fields = (*self.features.item, *self.features.event, *self.features.context)
        self._table_of = {field.name: (table_of(field), field.rows) for field in fields}
        # What two batches need, and a bit more, fits nearly all: most runs compile one shape. A function of the data
        # alone, so that a resumed run pads as before.
        quantum = max(256 // share.num_devices, 8)
        self.least = dict.fromkeys(self._tables, quantum)
        probes = [self.batch(k) for k in sorted({0, self.batches_per_epoch // 2})]
        for table in self._tables:
            fullest = max(int(probe.fullest[table]) for probe in probes)
            self.least[table] = quantum * (1 + fullest * 5 // (4 * quantum))

    def _check_columns(self) -> None:
        known = {field.name: field for field in self.vault.schema.fields}
        for field in (*self.features.item, *self.features.event):
            if field.name not in known:
                raise seqvault.UnknownFieldError(
                    f"{self.vault.path}: features name the event field {field.name!r}; the vault has {', '.join(known)}"
                )
            if known[field.name].size is not None:
                raise ValueError(f"{self.vault.path}: field {field.name!r} is a vector, which no id map can take")
            if known[field.name].type.startswith("float") and field.ids != "log":
                raise ValueError(
                    f"{self.vault.path}: field {field.name!r} is {known[field.name].type}, which ids={field.ids!r} "
                    "would cut to whole numbers: use ids='log'"
                )
        if self.vault.schema.user != self.requests.user_type:
            raise ValueError(
                f"{self.requests.path} has {self.requests.user_type} users, {self.vault.path} has "
                f"{self.vault.schema.user}: write requests with the vault's user type"
            )
        for fields, columns, what in (
            (self.features.item, self.requests.columns, "candidate"),
            (self.features.context, self.requests.context_columns, "context"),
        ):
            for field in fields:
                if field.name not in columns:
                    raise ValueError(
                        f"{self.requests.path}: features name the {what} column {field.name!r}; there is "
                        f"{', '.join(columns) or 'none'}"
                    )

    def __reduce__(self):
        return type(self), self._args

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

    def batch(self, k: int, bucket_sizes: dict[str, int] | None = None) -> Batch:
        """Reads, looks up, makes unique and pads batch k.

        Args:
          bucket_sizes: by table; by default what the batch needs.
        """
        rows = self.rows(k)
        requests = self.requests.read(self._row_request[rows])
        devices = len(self.share.local)
        each = self.batch_size // self.share.num_devices
        b, c, length = each * devices, self.num_columns, self.data.history_length
        features = self.features
        limit = self.vault.schema.time_limit
        if len(requests) and requests.time.max() >= limit:
            raise ValueError(
                f"{self.requests.path}: a request has time {requests.time.max()}, not below {limit} "
                f"{self.vault.schema.time_unit}: write requests in the unit of the vault's schema"
            )
        histories = self.vault.gather(
            requests.user,
            requests.time,
            length,
            # What the server had not seen at the time is kept out, though it happened before.
            as_of=requests.sequence,
            fields=[f.name for f in (*features.item, *features.event)],
        )
        sizes = np.diff(histories.offsets)
        owner = np.repeat(np.arange(len(rows)), sizes)
        place = np.arange(len(owner)) + (length - histories.offsets[1:])[owner]  # newest at L-1

        def pad_events(values, dtype=np.int32):
            out = np.zeros((b, length), dtype)
            out[owner, place] = values
            return out

        # Candidates [rows, C] as positions in the requests' flat columns.
        start, count = self._row_start[rows], self._row_count[rows]
        real = np.arange(c) < count[:, None]
        flat = np.where(real, requests.offsets[:-1, None] + start[:, None] + np.arange(c), 0)

        def pad_candidates(values, dtype):
            out = np.zeros((b, c), dtype)
            out[: len(rows)] = np.where(real, values[flat], 0)
            return out

        age = (requests.time[owner] - histories.columns["time"]) // self._seconds
        step: dict[str, Any] = {
            "age": pad_events(np.minimum(age, np.iinfo(np.int32).max)),
            "length": np.pad(sizes, (0, b - len(rows))).astype(np.int32),
            "label": pad_candidates(requests.label, np.float32),
            "mask": pad_candidates(np.ones(len(requests.label), np.bool_), np.bool_),
        }
        looked_up = {
            "history": self._look_up((*features.item, *features.event), histories.columns),
            "candidates": self._look_up(features.item, requests.candidates),
            "context": self._look_up(features.context, requests.context),
        }
        # Rows of the flat columns at which each device's requests begin.
        cuts = np.minimum(each * np.arange(devices + 1), len(rows))
        starts = {"history": histories.offsets[cuts], "candidates": requests.offsets[cuts], "context": cuts}
        step["unique"], wanted = self._make_unique(looked_up, starts, bucket_sizes)
        step["history"] = {name: pad_events(rows) for name, (_, rows) in looked_up["history"].items()}
        step["candidates"] = {
            name: pad_candidates(rows, np.int32) for name, (_, rows) in looked_up["candidates"].items()
        }
        step["context"] = {name: np.pad(rows, (0, b - len(rows))) for name, (_, rows) in looked_up["context"].items()}
        return Batch(
            step=step,
            users=np.asarray(requests.user),
            lengths=sizes,
            references={name: pad_candidates(v, np.float32) for name, v in requests.references.items()},
            num_unique={table: sum(len(device.places) for device in found) for table, found in wanted.items()},
            fullest={table: max(int(device.counts.max()) for device in found) for table, found in wanted.items()},
            tables=self._table_of,
        )

    def _look_up(self, fields: tuple[FieldConfig, ...], columns: dict[str, np.ndarray]):
        """Field name -> [table, embedding rows of its column]."""
        return {f.name: [table_of(f), rows_of(f, columns[f.name], self._vocabularies.get(f.name))] for f in fields}

    def _make_unique(self, looked_up: dict[str, dict[str, list]], starts: dict[str, np.ndarray], bucket_sizes):
        """Replaces rows by positions among what each device wants of a table, in place.

        Args:
          looked_up: side -> field -> [table, rows]. starts: side -> where each device's part of its columns begins.

        Returns:
          table -> int32 [devices, N, size], and table -> one Wanted a device.
        """
        unique, wanted = {}, {}
        num_devices = self.share.num_devices
        for table, (num_rows, _) in self._tables.items():
            entries = [(side, entry) for side, fields in looked_up.items() for entry in fields.values()]
            entries = [(starts[side], entry) for side, entry in entries if entry[0] == table]
            share = rows_per_device(num_rows, num_devices)
            wanted[table], numbered = [], []
            for device in range(len(self.share.local)):
                parts = [entry[1][start[device] : start[device + 1]] for start, entry in entries]
                met, positions = unique_keys(parts)
                found, rank = Wanted.of(met, num_rows, num_devices)
                wanted[table].append(found)
                numbered.append((rank, positions))
            if bucket_sizes is None:
                fullest = max(int(found.counts.max()) for found in wanted[table])
                size = bucket_size(fullest, min(share, num_rows), self.least[table])
            else:
                size = bucket_sizes[table]
            blocks, columns = [], [[] for _ in entries]
            for found, (rank, positions) in zip(wanted[table], numbered, strict=True):
                local, slots = found.buckets(size, share)
                blocks.append(local)
                slots = slots[rank]
                for column, position in zip(columns, positions, strict=True):
                    column.append(slots[position])
            for (_, entry), column in zip(entries, columns, strict=True):
                entry[1] = np.concatenate(column)
            unique[table] = np.stack(blocks)
        return unique, wanted

    def stream(self, start: int, stop: int, agree: Callable[[list[int]], list[int]] | None = None) -> Iterator[Batch]:
        """Iterates batches start .. stop-1, made ahead by threads.

        Args:
          agree: bucket sizes that a batch needs -> those that all processes need; with several processes, which must
            run programs of one shape.
        """
        options = grain.ReadOptions(num_threads=self.data.threads, prefetch_buffer_size=self.data.prefetch)
        made = iter(grain.MapDataset.range(start, stop).map(self.batch).to_iter_dataset(options))
        if agree is None:
            return made
        return (self._at_agreed_sizes(k, batch, agree) for k, batch in zip(range(start, stop), made, strict=True))

    def _at_agreed_sizes(self, k: int, batch: Batch, agree: Callable[[list[int]], list[int]]) -> Batch:
        sizes = {table: unique.shape[2] for table, unique in batch.step["unique"].items()}
        agreed = dict(zip(sizes, agree(list(sizes.values())), strict=True))
        return batch if agreed == sizes else self.batch(k, agreed)  # seldom: sizes have room to spare

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
    missing = [name for name in ("vault", "requests") if not os.path.isdir(os.path.join(data.path, name))]
    if missing:
        raise FileNotFoundError(
            f"{data.path} is no data set ({' and '.join(missing)} missing): ingest a vault and write requests there, "
            "or give the config a recipe"
        )


def fingerprint(data: DataConfig) -> dict[str, str]:
    """Checksums of what says which data a data set holds, so that a run notices when it is continued on other data."""
    vaults = ["vault"]
    if is_partitioned(os.path.join(data.path, "vault")):
        vaults = [os.path.relpath(inner, data.path) for inner in partition_paths(os.path.join(data.path, "vault"))]
    manifest = f"snapshots/{data.snapshot}.json" if data.snapshot else "manifest.json"
    files = [*(f"{vault}/{manifest}" for vault in vaults), *(f"requests/{split}/{MANIFEST}" for split in SPLITS)]
    sums = {}
    for name in files:
        with open(os.path.join(data.path, name), "rb") as file:
            sums[name] = hashlib.sha256(file.read()).hexdigest()[:16]
    return sums
