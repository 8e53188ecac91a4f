"""A model as `export` writes it, read and run without the code of the model."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import export
from jaxtyping import Bool, Float, Int

from laser_jax.assembly import Assembly, Columns, comparable
from laser_jax.features import FeatureConfig, FieldConfig, line_source
from laser_jax.schema import Schema
from laser_jax.serving.arguments import check_histories, check_moments, check_side
from laser_jax.serving.embeddings import Embeddings, Table
from laser_jax.serving.files import ModelError, read_manifest
from laser_jax.vault.history import Histories

#: Requests that are scored together are padded to one of these numbers,
BATCHES = (1, 2, 4, 8, 16, 32)
#: and so are (request, candidate) pairs at most, but for a single request: what does not fit a CPU's caches is slower
#: together than one by one.
MOST_PAIRS = {"cpu": 128}
MOST_PAIRS_ELSEWHERE = 2048
#: Of a single request with more candidates than that, so many are scored at a time; what is read of its history is read
#: once for all of them.
PIECE = 128


@dataclasses.dataclass(frozen=True)
class Requests:
    """Requests to score; request i has the candidates offsets[i] .. offsets[i+1]-1.

    Attributes:
      time: int64 [B], in the unit of the vault. offsets: int64 [B + 1].
      candidates: field -> [N] (or [N, m]), of strings themselves or their codes. context: field -> [B].
    """

    time: Int[np.ndarray, "B"]
    offsets: Int[np.ndarray, "B+1"]
    candidates: Columns
    context: Columns


@dataclasses.dataclass(frozen=True)
class Events:
    """What a model reads of a history, at most history_length events, oldest first: nothing that depends on a request.

    Attributes:
      time: int64 [n]. embeddings: of all their fields, side by side. compared: field -> rows [n], of those fields that
        the model compares with a candidate's.
    """

    time: Int[np.ndarray, "n"]
    embeddings: Float[np.ndarray, "n f"]
    compared: Columns

    def __len__(self) -> int:
        return len(self.time)

    @property
    def num_bytes(self) -> int:
        """Of the arrays."""
        return sum(array.nbytes for array in (self.time, self.embeddings, *self.compared.values()))

    def part(self, start: int, stop: int) -> "Events":
        """Events start to stop - 1, of the same arrays."""
        compared = {name: rows[start:stop] for name, rows in self.compared.items()}
        return Events(self.time[start:stop], self.embeddings[start:stop], compared)


class ExportedModel:
    """Scores requests with a model that was exported.

    Attributes:
      path: of the directory. name, version: of the model. config: of the run that trained it, as plain values.
      schema: of the vault that it was trained on. history_length: L, events that it reads at most.
      lengths: of histories that there are programs for. many: C from which the form for many candidates serves.
    """

    def __init__(self, path: str, verify: bool = True, before: "ExportedModel | None" = None):
        """Reads everything but the tables, which stay on disk, mapped.

        Args:
          path: directory that `export` wrote.
          verify: whether the checksum of every file is compared.
          before: a model whose programs, and all that is compiled of them, serve here too where they are the same: as
            they are if this is the same model, trained again.

        Raises:
          ModelError: the directory holds no whole model.
        """
        self.path = path
        content = read_manifest(path, verify)
        self.name, self.version, self.config = content["name"], content["model_version"], content["config"]
        self.schema = Schema.from_json(content["schema"])
        self.history_length, self.lengths, self.many = content["history_length"], content["lengths"], content["many"]
        settings = content["features"]
        self.features = FeatureConfig(
            *(tuple(FieldConfig(**field) for field in settings[side]) for side in ("item", "event", "context")),
            settings["age_width"],
            settings["age_buckets"],
        )
        vocabularies = {name: np.load(self._file(file)) for name, file in content["vocabularies"].items()}
        self._history_fields = (*self.features.item, *self.features.event)
        self.event_fields = tuple(field.name for field in self._history_fields)
        self._compared = tuple(field for field in self.features.item if field.name in content["compared"])
        dictionaries = self.features.dictionaries()
        for name, file in content["dictionaries"].items():
            with np.load(self._file(file)) as state:
                dictionaries[name].load(dict(state))
        tables = {name: Table(path, **entry) for name, entry in content["tables"].items()}
        self._embeddings = Embeddings(Assembly(self.features, vocabularies), tables, dictionaries)
        self.strings: dict[str, list[str]] = {}
        for name, file in content["strings"].items():
            with open(self._file(file), encoding="utf-8") as opened:
                self.strings[name] = json.load(opened)
        self._codes = {name: {text: code for code, text in enumerate(texts)} for name, texts in self.strings.items()}
        with np.load(self._file("weights.npz")) as stored:
            self._weights = [jax.device_put(stored[name]) for name in content["weights"]]
        known = {} if before is None else {program.digest: program for program in before._programs.values()}
        self._programs: dict[tuple[str, int], _Program] = {}
        for name, entry in content["programs"].items():
            with open(self._file(f"programs/{name}.bin"), "rb") as file:
                program = file.read()
            same = known.get(hashlib.sha256(program).hexdigest())
            self._programs[entry["form"], entry["length"]] = same or _Program(program, path)
        self._lines = content["lines"]

    def codes(self, field: str, values: Any) -> Int[np.ndarray, "N"]:
        """Codes of strings as the model knows them, -1 for those that it does not know."""
        known = self._codes[field]
        return np.fromiter((known.get(value, -1) for value in values), np.int64, len(values))

    def translations(self, vault: Any) -> dict[str, np.ndarray]:
        """For a vault whose codes of strings are others than the model's: field -> the model's code of each of them."""
        found = {}
        for name, texts in self.strings.items():
            theirs = vault.dictionary(name).tolist()
            # What was appended since may be new to the model, and has the codes that training on it would meet. A vault
            # that has not met all of the model's strings yet may give their codes to others.
            if theirs[: len(texts)] != texts:
                found[name] = self.codes(name, theirs).astype(np.int32)
        return found

    def look_up(self, columns: Columns, translations: dict[str, np.ndarray] | None = None) -> Events:
        """What the model reads of a history.

        Args:
          columns: `time` and all event_fields, as the vault gives them.
          translations: see `translations`, for the vault that the columns are from.
        """
        known = translations or {}
        columns = {name: known[name][at] if name in known else at for name, at in columns.items()}
        rows = self._embeddings.rows(self._history_fields, columns)
        embeddings = self._embeddings.of(self._history_fields, rows, len(columns["time"]))
        return Events(columns["time"], embeddings, self._rows_compared(rows))

    def score(
        self, histories: Histories, requests: Requests, translations: dict[str, np.ndarray] | None = None
    ) -> Float[np.ndarray, "N"]:
        """The logit of every candidate.

        Args:
          histories: of the B requests' users, at most history_length events each, with event_fields.
          requests: at most BATCHES[-1] of them.
          translations: as for look_up.

        Raises:
          ValueError: histories or requests are not what the model reads, or are too many; names the column.
        """
        check_histories(histories, self._history_fields, self.width_of)
        count = check_moments(requests.time, requests.offsets, len(histories))
        check_side("candidates", requests.candidates, self.features.item, count, self.width_of, self.strings)
        check_side("context", requests.context, self.features.context, len(histories), self.width_of, self.strings)
        found, offsets = self.look_up(histories.columns, translations), histories.offsets.tolist()
        events = [found.part(start, stop) for start, stop in zip(offsets[:-1], offsets[1:], strict=True)]
        return self.run(self.assemble(events, requests))

    def assemble(self, events: Sequence[Events], requests: Requests) -> "Assembled":
        """Requests and their users' events, in the order of both, as a program takes them."""
        offsets = requests.offsets.tolist()
        counts = np.diff(requests.offsets)
        shape = self._shape(len(counts), int(counts.max()), max(len(found) for found in events))
        units = 1000 if self.schema.time_unit == "ms" else 1
        ages = [
            np.minimum((moment - found.time) // units, np.iinfo(np.int32).max)
            for moment, found in zip(requests.time.tolist(), events, strict=True)
        ]
        candidates = self._embeddings.rows(self.features.item, self._coded(requests.candidates))
        context = self._embeddings.rows(self.features.context, self._coded(requests.context))
        compared = self._rows_compared(candidates)
        of_item = self._embeddings.of(self.features.item, candidates, offsets[-1])
        of_context = self._embeddings.of(self.features.context, context, len(counts))
        history, pairs = (shape.batch, shape.length), (shape.batch, shape.candidates)
        arrays = {
            "events": _newest_last([found.embeddings for found in events], history, np.float32),
            "age": _newest_last(ages, history, np.int32),
            "length": _padded([len(found) for found in events], shape.batch),
            "candidates": _by_request(of_item, offsets, pairs),
            "context": _padded(of_context, shape.batch),
            "compared": {
                name: _newest_last([found.compared[name] for found in events], history, np.int32) for name in compared
            },
            "side": {name: _by_request(comparable(rows != 0, rows), offsets, pairs) for name, rows in compared.items()},
        }
        return Assembled(shape, counts, self._unseen(candidates, offsets[-1]), arrays)

    def run(self, assembled: "Assembled") -> Float[np.ndarray, "N"]:
        """The logits of what was assembled, request after request."""
        shape = assembled.shape
        logits = np.asarray(self._programs[shape.form, shape.length].call(self._weights, assembled.arrays))
        rows = zip(logits, assembled.counts.tolist(), strict=False)
        return np.concatenate([row[:count] for row, count in rows])

    def compile(
        self, requests: int, candidates: int, progress: Callable[[int, int], None] = lambda done, shapes: None
    ) -> int:
        """Compiles what is not compiled yet of all programs for up to so many requests and candidates.

        Args:
          progress: is told before each of these how many are done, and of how many; what it raises ends this.

        Returns:
          For how many shapes programs are compiled now.
        """
        shapes = {
            self._shape(batch, size, length)
            for size in self._sizes(candidates)
            for batch in BATCHES
            if batch <= min(self.most_requests(size), requests)
            for length in self.lengths
        }
        missing = [shape for shape in shapes if shape not in self._programs[shape.form, shape.length].compiled]
        for done, shape in enumerate(sorted(missing, key=lambda shape: (shape.batch, shape.candidates))):
            progress(done, len(missing))
            program = self._programs[shape.form, shape.length]
            jax.block_until_ready(program.call(self._weights, self._empty(shape)))
            program.compiled.add(shape)
        return len(shapes)

    def _shape(self, requests: int, candidates: int, length: int) -> "_Shape":
        if requests > BATCHES[-1] or length > self.lengths[-1]:
            raise ValueError(
                f"{requests} requests with up to {length} events: at most {BATCHES[-1]} are scored at once, and "
                f"{self.lengths[-1]} events read"
            )
        batch = next(size for size in BATCHES if size >= requests)
        length = next(size for size in self.lengths if size >= length)
        padded = self.padded(candidates)
        form = "one" if padded == 1 else "many" if padded <= self.most_pairs else "pieces"
        return _Shape(form, batch, padded, length)

    def padded(self, candidates: int) -> int:
        """What a number of candidates is padded to."""
        return self._sizes(candidates)[-1]

    @property
    def most_pairs(self) -> int:
        """How many candidates of all requests together are scored at once, but for a single request's."""
        return MOST_PAIRS.get(jax.default_backend(), MOST_PAIRS_ELSEWHERE)

    def most_requests(self, candidates: int) -> int:
        """How many requests of so many candidates are scored together, at most."""
        return max(size for size in BATCHES if size == 1 or size * self.padded(candidates) <= self.most_pairs)

    def _sizes(self, candidates: int) -> list[int]:
        """What numbers of candidates are padded to, up to this one."""
        sizes = [1]
        while sizes[-1] < candidates:
            sizes.append(self.many if sizes == [1] else 2 * sizes[-1])
        return sizes

    def width_of(self, field: FieldConfig) -> int | None:
        """How many numbers a value of this field is; None for one."""
        return self._lines.get(line_source(field.name)) if field.pool or field.ids == "vector" else None

    def _rows_compared(self, rows: Columns) -> Columns:
        return {field.name: rows[field.name].astype(np.int32, copy=False) for field in self._compared}

    def _unseen(self, rows: Columns, count: int) -> Bool[np.ndarray, "N"]:
        fields = [field for field in self.features.item if field.ids in ("vocab", "dictionary")]
        unknown = [(rows[field.name] <= 0).reshape(count, -1).all(axis=1) for field in fields]
        return np.logical_and.reduce(unknown) if unknown else np.zeros(count, bool)

    def _coded(self, columns: Columns) -> Columns:
        """Strings as codes."""
        return {name: self.codes(name, at) if at.dtype.kind in "OU" else at for name, at in columns.items()}

    def _empty(self, shape: "_Shape") -> dict[str, Any]:
        """What a program takes beside weights, with nothing in it."""
        b, c, length = shape.batch, shape.candidates, shape.length

        def floats(fields: tuple[FieldConfig, ...], *sizes: int) -> np.ndarray:
            return np.zeros((*sizes, sum(field.width for field in fields)), np.float32)

        return {
            "events": floats(self._history_fields, b, length),
            "age": np.zeros((b, length), np.int32),
            "length": np.zeros(b, np.int32),
            "candidates": floats(self.features.item, b, c),
            "context": floats(self.features.context, b),
            "compared": {field.name: np.zeros((b, length), np.int32) for field in self._compared},
            "side": {field.name: np.zeros((b, c), np.int32) for field in self._compared},
        }

    def _file(self, name: str) -> str:
        return os.path.join(self.path, name)


class _Program:
    """A program without its weights, which it is given with every call.

    Attributes:
      digest: of its file. call: (weights, arrays) -> logits. compiled: the shapes that it is compiled for.
    """

    def __init__(self, content: bytes, path: str):
        program, here = export.deserialize(bytearray(content)), export.default_export_platform()
        if here not in program.platforms:  # "cuda", where the backend is called "gpu"
            raise ModelError(f"{path} was exported for {', '.join(program.platforms)}, this is {here}")
        self.digest, self.call = hashlib.sha256(content).hexdigest(), jax.jit(program.call)
        self.compiled: set[_Shape] = set()


@dataclasses.dataclass(frozen=True)
class _Shape:
    form: str
    batch: int
    candidates: int
    length: int


@dataclasses.dataclass(frozen=True)
class Assembled:
    """Requests as a program takes them.

    Attributes:
      counts: int64 [B], candidates of each.
      unseen: bool [N], candidates of which no field with a table of its own ids was ever met in training.
    """

    shape: _Shape
    counts: Int[np.ndarray, "B"]
    unseen: Bool[np.ndarray, "N"]
    arrays: dict[str, Any]


def joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Arrays one after the other; of a single one no copy."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _newest_last(parts: Sequence[np.ndarray], shape: tuple[int, int], dtype: Any) -> np.ndarray:
    """[B, L, ...] with each part at the end of its row, zeros before; a single part that is all of it is not copied."""
    if shape == (1, len(parts[0])) and parts[0].dtype == dtype:
        return parts[0][None]
    out = np.zeros((*shape, *parts[0].shape[1:]), dtype)
    for row, part in zip(out, parts, strict=False):
        row[len(row) - len(part) :] = part
    return out


def _by_request(values: np.ndarray, offsets: list[int], shape: tuple[int, int]) -> np.ndarray:
    """Values of candidates, request after request -> [B, C, ...], zeros behind each request's."""
    out = np.zeros((*shape, *values.shape[1:]), values.dtype)
    for row, start, stop in zip(out, offsets[:-1], offsets[1:], strict=False):
        row[: stop - start] = values[start:stop]
    return out


def _padded(values: Any, rows: int) -> np.ndarray:
    """Values of requests, float32 or int32, with zeros behind them up to so many."""
    values = np.asarray(values)
    out = np.zeros((rows, *values.shape[1:]), np.float32 if values.dtype.kind == "f" else np.int32)
    out[: len(values)] = values
    return out
