"""What all recipes share: built once, whole or not at all, and a command line made of the recipe's fields."""

import argparse
import dataclasses
import fcntl
import json
import os
import shutil
import sys
import time

from laser_jax.column_files import sync_directory

DATASET = "dataset.json"


class RecipeError(ValueError):
    """A data set that cannot be built here; the message names the place, the argument and the remedy."""


@dataclasses.dataclass
class Recipe:
    """A way to make a data set. Subclasses are dataclasses whose fields are the arguments of the recipe.

    A subclass sets NAME and VERSION (raise it whenever the same arguments would give other data) and defines
    `check` and `build`.
    """

    def prepare(self, path, progress=True):
        """Makes sure that `path` holds this data set, and returns it as an absolute path.

        Built in `path`.building and renamed at the end: a killed build leaves nothing at `path`, and the next
        one clears what it left. Two processes may ask at once; the second waits and finds the work done.

        Args:
            path: directory of the data set: missing or empty, or holding this very data set.
            progress: whether to say on stderr how far the build is.

        Raises:
            RecipeError: arguments that make no sense, or a directory that holds something else.
        """
        self.check()
        path = os.path.abspath(os.fspath(path))
        if self._is_done(path):
            return path
        building = path + ".building"
        lock = _lock_directory(building)
        try:
            if self._is_done(path):  # another process was faster
                shutil.rmtree(building)
                return path
            _clear(building)
            counts = self.build(building, Progress(self.NAME, progress))
            with open(os.path.join(building, DATASET), "w", encoding="utf-8") as f:
                json.dump({**self._identity(), "counts": counts}, f, indent=1)
                f.flush()
                os.fsync(f.fileno())
            sync_directory(building)
            if os.path.isdir(path):
                os.rmdir(path)  # empty, or _is_done would have refused it
            os.rename(building, path)
            sync_directory(os.path.dirname(path))
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise
        finally:
            os.close(lock)
        return path

    def check(self):
        """Raises RecipeError for arguments that make no sense."""
        raise NotImplementedError

    def build(self, directory, progress):
        """Fills an empty directory with vault, requests and vocab; returns counts as plain JSON."""
        raise NotImplementedError

    def _identity(self):
        arguments = json.loads(json.dumps(dataclasses.asdict(self)))  # tuples as the file will hold them
        return {"recipe": self.NAME, "version": self.VERSION, "arguments": arguments}

    def _is_done(self, path):
        if not os.path.exists(path) or (os.path.isdir(path) and not os.listdir(path)):
            return False
        held = read_dataset(path)
        wanted = self._identity()
        different = [
            f"{key} {held.get(key)!r}, not {wanted[key]!r}"
            for key in ("recipe", "version")
            if held.get(key) != wanted[key]
        ]
        arguments = held.get("arguments", {})
        different += [
            f"{name}={arguments.get(name)!r}, not {value!r}"
            for name, value in wanted["arguments"].items()
            if arguments.get(name) != value
        ]
        if different:
            raise RecipeError(
                f"{path} holds another data set ({'; '.join(different)}): remove it, or choose another directory"
            )
        return True


def read_dataset(path):
    """dataset.json of a finished data set, as a dict; RecipeError where `path` holds none."""
    place = os.path.join(path, DATASET)
    try:
        with open(place, encoding="utf-8") as f:
            return json.load(f)
    except (FileNotFoundError, NotADirectoryError):
        raise RecipeError(
            f"{path} holds no finished data set ({DATASET} is missing): choose another directory"
        ) from None
    except json.JSONDecodeError as error:
        raise RecipeError(f"{place} is damaged ({error}): remove {path} and build it again") from error


class Progress:
    """Says on stderr how far a build is, at most every two seconds."""

    def __init__(self, name, enabled):
        self._name, self._enabled, self._said = name, enabled, 0.0
        self._begun, self._first, self._stage = time.monotonic(), 0, None

    def __call__(self, done, total, unit, stage=""):
        """`done` of `total` units are finished in this stage; the rate counts from the stage's first call."""
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._begun, self._first = stage, now, done
        if not self._enabled or (now - self._said < 2 and done < total):
            return
        self._said = now
        rate = (done - self._first) / (now - self._begun) if now > self._begun else 0.0
        eta = f", ETA {(total - done) / rate:.0f} s" if rate and done < total else ""
        what = f"{self._name} {stage}".strip()
        print(f"{what}: {done}/{total} {unit}, {rate:.0f} {unit}/s{eta}", file=sys.stderr, flush=True)


def run(recipe_class, arguments=None):
    """The command line `python -m data.NAME --out=DIR [--ARGUMENT=VALUE ...]`."""
    parser = argparse.ArgumentParser(
        prog=f"python -m data.{recipe_class.NAME}",
        description=sys.modules[recipe_class.__module__].__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", required=True, help="directory of the data set")
    for field in dataclasses.fields(recipe_class):
        parser.add_argument(
            f"--{field.name}", type=_reader(field.default), default=field.default, help=f"default {field.default}"
        )
    values = vars(parser.parse_args(arguments))
    out, begun = values.pop("out"), time.monotonic()
    try:
        path = recipe_class(**values).prepare(out)
    except RecipeError as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    counts = " ".join(f"{name}={value}" for name, value in read_dataset(path)["counts"].items())
    print(f"{recipe_class.NAME} v{recipe_class.VERSION}: {path} {counts} ({time.monotonic() - begun:.1f} s)")


def _reader(default):
    """How the command line reads a value like `default`: a number, numbers with commas, or none."""

    def read(text):
        if text.lower() == "none":
            return None
        if isinstance(default, tuple):
            return tuple(type(default[0])(part) for part in text.split(","))
        return type(default)(text)

    read.__name__ = "value"
    return read


def _clear(directory):
    """Removes what a killed build left in a directory."""
    for entry in os.scandir(directory):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            os.remove(entry.path)


def _lock_directory(path):
    """Makes a directory and locks it until the returned descriptor is closed; waits for another holder."""
    while True:
        handle = None
        try:
            os.makedirs(path, exist_ok=True)
            handle = os.open(path, os.O_RDONLY)
            fcntl.flock(handle, fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle
        except (FileNotFoundError, FileExistsError):
            pass  # its holder renamed it into place, or removed it, just now
        if handle is not None:
            os.close(handle)
