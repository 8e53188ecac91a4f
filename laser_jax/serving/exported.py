"""A model as `export` writes it, read and run without the code of the model."""

import dataclasses
import json
import os
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax import export
from jaxtyping import Bool, Float, Int

from laser_jax.assembly import Assembly, Columns, ages, pad_events
from laser_jax.features import FeatureConfig, FieldConfig, line_source, table_of
from laser_jax.schema import Schema
from laser_jax.serving.files import ModelError, read_manifest
from laser_jax.vault.history import Histories

#: Requests that are scored together are padded to one of these numbers.
BATCHES = (1, 2, 4, 8, 16, 32)


@dataclasses.dataclass(frozen=True)
class Requests:
    """Requests to score; request i has the candidates offsets[i] .. offsets[i+1]-1.

    Attributes:
      time: int64 [B], in the unit of the vault. offsets: int64 [B + 1].
      candidates: field -> [N] (or [N, m]), strings as objects. context: field -> [B].
    """

    time: Int[np.ndarray, "B"]
    offsets: Int[np.ndarray, "B+1"]
    candidates: Columns
    context: Columns


class ExportedModel:
    """Scores requests with a model that was exported.

    Attributes:
      path: of the directory. name, version: of the model. config: of the run that trained it, as plain values.
      schema: of the vault that it was trained on. history_length: L, events that it reads at most.
      lengths: of histories that there are programs for. many: C from which the form for many candidates serves.
    """

    def __init__(self, path: str, verify: bool = True):
        """Reads everything but the tables, which stay on disk, mapped.

        Args:
          path: directory that `export` wrote.
          verify: whether the checksum of every file is compared.

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
        self._assembly = Assembly(self.features, vocabularies)
        self.event_fields = [field.name for field in (*self.features.item, *self.features.event)]
        self._dictionaries = self.features.dictionaries()
        for name, file in content["dictionaries"].items():
            with np.load(self._file(file)) as state:
                self._dictionaries[name].load(dict(state))
        self.strings: dict[str, list[str]] = {}
        for name, file in content["strings"].items():
            with open(self._file(file), encoding="utf-8") as opened:
                self.strings[name] = json.load(opened)
        self._codes = {name: {text: code for code, text in enumerate(texts)} for name, texts in self.strings.items()}
        self._tables = {name: _Rows(path, **entry) for name, entry in content["tables"].items()}
        with np.load(self._file("weights.npz")) as stored:
            self._weights = [jax.device_put(stored[name]) for name in content["weights"]]
        self._programs: dict[tuple[str, int], Any] = {}
        for name, entry in content["programs"].items():
            with open(self._file(f"programs/{name}.bin"), "rb") as file:
                program = export.deserialize(bytearray(file.read()))
            here = export.default_export_platform()  # "cuda", where the backend is called "gpu"
            if here not in program.platforms:
                raise ModelError(f"{path} was exported for {', '.join(program.platforms)}, this is {here}")
            self._programs[entry["form"], entry["length"]] = jax.jit(program.call)
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
            # What was appended since may be new to the model, and has the codes that training on it would meet.
            if theirs[: len(texts)] != texts[: len(theirs)]:
                found[name] = self.codes(name, theirs).astype(np.int32)
        return found

    def unseen(self, candidates: Columns) -> Bool[np.ndarray, "N"]:
        """Candidates of which no field with a table of its own ids was ever met in training."""
        fields = tuple(field for field in self.features.item if field.ids in ("vocab", "dictionary"))
        found = self._assembly.rows(fields, self._coded(candidates))
        unknown = [self._known_rows(table_of(field), found[field.name]) == 0 for field in fields]
        return np.logical_and.reduce(unknown) if unknown else np.zeros(len(next(iter(candidates.values()))), bool)

    def score(
        self, histories: Histories, requests: Requests, translations: dict[str, np.ndarray] | None = None
    ) -> Float[np.ndarray, "N"]:
        """The logit of every candidate.

        Args:
          histories: of the B requests' users, at most history_length events each, with event_fields.
          requests: at most BATCHES[-1] of them.
          translations: see `translations`, for the vault that the histories are from.
        """
        return self.run(self.assemble(histories, requests, translations))

    def assemble(
        self, histories: Histories, requests: Requests, translations: dict[str, np.ndarray] | None = None
    ) -> "Assembled":
        """The first part of `score`: everything that is done on the host."""
        counts = np.diff(requests.offsets)
        shape = self._shape(len(requests.time), int(counts.max()), int(np.diff(histories.offsets).max()))
        return Assembled(shape, counts, self._arrays(histories, requests, translations or {}, shape))

    def run(self, assembled: "Assembled") -> Float[np.ndarray, "N"]:
        """The second part of `score`."""
        shape, counts = assembled.shape, assembled.counts
        logits = np.asarray(self._programs[shape.form, shape.length](self._weights, *assembled.arrays))
        return logits[: len(counts)][np.arange(shape.candidates) < counts[:, None]]

    def compile(self, batches: tuple[int, ...], candidates: tuple[int, ...]) -> int:
        """Compiles all programs for some numbers of requests and of candidates; returns how many shapes these are."""
        shapes = {self._shape(b, c, length) for b in batches for c in candidates for length in self.lengths}
        none = np.zeros(0, np.int64)
        for shape in shapes:
            columns = {name: self._empty(name) for name in self.event_fields}
            histories = Histories({"time": none, **columns}, np.zeros(1, np.int64), lambda name: None, 0, 0)
            candidates_ = {field.name: self._empty(field.name) for field in self.features.item}
            context = {field.name: self._empty(field.name) for field in self.features.context}
            requests = Requests(none, np.zeros(1, np.int64), candidates_, context)
            arrays = self._arrays(histories, requests, {}, shape)
            jax.block_until_ready(self._programs[shape.form, shape.length](self._weights, *arrays))
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
        return _Shape("one" if padded == 1 else "many", batch, padded, length)

    def padded(self, candidates: int) -> int:
        """What a number of candidates is padded to."""
        size = 1 if candidates <= 1 else self.many
        while size < candidates:
            size *= 2
        return size

    def width_of(self, field: FieldConfig) -> int | None:
        """How many numbers a value of this field is; None for one."""
        return self._lines.get(line_source(field.name)) if field.pool or field.ids == "vector" else None

    def _arrays(
        self, histories: Histories, requests: Requests, translations: dict[str, np.ndarray], shape: "_Shape"
    ) -> tuple[Any, ...]:
        """Arguments of a program, behind the weights: rows, bags, vectors, requests."""
        b, c, length = shape.batch, shape.candidates, shape.length
        events = {name: histories.columns[name] for name in self.event_fields}
        events = {name: translations[name][at] if name in translations else at for name, at in events.items()}
        looked_up = self._assembly.look_up(events, self._coded(requests.candidates), self._coded(requests.context))
        columns = {(side, name): values for side, fields in looked_up.items() for name, values in fields.items()}
        numbered, lines = self._assembly.number(columns)
        places = {"history": b * length, "candidates": b * c, "context": b}
        sides = {field.name: ("history", "candidates") for field in self.features.item}
        sides |= {field.name: ("history",) for field in self.features.event}
        for field in self.features.context:
            sides[field.name] = (*sides.get(field.name, ()), "context")
        most = {name: sum(places[side] for side in found) for name, found in sides.items()}
        found_at: dict[tuple[str, str], np.ndarray] = {}
        rows, bags, vectors = {}, {}, {}
        for table, part in numbered.items():
            keys = self._known_rows(table, part.keys)
            size = sum(most[name] for name, (of, _) in self._assembly.table_of.items() if of == table)
            for source, bag in part.bags.items():
                width = self._lines[source]
                bags[source] = np.full((most[self._assembly.lined[source].name], width), -1, np.int32)
                bags[source][: len(bag)] = bag
                size += bags[source].size
            rows[table] = self._tables[table].padded(keys, min(size, self._assembly.tables[table][0]))
            found_at |= part.positions
        for source, line in lines.items():
            field = self._assembly.lined[source]
            if not field.bagged:
                vectors[source] = np.zeros((most[field.name], field.width), np.float32)
                vectors[source][: len(line.values)] = line.values
            found_at |= line.positions
        real = np.arange(c) < np.diff(requests.offsets)[:, None]
        sizes = np.diff(histories.offsets)
        age = ages(requests.time, histories.columns["time"], histories.offsets, self._units_per_second)
        step: dict[str, Any] = {"age": pad_events(age, histories.offsets, b, length), "length": np.zeros(b, np.int32)}
        step["length"][: len(sizes)] = sizes
        for side in ("history", "candidates", "context"):
            step[side] = {}
        for (side, name), at in found_at.items():
            if side == "history":
                step[side][name] = pad_events(at, histories.offsets, b, length)
            elif side == "candidates":
                step[side][name] = np.zeros((b, c), np.int32)
                step[side][name][: len(real)][real] = at
            else:
                step[side][name] = np.zeros(b, np.int32)
                step[side][name][: len(at)] = at
        return rows, bags, vectors, step

    def _known_rows(self, table: str, keys: np.ndarray) -> np.ndarray:
        dictionary = self._dictionaries.get(table)
        return keys if dictionary is None else dictionary.rows(keys)

    def _coded(self, columns: Columns) -> Columns:
        """Strings as codes."""
        return {name: self.codes(name, at) if at.dtype == object else at for name, at in columns.items()}

    def _empty(self, name: str) -> np.ndarray:
        source = line_source(name)
        return np.zeros((0, self._lines[source]), np.int64) if source in self._lines else np.zeros(0, np.int64)

    @property
    def _units_per_second(self) -> int:
        return 1000 if self.schema.time_unit == "ms" else 1

    def _file(self, name: str) -> str:
        return os.path.join(self.path, name)


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
    """

    shape: _Shape
    counts: np.ndarray
    arrays: tuple[Any, ...]


class _Rows:
    """A table on disk, mapped: rows are read as they are asked for."""

    def __init__(self, path: str, file: str, dtype: str, scale: str | None):
        self._values = np.load(os.path.join(path, file), mmap_mode="r")
        if dtype == "bfloat16":
            self._values = self._values.view(ml_dtypes.bfloat16)
        self._scale = None if scale is None else np.load(os.path.join(path, scale), mmap_mode="r")

    def padded(self, rows: np.ndarray, size: int) -> np.ndarray:
        """Those rows, float32, and zeros up to `size`."""
        out = np.zeros((max(size, len(rows)), self._values.shape[1]), np.float32)
        out[: len(rows)] = self._values[rows]
        if self._scale is not None:
            out[: len(rows)] *= self._scale[rows][:, None]
        return out
