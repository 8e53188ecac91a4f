"""The files of a raw log: which they are, what each of them holds, and SQL that reads them without guessing."""

import csv
import dataclasses
import glob
import io
import os
import re
import secrets
from typing import Any

import numpy as np
import pyarrow as pa

from laser_jax.schema import Field, Schema, SchemaError
from laser_jax.vault.errors import UnavailableError, VaultError

_CSV = re.compile(r"\.(csv|tsv)(\.gz|\.zst)?$")
_PARQUET = re.compile(r"\.(parquet|pq)$")
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
#: Everything that DuckDB would otherwise guess from the first rows of the first file. A guess is data lost: rows
#: that start with a comment sign, quotes that stay in the values when the first of them comes late.
_CSV_OPTIONS = (
    "auto_detect = false, header = true, skip = 0, quote = '\"', escape = '\"', comment = '', "
    "strict_mode = true, null_padding = false, ignore_errors = false, buffer_size = 8000000"
)
#: The columns that DuckDB adds to those of a file. Ours have blanks: no field of a schema has such a name.
_FILE, _ROW = "log file", "log row"
#: Bits of a place that count rows.
ROW_BITS = 40
_SQL_TYPES = {
    "bool": "BOOLEAN",
    "int8": "TINYINT",
    "int16": "SMALLINT",
    "int32": "INTEGER",
    "int64": "BIGINT",
    "uint8": "UTINYINT",
    "uint16": "USMALLINT",
    "uint32": "UINTEGER",
    "uint64": "UBIGINT",
    "float16": "FLOAT",
    "float32": "FLOAT",
    "float64": "DOUBLE",
    "string": "VARCHAR",
}
_INTEGERS = {sql for name, sql in _SQL_TYPES.items() if "int" in name} | {"HUGEINT", "UHUGEINT"}
_FLOATS = _INTEGERS | {"FLOAT", "DOUBLE"}
_WHOLE = r"\s*[+-]?[0-9]+\s*"


@dataclasses.dataclass(frozen=True)
class Shape:
    """What DuckDB has to know of a file to read it; files of one shape are read together.

    Attributes:
      names: of the file's columns, in order.
      types: of the columns, in DuckDB's words; None for CSV, where all are text.
      delimiter: of CSV, None for parquet.
    """

    names: tuple[str, ...]
    types: tuple[str, ...] | None = None
    delimiter: str | None = None


@dataclasses.dataclass(frozen=True)
class Column:
    """A column that the vault wants.

    Attributes:
      name: in the log.
      field: its type, under any name.
    """

    name: str
    field: Field

    @property
    def type(self) -> str:
        """Its type for messages."""
        return self.field.type if self.field.size is None else f"{self.field.type}[{self.field.size}]"


def columns_of(schema: Schema) -> list[Column]:
    """The columns that a log must have: user, time and the schema's fields."""
    keys = [Column("user", Field("key", schema.user)), Column("time", Field("key", "int64"))]
    return keys + [Column(field.name, field) for field in schema.fields]


def find_files(inputs: str | list[str]) -> list[str]:
    """Absolute names of the files that some patterns match, each file once, sorted."""
    found: set[str] = set()
    for pattern in [inputs] if isinstance(inputs, str) else list(inputs):
        matched = [os.path.abspath(path) for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)]
        if not matched:
            raise VaultError(f"input {pattern!r} matches no file")
        found.update(matched)
    # One file under two names, through `..` or a link, is loaded once.
    once: dict[str, str] = {}
    for path in sorted(found):
        once.setdefault(os.path.realpath(path), path)
    files = list(once.values())
    for path in files:
        try:
            path.encode()
        except UnicodeEncodeError as error:
            raise VaultError(f"{path!r}: the name of a log file must be UTF-8; rename it") from error
    others = [path for path in files if not is_csv(path)]
    odd = next((path for path in others if not _PARQUET.search(path) or len(others) < len(files)), None)
    if odd is not None:
        raise VaultError(f"{odd}: logs must be all parquet (.parquet, .pq) or all CSV (.csv, .tsv, also .gz or .zst)")
    return files


def is_csv(path: str) -> bool:
    """Whether a log file is CSV by its name; if not, it is parquet."""
    return _CSV.search(path) is not None


def connect(spill: str, memory: int, threads: int) -> Any:
    """A connection to a DuckDB of its own.

    Args:
      spill: directory for what does not fit into memory.
      memory: bytes.
      threads: that it may use.
    """
    import duckdb

    config = {"temp_directory": spill, "memory_limit": f"{memory >> 20}MB", "threads": threads}
    connection = duckdb.connect(config=config | {"preserve_insertion_order": True})
    # Times with a zone must not depend on the machine's.
    connection.execute("SET TimeZone = 'UTC'")
    return connection


def create_view(connection: Any, schema: Schema, files: list[str]) -> bool:
    """Creates the view `log` of the files; SchemaError names a file that lacks a column or has it of another type.

    For column i of `columns_of(schema)` the view has `c{i}`, the value in the schema's type or null, `m{i}`, whether
    the log has no value there, and `s{i}`, the text of what the log has there: a value that does not fit has
    a null `c` and a false `m`. `file` and `row` say where an event is from; rows grow within a file. `place` grows
    with the file's place in `files`, then with the row: one number, which sorts several times faster than a name.

    Args:
      connection: to DuckDB.
      schema: of the events.
      files: as find_files gives them.

    Returns:
      Whether times are plain numbers, whose unit is what the schema says, in any of the files.
    """
    groups: dict[Shape, list[str]] = {}
    for path in files:
        shape = _csv_shape(path) if is_csv(path) else _parquet_shape(connection, path)
        groups.setdefault(shape, []).append(path)
    wanted = columns_of(schema)
    names = "[" + ", ".join(quoted(path) for path in files) + "]"
    selects = []
    plain_times = False
    for shape, paths in groups.items():
        raw, made = [], []
        for i, column in enumerate(wanted):
            position = _position(shape, column, paths[0])
            found = shape.types[position] if shape.types else "CSV"
            name = f"nullif(p{position}, '')" if shape.types is None else quoted(shape.names[position], '"')
            raw.append(f"{name} AS r{i}")
            plain_times |= column.name == "time" and not _is_moment(found)
            value, missing = _value(f"r{i}", column, found, schema, paths[0])
            made.append(f"{value} AS c{i}, {missing} AS m{i}, r{i}::VARCHAR AS s{i}")
        # The CSV reader has no row number: rows are counted as they come, files in order, rows in order.
        row = "row_number() OVER ()" if shape.types is None else "file_row_number"
        inner = f'SELECT {", ".join(raw)}, "{_FILE}", {row} AS "{_ROW}" FROM {_source(shape, paths)}'
        place = f'(list_position({names}, "{_FILE}")::BIGINT << {ROW_BITS}) + "{_ROW}"'
        outer = f'{", ".join(made)}, "{_FILE}" AS file, "{_ROW}" AS row, {place} AS place'
        selects.append(f"SELECT {outer} FROM ({inner})")
    connection.execute("CREATE VIEW log AS " + " UNION ALL ".join(selects))
    return plain_times


def quoted(text: str, sign: str = "'") -> str:
    """SQL of a string, or of a name with `sign` a double quote."""
    return sign + text.replace(sign, sign * 2) + sign


def explained(error: Exception, duckdb: Any) -> VaultError:
    """DuckDB's error as one of a vault, with the file and line of a CSV row that is none."""
    text = str(error)
    file = re.search(r"^ *file = (.*)$", text, re.MULTILINE)
    if file is None:
        reason = " ".join(text.split("\n\n")[0].split())
        if isinstance(error, (duckdb.ConversionException, duckdb.InvalidInputException)):
            return SchemaError(f"the log does not fit the schema: {reason}")
        if isinstance(error, duckdb.OutOfMemoryException):
            reason += "; give more memory or disk (many files with columns of their own need more memory)"
        return UnavailableError(f"the log cannot be read or sorted: {reason}")
    # DuckDB counts a row as one line, whatever line breaks its quoted cells hold.
    place = re.search(r"CSV Error on Line: (\d+)\n", text)
    where = f"{file[1]}, line {place[1]}" if place else file[1]
    cells = re.search(r"Original Line: ?(.*)\nExpected Number of Columns: (\d+) Found: (\d+)", text, re.DOTALL)
    if cells:
        shown = _shortened(cells[1].strip("\r\n"))
        return SchemaError(
            f"{where}: {cells[3]} cells, the header has {cells[2]}: {shown!r}; correct the row "
            "(a cell that holds a delimiter needs double quotes)"
        )
    reason = re.split(r"\n\s*Possible ", text)[0].strip().splitlines()[-1] if place else "rows cannot be told apart"
    return SchemaError(
        f"{where}: not as CSV must be: {_shortened(reason, 300)}; need UTF-8, cells quoted by double quotes or not at "
        "all, and one kind of line ending"
    )


def _csv_shape(path: str) -> Shape:
    """Delimiter by the file's name, columns by its header."""
    kind, compression = _CSV.search(path).groups()
    delimiter = "\t" if kind == "tsv" else ","
    try:
        with pa.input_stream(path, compression=_COMPRESSIONS.get(compression)) as stream:
            # Bytes that are not UTF-8 are for DuckDB to find, which knows their line.
            text = io.TextIOWrapper(stream, "utf-8-sig", errors="replace", newline="")
            header = next(csv.reader(text, delimiter=delimiter, strict=True), None)
    except OSError as error:
        raise UnavailableError(f"{path} cannot be read: {error}") from error
    except csv.Error as error:
        raise SchemaError(f"{path}: its first line is no CSV header: {error}") from error
    if not header:
        raise SchemaError(f"{path}: its first line is empty; need a header that names the columns")
    return Shape(tuple(header), None, delimiter)


def _parquet_shape(connection: Any, path: str) -> Shape:
    """Columns and types of one file, as DuckDB reads them."""
    source = f"read_parquet({_listed([path])}, hive_partitioning = false)"
    rows = connection.execute(f"DESCRIBE SELECT * FROM {source}").fetchall()
    return Shape(tuple(row[0] for row in rows), tuple(row[1] for row in rows))


def _position(shape: Shape, column: Column, path: str) -> int:
    """Where a column is in the files of a shape; SchemaError names the first of them if it is not there once."""
    count = shape.names.count(column.name)
    if count == 0:
        raise SchemaError(f"{path}: column {column.name!r} is missing; its columns: {', '.join(shape.names)}")
    if count > 1:
        raise SchemaError(f"{path}: column {column.name!r} is there {count} times; rename all but one")
    return shape.names.index(column.name)


def _source(shape: Shape, paths: list[str]) -> str:
    """SQL that reads files of one shape."""
    common = f"{_listed(paths)}, filename = '{_FILE}', hive_partitioning = false"
    if shape.types is not None:
        return f"read_parquet({common}, file_row_number = true)"
    # By position: names that differ in case only, or stand there twice, are no concern of DuckDB's.
    columns = ", ".join(f"'p{i}': 'VARCHAR'" for i in range(len(shape.names)))
    # What no cell holds: DuckDB lets a row have one cell too many if that one is null. Empty cells are null later.
    fixed = f"delim = {quoted(shape.delimiter)}, nullstr = '{secrets.token_hex(16)}', {_CSV_OPTIONS}"
    return f"read_csv({common}, columns = {{{columns}}}, {fixed})"


def _listed(paths: list[str]) -> str:
    """SQL list of files. DuckDB takes names for patterns: a sign in brackets stands for itself."""
    return "[" + ", ".join(quoted(re.sub(r"([*?\[])", r"[\1]", path)) for path in paths) + "]"


def _is_moment(found: str) -> bool:
    return found.startswith(("TIMESTAMP", "DATE"))


def _value(raw: str, column: Column, found: str, schema: Schema, path: str) -> tuple[str, str]:
    """SQL of a column in the schema's type (null if it does not fit), and of whether the log has no value."""
    missing = f"{raw} IS NULL"
    if column.name == "user" and schema.user == "string":
        missing = f"coalesce({raw}, '') = ''"
    if found == "CSV":
        if column.field.type == "string" and column.name != "user":
            return f"coalesce({raw}, '')", "false"
        return _parsed(raw, column.field), missing
    if column.name == "time" and _is_moment(found):
        # Division rounds towards 0: an event just before 1970 stays negative.
        zoned = "::TIMESTAMPTZ" if "ZONE" in found or "TZ" in found else ""  # nanoseconds with a zone need both steps
        moment, unit = f"{raw}{zoned}::TIMESTAMP", {"s": 1000, "ms": 1}[schema.time_unit]
        number = f"epoch_ms({moment}) // {unit}"
        return f"CASE WHEN {moment} < TIMESTAMP '1970-01-01' THEN least({number}, -1) ELSE {number} END", missing
    sql = _SQL_TYPES[column.field.type]
    element = found if column.field.size is None else re.sub(r"\[\d*\]$", "", found)
    allowed = _INTEGERS if sql in _INTEGERS else _FLOATS if sql in _FLOATS else {sql}
    if element not in allowed or (column.field.size is not None and element == found):
        raise SchemaError(
            f"{path}: column {column.name!r} has type {found}, the schema says {column.type}; convert the log's "
            "column, or change the schema"
        )
    if column.field.size is not None:
        return _vector(raw, column.field), missing
    return (raw if found == sql and column.field.type != "float16" else _number(raw, column.field)), missing


def _number(value: str, field: Field) -> str:
    """SQL that converts a number; null if it does not fit."""
    cast = f"TRY_CAST({value} AS {_SQL_TYPES[field.type]})"
    if field.type != "float16":
        return cast
    # DuckDB has no such type.
    return f"CASE WHEN NOT (isfinite({cast}) AND abs({cast}) > 65504) THEN {cast} END"


def _parsed(raw: str, field: Field) -> str:
    """SQL that parses a CSV cell; null if it cannot."""
    if field.type == "string":
        return raw
    kind = field.dtype.kind
    if field.size is not None:
        if kind in "iu":
            whole = rf"\s*\[{_WHOLE}(,{_WHOLE})*\]\s*"
            return f"CASE WHEN regexp_full_match({raw}, '{whole}') THEN {_vector(raw, field)} END"
        elements = f"TRY_CAST({raw} AS VARCHAR[])"
        numbers = f"TRY_CAST({elements} AS DOUBLE[])" if kind == "f" else elements
        return f"CASE WHEN NOT contains({raw}, '_') THEN {_vector(numbers, field)} END"
    if kind == "b":
        return f"TRY_CAST({raw} AS BOOLEAN)"
    if kind in "iu":
        # DuckDB would round 1.5 and read 1_0 as ten.
        return f"CASE WHEN regexp_full_match({raw}, '{_WHOLE}') THEN {_number(raw, field)} END"
    # Through a double: DuckDB makes a text too large for a type infinite, but refuses a number too large for it.
    number = f"TRY_CAST({raw} AS DOUBLE)"
    odd = f"contains({raw}, '_') OR (isinf({number}) AND regexp_matches({raw}, '[0-9]'))"
    return f"CASE WHEN NOT ({odd}) THEN {_number(number, field)} END"


def _vector(numbers: str, field: Field) -> str:
    """SQL that converts a list; null if its length is another, or an element is null, does not fit or is not finite.

    Args:
      numbers: SQL of the list.
      field: of the vector.
    """
    sql = _SQL_TYPES[field.type]
    cast = f"TRY_CAST({numbers} AS {sql}[{field.size}])"
    # An element that does not fit becomes null, and a null float would be NaN.
    whole = f"list_count({cast}::{sql}[]) = {field.size}"
    if field.dtype.kind == "f":
        # NaN is greater than any number.
        limit = float(np.finfo(field.dtype).max)
        whole += f" AND list_min({cast}::{sql}[]) >= {-limit} AND list_max({cast}::{sql}[]) <= {limit}"
    return f"CASE WHEN {whole} THEN {cast} END"


def _shortened(text: str, limit: int = 100) -> str:
    return text if len(text) <= limit else text[:limit] + " ..."
