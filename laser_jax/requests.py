"""Requests on disk: who was shown what and when; keys only, never a copied history.

A directory of requests holds `requests.json` (version, types, counts) and one zarr v3 array a column:

    user                  int64 [R]; or, for string users, user_text (all of them as UTF-8) and user_ends [R]
    time                  int64 [R], in the unit of the vault's schema
    offsets               int64 [R+1]; request r has the candidates offsets[r] .. offsets[r+1]-1
    sequence              int64 [R], optional: the sequence number that the server had seen
    context.NAME          [R]
    candidates.NAME       [N]
    label                 float32 [N]
    references.NAME       float32 [N], scores of others (an oracle, popularity): larger means likelier

This module knows no jax.
"""

import dataclasses
import json
import os
import shutil
import tempfile
import threading

import numpy as np
import tensorstore as ts

from laser_jax.column_files import ColumnWriter, RequestsError, open_column, read_column, sync_directory

VERSION = 1
CHECKSUMS = "checksums"  # in the manifest, of every column; files of earlier code have none
MANIFEST = "requests.json"
_TYPES = (
    "bool",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "float16",
    "float32",
    "float64",
)
_PARTS = ("context", "candidates", "references")


@dataclasses.dataclass(frozen=True)
class RequestBatch:
    """Some requests, in the order asked for; request i has the candidates offsets[i] .. offsets[i+1]-1.

    Attributes:
        user: int64 [b], or an object array of str.
        time: int64 [b], in the unit of the vault's schema.
        context: name -> [b].
        offsets: int64 [b+1].
        candidates: name -> [n].
        label: float32 [n].
        references: name -> float32 [n].
        sequence: int64 [b], or None where none was stored.
    """

    user: np.ndarray
    time: np.ndarray
    context: dict
    offsets: np.ndarray
    candidates: dict
    label: np.ndarray
    references: dict
    sequence: np.ndarray | None = None

    def __len__(self):
        return len(self.time)


class RequestsWriter:
    """Writes requests, streaming; nothing is visible at the path before the with-block ends cleanly."""

    def __init__(self, path, user="int64", context=None, candidates=None, references=(), sequence=False):
        """Prepares a build directory beside `path`.

        Args:
            path: the directory to make; it must not exist.
            user: "int64" or "string".
            context: name -> type of a value a request.
            candidates: name -> type of a value a candidate; named like the event field whose ids it shares. A type like
                "int32[4]" is of as many values.
            references: names of the scores stored beside the label.
            sequence: whether `write` is given sequence numbers.

        Raises:
            RequestsError: an unknown type, a column name that is no identifier, or a path that exists.
        """
        self._path, self._user, self._sequence = os.path.abspath(os.fspath(path)), user, bool(sequence)
        self._types = {
            "context": dict(context or {}),
            "candidates": dict(candidates or {}),
            "references": dict.fromkeys(references, "float32"),
        }
        if user not in ("int64", "string"):
            raise self._error("user", f"has type {user!r}: write 'int64' or 'string'")
        layout = _layout(user, self._sequence, self._types)
        for column, dtype in layout.items():
            if split_type(dtype)[0] not in _TYPES or not column.replace(".", "_").isidentifier():
                raise self._error(column, f"({dtype!r}) is no identifier, or no type of {', '.join(_TYPES)}")
        parent, name = os.path.split(self._path)
        if os.path.exists(self._path):
            raise RequestsError(f"{self._path} exists: requests are written once; remove it first")
        os.makedirs(parent, exist_ok=True)
        self._build = tempfile.mkdtemp(prefix=f"{name}.building-", dir=parent)
        os.chmod(self._build, 0o755)
        self._columns = {
            column: ColumnWriter(os.path.join(self._build, column), split_type(dtype)[0])
            for column, dtype in layout.items()
        }
        self._columns["offsets"].add(np.zeros(1, np.int64))
        self._num_requests = self._num_candidates = self._text_bytes = 0

    def write(self, *, user, time, counts, label, context=None, candidates=None, references=None, sequence=None):
        """Adds R requests with N = counts.sum() candidates in all. A refused call adds nothing.

        Args:
            user: [R] int64, or str when made with user="string".
            time: [R] int64, not negative.
            counts: [R] candidates of each request, at least 1.
            label: [N] bool or float.
            context, candidates, references: name -> [R], [N], [N], or [R, k], [N, k] for types of k values; all
                declared names; references finite.
            sequence: [R] int64, where declared.

        Raises:
            RequestsError: a missing or undeclared column, a wrong length, a value that its type cannot hold.
        """
        time = self._column("time", time, "int64")
        counts = self._column("counts", counts, "int64", len(time))
        if (counts < 1).any():
            raise self._error("counts", f"holds {counts.min()} at {counts.argmin()}: the least is 1")
        if (time < 0).any():
            raise self._error("time", f"holds {time.min()} at {time.argmin()}: times are not negative")
        rows, flat = len(time), int(counts.sum())
        label = self._column("label", label, "float32", flat)
        wrong = np.flatnonzero((label < 0) | (label > 1))
        if len(wrong):
            raise self._error("label", f"holds {label[wrong[0]]} at {wrong[0]}: labels lie between 0 and 1")
        columns = {"time": time, "label": label, "offsets": self._num_candidates + np.cumsum(counts)}
        for part, given in zip(_PARTS, (context or {}, candidates or {}, references or {}), strict=True):
            types = self._types[part]
            if set(given) != set(types):
                missing, undeclared = sorted(set(types) - set(given)), sorted(set(given) - set(types))
                raise self._error(part, f"misses {missing} and has undeclared {undeclared}")
            for name, values in given.items():
                length = rows if part == "context" else flat
                columns[f"{part}.{name}"] = self._column(f"{part}.{name}", values, types[name], length)
        if (sequence is not None) != self._sequence:
            raise self._error("sequence", f"is declared {self._sequence}, given {sequence is not None}")
        if sequence is not None:
            columns["sequence"] = self._column("sequence", sequence, "int64", rows)
        if self._user == "int64":
            columns["user"] = self._column("user", user, "int64", rows)
        else:
            columns["user_text"], columns["user_ends"] = self._text(user, rows)
            self._text_bytes += len(columns["user_text"])
        for name, values in columns.items():
            self._columns[name].add(values)
        self._num_requests += rows
        self._num_candidates += flat

    def close(self):
        """Makes the requests visible at the path."""
        for column in self._columns.values():
            column.close()
        manifest = {
            "version": VERSION,
            "user": self._user,
            "sequence": self._sequence,
            **self._types,
            "num_requests": self._num_requests,
            "num_candidates": self._num_candidates,
            CHECKSUMS: {name: column.checksum for name, column in self._columns.items()},
        }
        with open(os.path.join(self._build, MANIFEST), "w", encoding="utf-8") as f:
            json.dump(manifest, f, indent=1)
            f.flush()
            os.fsync(f.fileno())
        sync_directory(self._build)
        os.rename(self._build, self._path)
        sync_directory(os.path.dirname(self._path))

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        try:
            if kind is None:
                self.close()
        finally:  # after a clean close there is nothing left to remove
            shutil.rmtree(self._build, ignore_errors=True)

    def _error(self, column, problem):
        return RequestsError(f"column {column!r} of {self._path} {problem}")

    def _column(self, name, values, dtype, length=None):
        array, (dtype, size) = np.asarray(values), split_type(dtype)
        dtype = np.dtype(dtype)
        if array.ndim != (1 if size is None else 2) or (length is not None and len(array) != length):
            wanted = f"a vector of {length or 'R'}" if size is None else f"{length or 'R'} of {size} each"
            raise self._error(name, f"has shape {array.shape}, expected {wanted}")
        if size is not None:
            if array.shape[1] != size:
                raise self._error(name, f"has shape {array.shape}, expected {size} values each")
            array = array.ravel()
        if not array.size:  # an empty list arrives as floats
            return array.astype(dtype)
        if array.dtype.kind not in "biuf" or (array.dtype.kind == "f" and dtype.kind != "f"):
            raise self._error(name, f"is given as {array.dtype}, which cannot become {dtype}")
        with np.errstate(over="ignore"):
            held = array.astype(dtype)  # a copy in any case: the buffer outlives the call
        if dtype.kind == "f" and not np.isfinite(held).all():
            raise self._error(name, f"holds {array[~np.isfinite(held)][0]}, no finite {dtype}")
        # Signs are compared too, since a wrapped uint64 equals the int64 that it became.
        wrong = (held != array) | ((held < 0) != (array < 0)) if dtype.kind in "biu" else np.zeros(0, bool)
        if wrong.any():
            raise self._error(name, f"holds {array[wrong][0]}, which {dtype} cannot hold")
        return held

    def _text(self, user, rows):
        if len(user) != rows or not all(isinstance(value, str) for value in user):
            raise self._error("user", f"is not {rows} strings: {list(user)[:3]}...")
        encoded = [value.encode() for value in user]
        ends = self._text_bytes + np.cumsum([len(e) for e in encoded], dtype=np.int64)
        return np.frombuffer(b"".join(encoded), np.uint8), ends


class Requests:
    """Requests opened for reading, by any indices in any order. Safe for threads; pickles to its path.

    Attributes:
        path: absolute path of the directory.
        num_candidates: candidates of all requests together.
        user_type: "int64" or "string".
        columns: name -> type of the candidate columns.
        context_columns: name -> type of the columns with one value a request.
        references: names of the stored reference scores.
    """

    def __init__(self, path, cache_bytes=1 << 30):
        self.path, self._cache_bytes = os.path.abspath(os.fspath(path)), int(cache_bytes)
        manifest = os.path.join(self.path, MANIFEST)
        try:
            with open(manifest, encoding="utf-8") as f:
                self._spec = json.load(f)
        except (FileNotFoundError, NotADirectoryError):
            raise RequestsError(f"{self.path} holds no requests ({MANIFEST} is missing): build it") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise RequestsError(f"{manifest} is damaged ({error}): rebuild the data set") from error
        expected = {"version", "user", "sequence", *_PARTS, "num_requests", "num_candidates"}
        if not isinstance(self._spec, dict) or "version" not in self._spec:
            raise RequestsError(f"{manifest} is damaged (no version in it): rebuild the data set")
        if self._spec["version"] != VERSION:
            raise RequestsError(
                f"{manifest} has version {self._spec['version']}, this laser_jax reads {VERSION}: install the one "
                "that wrote it, or rebuild the data set"
            )
        if expected - self._spec.keys():
            raise RequestsError(f"{manifest} is damaged (no {min(expected - self._spec.keys())}): rebuild the data set")
        self.num_candidates = self._spec["num_candidates"]
        self.columns, self.context_columns = dict(self._spec["candidates"]), dict(self._spec["context"])
        self.references = tuple(self._spec["references"])
        self.user_type = self._spec["user"]
        self._columns, self._cached, self._lock = {}, 0, threading.Lock()
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": 64 << 20}})

    @classmethod
    def open(cls, path, cache_bytes=1 << 30):
        """Opens the requests at `path`; a column is read when it is first needed.

        Args:
            path: a directory written by RequestsWriter.
            cache_bytes: columns are held whole until they fill this; further ones are read by chunks.

        Raises:
            RequestsError: no requests there, or of another version.
        """
        return cls(path, cache_bytes)

    def __len__(self):
        return self._spec["num_requests"]

    def counts(self):
        """Candidates of every request, int64 [R]."""
        return np.diff(self._take("offsets", np.arange(len(self) + 1)))

    def read(self, indices, first=None, counts=None):
        """The requests at `indices`, int64 [b], any order, repeats allowed.

        Args:
            first, counts: int64 [b], of each request only so many candidates from that one on; all by default.

        Raises: IndexError for an index outside 0 .. len-1, RequestsError for a missing or damaged column.
        """
        indices = np.asarray(indices)
        if indices.ndim != 1 or (indices.dtype.kind not in "iu" and indices.size):
            raise IndexError(f"indices must be a vector of integers, not {indices.dtype} {indices.shape}")
        indices = indices.astype(np.int64)
        outside = indices[(indices < 0) | (indices >= len(self))]
        if len(outside):
            raise IndexError(f"request {outside[0]} of {self.path}, which has {len(self)}")
        starts, ends = self._take("offsets", indices), self._take("offsets", indices + 1)
        if first is not None:
            starts, ends = starts + first, np.minimum(starts + first + counts, ends)
        flat, offsets = _spans(starts, ends)
        part = {
            name: {
                column: self._take_lines(f"{name}.{column}", indices if name == "context" else flat, dtype)
                for column, dtype in self._spec[name].items()
            }
            for name in _PARTS
        }
        return RequestBatch(
            user=self.users(indices),
            time=self._take("time", indices),
            offsets=offsets,
            label=self._take("label", flat),
            **part,
            sequence=self._take("sequence", indices) if self._spec["sequence"] else None,
        )

    def __reduce__(self):
        return type(self), (self.path, self._cache_bytes)

    def users(self, indices):
        """The users of the requests at `indices`: int64 [b], or objects where users are strings."""
        if self._spec["user"] == "int64":
            return self._take("user", indices)
        starts = np.where(indices > 0, self._take("user_ends", np.maximum(indices - 1, 0)), 0)
        flat, offsets = _spans(starts, self._take("user_ends", indices))
        text = self._take("user_text", flat).tobytes()
        users = np.empty(len(indices), object)
        users[:] = [text[a:b].decode() for a, b in zip(offsets[:-1], offsets[1:], strict=True)]
        return users

    def _take_lines(self, name, indices, dtype):
        """Values at `indices` [n], or [n, k] where the column has k values each."""
        _, size = split_type(dtype)
        if size is None:
            return self._take(name, indices)
        return self._take(name, (indices[:, None] * size + np.arange(size)).ravel()).reshape(-1, size)

    def _take(self, name, indices):
        column = self._columns.get(name)
        if column is None:
            column = self._load(name)
        return column[indices] if isinstance(column, np.ndarray) else read_column(column[indices], self.path, name)

    def _load(self, name):
        with self._lock:
            if name not in self._columns:
                column = open_column(self.path, name, self._context)
                of_candidates = name.split(".")[0] in ("candidates", "label", "references")
                expected = self.num_candidates if of_candidates else len(self) + (name == "offsets")
                part, _, column_name = name.partition(".")
                if part in ("candidates", "context"):
                    expected *= split_type(self._spec[part][column_name])[1] or 1
                if name != "user_text" and column.shape != (expected,):
                    raise RequestsError(
                        f"column {name!r} of {self.path} has shape {column.shape}, "
                        f"{MANIFEST} says {expected}: rebuild the data set"
                    )
                size = column.shape[0] * column.dtype.numpy_dtype.itemsize
                if self._cached + size <= self._cache_bytes:
                    self._cached += size
                    column = read_column(column, self.path, name)
                self._columns[name] = column
            return self._columns[name]


def write_vocabulary(path, ids):
    """Stores known ids, ascending and unique; the row of an id is 1 + its position, row 0 is for the unseen.

    Args:
        path: the array to make, e.g. DIR/vocab/item; it must not exist.
        ids: [V] integers, in any order.
    """
    path, ids = os.path.abspath(os.fspath(path)), np.asarray(ids)
    if os.path.exists(path):
        raise RequestsError(f"{path} exists: a vocabulary is written once; remove it first")
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or ids.dtype == np.uint64:
        raise RequestsError(f"vocabulary {path} is given as {ids.dtype} {ids.shape}, expected int64 (V,)")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    # Whatever lies beside it is taken for a vocabulary too, so that what a killed process leaves must not lie there.
    build = tempfile.mkdtemp(prefix=".vocabulary.", dir=os.path.dirname(os.path.dirname(path)))
    try:
        column = ColumnWriter(os.path.join(build, "ids"), "int64")
        column.add(np.unique(ids).astype(np.int64))
        column.close()
        os.rename(os.path.join(build, "ids"), path)
        sync_directory(os.path.dirname(path))
    finally:
        shutil.rmtree(build, ignore_errors=True)


def read_vocabulary(path):
    """The ids stored by write_vocabulary, int64 [V], ascending."""
    place, name = os.path.split(os.path.abspath(os.fspath(path)))
    return read_column(open_column(place, name, ts.Context()), place, name)


def split_type(dtype):
    """A type's name and how many values it is of, None for one: "int32[4]" is ("int32", 4)."""
    name, bracket, rest = dtype.partition("[")
    if not bracket:
        return name, None
    size = rest[:-1]
    return (name, int(size)) if rest.endswith("]") and size.isdigit() and int(size) > 0 else (dtype, None)


def _layout(user, sequence, types):
    """Column name -> type of everything stored."""
    columns = {"user": "int64"} if user == "int64" else {"user_text": "uint8", "user_ends": "int64"}
    columns |= {"time": "int64", "offsets": "int64", "label": "float32"}
    columns |= {"sequence": "int64"} if sequence else {}
    return columns | {f"{part}.{name}": dtype for part in _PARTS for name, dtype in types[part].items()}


def _spans(starts, ends):
    """The positions of many ranges one after the other, and where each range begins among them."""
    offsets = np.zeros(len(starts) + 1, np.int64)
    np.cumsum(ends - starts, out=offsets[1:])
    return np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], ends - starts), offsets
