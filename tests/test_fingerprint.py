"""What a run notes about its data: ids that have come to mean something else are refused by name."""

import json
import os
import shutil

import numpy as np
import pytest

from laser_jax import train
from laser_jax import vault as seqvault
from laser_jax.features import FeatureConfig, FieldConfig
from laser_jax.requests import RequestsWriter, write_vocabulary
from laser_jax.schema import Field, Schema
from laser_jax.serving.export import load_run
from laser_jax.serving.files import ModelError
from laser_jax.warm_start import WarmStartError
from tests.small_config import get_config

BRANDS = ["ant", "bee", "cat", "dog"]


def write_vault(path, brands: list[str]) -> None:
    schema = Schema(fields=(Field("item", "int64"), Field("brand", "string")))
    with seqvault.create(path, schema) as writer:
        writer.write({"user": [1] * 4, "time": [1, 2, 3, 4], "item": [5, 6, 7, 8], "brand": brands})


@pytest.fixture
def config(tmp_path):
    """Of a data set with strings and a vocabulary."""
    write_vault(tmp_path / "data" / "vault", BRANDS)
    for split in ("train", "valid", "test"):
        candidates = {"item": np.arange(24) % 8, "brand": np.arange(24) % 4}
        with RequestsWriter(
            tmp_path / "data" / "requests" / split, candidates=dict.fromkeys(candidates, "int64")
        ) as file:
            file.write(user=[1] * 12, time=[9] * 12, counts=[2] * 12, candidates=candidates, label=np.arange(24) % 2)
    write_vocabulary(tmp_path / "data" / "vocab" / "item", [5, 6, 7])
    config = get_config("mean")
    config.data.path, config.data.epochs, config.train.save_every = str(tmp_path / "data"), 1, 1
    config.features = FeatureConfig(item=(FieldConfig("item", 4, 10, "vocab"), FieldConfig("brand", 4, 10)))
    return config


def test_strings_that_were_added_are_welcome_and_other_codes_are_refused(config, tmp_path):
    first, data = str(tmp_path / "first"), config.data.path
    train.run(config, first)
    with seqvault.open(f"{data}/vault") as vault:
        vault.append({"user": [2], "time": [3], "item": [5], "brand": ["elk"]})
    assert load_run(first).step == 1
    config.train.warm_start, config.train.warm_parts = first, ("tables",)
    train.run(config, str(tmp_path / "second"))
    shutil.move(f"{data}/vault", tmp_path / "before")
    for brands in (["bee", "ant", "cat", "dog"], ["ant", "bee", "cat", "ant"]):
        write_vault(f"{data}/vault", brands)
        codes = "its strings have other codes there than in .*vault: append to the vault that it was trained on"
        with pytest.raises(WarmStartError, match=f"table 'brand' of {first} does not fit: {codes}"):
            train.run(config, str(tmp_path / "third"))
        with pytest.raises(
            ModelError, match=f"{first} was trained on other ids of 'brand' than {data} has now: {codes}"
        ):
            load_run(first)
        assert not os.path.exists(tmp_path / "third" / "checkpoints" / "1")
        shutil.rmtree(f"{data}/vault")
    shutil.move(tmp_path / "before", f"{data}/vault")
    shutil.rmtree(f"{data}/vocab/item")
    write_vocabulary(f"{data}/vocab/item", [4, 5, 6, 7])
    with pytest.raises(ModelError, match="other ids of 'item' .* its vocabulary is another one"):
        load_run(first)
    with pytest.raises(WarmStartError, match="table 'item' .* its vocabulary is another one"):
        train.run(config, str(tmp_path / "third"))


def test_other_labels_times_and_candidates_are_other_data(config, tmp_path):
    """Of as many requests, of the same types."""
    run, requests = str(tmp_path / "run"), f"{config.data.path}/requests/valid"
    train.run(config, run)
    candidates, labels = {"item": np.arange(24) % 8, "brand": np.arange(24) % 4}, np.arange(24) % 2
    other = {name: values[::-1] for name, values in candidates.items()}
    for time, shown, clicked in ((8, candidates, labels), (9, other, labels), (9, candidates, 1 - labels)):
        shutil.rmtree(requests)
        with RequestsWriter(requests, candidates=dict.fromkeys(candidates, "int64")) as file:
            file.write(user=[1] * 12, time=[time] * 12, counts=[2] * 12, candidates=shown, label=clicked)
        with pytest.raises(ValueError, match=r"another config \(fingerprint.requests/valid/columns: "):
            train.run(config, run)
    shutil.rmtree(requests)
    with RequestsWriter(requests, candidates=dict.fromkeys(candidates, "int64")) as file:
        for _ in range(2):  # the same values, handed over otherwise
            half = {name: values[:12] for name, values in candidates.items()}
            file.write(user=[1] * 6, time=[9] * 6, counts=[2] * 6, candidates=half, label=labels[:12])
    with pytest.raises(ValueError, match="columns"):  # ids 0 to 7 and 0 to 3, and not 0 to 7 three times
        train.run(config, run)
    # Earlier code took no checksums, neither of data nor for a run.
    told = f"{requests}/requests.json"
    with open(told, encoding="utf-8") as file:
        content = json.load(file)
    del content["checksums"]
    with open(told, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
    train.run(config, run)


@pytest.mark.parametrize("rows", [4, 5])
def test_strings_that_have_no_row_are_told(config, tmp_path, caplog, rows):
    config.features = FeatureConfig(item=(FieldConfig("item", 4, 10, "vocab"), FieldConfig("brand", 4, rows)))
    train.run(config, str(tmp_path / "run"))
    told = "vault knows 4 values of 'brand', its table has 4 rows: 1 values share row 0 with what is unknown"
    assert (told in caplog.text) == (rows == 4)
