"""experiments/colab: the notebook, in a kernel of its own as Jupyter and Colab start one."""

import pathlib

import nbformat
from nbclient import NotebookClient

from laser_jax import vault as seqvault

CHECKOUT = pathlib.Path(__file__).parents[2]


def test_it_runs_shows_its_pictures_and_runs_again(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(CHECKOUT))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(CHECKOUT / "experiments/colab/lifelong_ranking.ipynb", as_version=4)
    settings = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    settings.source = 'DIRECTORY, USERS, TRAIN_REQUESTS, ENCODERS = "few", 60, 1600, ("laser_plus",)'
    events = []
    for line in ("step 50/50 ", "going on from step 50 "):
        NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
        outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
        printed = "".join(output.text for output in outputs if output.output_type == "stream")
        assert line in printed
        # Two that the notebook draws, which importing what trains must not switch off, and three of the run's report.
        assert sum("image/png" in output.get("data", {}) for output in outputs) == 5
        events.append(seqvault.open(tmp_path / "few/data/vault").num_events)
    assert events[1] == events[0] + 3  # the clicks
