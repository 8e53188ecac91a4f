"""What is wrong with a log: found file by file if need be, judged as a whole."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from laser_jax.schema import TIME_LIMIT, Schema, SchemaError
from laser_jax.vault import log_files

#: Times in milliseconds below it are of before March 1973: nobody logged then, these are seconds.
_FIRST_MS = 10**11


@dataclasses.dataclass(frozen=True)
class Finding:
    """Events that are alike in some way.

    Attributes:
      count: how many they are.
      where: file and row of the first one.
      value: what the log has there.
    """

    count: int
    where: str
    value: str | None


@dataclasses.dataclass(frozen=True)
class Survey:
    """What `check` has to know of some files of a log.

    Attributes:
      events: how many they hold.
      first, last: times, None without events.
      unfit: for each of log_files.columns_of, the events whose value does not fit the schema, if there are any.
      missing: the same of events without a value that must have one.
      outside: events whose time is negative or absurd.
      newest: the event of the last time, if that looks like seconds in a schema of milliseconds.
    """

    events: int
    first: int | None
    last: int | None
    unfit: list[Finding | None]
    missing: list[Finding | None]
    outside: Finding | None
    newest: Finding | None

    @classmethod
    def of(cls, connection: Any, schema: Schema) -> "Survey":
        """Of the files in the view `log` (see log_files.create_view) of a connection to DuckDB."""
        columns = log_files.columns_of(schema)
        outside = f"c1 < 0 OR c1 >= {schema.time_limit}"
        counted = ["count(*)", "min(c1)", "max(c1)", f"count(*) FILTER ({outside})"]
        for i in range(len(columns)):
            counted += [f"count(*) FILTER (c{i} IS NULL AND NOT m{i})", f"count(*) FILTER (m{i})"]
        row = connection.execute(f"SELECT {', '.join(counted)} FROM log").fetchall()[0]
        events, first, last = row[:3]

        def find(count: int, condition: str, column: int) -> Finding | None:
            return Finding(count, *_first(connection, condition, column)) if count else None

        unfit = [find(count, f"c{i} IS NULL AND NOT m{i}", i) for i, count in enumerate(row[4::2])]
        # A missing float is NaN; anything else that is missing has no value to stand for it.
        needed = [column.field.size is not None or column.field.dtype.kind != "f" for column in columns]
        missing = [find(count * needed[i], f"m{i}", i) for i, count in enumerate(row[5::2])]
        seconds = schema.time_unit == "ms" and last is not None and last < _FIRST_MS
        newest = find(int(seconds), f"c1 = {last}", 1)
        return cls(events, first, last, unfit, missing, find(row[3], outside, 1), newest)

    @classmethod
    def merged(cls, surveys: Sequence["Survey"]) -> "Survey":
        """Of all files of a log, in their order."""
        events = [survey for survey in surveys if survey.events]
        last = max((survey.last for survey in events if survey.last is not None), default=None)
        return cls(
            sum(survey.events for survey in surveys),
            min((survey.first for survey in events if survey.first is not None), default=None),
            last,
            [_together(found) for found in zip(*(survey.unfit for survey in surveys), strict=True)],
            [_together(found) for found in zip(*(survey.missing for survey in surveys), strict=True)],
            _together([survey.outside for survey in surveys]),
            next((survey.newest for survey in events if survey.last == last), None),
        )

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values, the inverse of from_json."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Survey":
        """From what to_json made."""

        def finding(found: dict[str, Any] | None) -> Finding | None:
            return Finding(**found) if found else None

        lists = {name: [finding(found) for found in value[name]] for name in ("unfit", "missing")}
        return cls(**value | lists | {name: finding(value[name]) for name in ("outside", "newest")})


def check(schema: Schema, survey: Survey, files: list[str], plain_times: bool) -> None:
    """SchemaError names file, row and column of a value that no event may have.

    Args:
      schema: of the events.
      survey: of all files.
      files: of the log.
      plain_times: what create_view says of them.
    """
    if survey.events == 0:
        where = files[0] if len(files) == 1 else f"{len(files)} files, {files[0]} the first"
        raise SchemaError(f"{where}: the log holds no event")
    for column, unfit, missing in zip(log_files.columns_of(schema), survey.unfit, survey.missing, strict=True):
        if unfit:
            finite = " of finite numbers" if column.field.size is not None and column.field.dtype.kind == "f" else ""
            raise SchemaError(
                f"{unfit.where}: column {column.name!r}: {unfit.value!r} is not of type {column.type}{finite} "
                f"(in {_rows(unfit.count)}); correct the log, or change the schema"
            )
        if missing:
            shown = "null" if missing.value is None else "empty"
            raise SchemaError(
                f"{missing.where}: {shown} {column.name} (in {_rows(missing.count)}); drop these events or fill them"
            )
    unit, first, last = schema.time_unit, survey.first, survey.last
    if survey.outside:
        # With both kinds in the log, which of them the first one is cannot be told from the ends.
        kind = "absurd" if first >= 0 else "negative" if last < schema.time_limit else "impossible"
        hint = "is the unit right?"
        if plain_times and first >= 0 and unit == "s" and _FIRST_MS <= last < TIME_LIMIT["ms"]:
            hint = 'are these milliseconds? then set time_unit "ms" in the schema'
        found = f"{survey.outside.where}: {kind} time, such as {survey.outside.value}"
        raise SchemaError(f"{found}; need 0 <= time < {schema.time_limit} in {unit} since 1970 ({hint})")
    if plain_times and survey.newest:
        raise SchemaError(
            f"{survey.newest.where}: the newest time of the log is {last}: in milliseconds that is before March 1973, "
            'so these must be seconds; set time_unit "s" in the schema, or multiply the times by 1000'
        )


def _first(connection: Any, condition: str, column: int) -> tuple[str, str | None]:
    """File and row of the first event that fulfils a condition, and what the log has in a column there."""
    query = f"SELECT file, row, s{column} FROM log WHERE {condition} ORDER BY place LIMIT 1"
    file, row, value = connection.execute(query).fetchall()[0]
    if log_files.is_csv(file):
        # Counted through all files.
        row -= connection.execute("SELECT min(row) FROM log WHERE file = ?", [file]).fetchall()[0][0]
    return f"{file}, row {row}", value if value is None or len(value) <= 100 else value[:100] + " ..."


def _together(found: Sequence[Finding | None]) -> Finding | None:
    """One finding of those of several files, in their order."""
    there = [finding for finding in found if finding]
    return dataclasses.replace(there[0], count=sum(finding.count for finding in there)) if there else None


def _rows(count: int) -> str:
    return f"{count:,} row{'s' * (count > 1)}"
