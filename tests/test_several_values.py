"""Fields of several values, of several hashes, and of numbers used as they are, against a brute-force assembly."""

import dataclasses
import os

import numpy as np
import pytest
from flax import nnx

from laser_jax import train
from laser_jax import vault as seqvault
from laser_jax.features import FeatureConfig, FieldConfig, rows_of
from laser_jax.layers.embedding import pool_rows
from laser_jax.models import encoder_config
from laser_jax.models.base import HeadConfig
from laser_jax.pipeline import BatchSource, DataConfig
from laser_jax.requests import RequestsError, RequestsWriter
from laser_jax.row_placement import DeviceShare, distinct_lines, padded_rows, places, rows_per_device
from laser_jax.schema import Field, Schema
from laser_jax.serving.export import Run, export_model, score_split
from laser_jax.serving.exported import ExportedModel
from laser_jax.sharding import MeshConfig, make_mesh
from laser_jax.state import StateFactory
from laser_jax.step import make_eval_step
from tests.small_config import get_config

TAGS, NUMBERS, WIDTH = 3, 2, 4
FIELDS = (
    FieldConfig("item", WIDTH, 500, "hash", hashes=2),
    FieldConfig("tags", WIDTH, 20, "code", pool="mean"),
    FieldConfig("topics", WIDTH, 20, "code", pool="sum", table="tags"),
    FieldConfig("numbers", NUMBERS, ids="vector"),
)
FEATURES = FeatureConfig(item=FIELDS, event=(FieldConfig("action", 2, 5),))
USERS, EVENTS, REQUESTS, C, L = 6, 120, 40, 3, 16


def draw(rng, n):
    """Columns of n items; tags may be absent altogether."""
    tags = np.where(rng.random((n, TAGS)) < 0.4, -1, rng.integers(0, 15, (n, TAGS))).astype(np.int32)
    topics = np.where(rng.random((n, 1)) < 0.6, -1, rng.integers(0, 15, (n, 1))).astype(np.int32)
    numbers = rng.normal(size=(n, NUMBERS)).astype(np.float32)
    return {"item": rng.integers(0, 40, n), "tags": tags, "topics": topics, "numbers": numbers}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """(path, events, requests): what is on disk, and the columns it was made of."""
    path = str(tmp_path_factory.mktemp("several") / "data")
    rng = np.random.default_rng(0)
    events = {"user": rng.integers(0, USERS, EVENTS), "time": np.arange(EVENTS), **draw(rng, EVENTS)}
    events["action"] = rng.integers(0, 4, EVENTS).astype(np.uint8)
    fields = (
        Field("item", "int64"),
        Field("tags", "int32", size=TAGS),
        Field("topics", "int32", size=1),
        Field("numbers", "float32", size=NUMBERS),
        Field("action", "uint8"),
    )
    with seqvault.create(os.path.join(path, "vault"), Schema(fields=fields)) as writer:
        writer.write(events)
    types = {"item": "int64", "tags": f"int32[{TAGS}]", "topics": "int32[1]", "numbers": f"float32[{NUMBERS}]"}
    requests = {
        "user": rng.integers(0, USERS, REQUESTS),
        "time": rng.integers(0, EVENTS + 10, REQUESTS),
        "counts": np.full(REQUESTS, C),
        "candidates": draw(rng, REQUESTS * C),
        "label": rng.integers(0, 2, REQUESTS * C).astype(np.float32),
    }
    for split in ("train", "valid", "test"):
        with RequestsWriter(os.path.join(path, "requests", split), candidates=types) as writer:
            writer.write(**requests)
    return path, events, requests


def embedding(field, value, tables):
    """Of one value (or several), by the definition."""
    if field.ids == "vector":
        return value
    values = np.atleast_1d(value)
    values = values[values != -1] if field.pool else values
    if not len(values):
        return np.zeros(WIDTH)
    table = tables[field.table or field.name]
    rows = table[places(rows_of(field, values, None).ravel(), field.rows)]
    return rows.mean(axis=0) if field.pool == "mean" else rows.sum(axis=0)


@pytest.mark.parametrize("devices", [1, 4])
def test_embeddings_equal_a_brute_force_assembly(data, devices):
    path, events, requests = data
    config = DataConfig(path=path, history_length=L, batch_size=8, candidates=C, eval_batch_size=8, eval_candidates=C)
    source = BatchSource(config, FEATURES, "test", DeviceShare(devices, tuple(range(devices))))
    rng = np.random.default_rng(1)
    tables = {
        name: rng.normal(size=(padded_rows(rows), width)).astype(np.float32)
        for name, (rows, width) in FEATURES.tables().items()
    }
    assert set(tables) == {"item", "tags", "action"}
    seen = 0
    for k in range(source.num_batches):
        step = source.batch(k).step
        for row, request in enumerate(source.rows(k)):
            device = row // (8 // devices)
            # What this device fetches.
            fetched = {}
            for table, unique in step["unique"].items():
                share = rows_per_device(FEATURES.tables()[table][0], devices)
                place = (unique[device] + share * np.arange(devices)[:, None]).ravel()
                fetched[table] = tables[table][np.minimum(place, len(tables[table]) - 1)]
            bags = FEATURES.bags()
            for name, bag in step["bags"].items():
                fetched[name] = np.asarray(pool_rows(fetched[bags[name].table], bag[device], bags[name].mean))
            fetched |= {name: vectors[device] for name, vectors in step["vectors"].items()}
            mine = np.flatnonzero(
                (events["user"] == requests["user"][request]) & (events["time"] < requests["time"][request])
            )
            mine = mine[-L:]
            for field in FIELDS:
                name = f"values of {field.name}"
                for slot, event in enumerate(mine, L - len(mine)):
                    got = fetched[name][step["history"][field.name][row, slot]]
                    np.testing.assert_allclose(got, embedding(field, events[field.name][event], tables), atol=1e-6)
                    seen += 1
                for c in range(C):
                    value = requests["candidates"][field.name][request * C + c]
                    got = fetched[name][step["candidates"][field.name][row, c]]
                    np.testing.assert_allclose(got, embedding(field, value, tables), atol=1e-6)
    assert seen > 500


def test_devices_without_requests_and_without_values(data):
    """A short last batch, and devices that meet no tag at all."""
    config = DataConfig(path=data[0], history_length=1, batch_size=32, eval_batch_size=32, eval_candidates=1)
    tags = dataclasses.replace(FEATURES.item[2], table="")  # topics, on a table of their own: often none at all
    features = FeatureConfig(item=(FEATURES.item[0], tags))
    source = BatchSource(config, features, "test", DeviceShare(32, tuple(range(32))))
    bags = [source.batch(k).step["bags"]["values of topics"] for k in range(source.num_batches)]
    rows = REQUESTS * C  # one candidate each
    assert rows % 32 and len(bags) == 4
    assert (bags[-1][rows % 32 :] == -1).all() and (bags[0] >= 0).any()
    assert any((line == -1).all() for bag in bags[:-1] for line in bag)
    batch = source.batch(0)
    known = batch.known("candidates", "topics")
    np.testing.assert_array_equal(known, data[2]["candidates"]["topics"][:32] != -1)


def test_a_run_learns_from_them(data, tmp_path):
    config = get_config("ta")
    config.data = DataConfig(
        path=data[0], history_length=L, batch_size=8, candidates=C, eval_batch_size=8, eval_candidates=C, epochs=12
    )
    config.features = FEATURES
    before = train.run(config, str(tmp_path / "run"))
    assert before.figures().auc > 0.8  # the test split is the training split: it can be learned by heart


@pytest.mark.parametrize("name", ["tags", "numbers"])
def test_what_has_several_values_is_not_compared(name):
    config = get_config("sim_hard")
    config.features = FEATURES
    for settings, message in (
        (
            dict(encoder=encoder_config("sim_hard", field=name)),
            f"encoder.field: '{name}' is no field of the items that",
        ),
        (
            dict(encoder=encoder_config("ta"), head=HeadConfig(matches=(name,))),
            f"head.matches=.*: '{name}' is no field",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(config, **settings).build_model(nnx.Rngs(0))


def test_distinct_lines_give_the_arrays_back():
    rng = np.random.default_rng(0)
    for dtype in (np.int32, np.float32, np.int64):
        parts = [rng.integers(0, 3, (n, 3)).astype(dtype) for n in (40, 0, 25)]
        lines, positions = distinct_lines(parts)
        assert len(np.unique(lines, axis=0)) == len(lines) == len(np.unique(np.concatenate(parts), axis=0))
        for part, at in zip(parts, positions, strict=True):
            np.testing.assert_array_equal(lines[at], part)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        (FieldConfig("tags", 4, 20), "'tags' holds 3 values each"),
        (FieldConfig("numbers", 3, ids="vector"), "'numbers' holds 2 values each, .* width=3"),
        (FieldConfig("item", 4, 20, "hash", pool="mean"), "'item' holds 1 values each"),
    ],
)
def test_a_column_that_does_not_fit_its_field_is_refused(data, field, message):
    with pytest.raises(ValueError, match=message):
        BatchSource(DataConfig(path=data[0]), FeatureConfig(item=(field,)), "train")


@pytest.mark.parametrize(
    ("field", "message"),
    [
        (FieldConfig("a", 4, 20, "code", pool="max"), "pool='max'"),
        (FieldConfig("a", 4, 20, "code", hashes=2), "hashes=2 needs ids='hash'"),
        (FieldConfig("a", 4, 20, "vector"), "none for ids='vector'"),
        (FieldConfig("a", 4, 1), "rows=1"),
        (FieldConfig("a", 4, 2**31), "rows=2147483648"),
        (FieldConfig("a", 4, 10, keep=3), "admit and keep are for ids='dictionary'"),
        (FieldConfig("a", 4, ids="vector", table="b"), "ids='vector' has no table"),
    ],
)
def test_a_field_that_makes_no_sense_is_refused(field, message):
    with pytest.raises(ValueError, match=message):
        FeatureConfig(item=(field,)).tables()


def test_a_context_field_cannot_share_a_name_with_another_kind_of_field():
    same = FieldConfig("city", 4, 20)
    assert FeatureConfig(item=(same,), context=(same,)).tables() == {"city": (20, 4)}
    with pytest.raises(ValueError, match="context field 'city' has the name of another field"):
        FeatureConfig(item=(same,), context=(dataclasses.replace(same, table="home"),)).tables()


def test_request_columns_that_do_not_fit_are_refused(data, tmp_path):
    path = str(tmp_path / "data")
    os.makedirs(path)
    os.symlink(os.path.join(data[0], "vault"), os.path.join(path, "vault"))
    with RequestsWriter(
        os.path.join(path, "requests", "train"), candidates={"tags": "int32[4]"}, context={"price": "float32"}
    ) as writer:
        writer.write(
            user=[1],
            time=[9],
            counts=[1],
            label=[1],
            candidates={"tags": np.zeros((1, 4), int)},
            context={"price": [0.5]},
        )
    config, tags = DataConfig(path=path), FIELDS[1]
    with pytest.raises(ValueError, match="candidate column 'tags' holds 4 values, the vault's field 3"):
        BatchSource(config, FeatureConfig(item=(tags,)), "train")
    with RequestsWriter(
        os.path.join(path, "requests", "test"), candidates={"item": "int64"}, context={"price": "float32"}
    ) as writer:
        writer.write(user=[1], time=[9], counts=[1], label=[1], candidates={"item": [1]}, context={"price": [0.5]})
    price = FieldConfig("price", 4, 20)
    with pytest.raises(ValueError, match="'price' is float32, which ids='code' would cut"):
        BatchSource(config, FeatureConfig(item=(FIELDS[0],), context=(price,)), "test")


def test_lines_of_another_length_are_refused(tmp_path):
    with RequestsWriter(str(tmp_path / "requests"), candidates={"tags": "int32[3]"}) as writer:
        given = dict(user=[1], time=[1], counts=[2], label=[0, 1])
        with pytest.raises(RequestsError, match="expected 3 values each"):
            writer.write(**given, candidates={"tags": np.zeros((2, 2), int)})
        with pytest.raises(RequestsError, match="expected 2 of 3 each"):
            writer.write(**given, candidates={"tags": np.zeros(2, int)})
        writer.write(**given, candidates={"tags": np.zeros((2, 3), int)})
    with pytest.raises(RequestsError, match="no type of"):
        RequestsWriter(str(tmp_path / "other"), candidates={"tags": "int32[x]"})


def test_what_is_exported_scores_them_alike(data, tmp_path):
    config = get_config("laser_plus")
    config.data.path, config.features = data[0], FEATURES
    config.data.candidates = config.data.eval_candidates = C
    factory = StateFactory(config.build_model, FEATURES, config.optim, make_mesh(MeshConfig()))
    run = Run(config, factory.create(0), factory, 0, {})
    export_model(run, str(tmp_path / "model"))
    source, wanted = BatchSource(config.data, FEATURES, "test"), []
    eval_step = make_eval_step(factory)
    for batch in source.stream(0, source.num_batches):
        wanted.append(np.asarray(eval_step(run.state, batch.step)[0])[batch.step["mask"]])
    found, _ = score_split(ExportedModel(str(tmp_path / "model")), config, "test")
    np.testing.assert_allclose(found, np.concatenate(wanted), rtol=1e-5, atol=1e-5)
