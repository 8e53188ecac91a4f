"""Storage that refuses, or a process that dies, at any step of any writing call: nothing is lost, and on it goes.

LASER_KILLS=200 tries every step.
"""

import contextlib
import errno
import itertools
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from laser_jax import vault as seqvault
from laser_jax.schema import Field, Schema

FIELDS = (Field("item", "int64"), Field("brand", "string"))
SCHEMA = Schema(fields=FIELDS)
WIDER = Schema(fields=(*FIELDS, Field("scene", "string", default="home")))
USERS = np.arange(4)
#: Whether every step is tried: minutes.
THOROUGH = int(os.environ.get("LASER_KILLS", "0")) >= 100
QUIET = seqvault.WriterOptions(background=False)
OLD = range(60)
HELD = range(100)

# What a full disk refuses, and what a dying process may not get to.
GROWING = ("fsync", "fdatasync", "replace", "link", "pwrite", "makedirs", "mkdir")
CHANGING = (*GROWING, "remove", "unlink", "rmdir", "truncate", "ftruncate")


class Killed(BaseException):
    """Stands for SIGKILL: nothing after it runs."""


def time_of(numbers: np.ndarray) -> np.ndarray:
    """Times of events: late ones and ties at first, later on in order."""
    return np.where(numbers < 100, numbers * 7 % 50, numbers)


def events(vault, numbers) -> dict:
    """Columns of events, as the vault's schema wants them; event i is of user i % 4."""
    numbers = np.array(numbers)
    columns = {"user": numbers % 4, "time": time_of(numbers), "item": numbers}
    columns["brand"] = np.array([f"brand {number // 10}" for number in numbers.tolist()], object)
    if "scene" in vault.schema.names:
        columns["scene"] = np.array(["home"] * len(numbers), object)
    return columns


def seen(vault) -> set[int]:
    """All items that a handle sees, each of them checked."""
    found = []
    for user, history in zip(USERS.tolist(), vault.gather(USERS, n=10**6), strict=True):
        items = history["item"]
        assert vault.get(user, 10**6)["item"].tolist() == items.tolist()
        assert (items % 4 == user).all() and history["time"].tolist() == time_of(items).tolist()
        assert history["brand"].tolist() == [f"brand {item // 10}" for item in items.tolist()]
        assert items[np.lexsort((items, history["time"]))].tolist() == items.tolist()
        if "scene" in vault.schema.names:
            assert history["scene"].tolist() == ["home"] * len(items)
        found += items.tolist()
    assert len(set(found)) == len(found), "an event is there twice"
    return set(found)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A vault with bulk, delta and merged parts, a snapshot `old` of the events OLD, and a tail; it holds HELD."""
    path = tmp_path_factory.mktemp("full") / "vault"
    with seqvault.create(path, SCHEMA) as writer:
        writer.write(events(writer, range(20)))
    with seqvault.open(path, writing=QUIET) as vault:
        vault.append(events(vault, range(20, 40)))
        vault.merge()
        vault.append(events(vault, range(40, 60)))
        vault.snapshot("old")
        vault.append(events(vault, range(60, 80)))
        vault.flush()
        vault.append(events(vault, range(80, 100)))
        assert seen(vault) == set(HELD) and len(vault.state.parts) == 3
    return path


def without(numbers, user: int) -> set[int]:
    """Those events that are not one user's."""
    return {number for number in numbers if number % 4 != user}


#: Name -> the call, and what is there after it: in the vault, in its snapshot (None: it is gone).
CALLS = {
    "append": (lambda vault: vault.append(events(vault, range(100, 108))), set(range(108)), set(OLD)),
    "flush": (lambda vault: vault.flush(), set(HELD), set(OLD)),
    "merge": (lambda vault: vault.merge(), set(HELD), set(OLD)),
    # It may be there when the call is made again, with more events.
    "snapshot": (lambda vault: vault.snapshot("new", replace=True), set(HELD), set(OLD)),
    "snapshot again": (lambda vault: vault.snapshot("old", replace=True), set(HELD), set(HELD)),
    "drop_snapshot": (lambda vault: vault.drop_snapshot("old"), set(HELD), None),
    "forget": (lambda vault: vault.forget([3]), without(HELD, 3), without(OLD, 3)),
    "evolve": (lambda vault: vault.evolve(WIDER), set(HELD), set(OLD)),
    "retain": (lambda vault: vault.retain(events=1000), set(HELD), set(OLD)),
}


class Counted:
    """Counts calls that change files, and makes some of them fail.

    Attributes:
      names: of the functions that were called, up to and with the one that failed.
      failed: whether one did.
    """

    def __init__(self):
        self.names: list[str] = []
        self.failed = False

    @contextlib.contextmanager
    def patched(self, functions, at: int, only_one: bool, error):
        """Functions of `os` fail from call number `at` on, or only there."""
        original = {name: getattr(os, name) for name in functions}

        def wrapped(name):
            def call(*arguments, **options):
                if not self.failed:
                    self.names.append(name)
                if len(self.names) - 1 == at and not (self.failed and only_one):
                    self.failed = True
                    raise error()
                return original[name](*arguments, **options)

            return call

        for name in functions:
            setattr(os, name, wrapped(name))
        try:
            yield
        finally:
            for name, function in original.items():
                setattr(os, name, function)


def no_space() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def steps_of(call, functions, whole, folder) -> list[int]:
    """Steps of a call at which to fail: all but most of the many flushes of a part's files."""
    path = folder / "dry"
    shutil.copytree(whole, path)
    counted = Counted()
    with seqvault.open(path, writing=QUIET) as vault:
        with counted.patched(functions, -1, True, no_space):
            call(vault)
    shutil.rmtree(path)
    if THOROUGH:
        return list(range(len(counted.names)))
    # All renames, and some of the many flushes and removals of a part's files.
    renames = {step for step, name in enumerate(counted.names) if name == "replace"}
    return sorted(renames | set(range(0, len(counted.names), max(1, len(counted.names) // 4))))


def states_of(name: str) -> tuple[list[set[int]], list]:
    """What may be there while a call has not come to its end: in the vault, in its snapshot."""
    _, after, pinned = CALLS[name]
    return [set(HELD), after], [set(OLD), pinned]


def snapshot_of(path, name: str = "old"):
    """What a snapshot holds; None if there is none."""
    return seen(seqvault.open(path, at=name)) if name in seqvault.open(path).snapshots() else None


@pytest.mark.parametrize("name", CALLS)
def test_no_space_at_any_step(whole, tmp_path, name):
    """A flush that fails once, and a disk that stays full, so that tidying up fails as well."""
    call, after, pinned = CALLS[name]
    states, pinned_states = states_of(name)
    steps = steps_of(call, GROWING, whole, tmp_path)
    tries = [(step, number % 2 == 0) for number, step in enumerate(steps)]
    for step, only_one in tries if not THOROUGH else itertools.product(steps, (True, False)):
        path = tmp_path / f"vault{step}"
        shutil.copytree(whole, path)
        counted = Counted()
        vault = seqvault.open(path, writing=QUIET)
        try:
            with counted.patched(GROWING, step, only_one, no_space):
                try:
                    call(vault)
                    done = True
                except seqvault.UnavailableError:
                    done = False
            where = (name, step, only_one, counted.names[-1], done)
            assert counted.failed
            now = seen(vault)
            assert now in ([after] if done else states), where
            assert snapshot_of(path) in ([pinned] if done else pinned_states), where
            fresh = seen(seqvault.open(path))
            assert fresh in states, where
            # There is room again.
            try:
                vault.append(events(vault, range(200, 204)))
            except seqvault.UnavailableError as error:
                # What was written but could not be flushed may be there or not: the handle must not go on.
                assert "open it again" in str(error) and not done, where
                vault.close()
                assert seen(seqvault.open(path)) in states, where
                vault.append(events(vault, range(200, 204)))
                fresh = seen(vault) - set(range(200, 204))
                assert fresh in states, where
            else:
                assert fresh == now, where
            fresh |= set(range(200, 204))
            assert seen(vault) == fresh == seen(seqvault.open(path)), where
            if not done and not (name == "append" and after <= fresh):
                if name != "drop_snapshot" or vault.snapshots():
                    call(vault)
            assert seen(vault) == seen(seqvault.open(path)) >= after, where
            assert vault.verify() == [], where
        finally:
            vault.close()
        with seqvault.open(path, writing=QUIET) as vault:
            vault.merge()
            assert seen(vault) >= after and vault.verify() == [], where
            if name == "forget":
                assert len(vault.get(3)) == done, "none but one that came later"
        shutil.rmtree(path)


@pytest.mark.parametrize("name", CALLS)
def test_a_process_that_dies_at_any_step(whole, tmp_path, name):
    call, after, pinned = CALLS[name]
    states, pinned_states = states_of(name)
    for step in steps_of(call, CHANGING, whole, tmp_path):
        path, corpse = tmp_path / f"vault{step}", tmp_path / f"corpse{step}"
        shutil.copytree(whole, path)
        counted = Counted()
        with seqvault.open(path, writing=QUIET) as vault:
            with counted.patched(CHANGING, step, False, Killed):
                with pytest.raises(Killed):
                    call(vault)
            shutil.copytree(path, corpse)
        where = (name, step, counted.names[-1])
        assert seen(seqvault.open(corpse)) in states, where
        assert snapshot_of(corpse) in pinned_states, where
        with seqvault.open(corpse, writing=QUIET) as vault:
            vault.append(events(vault, range(200, 204)))
            now = seen(vault) - set(range(200, 204))
            assert now in states, where
            if name != "append" and not (name == "drop_snapshot" and not vault.snapshots()):
                call(vault)
                assert snapshot_of(corpse) in (pinned, None if pinned is None else pinned | set(range(200, 204))), where
                now = after
            assert seen(vault) == seen(seqvault.open(corpse)) >= now, where
            vault.merge()
            assert seen(vault) >= now and vault.verify() == [], where
            held = {f"parts/{part}" for part in vault.state.parts}
        left = {f"parts/{part}" for part in os.listdir(corpse / "parts")}
        assert left == held or vault.snapshots(), where
        shutil.rmtree(corpse)
        shutil.rmtree(path)


@pytest.mark.parametrize("tidied", [True, False])
def test_the_half_of_a_record_that_found_room_does_not_stay(whole, tmp_path, monkeypatch, tidied):
    """Under the shorter record that is written there later, its end would look like damage."""
    path = tmp_path / "vault"
    shutil.copytree(whole, path)
    write = os.pwrite

    def half(descriptor, data, offset):
        if len(data) < 1000:
            return write(descriptor, data, offset)
        write(descriptor, bytes(data)[: len(data) // 2], offset)
        raise no_space()

    def refused(*_):
        raise no_space()

    vault = seqvault.open(path, writing=QUIET)
    vault.append(events(vault, range(100, 104)))
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", half)
        if not tidied:
            patch.setattr(os, "ftruncate", refused)
        with pytest.raises(seqvault.UnavailableError):
            vault.append(events(vault, range(104, 500)))
    assert seen(vault) == set(range(104)) == seen(seqvault.open(path))
    if not tidied:
        with pytest.raises(seqvault.UnavailableError, match="open it again"):
            vault.append(events(vault, range(104, 105)))
        vault.close()
    for start in (104, 105):
        vault.append(events(vault, range(start, start + 1)))
        assert seen(vault) == set(range(start + 1)) == seen(seqvault.open(path))
        vault.close()
    assert vault.verify() == []


# A disk that is full in earnest: files cannot grow beyond a limit.


def write_until_full(path: str, size: int, background: bool) -> None:
    """Fills a vault with a limit on the size of files, call by call; run in a process of its own."""
    import resource
    import signal
    import time

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    # The compiled loops are kept in files too; they are made before there is no room for any.
    shutil.copytree(path, path + "-warm")
    with seqvault.open(path + "-warm", writing=seqvault.WriterOptions(background=background)) as warm:
        for first in (0, 10, 20):
            warm.append(events(warm, range(10_000 + first, 10_010 + first)))
            seen(warm)
            seen(seqvault.open(path + "-warm"))
            warm.flush()
        warm.merge()
        warm.retain(age=10**6)
        warm.merge()
        seen(warm)
        assert warm.verify() == []
    options = seqvault.WriterOptions(background=background, tail_bytes=4000, merge_parts=2, merge_bytes_per_s=0)
    vault = seqvault.open(path, writing=options)
    vault.flush()

    def limit(size: int) -> None:
        # The worker's limit is its own.
        processes = [os.getpid()]
        for task in os.listdir("/proc/self/task"):
            with contextlib.suppress(FileNotFoundError):  # a thread that has ended
                with open(f"/proc/self/task/{task}/children", encoding="ascii") as file:
                    processes += map(int, file.read().split())
        for process in processes:
            resource.prlimit(process, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    count = 100
    refused = 0
    for turn in range(3):
        limit(size)
        for _ in range(400):
            try:
                sequence = vault.append(events(vault, range(count, count + 10)))
            except seqvault.UnavailableError:
                refused += 1
                break
            count += 10
            assert sequence == count
        assert seen(vault) == set(range(count)), "nothing of what was refused, all that was acknowledged"
        for call in (
            vault.flush,
            vault.merge,
            lambda turn=turn: vault.snapshot(f"turn-{turn}"),
            lambda: vault.retain(age=10**6),
        ):
            try:
                call()
            except seqvault.UnavailableError:
                refused += 1
            assert seen(vault) == set(range(count)) == seen(seqvault.open(path))
        limit(resource.RLIM_INFINITY)
        deadline = time.monotonic() + 30
        while True:
            try:
                assert vault.append(events(vault, range(count, count + 1))) == count + 1
                break
            except seqvault.UnavailableError as error:
                # What waits for a worker's second try, or for a new handle.
                assert time.monotonic() < deadline, error
                if "open it again" in str(error):
                    vault.close()
                time.sleep(0.1)
        count += 1
        assert seen(vault) == set(range(count)) == seen(seqvault.open(path))
        vault.close()
    vault.merge()
    assert vault.verify() == [] and seen(vault) == set(range(count))
    kept = {os.path.basename(name) for name in os.listdir(os.path.join(path, "parts"))}
    assert vault.snapshots() or kept == set(vault.state.parts)
    vault.close()
    print(refused, count)


@pytest.mark.parametrize("background", [False, True], ids=["by itself", "by a worker"])
@pytest.mark.parametrize("size", [300, 1500, 6000])
def test_files_that_cannot_grow(whole, tmp_path, size, background):
    path = tmp_path / "vault"
    shutil.copytree(whole, path)
    command = [sys.executable, __file__, str(path), str(size), str(int(background))]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    refused, count = map(int, process.stdout.split())
    assert refused >= 3 and count > 102
    assert seen(seqvault.open(path)) == set(range(count))


# Places that cannot be written.


@pytest.mark.parametrize("name", ["log", "manifests", "snapshots", "parts", "writer.lock"])
def test_something_else_lies_where_a_file_belongs(tmp_path, name):
    path = tmp_path / "vault"
    with seqvault.create(path, SCHEMA):
        pass
    if (path / name).exists():
        (path / name).rename(tmp_path / "aside")
    (path / name).mkdir() if name == "writer.lock" else (path / name).touch()
    acknowledged = set()
    with pytest.raises(seqvault.UnavailableError, match="vault"):
        with seqvault.open(path, writing=QUIET) as vault:
            vault.append(events(vault, range(4)))
            acknowledged = set(range(4))
            assert seen(vault) == acknowledged
            vault.flush()
            vault.snapshot("now")
    (path / name).rmdir() if name == "writer.lock" else (path / name).unlink()
    if (tmp_path / "aside").exists():
        (tmp_path / "aside").rename(path / name)
    with seqvault.open(path, writing=QUIET) as vault:
        vault.append(events(vault, range(8, 12)))
        vault.snapshot("now", replace=True)
        assert seen(vault) == seen(seqvault.open(path, at="now")) == acknowledged | set(range(8, 12))
        assert vault.verify() == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_without_the_right_to_write(whole, tmp_path):
    path = tmp_path / "vault"
    shutil.copytree(whole, path)
    folders = [folder for folder, _, _ in os.walk(path)]
    try:
        for folder in folders:
            os.chmod(folder, 0o555)
        (path / "writer.lock").chmod(0o444)
        with seqvault.open(path, writing=QUIET) as vault:
            assert seen(vault) == set(HELD)
            for call, _, _ in CALLS.values():
                with pytest.raises(seqvault.UnavailableError, match="cannot be written"):
                    call(vault)
    finally:
        for folder in folders:
            os.chmod(folder, 0o755)


if __name__ == "__main__":
    write_until_full(sys.argv[1], int(sys.argv[2]), sys.argv[3] == "1")
