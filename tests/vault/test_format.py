"""A part is plain zarr v3: other readers give the same pages."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import tensorstore as ts
import zarr

from laser_jax import vault as seqvault
from laser_jax.schema import Field, Schema
from tests.vault.conftest import FIELDS, random_log


@pytest.fixture
def part(make_vault):
    schema = Schema(time_unit="ms", fields=FIELDS)
    log = random_log(schema, [1, 2, 3], 3000, 0)
    vault = make_vault(schema, log)
    return vault, os.path.join(vault.path, "parts", vault.manifest["parts"][0]["name"])


def decode(group, arrays, first: int, end: int) -> dict:
    """Pages -> columns by nothing but the attributes of the group, as a stranger would."""
    layout = dict(group.attrs)["fields"]
    pages, count = arrays["pages"][first:end], arrays["page_count"][first:end]
    used = np.arange(256) >= 256 - count[:, None].astype(np.int64)
    columns = {}
    for name, place in layout.items():
        words = pages[:, place["word"]].astype(np.uint64)
        if place["words"] == 2:
            words |= pages[:, place["word"] + 1].astype(np.uint64) << np.uint64(32)
        if place["type"] == "delta":
            columns[name] = np.cumsum(words.astype(np.int64), axis=1)[used]
            continue
        dtype = np.dtype(place["type"])
        bits = (words >> np.uint64(place["shift"])).astype(f"u{dtype.itemsize}")
        columns[name] = bits.view(dtype)[used]
    return columns


def test_zarr_python_and_tensorstore_give_the_same_pages(part):
    vault, path = part
    group = zarr.open_group(path, mode="r", zarr_format=3)
    members = dict(group.members(max_depth=None))
    arrays = {name: member for name, member in members.items() if isinstance(member, zarr.Array)}
    assert {"pages", "vectors/embedding", "users", "user_first_page", "page_count"} <= set(arrays)
    for name, array in arrays.items():
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": os.path.join(path, name)}}
        store = ts.open(spec, read=True).result()
        np.testing.assert_array_equal(store.read().result(), array[...])

    for position, user in enumerate(arrays["users"][...].tolist()):
        first, end = arrays["user_first_page"][position : position + 2].tolist()
        columns = decode(group, arrays, first, end)
        history = vault.get(user, 9999, fields=vault.schema.names)
        for name, values in columns.items():
            np.testing.assert_array_equal(values, history.columns[name])
        # The oldest page alone is partly filled, from its end.
        assert arrays["page_count"][first + 1 : end].tolist() == [256] * (end - first - 1)
        pages = arrays["pages"][first]
        assert not pages[:, : 256 - int(arrays["page_count"][first])].any()
        vectors = arrays["vectors/embedding"][first:end].reshape(-1, 3)[-len(history) :]
        np.testing.assert_array_equal(vectors, history["embedding"])


def test_strings_are_plain_arrays(make_vault):
    schema = Schema(user="string", fields=[Field("brand", "string")])
    vault = make_vault(schema, {"user": ["ü", "b"], "time": [1, 2], "brand": ["", ""]})
    part = zarr.open_group(os.path.join(vault.path, "parts", vault.manifest["parts"][0]["name"]), mode="r")
    assert bytes(part["user_bytes"][...]).decode() == "üb"
    assert part["user_offsets"][...].tolist() == [0, 2, 3]
    piece = os.path.join(vault.path, "dictionaries", vault.manifest["dictionaries"]["brand"][0]["name"])
    assert zarr.open_array(os.path.join(piece, "offsets"), mode="r")[...].tolist() == [0, 0]


def test_narrow_fields_share_words():
    from laser_jax.vault.format import PageLayout

    types = ["uint8", "int64", "bool", "uint16", "float16", "int32", "int8"]
    layout = PageLayout(Schema(fields=[Field(f"f{i}", kind) for i, kind in enumerate(types)]))
    # time 1, int64 2, int32 1, the two 2-byte fields 1, the three 1-byte fields 1
    assert layout.num_words == 6
    assert layout.places["f0"].word == layout.places["f6"].word
    assert PageLayout(Schema(time_unit="ms")).num_words == 2
    assert PageLayout(Schema()).num_words == 1


def test_a_user_in_grouped_input_lives_in_one_part(make_vault, small_schema):
    users = np.repeat(np.arange(50), 97)
    log = random_log(small_schema, [0], len(users), 0) | {"user": users}
    vault = make_vault(small_schema, log, parts=7)
    assert len(vault.state.parts) >= 7
    assert vault.stats()["parts_per_user"] == [1.0, 1.0, 1]


def test_vault_knows_no_jax():
    code = "import sys, laser_jax.vault, laser_jax.schema; print('jax' in sys.modules, 'duckdb' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_stats(make_vault):
    users = np.repeat([1, 2, 3], [1, 300, 700])
    vault = make_vault(Schema(), {"user": users, "time": np.arange(len(users))})
    stats = vault.stats()
    assert json.loads(json.dumps(stats)) == stats
    assert stats["users"] == 3 and stats["events"] == 1001 and stats["parts"] == 1 and stats["pages"] == 6
    assert stats["first_time"] == 0 and stats["last_time"] == 1000
    assert stats["lengths"] == [[1, 2, 1], [256, 512, 1], [512, 1024, 1]]
    on_disk = sum(
        os.path.getsize(os.path.join(folder, name))
        for folder, _, names in os.walk(vault.path)
        for name in names
        if name not in ("writer.lock", "manifest.copy.json") and not folder.endswith("manifests")
    )
    assert stats["bytes"] == on_disk
    assert stats["bytes_per_event"] == on_disk / 1001


def test_schema_round_trip(tmp_path):
    schema = Schema("string", "ms", FIELDS, event_key="item", duplicates="drop")
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(schema.to_json()))
    assert Schema.load(str(path)) == schema
    assert hash(Schema.load(str(path))) == hash(schema)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"fields": [{"name": "user", "type": "int64"}]}, "'user' is taken"),
        ({"fields": [{"name": "x", "type": "int63"}]}, "unknown type 'int63'"),
        ({"fields": [{"name": "x"}]}, r"fields\[0\] has no 'type'"),
        ({"fields": [{"name": "x", "type": "int8", "sise": 3}]}, "unknown key 'sise'"),
        ({"fields": [{"name": "x", "type": "int8"}] * 2}, "declared twice"),
        ({"fields": [{"name": "x", "type": "int8", "size": 0}]}, "size 0"),
        ({"fields": [{"name": "x", "type": "string", "size": 2}]}, "vector of strings"),
        ({"fields": [{"name": "a/b", "type": "int8"}]}, "identifier"),
        ({"fields": 3}, "must be a list"),
        ({"user": "int32"}, "user type 'int32'"),
        ({"time_unit": "us"}, "time_unit 'us'"),
        ({"event_key": "x"}, "event_key 'x' is not a field"),
        ({"event_key": "x", "fields": [{"name": "x", "type": "string"}]}, "must be an integer"),
        ({"duplicates": "maybe"}, "duplicates 'maybe'"),
        ({"color": 1}, "unknown key 'color'"),
        ([], "must be an object"),
    ],
)
def test_wrong_schemas_say_what_is_wrong(value, text, tmp_path):
    with pytest.raises(seqvault.SchemaError, match=text):
        Schema.from_json(value)
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(value))
    with pytest.raises(seqvault.SchemaError, match="schema.json"):
        Schema.load(str(path))
