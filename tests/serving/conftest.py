"""A run, and the model that was exported from it."""

import pytest

from laser_jax.serving.export import export_model, load_run
from laser_jax.serving.exported import ExportedModel
from laser_jax.train import run
from tests.small_config import get_config


@pytest.fixture(scope="session")
def workdir(known_data, tmp_path_factory):
    """Of a run of one epoch."""
    path = tmp_path_factory.mktemp("run") / "laser_plus"
    config = get_config("laser_plus")
    config.data.path, config.data.epochs = known_data.path, 1
    run(config, str(path))
    return path


@pytest.fixture(scope="session")
def trained(workdir):
    return load_run(str(workdir))


@pytest.fixture(scope="session")
def model(trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("model") / "v1"
    made = export_model(trained, str(out), lengths=(4,))
    assert made.programs == 6 and made.bytes > 10_000
    return ExportedModel(made.path)
