"""Checks of a log: file by file or all at once, they find the same."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from laser_jax import vault as seqvault
from laser_jax.schema import Field, Schema
from laser_jax.vault import log_files
from laser_jax.vault.ingest import MIN_MEMORY, ingest
from laser_jax.vault.log_check import Survey

SCHEMA = Schema(fields=(Field("item", "uint8"), Field("score", "float32"), Field("pair", "int8", size=2)))


def survey(tmp_path, schema: Schema, files: list[str]) -> Survey:
    with log_files.connect(str(tmp_path), MIN_MEMORY, 1) as connection:
        log_files.create_view(connection, schema, files)
        return Survey.of(connection, schema)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_merged_surveys_of_files_are_the_survey_of_all(tmp_path, kind, seed):
    rng = np.random.default_rng(seed)
    files = []
    for number, rows in enumerate(rng.integers(0, 6, 5).tolist()):
        # Some files hold values that do not fit, some miss some, some are empty.
        columns = {
            "user": [int(user) if rng.random() < 0.9 else None for user in rng.integers(0, 3, rows)],
            "time": rng.integers(-1 if number % 2 else 0, 5, rows).tolist(),
            "item": rng.integers(0, 300, rows).tolist(),
            "score": [None] * rows,
            "pair": [[1, 2] if rng.random() < 0.8 else [1, 200] for _ in range(rows)],
        }
        path = tmp_path / f"log{number}.{kind}"
        if kind == "csv":
            cells = [['""' if value is None else f'"{value}"' for value in column] for column in columns.values()]
            lines = zip(*cells, strict=True)
            path.write_text("\n".join([",".join(columns), *map(",".join, lines)]) + "\n")
        else:
            types = [pa.int64(), pa.int64(), pa.int32(), pa.float32(), pa.list_(pa.int16())]
            arrays = [pa.array(column, kind) for column, kind in zip(columns.values(), types, strict=True)]
            pq.write_table(pa.table(arrays, list(columns)), path)
        files.append(str(path))
    for schema in (SCHEMA, Schema(time_unit="ms", fields=SCHEMA.fields)):
        each = [survey(tmp_path, schema, [file]) for file in files]
        assert Survey.merged(each) == survey(tmp_path, schema, files)
        assert [Survey.from_json(one.to_json()) for one in each] == each


def test_ties_between_files_of_several_shapes_go_by_file(tmp_path):
    """Files of one shape are read together, but their rows stand in order of all names."""
    schema = Schema(fields=(Field("row", "int32"),))
    (tmp_path / "log0.csv").write_text("user,time,row\n1,5,0\n1,5,1\n")
    (tmp_path / "log1.tsv").write_text("row\ttime\tuser\n2\t5\t1\n3\t5\t1\n")
    (tmp_path / "log2.csv").write_text("user,time,row\n1,5,4\n1,4,9\n1,5,5\n")
    (tmp_path / "log3's.tsv").write_text("row\ttime\tuser\n6\t5\t1\n")
    ingest(schema, str(tmp_path / "log*"), str(tmp_path / "vault"), MIN_MEMORY)
    assert seqvault.open(tmp_path / "vault").get(1)["row"].tolist() == [9, 0, 1, 2, 3, 4, 5, 6]
