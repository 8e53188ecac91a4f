"""What every recipe promises: built once, whole or not at all, and a refusal where something else lies."""

import dataclasses
import json
import os
import threading
import time

import pytest

from data.recipe import Recipe, RecipeError, read_dataset, run


@dataclasses.dataclass
class Numbers(Recipe):
    """Writes a file of numbers."""

    count: int = 3
    weeks: tuple[int, int] = (1, 2)
    most: int | None = 5

    NAME = "numbers"
    VERSION = 1

    builds = []

    def check(self):
        if self.count < 1:
            raise RecipeError(f"count={self.count}: give at least 1")

    def build(self, directory, progress):
        self.builds.append(self.count)
        assert os.listdir(directory) == []
        for k in range(self.count):
            progress(k, self.count, "numbers")
        with open(os.path.join(directory, "numbers"), "w") as f:
            f.write(str(list(range(self.count))))
            if self.count == 13:
                raise KeyboardInterrupt
        time.sleep(0.05)
        return {"numbers": self.count}


@pytest.fixture(autouse=True)
def no_builds():
    Numbers.builds.clear()


def test_built_once(tmp_path):
    path = Numbers().prepare(tmp_path / "a" / "set", progress=False)
    assert path == str(tmp_path / "a" / "set")
    assert sorted(os.listdir(path)) == ["dataset.json", "numbers"]
    assert Numbers().prepare(path) == path and Numbers.builds == [3]
    held = read_dataset(path)
    assert held == {
        "recipe": "numbers",
        "version": 1,
        "counts": {"numbers": 3},
        "arguments": {"count": 3, "weeks": [1, 2], "most": 5},
    }


def test_an_empty_directory_is_taken(tmp_path):
    (tmp_path / "set").mkdir()
    assert os.listdir(Numbers().prepare(tmp_path / "set", progress=False))


def test_what_lies_elsewhere_is_refused_and_kept(tmp_path):
    path = Numbers().prepare(tmp_path / "set", progress=False)
    with pytest.raises(RecipeError, match=r"set holds another data set \(count=3, not 4\): remove it"):
        Numbers(count=4).prepare(path)
    manifest = tmp_path / "set" / "dataset.json"
    held = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(held | {"version": 0}))
    with pytest.raises(RecipeError, match="version 0, not 1"):
        Numbers().prepare(path)
    manifest.write_text("{")
    with pytest.raises(RecipeError, match="damaged"):
        Numbers().prepare(path)
    manifest.unlink()
    with pytest.raises(RecipeError, match="dataset.json is missing"):
        Numbers().prepare(path)
    assert (tmp_path / "set" / "numbers").exists()


def test_wrong_arguments_touch_nothing(tmp_path):
    with pytest.raises(RecipeError, match="count=0"):
        Numbers(count=0).prepare(tmp_path / "set")
    assert os.listdir(tmp_path) == []


def test_a_build_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        Numbers(count=13).prepare(tmp_path / "set", progress=False)
    assert os.listdir(tmp_path) == []


def test_what_a_killed_build_left_is_cleared(tmp_path):
    (tmp_path / "set.building" / "vault").mkdir(parents=True)
    (tmp_path / "set.building" / "numbers").write_text("[0, 1")
    (tmp_path / "set.building" / "vault" / "part").write_text("half")
    path = Numbers().prepare(tmp_path / "set", progress=False)
    assert os.listdir(tmp_path) == ["set"] and sorted(os.listdir(path)) == ["dataset.json", "numbers"]


def test_two_at_once_build_once(tmp_path):
    threads = [threading.Thread(target=Numbers().prepare, args=(tmp_path / "set", False)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Numbers.builds == [3] and os.listdir(tmp_path) == ["set"]


def test_command_line(tmp_path, capsys):
    run(Numbers, [f"--out={tmp_path}/set", "--count=4", "--weeks=3,5", "--most=none"])
    out, err = capsys.readouterr()
    assert out.startswith(f"numbers v1: {tmp_path}/set numbers=4 (") and out.count("\n") == 1
    assert "0/4 numbers" in err
    assert read_dataset(tmp_path / "set")["arguments"] == {"count": 4, "weeks": [3, 5], "most": None}
    with pytest.raises(SystemExit) as stopped:
        run(Numbers, [f"--out={tmp_path}/set"])
    assert stopped.value.code == 1 and "holds another data set" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(Numbers, [f"--out={tmp_path}/set", "--cuont=4"])
