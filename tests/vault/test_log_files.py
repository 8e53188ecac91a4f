"""Log files of every kind: nothing in them is guessed, and a wrong one is named with its place."""

import gzip
import os
import subprocess
import sys

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from laser_jax import vault as seqvault
from laser_jax.schema import Field, Schema
from laser_jax.vault.ingest import MIN_MEMORY, ingest

TEXTS = Schema(fields=(Field("text", "string"),))
ITEMS = Schema(fields=(Field("item", "int64"),))


def load(tmp_path, schema: Schema, inputs="log*"):
    """The vault of the logs in tmp_path that match a pattern or some."""
    inputs = [inputs] if isinstance(inputs, str) else inputs
    ingest(schema, [str(tmp_path / name) for name in inputs], str(tmp_path / "vault"), MIN_MEMORY, threads=1)
    return seqvault.open(tmp_path / "vault")


def refused(tmp_path, schema: Schema, match: str, inputs="log*") -> None:
    """The logs are an error with this text, and nothing is left."""
    with pytest.raises(seqvault.VaultError, match=match):
        load(tmp_path, schema, inputs)
    assert not (tmp_path / "vault").exists()


def test_csv_cells_are_taken_as_they_stand(tmp_path):
    """Comment signs, apostrophes, doubled and stray quotes, delimiters and line breaks in cells."""
    cells = ["#1", "'a'", '"say ""hi"", he"', '"two\nlines"', 'a"b', "#", "back\\", "", '""', "NULL", "ü;|\t"]
    values = ["#1", "'a'", 'say "hi", he', "two\nlines", 'a"b', "#", "back\\", "", "", "NULL", "ü;|\t"]
    rows = [f"{cell},1,{time}\n" for time, cell in enumerate(cells)]
    (tmp_path / "log.csv").write_text("text,user,time\n" + "".join(rows))
    assert load(tmp_path, TEXTS).get(1)["text"].tolist() == values


def test_quotes_that_come_late(tmp_path):
    """In the second file, or after many rows: the value is the same as in the first row."""
    plain = "".join(f"1,{time},plain\n" for time in range(30_000))
    (tmp_path / "log0.csv").write_text("user,time,text\n" + plain)
    (tmp_path / "log1.csv").write_text('user,time,text\n2,1,"a, ""b"""\n' + plain + '2,2,"a, ""b"""\n')
    vault = load(tmp_path, TEXTS)
    assert vault.num_events == 60_002
    assert vault.get(2)["text"].tolist() == ['a, "b"'] * 2


def test_each_csv_file_has_its_own_header_and_delimiter(tmp_path):
    """Another order of columns, tabs, a byte order mark, Windows line ends, names twice or in another case."""
    (tmp_path / "log0.csv").write_text("user,time,item,Item,x,x\n1,0,10,0,0,0\n")
    (tmp_path / "log1.tsv").write_text("item\ttime\tuser\n11\t1\t1\n")
    (tmp_path / "log2.csv").write_bytes(b"\xef\xbb\xbftime,item,user\r\n2,12,1\r\n")
    (tmp_path / "log3.tsv.gz").write_bytes(gzip.compress(b"item\ttime\tuser\n13\t3\t1\n\n14\t4\t1"))
    assert load(tmp_path, ITEMS).get(1)["item"].tolist() == [10, 11, 12, 13, 14]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b"user,time,item\n1,2,3\n1,2,4,\n", r"log1.csv, line 3: 4 cells, the header has 3: '1,2,4,'; correct the row"),
        (b"user,time,item\n1,2,3\n#1,2\n", r"log1.csv, line 3: 2 cells, the header has 3: '#1,2'"),
        (b"user,time,item,\n1,2,3\n", r"log1.csv, line 2: 3 cells, the header has 4"),
        (
            b"# made by hand\nuser,time,item\n1,2,3\n",
            r"log1.csv: column 'user' is missing; its columns: # made by hand",
        ),
        (b"user,time,item,item\n1,2,3,4\n", r"log1.csv: column 'item' is there 2 times"),
        (b'user,time,item\n1,2,"3\n1,2,4\n', r"log1.csv, line 2: not as CSV must be: .*unterminated quote"),
        (b"user,time,item\n1,2,3\r\n1,2,4\n", r"log1.csv: .*rows cannot be told apart.*one kind of line ending"),
        (b"user,time,item\n1,2,3\n1,\xff,3\n", r"log1.csv, line 3: not as CSV must be: .*; need UTF-8"),
        (b"", r"log1.csv: its first line is empty; need a header"),
        (b'"user', r"log1.csv: its first line is no CSV header"),
    ],
)
def test_files_that_are_no_csv(tmp_path, text, match):
    (tmp_path / "log0.csv").write_text("user,time,item\n1,2,3\n")
    (tmp_path / "log1.csv").write_bytes(text)
    refused(tmp_path, ITEMS, match)


def test_broken_compression_and_mixed_kinds(tmp_path):
    (tmp_path / "log.csv.gz").write_bytes(b"user,time,item\n1,2,3\n")
    with pytest.raises(seqvault.UnavailableError, match="log.csv.gz cannot be read"):
        load(tmp_path, ITEMS)
    pq.write_table(pa.table({"user": [1], "time": [1], "item": [1]}), tmp_path / "log.parquet")
    refused(tmp_path, ITEMS, "log.parquet: logs must be all parquet")


@pytest.mark.parametrize(
    ("field", "cell", "fits"),
    [
        (Field("x", "int64"), "1.5", False),
        (Field("x", "int64"), "1_0", False),
        (Field("x", "int64"), " +7 ", True),
        (Field("x", "uint8"), "256", False),
        (Field("x", "uint64"), "18446744073709551615", True),
        (Field("x", "bool"), "maybe", False),
        (Field("x", "float32"), "1e39", False),
        (Field("x", "float64"), "1e309", False),
        (Field("x", "float32"), "1_0", False),
        (Field("x", "float32"), "-inf", True),
        (Field("x", "float16"), "65505", False),
        (Field("x", "float16"), "inf", True),
        (Field("x", "float32", 2), '"[1, x]"', False),
        (Field("x", "float32", 2), "[1]", False),
        (Field("x", "float32", 2), '"[1.5, nan]"', False),
        (Field("x", "float64", 2), '"[1, -inf]"', False),
        (Field("x", "float16", 2), '"[NULL, 1]"', False),
        (Field("x", "float64", 2), '"[1e308, 1e308]"', True),
        (Field("x", "int8", 2), '"[1.5, 2]"', False),
        (Field("x", "int8", 2), '"[1, 128]"', False),
        (Field("x", "int8", 2), '"[ 1,-2 ]"', True),
        (Field("x", "bool", 2), '"[true, false]"', True),
    ],
)
def test_a_csv_cell_fits_its_type_or_is_named_with_its_place(tmp_path, field, cell, fits):
    """Rows are counted within their file."""
    (tmp_path / "log0.csv").write_text("user,time,x\n")
    good = {"b": "true", "f": "0.5"}.get(field.dtype.kind, "0")
    good = good if field.size is None else f'"[{good}, {good}]"'
    for name in ("log1.csv", "log2.csv"):
        (tmp_path / name).write_text(f"user,time,x\n1,1,{good}\n1,2,{good}\n")
    with open(tmp_path / "log2.csv", "a") as file:
        file.write(f"1,3,{cell}\n1,4,{cell}\n")
    if fits:
        assert load(tmp_path, Schema(fields=(field,))).num_events == 6
        return
    shown = cell.strip('"').replace("[", r"\[").replace("]", r"\]")
    what = rf"log2.csv, row 2: column 'x': '{shown}' is not of type {field.type}.*\(in 2 rows\)"
    refused(tmp_path, Schema(fields=(field,)), what)


def write_parquet(path, **columns) -> None:
    pq.write_table(pa.table({"user": [1, 1], "time": [1, 2]} | columns), path)


def test_each_parquet_file_has_its_own_types(tmp_path):
    write_parquet(tmp_path / "log0.parquet", item=pa.array([1, 2], pa.int8()))
    write_parquet(tmp_path / "log1.parquet", more=["a", "b"], item=pa.array([2**40, 4], pa.uint64()))
    schema = Schema(fields=ITEMS.fields, event_key="item")
    assert load(tmp_path, schema).get(1)["item"].tolist() == [1, 2**40, 2, 4]


@pytest.mark.parametrize(
    ("columns", "match"),
    [
        ({"item": [1.5, 2.0]}, "log1.parquet: column 'item' has type DOUBLE, the schema says int64; convert"),
        ({"items": [1, 2]}, "log1.parquet: column 'item' is missing; its columns: user, time, items"),
        ({"item": pa.array([1, 2**63], pa.uint64())}, "log1.parquet, row 1: column 'item': '9223372036854775808' is"),
        ({"item": [1, None]}, r"log1.parquet, row 1: null item \(in 1 row\); drop"),
        (
            {"item": [1, 2], "pair": [[1.0, 2.0], [np.nan, 1.0]]},
            r"log1.parquet, row 1: column 'pair': .*nan.* is not of",
        ),
        (
            {"item": [1, 2], "pair": [[1.0, np.inf], [3.0, 1.0]]},
            r"row 0: .* is not of type float32\[2\] of finite numbers",
        ),
        ({"item": [1, 2], "pair": [[1.0, None], [3.0, 1.0]]}, "row 0: column 'pair': .*NULL.* is not of type float32"),
        ({"item": [[1], [2]]}, r"log1.parquet: column 'item' has type BIGINT\[\], the schema says int64"),
    ],
)
def test_a_later_parquet_file_that_does_not_fit(tmp_path, columns, match):
    more = {"pair": [[0.0, 1.0]] * 2} if "pair" in columns else {}
    write_parquet(tmp_path / "log0.parquet", item=[1, 2], **more)
    write_parquet(tmp_path / "log1.parquet", **columns)
    fields = (*ITEMS.fields, Field("pair", "float32", 2)) if more else ITEMS.fields
    refused(tmp_path, Schema(fields=fields), match)


def test_a_missing_column_is_no_missing_float(tmp_path):
    write_parquet(tmp_path / "log0.parquet", price=[1.0, None])
    write_parquet(tmp_path / "log1.parquet")
    refused(tmp_path, Schema(fields=(Field("price", "float32"),)), "log1.parquet: column 'price' is missing")


def test_parquet_vectors_and_numbers_that_do_not_fit(tmp_path):
    for field, values, shown in (
        (Field("x", "float32", 2), [[1.0, 2.0], [3.0]], r"\[3.0\]"),
        (Field("x", "int16", 2), [[1, 2], [3, None]], r"\[3, NULL\]"),
        (Field("x", "int16", 2), [[1, 2], [3, 70000]], r"\[3, 70000\]"),
        (Field("x", "float32"), [1.0, 1e39], "1e[+]?39"),
        (Field("x", "float16"), [1.0, 70000.0], "70000.0"),
    ):
        write_parquet(tmp_path / "log.parquet", x=values)
        refused(tmp_path, Schema(fields=(field,)), f"log.parquet, row 1: column 'x': '{shown}' is not of type")
    schema = Schema(user="string")
    write_parquet(tmp_path / "log.parquet", user=["ann", ""])
    refused(tmp_path, schema, r"log.parquet, row 1: empty user")


def test_file_names_are_no_patterns_and_folders_no_columns(tmp_path):
    """Signs that DuckDB would expand, and a folder that looks like a column of a partitioned table."""
    names = ["a[1].parquet", "a1.parquet", "b*.parquet", "b?.parquet", "it's \\ {x,y} ü.parquet", "user=7/c.parquet"]
    (tmp_path / "user=7").mkdir()
    for number, name in enumerate(names):
        write_parquet(tmp_path / name, item=[number, number])
    vault = load(tmp_path, ITEMS, ["a[[]1].parquet", "b[*].parquet", "b[?].parquet", "it*", "user=7/*"])
    assert vault.users().tolist() == [1]
    assert sorted(vault.get(1)["item"].tolist()) == [0, 0, 2, 2, 3, 3, 4, 4, 5, 5]


def test_one_file_by_two_names_is_loaded_once(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    write_parquet(tmp_path / "log.parquet", item=[1, 2])
    os.symlink(tmp_path / "log.parquet", tmp_path / "link.parquet")
    monkeypatch.chdir(tmp_path)
    relative = ["log.parquet", "./log.parquet", "folder/../log.parquet", "*.parquet"]
    report = ingest(ITEMS, [*relative, str(tmp_path / "log.parquet")], "vault", MIN_MEMORY)
    assert report.events == 2


def test_times_do_not_depend_on_the_zone_of_the_machine(tmp_path):
    """Moments with a zone and without, in every unit of parquet; one just before 1970 is negative."""
    moment = np.datetime64("2024-01-05T10:00:00.123")
    for unit in ("ms", "us", "ns"):
        for zone in (None, "UTC", "Asia/Tokyo"):
            times = pa.array(np.array([moment] * 2), pa.timestamp(unit)).cast(pa.timestamp(unit, zone))
            write_parquet(tmp_path / f"log-{unit}-{(zone or 'none')[:3]}.parquet", time=times)
    (tmp_path / "schema.json").write_text('{"time_unit": "ms"}')
    arguments = [f"--schema={tmp_path / 'schema.json'}", f"--input={tmp_path / 'log*'}", f"--out={tmp_path / 'vault'}"]
    command = [sys.executable, "-m", "laser_jax.vault", "ingest", "--threads=1", *arguments]
    done = subprocess.run(command, env=os.environ | {"TZ": "America/New_York"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    times = seqvault.open(tmp_path / "vault").get(1)["time"]
    assert times.tolist() == [moment.astype(int)] * 18
    early = np.array(["1970-01-01", "1969-12-31T23:59:59.9"], "datetime64[us]")
    write_parquet(tmp_path / "early.parquet", time=early)
    with pytest.raises(seqvault.SchemaError, match="early.parquet, row 1: negative time"):
        ingest(Schema(), str(tmp_path / "early.parquet"), str(tmp_path / "vault2"), MIN_MEMORY)


def test_too_little_memory_names_the_remedy(tmp_path, monkeypatch):
    def refuse(*_):
        raise duckdb.OutOfMemoryException("Out of Memory Error: failed to allocate")

    write_parquet(tmp_path / "log.parquet", item=[1, 2])
    monkeypatch.setattr("laser_jax.vault.log_files.create_view", refuse)
    refused(tmp_path, ITEMS, "failed to allocate; give more memory or disk")
