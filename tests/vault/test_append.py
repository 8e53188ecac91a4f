"""Writing into a vault that is open: appends, what goes on behind them, and what other handles and processes see."""

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
import textwrap
import threading
import time
import types

import numpy as np
import pytest

from laser_jax import vault as seqvault
from laser_jax.schema import Field, Schema
from laser_jax.vault import WriterOptions
from laser_jax.vault import reader as vault_reader
from laser_jax.vault.history_cache import HistoryCache
from laser_jax.vault.log_writer import LogWriter
from tests.vault.conftest import FIELDS, Model, assert_same, random_log, take

ITEMS = Schema(fields=(Field("item", "int64"),))
BRANDS = Schema(fields=(Field("item", "int64"), Field("brand", "string")))
KEYED = Schema(fields=(Field("key", "int64"), Field("brand", "string")), event_key="key", duplicates="drop")
GOLDEN = os.path.join(os.path.dirname(os.path.dirname(__file__)), "golden", "vault_v1")
#: Nothing happens but by the calls of a test.
QUIET = WriterOptions(background=False)


@pytest.fixture
def make(tmp_path):
    """Makes empty vaults and opens them; closes everything in the end."""
    opened = []

    def make(schema: Schema, writing: WriterOptions = QUIET, **options):
        path = tmp_path / f"vault{len(opened)}"
        with seqvault.create(path, schema):
            pass
        opened.append(seqvault.open(path, writing=writing, **options))
        return opened[-1]

    yield make
    for vault in opened:
        vault.close()


def events(users, start: int = 0, **columns) -> dict:
    """One event for each user, times and items counting up from `start`."""
    numbers = list(range(start, start + len(users)))
    return {"user": users, "time": numbers, "item": numbers} | columns


def items(vault, user, n: int = 10**6, **bounds) -> list[int]:
    """The items of a user's history; get and gather must agree."""
    found = vault.get(user, n, **bounds)["item"].tolist()
    assert vault.gather([user], n=n, **bounds).columns["item"].tolist() == found
    return found


def reopened(vault, **options):
    """The same vault through a handle that knows nothing yet."""
    vault.close()
    return seqvault.open(vault.path, writing=QUIET, **options)


def files_with(path, data: bytes) -> list[str]:
    """Files below a directory that hold some bytes, as they are or packed by zarr."""
    found = []
    for folder, _, names in os.walk(path):
        for name in names:
            with open(os.path.join(folder, name), "rb") as file:
                if data in file.read():
                    found.append(os.path.relpath(os.path.join(folder, name), path))
    return found


def python(code: str, *arguments, **options) -> subprocess.Popen:
    """Another process that runs some code; it is spoken to by lines."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options)


def ask(process: subprocess.Popen, line: str = "") -> str:
    """Sends a line and waits for the answer."""
    process.stdin.write(line + "\n")
    process.stdin.flush()
    return process.stdout.readline().rstrip("\n")


@pytest.fixture
def other(tmp_path):
    """Starts a process that evaluates the lines it is sent, with `vault` and `path` at hand; ends it in the end."""
    started = []
    code = """
        import sys
        from laser_jax import vault as seqvault
        from laser_jax.vault import WriterOptions, reader
        path = sys.argv[1]
        vault = seqvault.open(path, writing=WriterOptions(background=False))
        for line in sys.stdin:
            try:
                print(repr(eval(line)), flush=True)
            except Exception as error:
                print(f"{type(error).__name__}: {error}", flush=True)
    """

    def start(path):
        started.append(python(code, path))
        return started[-1]

    yield start
    for process in started:
        process.communicate(timeout=60)


# Durable and visible.


def test_an_append_is_visible_at_once_and_after_reopening(make):
    vault = make(BRANDS)
    assert vault.append(events([1, 2, 1], brand=["a", "ü", "a"])) == 3
    assert items(vault, 1) == [0, 2] and items(vault, 2) == [1] and items(vault, 3) == []
    assert vault.get(2)["brand"].tolist() == ["ü"]
    assert len(vault) == 2 and vault.num_events == 3 and vault.next_sequence == 3
    # Another handle sees what was acknowledged though this one is still writing.
    again = seqvault.open(vault.path)
    assert items(again, 1) == [0, 2] and again.get(2)["brand"].tolist() == ["ü"] and again.next_sequence == 3
    vault = reopened(vault)
    assert items(vault, 1) == [0, 2] and vault.get(2)["brand"].tolist() == ["ü"]
    assert vault.verify() == []


def test_every_type_survives_the_tail_the_log_and_the_parts(make):
    for user_type in ("int64", "string"):
        schema = Schema(user=user_type, fields=FIELDS)
        users = (
            np.array([3, -(2**63), 2**63 - 1]) if user_type == "int64" else np.array(["ä", "b\0c", "long" * 99], object)
        )
        log = random_log(schema, users, 700, 5, span=300)
        vault, model = make(schema), Model(log)

        def check(vault, model=model, users=users, schema=schema):
            for user in users:
                for before in (None, 150):
                    expected = model.read(user, 10_000, before)
                    assert_same(vault, vault.get(user, 10_000, before, fields=schema.names), expected, schema.names)

        for rows in np.array_split(np.arange(700), 4):
            vault.append(take(log, rows))
        check(vault)
        vault = reopened(vault)
        check(vault)
        vault.append({name: column[:0] for name, column in log.items()})
        vault.flush()
        check(vault)
        vault = reopened(vault)
        vault.merge()
        check(vault)
        assert vault.verify() == []
        vault.close()


def test_the_number_that_append_returns_sees_these_events_and_all_before(make):
    vault = make(ITEMS)
    after = [vault.append(events([7] * size, size * 100)) for size in (1, 3, 2)]
    assert after == [1, 4, 6] and vault.next_sequence == 6
    written = [100, 300, 301, 302, 200, 201]  # times are the items: the last batch is late
    for sequence in range(7):
        expected = sorted(written[:sequence])
        assert items(vault, 7, as_of=sequence) == expected
        assert vault.get(7, as_of=sequence).as_of == vault.gather([7, 8], as_of=sequence)[0].as_of - 6 + sequence
        assert vault.gather([7, 7, 8], as_of=np.array([sequence, 6, 0])).offsets.tolist() == [
            0,
            sequence,
            sequence + 6,
        ] + [sequence + 6]
    assert vault.get(7).as_of == 6 and vault.get(7, as_of=99).as_of == 6 and vault.get(8).as_of == 6
    for move in (vault.flush, vault.merge):
        move()
        for sequence in range(7):
            assert items(vault, 7, as_of=sequence) == sorted(written[:sequence])
            assert items(vault, 7, 2, as_of=sequence) == sorted(written[:sequence])[-2:]
            early = [item for item in sorted(written[:sequence]) if item < 300]
            assert items(vault, 7, 2, before=300, as_of=sequence) == early[-2:]


def test_bounds_beyond_int64_bound_nothing(make):
    vault = make(ITEMS)
    vault.append(events([1, 1]))
    for bound in (2**63 - 1, np.uint64(2**63), 2**63):
        assert items(vault, 1, before=bound) == [0, 1]
        assert items(vault, 1, as_of=bound) == [0, 1]


def test_late_events_and_ties_are_in_order_of_time_then_of_writing(make):
    vault = make(ITEMS)
    rng = np.random.default_rng(0)
    time_of, written = rng.integers(0, 40, 1500), 0
    model = Model({"user": np.ones(1500, np.int64), "time": time_of, "item": np.arange(1500)})
    while written < 1500:
        size = int(rng.integers(1, 90))
        rows = np.arange(written, min(1500, written + size))
        vault.append(take(model.log, rows))
        written += len(rows)
        seen = Model(take(model.log, np.arange(written)))
        for n, before in ((5, None), (300, 20), (2000, None)):
            assert items(vault, 1, n, before=before) == seen.read(1, n, before)["item"].tolist()
        if rng.random() < 0.2:
            vault.flush()
    assert len(vault.state.parts) > 2
    vault.merge()
    assert len(vault.state.parts) == 1
    assert items(vault, 1) == model.read(1, 1500, None)["item"].tolist()


def test_a_clock_that_runs_backwards_loses_nothing(make):
    vault = make(ITEMS)
    for number, moment in enumerate([1000, 999, 998, 5, 1001, 0, 0, 1000]):
        vault.append({"user": [1], "time": [moment], "item": [number]})
    assert items(vault, 1) == [5, 6, 3, 2, 1, 0, 7, 4]
    vault.flush()
    vault.append({"user": [1], "time": [0], "item": [8]})
    assert items(vault, 1) == [5, 6, 8, 3, 2, 1, 0, 7, 4]
    assert items(reopened(vault), 1, 2, before=6) == [8, 3]


def test_one_large_batch_and_users_by_the_thousand(make):
    vault = make(ITEMS)
    users = np.random.default_rng(0).integers(0, 5000, 60_000)
    vault.append({"user": users, "time": np.arange(60_000), "item": np.arange(60_000)})
    for _ in range(2):
        batch = vault.gather(np.arange(5000), n=10**6)
        assert (np.diff(batch.offsets) == np.bincount(users, minlength=5000)).all()
        assert (users[batch.columns["item"]] == np.repeat(np.arange(5000), np.diff(batch.offsets))).all()
        vault.flush()


def test_errors_leave_nothing(make):
    vault = make(BRANDS)
    vault.append(events([1], brand=["a"]))
    for change in (
        {"time": [1, -1]},
        {"brand": ["new", None]},
        {"user": ["x", "y"]},
        {"item": [1]},
        {"colour": [1, 2]},
    ):
        with pytest.raises(seqvault.SchemaError):
            vault.append(events([1, 2], brand=["new", "newer"]) | change)
        with pytest.raises(seqvault.SchemaError):
            vault.append_async(events([1, 2], brand=["new", "newer"]) | change)
    with pytest.raises(seqvault.SchemaError, match="column 'brand' is missing"):
        vault.append(events([1]))
    assert vault.next_sequence == 1 and vault.num_events == 1 and len(vault) == 1
    assert vault.dictionary("brand").tolist() == ["a"]
    assert items(reopened(vault), 1) == [0]


def test_a_refused_write_gives_its_strings_no_codes(make):
    """The log defines every code that it uses, also after an append that failed for want of room."""
    vault = make(BRANDS)
    vault.append(events([1], brand=["a"]))
    vault.flush()
    wall = os.path.join(vault.path, "log", "000000001.log")
    os.mkdir(wall)
    with pytest.raises(seqvault.UnavailableError):
        vault.append(events([1], 5, brand=["b"]))
    assert vault.next_sequence == 1 and items(vault, 1) == [0]
    os.rmdir(wall)
    with seqvault.open(vault.path, writing=QUIET) as second:
        with pytest.raises(seqvault.LockedError):
            second.append(events([1], 6, brand=["c"]))
        vault.close()
        second.append(events([1], 6, brand=["c"]))
    vault.refresh()
    assert vault.get(1)["brand"].tolist() == ["a", "c"]
    vault.append(events([1], 7, brand=["b"]))
    for handle in (vault, reopened(vault)):
        assert handle.get(1)["brand"].tolist() == ["a", "c", "b"]


def test_asynchronous_appends_keep_their_order(make):
    vault = make(ITEMS)
    promised = [vault.append_async(events([number % 3], number)) for number in range(300)]
    assert [future.result(60) for future in promised] == list(range(1, 301))
    assert items(vault, 1) == list(range(1, 300, 3))
    future = vault.append_async(events([1], 300))
    vault.close()
    assert future.result(0) == 301, "close waits for what is under way"
    assert items(seqvault.open(vault.path), 1)[-1] == 300


def test_appends_from_many_threads(make):
    vault = make(ITEMS, WriterOptions(tail_bytes=20_000))
    numbers: list[int] = []

    def write(thread):
        for turn in range(40):
            user = [thread * 1000 + turn]
            future = vault.append_async(events(user * 2)) if turn % 2 else None
            numbers.append(future.result(60) if future else vault.append(events(user * 2)))

    threads = [threading.Thread(target=write, args=(thread,)) for thread in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers) == list(range(2, 482, 2)), "each batch is in one piece"
    assert vault.next_sequence == 480 and len(vault) == 240
    assert all(items(vault, user) == [0, 1] for user in vault.users().tolist())


def test_a_cancelled_append_holds_up_nobody(make):
    vault = make(ITEMS)
    promised = [vault.append_async(events([1], number)) for number in range(40)]
    for future in promised[1::3]:
        future.cancel()
    promised.append(vault.append_async(events([1], 40)))
    found = {future.result(60) for future in promised if not future.cancelled()}
    assert max(found) == vault.next_sequence == len(items(vault, 1))
    kept = [number for number, future in enumerate(promised) if not future.cancelled()]
    assert set(kept) <= set(items(vault, 1))


# Repeated events.


def keyed(keys, users=None, brand="a", start=0) -> dict:
    """Events with these keys."""
    count = len(keys)
    users = [1] * count if users is None else users
    return {"user": users, "time": list(range(start, start + count)), "key": keys, "brand": [brand] * count}


def test_repeated_events_are_dropped_within_the_window(make):
    vault = make(KEYED)
    assert vault.append(keyed([1, 2, 1, 3, 2])) == 3, "within a batch"
    assert vault.append(keyed([3, 4, 1], start=50)) == 4, "and across batches"
    assert vault.append(keyed([4], start=99)) == 4, "whatever else it holds"
    assert vault.append(keyed([4], users=[2])) == 5, "another user's is another event"
    assert vault.get(1)["key"].tolist() == [1, 2, 3, 4] and vault.next_sequence == 5
    vault.close()
    assert vault.append(keyed([4, 1, 5], start=200)) == 6, "by the next writer"
    vault.flush()
    assert vault.append(keyed([5])) == 6, "behind a flush"
    vault.close()
    assert vault.append(keyed([5, 1])) == 6, "of which the log is kept"
    vault.merge()
    vault.close()
    assert vault.append(keyed([5, 1, 2, 3, 4])) == 6
    assert vault.get(1)["key"].tolist() == [1, 2, 3, 4, 5] and vault.verify() == []


def test_a_forgotten_event_may_come_again_and_the_others_are_repeated_ones(make):
    vault = make(KEYED)
    vault.append(keyed([1, 2]))
    vault.append(keyed([1], users=[2]))
    assert vault.forget([1]) == 2
    vault.append(keyed([2, 2]))
    vault.append(keyed([1], users=[2]))
    for _ in range(2):
        assert vault.get(1)["key"].tolist() == [2] and vault.get(2)["key"].tolist() == [1]
        vault.close()


def test_no_event_repeats_none(make):
    vault = make(dataclasses.replace(BRANDS, duplicates="drop"))
    end = vault.append(events([1], brand=["x"]))
    waiting = [vault.append_async(events([], brand=[])), vault.append_async(events([1, 1], brand=["x", "y"]))]
    assert [future.result() for future in waiting] == [end, end + 1]


def test_the_window_is_as_long_as_asked(make):
    vault = make(KEYED, WriterOptions(background=False, dedup_window=3))
    for _ in range(2):
        vault.append(keyed([1, 2, 3, 4, 5]))
        assert vault.append(keyed([3, 4, 5])) == vault.next_sequence
        before = vault.next_sequence
        assert vault.append(keyed([2])) == before + 1, "fallen out of the window, so that it is new"
        assert vault.append(keyed([4])) == before + 1
        vault.flush()
        vault.close()
        assert vault.append(keyed([4])) == before + 1
        assert vault.append(keyed([2])) == before + 1
        assert vault.append(keyed([3])) == before + 2
        vault.append(keyed([101, 102, 103]))  # nothing of it is left


def test_without_an_event_key_whole_events_are_compared(make):
    fields = (Field("item", "int64"), Field("brand", "string"), Field("pair", "float32", size=2))
    vault = make(Schema(fields=fields, duplicates="drop"))
    one = {"user": [1], "time": [5], "item": [7], "brand": ["a"], "pair": [[1.0, 2.0]]}
    assert vault.append(one) == 1
    assert vault.append(one) == 1
    for number, change in enumerate(({"time": [6]}, {"brand": ["b"]}, {"pair": [[1.0, 3.0]]}, {"user": [2]})):
        assert vault.append(one | change) == number + 2
        vault.close()
        assert vault.append(one | change) == vault.append(one) == number + 2
    vault.flush()
    vault.close()
    assert vault.append(one | {"brand": ["b"]}) == 5


def test_a_repeated_event_takes_no_code_with_it(make):
    """Appends that share a flush: one is dropped whole, and the next one uses the string that it brought."""
    vault = make(KEYED)
    vault.append(keyed([0]))
    for turn in range(5):
        brand = f"new {turn}"
        promised = [vault.append_async(keyed([100 * turn + number + 1])) for number in range(50)]
        promised.append(vault.append_async(keyed([0], brand=brand)))
        promised.append(vault.append_async(keyed([100 * turn + 99], brand=brand, start=1000 + turn)))
        for future in promised:
            future.result(60)
        assert seqvault.open(vault.path).get(1, 1)["brand"].tolist() == [brand]
    vault = reopened(vault)
    assert vault.get(1, 1)["brand"].tolist() == ["new 4"] and vault.num_events == 256


# Who may write.


def test_a_second_writer_is_refused_until_the_first_one_closes(make, other):
    first = make(ITEMS)
    assert first.append(events([1])) == 1
    second = seqvault.open(first.path, writing=QUIET)
    for call in (
        lambda: second.append(events([1])),
        lambda: second.append_async(events([1])),
        second.flush,
        second.merge,
        second.snapshot,
        lambda: second.forget([1]),
        lambda: second.evolve(ITEMS),
        lambda: second.retain(events=1),
    ):
        with pytest.raises(seqvault.LockedError, match="vault0 is being written by another writer"):
            call()
    process = other(first.path)
    append = "vault.append({'user': [1], 'time': [9], 'item': [9]})"
    assert ask(process, append).startswith("LockedError: ")
    assert ask(process, "vault.get(1)['item'].tolist()") == "[0]", "but it may read"
    first.close()
    assert second.append(events([1], 1)) == 2
    assert ask(process, append).startswith("LockedError: ")
    second.close()
    assert ask(process, append) == "3"
    with pytest.raises(seqvault.LockedError):
        first.append(events([1]))
    process.kill()
    process.wait()
    assert first.append(events([1], 3)) == 4, "a dead writer's lock is free"
    assert items(first, 1) == [0, 1, 3, 9]


def test_a_vault_that_is_only_read_is_not_locked(make):
    vault = make(ITEMS)
    vault.append(events([1]))
    vault.close()
    readers = [seqvault.open(vault.path) for _ in range(3)]
    for reader in readers:
        reader.refresh()
        assert items(reader, 1) == [0] and reader.snapshots() == [] and reader.stats()["events"] == 1
    assert vault.append(events([1], 1)) == 2
    with pytest.raises(seqvault.VaultError, match="opened at snapshot 'now', which cannot be written"):
        vault.snapshot("now")
        seqvault.open(vault.path, at="now").append(events([1]))


def test_appends_that_race_with_close_are_written_or_refused(make):
    for _ in range(5):
        vault = make(ITEMS, WriterOptions())
        promised, done = [], []
        vault.append(events([1]))

        def write(vault=vault, promised=promised, done=done):
            while not done:
                try:
                    promised.append(vault.append_async(events([1])))
                except seqvault.LockedError:
                    pass

        thread = threading.Thread(target=write)
        thread.start()
        time.sleep(0.05)
        vault.close()
        done.append(True)
        thread.join()
        vault.close()
        written = 1
        for future in promised:
            try:
                future.result(60)
                written += 1
            except seqvault.UnavailableError:
                pass
        assert len(items(vault, 1)) == written


@pytest.mark.parametrize("wait", [True, False])
def test_an_append_that_a_close_overtakes_is_refused_and_not_forgotten(make, monkeypatch, wait):
    vault = make(ITEMS)
    vault.append(events([1]))
    maintenance = vault._appender.maintenance  # between the check of the events and the queue
    monkeypatch.setattr(maintenance, "wait_for_room", lambda: closing.start() or closing.join(60))
    closing = threading.Thread(target=vault.close)
    with pytest.raises(seqvault.UnavailableError, match="was closed meanwhile"):
        vault.append(events([1])) if wait else vault.append_async(events([1])).result(60)
    assert len(items(vault, 1)) == 1


def test_appends_that_race_with_evolve_are_written_or_refused(make):
    for _ in range(5):
        vault = make(ITEMS)
        promised, refused, written = [], [], []

        def write(wait, vault=vault, promised=promised, refused=refused, written=written):
            try:
                while True:
                    if wait:
                        vault.append(events([1]))
                        written.append(1)
                    else:
                        promised.append(vault.append_async(events([1])))
                        time.sleep(0.001)
            except seqvault.SchemaError:
                refused.append(1)

        threads = [threading.Thread(target=write, args=(wait,)) for wait in (True, True, False)]
        for thread in threads:
            thread.start()
        time.sleep(0.03)
        vault.evolve(Schema(fields=(*ITEMS.fields, Field("scene", "int8", default=-1))))
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        assert len(refused) == 3
        taken = sum(future.exception(60) is None for future in promised)
        history = vault.get(1, 10**6)
        assert len(history) == len(written) + taken and set(history["scene"].tolist()) <= {-1}


# Tails become parts, parts are merged.


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_answers_stay_right_while_parts_are_made_and_merged_behind_readers(make, cache_bytes):
    vault = make(ITEMS, WriterOptions(tail_bytes=30_000, merge_parts=2, merge_bytes_per_s=0), cache_bytes=cache_bytes)
    users, rounds = 20, 220
    failures, done = [], []

    def read(handle):
        rng = np.random.default_rng()
        try:
            while not done:
                user = int(rng.integers(users))
                handle.refresh()
                sequence = handle.next_sequence
                # Round r gives user u the items r * users + u, at time r but for every seventh, which is late.
                count = -(-(sequence - user) // users)
                expected = sorted(range(user, sequence, users), key=lambda item: (moment_of(item // users), item))
                found = handle.get(user, 10**6, as_of=sequence)["item"].tolist()
                assert found == expected and len(found) == max(count, 0)
                n, before = int(rng.integers(1, 30)), int(rng.integers(rounds))
                batch = handle.gather([user, 99, user], np.array([before, 5, rounds]), n, sequence)
                early = [item for item in expected if moment_of(item // users) < before]
                assert batch[0]["item"].tolist() == early[-n:] and len(batch[1]) == 0
                assert batch[2]["item"].tolist() == expected[-n:]
        except BaseException as error:
            failures.append(error)

    def moment_of(number: int) -> int:
        return number if number % 7 else number // 2

    handles = [vault, vault, seqvault.open(vault.path, cache_bytes=cache_bytes)]
    threads = [threading.Thread(target=read, args=(handle,)) for handle in handles]
    for thread in threads:
        thread.start()
    most_parts = 0
    try:
        for number in range(rounds):
            numbers = np.arange(users) + number * users
            vault.append({"user": np.arange(users), "time": np.full(users, moment_of(number)), "item": numbers})
            most_parts = max(most_parts, len(vault.state.parts))
            time.sleep(0.002)
        vault.merge()
    finally:
        done.append(True)
        for thread in threads:
            thread.join()
    assert not failures, failures[0]
    assert most_parts >= 2 and vault.stats()["writer"]["events_merged"] > 0
    assert len(vault.state.parts) == 1 and vault.verify() == []
    assert os.listdir(os.path.join(vault.path, "parts")) == list(vault.state.parts) or handles[2]


def test_a_user_lives_in_few_parts(make):
    vault = make(ITEMS, WriterOptions(tail_bytes=8000, merge_parts=3, merge_bytes_per_s=0))
    for number in range(400):
        vault.append(events([number % 5, 77, 1000 + number], 3 * number))
    deadline = time.monotonic() + 30
    while vault.stats()["parts_per_user"][2] > 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    mean, percentile, most = vault.stats()["parts_per_user"]
    assert most <= 4 and percentile <= 4 and mean < 2, "at most 3, and the part that was made last"
    assert len(vault.state.parts) < 30, "small parts are merged too"
    assert items(vault, 77) == list(range(1, 1200, 3))


def test_appends_wait_while_the_tail_is_over_its_budget(make):
    vault = make(ITEMS, WriterOptions(tail_bytes=50_000))
    most = 0
    for number in range(60):
        vault.append(events(list(range(100)), 100 * number))
        most = max(most, vault.stats()["tail_bytes"])
    assert most < 2 * 50_000 and len(vault.state.parts) > 0
    assert vault.num_events >= 6000 and items(vault, 99) == list(range(99, 6000, 100))


@pytest.mark.parametrize("background", [False, True])
def test_a_tail_that_is_over_budget_from_the_start_is_flushed(make, background):
    """The log of a writer that had more memory, or that was killed with several tails under way."""
    vault = make(ITEMS)
    vault.append(events(list(range(300))))
    vault.close()
    with seqvault.open(vault.path, writing=WriterOptions(tail_bytes=1000, background=background)) as small:
        future: list[int] = []
        thread = threading.Thread(target=lambda: future.append(small.append(events([1], 500))), daemon=True)
        thread.start()
        thread.join(60)
        assert future == [301], "append waits for ever"
        assert items(small, 1) == [1, 500]


def test_one_damaged_page_does_not_stop_appends(make):
    writing = WriterOptions(tail_bytes=20_000, merge_parts=1, merge_bytes_per_s=0)
    vault = make(ITEMS, writing)
    vault.append(events(list(range(50))))
    vault.flush()
    vault.close()
    (part,) = vault.state.parts.values()
    with open(os.path.join(part.folder.path, "pages/c/0/0/0"), "r+b") as file:
        file.seek(20)
        byte = file.read(1)[0]
        file.seek(20)
        file.write(bytes([byte ^ 1]))
    for number in range(1, 200):
        vault.append(events(list(range(20)), 100 * number))
    assert items(vault, 19, 199) == list(range(119, 20_000, 100))
    with pytest.raises(seqvault.CorruptionError, match=part.name):
        vault.get(0, 10**6)


def test_verify_takes_no_work_that_goes_on_for_damage(make):
    vault = make(BRANDS, WriterOptions(tail_bytes=3000, merge_parts=1, merge_bytes_per_s=0))
    vault.append(events(list(range(2000)) * 50, brand=["a"] * 100_000))
    vault.flush()  # so much that looking at all of it takes a while
    done = []

    def write():
        number = 0
        while not done:
            vault.append(events([1, 2, 3], number, brand=[f"b{number}", "a", "b"]))
            number += 3

    thread = threading.Thread(target=write)
    thread.start()
    try:
        time.sleep(1)
        found = [seqvault.verify(vault.path) for _ in range(12)]
    finally:
        done.append(True)
        thread.join()
    assert found == [[]] * 12


def test_merge_leaves_one_entry_a_user_and_no_old_file(make):
    vault = make(BRANDS)
    for number in range(5):
        vault.append(events([1, 2, 3 + number], 10 * number, brand=["a", "b", f"c{number}"]))
        vault.flush()
    assert len(vault.state.parts) == 5 and vault.stats()["parts_per_user"][2] == 5
    vault.merge()
    assert vault.stats()["parts_per_user"] == [1.0, 1.0, 1]
    assert set(os.listdir(os.path.join(vault.path, "parts"))) == set(vault.state.parts)
    assert vault.stats()["log_bytes"] == 0 and len(os.listdir(os.path.join(vault.path, "manifests"))) <= 1
    vault.merge()
    names = set(vault.state.parts)
    vault.merge()
    assert set(vault.state.parts) == names, "nothing to do"
    assert vault.num_events == 15 and vault.get(4)["brand"].tolist() == ["c1"]
    assert vault.verify() == []


def test_calls_on_an_empty_vault(make):
    vault = make(BRANDS)
    vault.flush()
    vault.merge()
    assert vault.forget([1]) == 0
    assert vault.append({"user": [], "time": [], "item": [], "brand": []}) == 0
    vault.snapshot("nothing")
    vault.retain(events=1)
    vault.merge()
    assert len(vault) == 0 and items(vault, 1) == [] and vault.next_sequence == 0
    assert items(seqvault.open(vault.path, at="nothing"), 1) == []
    assert vault.verify() == []


def test_old_parts_stay_while_readers_in_other_processes_hold_them(make, other):
    vault = make(ITEMS)
    for number in range(3):
        vault.append(events([1, 2], 10 * number))
        vault.flush()
    old = set(vault.state.parts)
    first, second = other(vault.path), other(vault.path)
    for process in (first, second):
        assert ask(process, "len(vault.state.parts)") == "3"
    vault.merge()
    folder = os.path.join(vault.path, "parts")
    assert old < set(os.listdir(folder))
    # They have not read a page yet: they can, though the vault has moved on.
    assert ask(first, "vault.get(1)['item'].tolist()") == "[0, 10, 20]"
    assert ask(first, "vault.refresh() or vault.get(1)['item'].tolist()") == "[0, 10, 20]"
    vault.merge()
    assert old < set(os.listdir(folder)), "the second one still holds them"
    assert ask(second, "vault.gather([1, 2]).columns['item'].tolist()") == "[0, 10, 20, 1, 11, 21]"
    second.kill()
    second.wait()
    vault.merge()
    assert set(os.listdir(folder)) == set(vault.state.parts) and not old & set(os.listdir(folder))
    assert ask(first, "vault.get(2)['item'].tolist()") == "[1, 11, 21]"


# Other processes.


STEPS = ("open", "pwrite", "fsync", "fdatasync", "rename", "makedirs")


def at_every_step(monkeypatch, visit) -> None:
    """Calls `visit` before and behind every call by which a writer changes or flushes files."""

    def visited(call):
        def wrapped(*arguments, **options):
            visit()
            result = call(*arguments, **options)
            visit()
            return result

        return wrapped

    for name in STEPS:
        monkeypatch.setattr(os, name, visited(getattr(os, name)))


def test_a_reader_may_look_between_any_two_steps_of_a_writer(make, monkeypatch):
    """The first append makes the log's files; one into the same file follows, and one into the next."""
    vault = make(ITEMS)
    reader, acknowledged, looks, closed = seqvault.open(vault.path), 0, [], False

    def look():
        nonlocal closed
        if closed:
            return
        closed = True
        reader.refresh()
        for handle in (reader, seqvault.open(vault.path)):
            # What is durable may be seen before the writer hears of it, nothing else.
            assert handle.get(1)["item"].tolist() in (list(range(acknowledged)), list(range(acknowledged + 1)))
        looks.append(acknowledged)
        closed = False

    at_every_step(monkeypatch, look)
    for number in range(4):
        if number == 2:
            closed = True  # what a merge does has its own tests
            vault.flush()
            closed = False
        vault.append(events([1], number))
        acknowledged = number + 1
    assert set(looks) == {0, 1, 2, 3} and looks.count(0) > looks.count(1)


def test_a_writer_may_come_to_any_step_of_its_first_append_within_a_look(make, monkeypatch):
    """A reader that found no log goes on to list its files only when the writer has come so far."""
    reached, go_on, steps, stop_at = threading.Event(), threading.Event(), [], 0

    def step():
        if threading.current_thread() is not threading.main_thread():
            steps.append(None)
            if len(steps) == stop_at:
                reached.set()
                assert go_on.wait(60)

    def write():
        vault.append(events([1]))
        reached.set()

    def listed(path):
        if str(path).endswith("log") and writer and not writer[0].ident:
            writer[0].start()
            assert reached.wait(60)
        return listdir(path)

    at_every_step(monkeypatch, step)
    listdir, writer = os.listdir, []
    monkeypatch.setattr(os, "listdir", listed)
    while len(steps) >= stop_at:
        writer.clear(), reached.clear(), go_on.clear(), steps.clear()
        vault = make(ITEMS)
        os.mkdir(os.path.join(vault.path, "log"))
        reader = seqvault.open(vault.path)
        writer.append(threading.Thread(target=write))
        stop_at += 1
        reader.refresh()
        assert items(reader, 1) in ([], [0])
        go_on.set()
        writer[0].join(60)
        reader.refresh()
        assert items(reader, 1) == [0]
    assert stop_at > 20


def test_another_process_follows(make, other):
    vault = make(BRANDS)
    process = other(vault.path)
    read = "[(vault.get(u)['item'].tolist(), vault.get(u)['brand'].tolist(), vault.get(u).as_of) for u in (1, 2)]"
    for number in range(9):
        old = ask(process, read)
        sequence = vault.append(events([1, 2], 10 * number, brand=[f"b{number}", "a"]))
        if number in (2, 3, 6):
            vault.flush()
        if number == 4:
            vault.merge()
        if number == 5:
            vault.close()
        if number == 7:
            vault.snapshot()
        assert ask(process, read) == old, "nothing changes by itself"
        assert ask(process, "vault.refresh()") == "None"
        expected = [
            ([10 * k + u for k in range(number + 1)], [("a" if u else f"b{k}") for k in range(number + 1)], sequence)
            for u in (0, 1)
        ]
        assert ask(process, read) == repr(expected)
        assert ask(process, f"vault.gather([1, 2], n=1, as_of={sequence - 1}).columns['item'].tolist()") == repr(
            [10 * number] + ([10 * number - 9] if number else [])
        )
    assert ask(process, "vault.stats()['events']") == "18" and ask(process, "vault.verify()") == "[]"


def test_another_process_follows_a_change_of_the_schema(make, other):
    vault = make(ITEMS)
    vault.append(events([1]))
    process = other(vault.path)
    fields = (*ITEMS.fields, Field("scene", "string", default="home"))
    vault.evolve(Schema(fields=fields))
    assert ask(process, "vault.get(1)['item'].tolist()") == "[0]"
    assert ask(process, "vault.refresh() or list(vault.get(1).columns)") == "['time', 'item', 'scene']"
    vault.append(events([1], 1, scene=["search"]))
    assert ask(process, "vault.refresh() or vault.get(1)['scene'].tolist()") == "['home', 'search']"
    vault.merge()
    assert ask(process, "vault.refresh() or vault.get(1)['scene'].tolist()") == "['home', 'search']"
    # It can go on writing where the first one stopped.
    vault.close()
    assert ask(process, "vault.append({'user': [1], 'time': [2], 'item': [2], 'scene': ['x']})") == "3"
    vault.refresh()
    assert vault.get(1)["scene"].tolist() == ["home", "search", "x"]


# Conditions.


def test_where_takes_the_newest_that_match_and_says_how_far_it_looked(make):
    schema = Schema(fields=(Field("item", "int64"), Field("action", "uint8"), Field("scene", "string")))
    vault = make(schema)
    size = 2000
    numbers = np.arange(size)
    scenes = np.array(["home", "search", "cart"], object)
    log = {
        "user": np.ones(size, np.int64),
        "time": numbers,
        "item": numbers,
        "action": numbers % 10,
        "scene": scenes[numbers % 3],
    }
    for rows in np.array_split(numbers, 3):
        vault.append(take(log, rows))
        vault.flush()
    for _ in range(2):
        found = vault.get(1, 5, where={"action": 3})
        assert found["item"].tolist() == [1953, 1963, 1973, 1983, 1993]
        assert found.scanned == 47 and not found.exhausted
        found = vault.get(1, 5, before=1000, where={"action": [3, 4], "scene": "search"}, fields=["scene"])
        matching = [n for n in range(1000) if n % 10 in (3, 4) and n % 3 == 1]
        assert found["time"].tolist() == matching[-5:] and list(found.columns) == ["time", "scene"]
        assert found.scanned == 1000 - matching[-5] and not found.exhausted
        found = vault.get(1, 5, where={"action": 3}, max_scan=20)
        assert found["item"].tolist() == [1983, 1993] and found.scanned == 20 and not found.exhausted
        found = vault.get(1, 5, where={"action": 11})
        assert len(found) == 0 and found.scanned == size and found.exhausted
        found = vault.get(1, 5, where={"action": 11}, max_scan=size)
        assert found.scanned == size and found.exhausted
        found = vault.get(1, 5, where={"action": 11}, max_scan=size - 1)
        assert found.scanned == size - 1 and not found.exhausted
        found = vault.get(1, 500, where={"action": 3}, as_of=700)
        assert found["item"].tolist() == list(range(3, 700, 10)) and found.scanned == 700 and found.exhausted
        assert len(vault.get(1, 5, where={"action": 3}, max_scan=0)) == 0
        assert len(vault.get(1, 0, where={"action": 3})) == 0
        assert len(vault.get(9, 5, where={"action": 3})) == 0 and vault.get(9, where={"action": 3}).exhausted
        assert len(vault.get(1, where={"scene": "nowhere"})) == len(vault.get(1, where={"action": []})) == 0
        assert vault.get(1, 2, where={"scene": ["cart", "nowhere"]})["item"].tolist() == [1994, 1997]
        vault.merge()
    for where, error in (
        ({"colour": 1}, seqvault.UnknownFieldError),
        ({"time": 1}, seqvault.UnknownFieldError),
        ({"scene": 1}, seqvault.SchemaError),
        ({"action": "click"}, seqvault.SchemaError),
    ):
        with pytest.raises(error):
            vault.get(1, where=where)
    with pytest.raises(seqvault.VaultError, match="max_scan goes with `where`"):
        vault.get(1, max_scan=5)


def test_where_tells_large_integers_apart(make):
    vault = make(Schema(fields=(Field("count", "uint64"), Field("item", "int64"))))
    counts = np.array([2**53, 2**53 + 1, 2**63 + 5, 2**64 - 1], np.uint64)
    vault.append({"user": [1] * 4, "time": [1, 2, 3, 4], "count": counts, "item": [2**53, 2**53 + 1, -1, 5]})
    for name in ("count", "item"):
        for wanted in (2**53 + 1, [2**53 + 1, *range(50)], np.array([2**53 + 1], np.uint64)):
            kept = vault.get(1, where={name: wanted})["time"].tolist()
            assert kept == [2] + [4] * (name == "item" and isinstance(wanted, list))
    assert vault.get(1, where={"count": [2**64 - 1, -1, 2**63 + 5]})["time"].tolist() == [3, 4]
    assert vault.get(1, where={"item": [-1, 2**64 - 1]})["time"].tolist() == [3]
    assert len(vault.get(1, where={"count": -1})) == 0


def test_where_on_floats_and_flags(make):
    vault = make(Schema(fields=(Field("price", "float16"), Field("score", "float32"), Field("clicked", "bool"))))
    prices = [0.5, float("inf"), float("nan"), 1.0]
    vault.append(
        {"user": [1] * 4, "time": [1, 2, 3, 4], "price": prices, "score": [0.1] * 4, "clicked": [True, False] * 2}
    )
    assert vault.get(1, where={"price": [0.5, 1]})["time"].tolist() == [1, 4]
    assert vault.get(1, where={"price": 70_000.0})["time"].tolist() == [], "it fits no float16"
    assert vault.get(1, where={"price": float("inf")})["time"].tolist() == [2]
    assert vault.get(1, where={"score": 0.1, "clicked": True})["time"].tolist() == [1, 3], "0.1 as the field holds it"
    for where in ({"clicked": 1}, {"price": True}, {"price": "1"}, {"clicked": None}):
        with pytest.raises(seqvault.SchemaError):
            vault.get(1, where=where)


# Retention, snapshots.


def test_retention_by_count(make):
    vault = make(ITEMS)
    vault.append(events([1] * 10 + [2]))
    vault.retain(events=3)
    assert len(items(vault, 1)) == 10, "merges enforce it"
    vault.merge()
    assert items(vault, 1) == [7, 8, 9] and items(vault, 2) == [10] and vault.num_events == 4
    vault.append(events([1], 5))
    vault.append(events([1], 50))
    assert items(vault, 1) == [5, 7, 8, 9, 50]
    vault = reopened(vault)
    vault.merge()
    assert items(vault, 1) == [8, 9, 50], "it is remembered"
    vault.retain()
    vault.append(events([1] * 9, 60))
    vault.merge()
    assert len(items(vault, 1)) == 12
    for wrong in ({"events": 0}, {"age": -1}, {"events": 1.5}, {"events": True}):
        with pytest.raises(seqvault.VaultError, match="retention"):
            vault.retain(**wrong)
    vault.close()


def test_retention_by_age_counts_from_the_newest_event(make):
    vault = make(ITEMS)
    vault.append({"user": [1, 1, 1, 2], "time": [100, 150, 199, 120], "item": [0, 1, 2, 3]})
    vault.retain(age=50)
    vault.merge()
    assert items(vault, 1) == [1, 2], "younger than 50: 150 is 49 before the newest"
    assert items(vault, 2) == [] and len(vault) == 1
    vault.append({"user": [3], "time": [200], "item": [4]})
    vault.retain(events=1, age=50)
    vault.merge()
    assert items(vault, 1) == [2] and items(vault, 3) == [4]
    vault.append({"user": [3], "time": [10**9], "item": [5]})
    vault.merge()
    assert vault.users().tolist() == [3] and items(vault, 3) == [5]
    assert vault.verify() == []


def test_an_event_that_is_ahead_of_its_time_makes_no_other_one_old(make):
    now = int(time.time())
    vault = make(ITEMS)
    vault.retain(age=1000)
    times = [now - 5000, now - 100, now - 50, 4 * 10**9]
    vault.append({"user": [1, 1, 2, 3], "time": times, "item": [0, 1, 2, 3]})
    vault.merge()
    assert items(vault, 1) == [1] and items(vault, 2) == [2] and items(vault, 3) == [3]


def test_background_merges_apply_retention(make):
    vault = make(ITEMS, WriterOptions(tail_bytes=4000, merge_parts=1, merge_bytes_per_s=0))
    vault.retain(events=10)
    for number in range(300):
        vault.append(events([1, 2], 2 * number))
        newest = items(vault, 1, 10)
        assert newest == list(range(2 * number, -2, -2))[:10][::-1]
    vault.merge()
    assert items(vault, 1) == list(range(580, 600, 2)) and vault.num_events == 20


def test_a_snapshot_keeps_what_merges_and_retention_drop(make):
    vault = make(BRANDS)
    vault.append(events([1, 2] * 5, brand=["a", "b"] * 5))
    vault.flush()
    vault.append(events([1], 100, brand=["c"]))
    assert vault.snapshot("monday") == "monday"
    with seqvault.open(vault.path, at="monday") as pinned:
        vault.append(events([1, 3], 200, brand=["d", "e"]))
        vault.retain(events=1)
        vault.merge()
        assert items(vault, 1) == [200] and vault.num_events == 3
        vault.evolve(Schema(fields=(*BRANDS.fields, Field("scene", "int8", default=0))))
        name = vault.snapshot()
        vault.append(events([1], 300, brand=["f"], scene=[1]))
        vault.merge()
        for handle in (pinned, seqvault.open(vault.path, at="monday")):
            assert items(handle, 1) == [0, 2, 4, 6, 8, 100] and items(handle, 3) == []
            assert handle.get(1)["brand"].tolist() == ["a"] * 5 + ["c"]
            assert handle.next_sequence == 11 and handle.schema == BRANDS and len(handle) == 2
            handle.refresh()
            assert items(handle, 1, as_of=3) == [0, 2]
    latest = seqvault.open(vault.path, at=name)
    assert items(latest, 1) == [200] and latest.get(1)["scene"].tolist() == [0]
    assert vault.snapshots() == sorted(["monday", name])
    parts = len(os.listdir(os.path.join(vault.path, "parts")))
    del pinned, handle
    vault.drop_snapshot("monday")
    assert vault.snapshots() == [name] and len(os.listdir(os.path.join(vault.path, "parts"))) < parts
    for call in (lambda: vault.drop_snapshot("monday"), lambda: seqvault.open(vault.path, at="monday")):
        with pytest.raises(seqvault.VaultError, match="no snapshot 'monday'"):
            call()
    with pytest.raises(seqvault.VaultError, match="need a name of"):
        vault.snapshot("../manifest")
    assert items(latest, 1) == [200] and vault.verify() == []


def test_users_are_counted_in_parts_and_tails(make):
    """Each once, wherever they live, and none of those who are gone."""
    for schema, name in ((ITEMS, int), (Schema(user="string", fields=ITEMS.fields), "u{}".format)):
        vault = make(schema)

        def counted(expected: int, vault=vault) -> None:
            assert len(vault) == len(vault.users()) == expected
            assert len(seqvault.open(vault.path)) == expected

        counted(0)
        for start, stop, total in ((0, 5, 5), (3, 8, 8), (8, 9, 9), (0, 9, 9)):
            vault.append(events([name(user) for user in range(start, stop)], 10 * stop))
            counted(total)
            vault._appender.seal()
            vault.append(events([name(0), name(total)], 10 * stop + 5))
            assert len(vault) == len(vault.users()) == total + 1
            vault.forget([name(total)])
            counted(total)
            vault.flush()
            counted(total)
        vault.merge()
        counted(9)
        vault.append(events([name(1), name(50)], 500))
        counted(10)


def test_stats_count_what_can_be_read(make):
    """A merge leaves the old events of a user in an old part while most of that part is needed."""
    vault = make(ITEMS)
    vault.append(events(range(40)))
    vault.flush()
    vault.append(events(range(5), 40))
    assert vault.stats()["events"] == 45 and vault.stats()["tail_events"] == 5
    vault.merge()
    stats = vault.stats()
    assert stats["events"] == 45 == vault.gather(np.arange(40)).num_events and stats["superseded_events"] == 5
    assert vault.num_events == 50 and sum(count for *_, count in stats["lengths"]) == stats["users"] == 40


def test_a_snapshot_is_moved_only_when_that_is_said(make):
    vault = make(ITEMS)
    vault.append(events([1]))
    assert vault.snapshot("now") == vault.snapshot("now") == "now"
    vault.append(events([1], 1))
    with pytest.raises(seqvault.VaultError, match="has a snapshot 'now' already, of another state: give"):
        vault.snapshot("now")
    assert items(seqvault.open(vault.path, at="now"), 1) == [0]
    assert vault.snapshot("now", replace=True) == "now"
    assert items(seqvault.open(vault.path, at="now"), 1) == [0, 1]
    assert vault.snapshot() == vault.snapshot() and len(vault.snapshots()) == 2


def test_a_snapshot_without_a_name_moves_none_that_is_there(make):
    vault = make(ITEMS)
    vault.append(events([1] * 10))
    first = vault.snapshot()
    vault.retain(events=3)
    vault.merge()
    second = vault.snapshot()
    assert second == vault.snapshot() != first and vault.snapshots() == sorted([first, second])
    assert items(seqvault.open(vault.path, at=first), 1) == list(range(10))
    assert items(seqvault.open(vault.path, at=second), 1) == [7, 8, 9]


def test_readers_of_a_snapshot_keep_it_when_its_name_is_given_anew_or_dropped(make):
    vault = make(ITEMS)
    readers = []
    for number in range(3):
        vault.append(events([1], number))
        vault.snapshot("now", replace=True)
        readers.append(seqvault.open(vault.path, at="now", cache_bytes=0))
        if number:
            vault.drop_snapshot("now")
        vault.append(events([1], 10 + number))
        vault.merge()
    for number, expected in enumerate(([0], [0, 1, 10], [0, 1, 2, 10, 11])):
        assert items(readers[number], 1) == expected


# Forgetting.


@pytest.mark.parametrize("keys", [{}, {"event_key": "item", "duplicates": "drop"}], ids=["", "log kept"])
def test_a_forgotten_string_user_is_in_no_file(make, keys):
    schema = Schema(user="string", fields=(*BRANDS.fields, Field("pair", "float32", size=2)), **keys)
    vault = make(schema, WriterOptions(tail_bytes=1 << 20))
    secret, rest = "somebody-who-wants-to-go", "ann"

    def batch(start):
        users = np.array([secret, rest, secret], object)
        return events(users, start, brand=["a", "b", "c"], pair=np.zeros((3, 2)))

    def gone():
        return not files_with(vault.path, secret.encode())

    assert gone()
    vault.append(batch(0))
    assert files_with(vault.path, secret.encode()), "in the log"
    assert vault.forget([secret]) == 2 and gone() and vault.get(secret)["item"].tolist() == []
    vault.append(batch(10))
    vault.flush()
    vault.append(batch(20))
    vault.snapshot("pinned")
    vault.append(batch(30))
    vault.merge()
    vault.append(batch(40))
    vault.flush()
    vault.append(batch(50))
    readers = [seqvault.open(vault.path), seqvault.open(vault.path, at="pinned")]
    assert len(files_with(vault.path, secret.encode())) >= 3
    removed = vault.forget([secret, "a stranger"])
    assert removed >= 10 and gone()
    assert vault.get(secret).exhausted and len(vault.get(secret)) == 0 and secret not in vault.users().tolist()
    pinned = seqvault.open(vault.path, at="pinned")
    assert len(pinned.get(secret)) == 0 and pinned.get(rest)["item"].tolist() == [1, 11, 21]
    assert pinned.gather([secret, rest], fields=["pair", "item"]).columns["item"].tolist() == [1, 11, 21]
    assert vault.get(rest)["item"].tolist() == [1, 11, 21, 31, 41, 51]
    assert vault.forget([secret]) == 0 and vault.verify() == []
    del readers
    # It may come back.
    vault.append(batch(60))
    assert vault.get(secret)["item"].tolist() == [60, 62]
    vault = reopened(vault)
    assert vault.get(secret)["item"].tolist() == [60, 62] and vault.get(rest)["brand"].tolist() == ["b"] * 7
    vault.forget([secret])
    vault.close()
    assert gone() and vault.verify() == []


def test_forgotten_events_of_int_users_are_gone_with_all_that_they_held(make):
    """Pages are compressed; but the log is not, and neither is what does not shrink: look for the raw values."""
    vault = make(Schema(fields=(Field("item", "int64"), Field("noise", "uint8", size=64))))
    rng = np.random.default_rng(0)
    values = rng.integers(2**40, 2**62, 400)
    noise = rng.integers(0, 256, (400, 64), np.uint8)
    users = np.arange(400) % 4

    def traces() -> set[int]:
        found = set()
        for folder, _, names in os.walk(vault.path):
            for name in names:
                with open(os.path.join(folder, name), "rb") as file:
                    data = file.read()
                for row in np.flatnonzero(users == 1).tolist():
                    if values[row].tobytes() in data or noise[row].tobytes() in data:
                        found.add(row)
        return found

    for rows in np.array_split(np.arange(400), 8):
        vault.append({"user": users[rows], "time": rows, "item": values[rows], "noise": noise[rows]})
        if rows[0] % 100 == 0:
            vault.flush()
        if rows[0] == 150:
            vault.snapshot()
            vault.merge()
    assert len(traces()) > 50
    assert vault.forget(np.array([1, 2**40])) >= 100
    assert traces() == set()
    for user in (0, 2, 3):
        assert vault.get(user)["item"].tolist() == values[users == user].tolist()
    assert vault.users().tolist() != [] and 1 not in vault.users()
    assert vault.verify() == []


def test_forget_finds_its_user_among_equal_hashes_and_everywhere(make, monkeypatch):
    """All string users of one hash: only the named one goes."""
    for module in ("part_writer", "state", "administration"):
        monkeypatch.setattr(f"laser_jax.vault.{module}.hash_strings", lambda texts: np.full(len(texts), 7, np.uint64))
    monkeypatch.setattr("laser_jax.vault.state.hash_string", lambda text: 7)
    vault = make(Schema(user="string", fields=ITEMS.fields))
    for number in range(3):
        vault.append(events(np.array(["ann", "bob", "cem"], object), 10 * number))
        vault.flush()
    assert [vault.get(user)["item"].tolist()[0] for user in ("ann", "bob", "cem")] == [0, 1, 2]
    assert vault.forget(["bob", "dan"]) == 3
    for _ in range(2):
        assert vault.get("ann")["item"].tolist() == [0, 10, 20] and vault.get("cem")["item"].tolist() == [2, 12, 22]
        assert vault.gather(["bob", "cem", "dan"])[1]["item"].tolist() == [2, 12, 22]
        assert len(vault.get("bob")) == len(vault.get("dan")) == 0
        vault.merge()


def test_forget_of_everybody_leaves_an_empty_vault(make):
    vault = make(BRANDS)
    vault.append(events([1, 2, 1], brand=["a"] * 3))
    vault.flush()
    vault.append(events([1], brand=["a"]))
    vault.snapshot("all")
    assert vault.forget(vault.users()) == 4
    assert len(vault) == 0 and vault.num_events == 0 and vault.next_sequence == 4
    assert os.listdir(os.path.join(vault.path, "parts")) == []
    assert len(seqvault.open(vault.path, at="all")) == 0
    assert vault.append(events([1], 9, brand=["b"])) == 5
    assert items(reopened(vault), 1) == [9]


def test_reads_go_on_while_users_are_forgotten(make):
    """Files go from under reads that are under way: these are done again, and no damage is reported."""
    vault = make(Schema(fields=(*ITEMS.fields, Field("pair", "float32", size=2))), cache_bytes=0)
    users = np.concatenate([np.ones(300, np.int64), np.arange(2, 400)])
    vault.append({"user": users, "time": users, "item": users, "pair": np.zeros((len(users), 2))})
    vault.flush()
    failures, done, reads = [], [], []

    def read():
        while not done:
            try:
                assert len(vault.get(1, fields=["item", "pair"])) == 300
                assert vault.gather([1] * 40, fields=["pair"]).num_events == 40 * 300
                reads.append(1)
            except BaseException as error:
                failures.append(error)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for user in range(2, 20):
        vault.forget([user])
    done.append(True)
    for thread in threads:
        thread.join()
    assert not failures and len(reads) > 10


def test_a_reader_is_told_to_refresh_when_forgetting_took_its_files(make, other):
    vault = make(Schema(fields=(*ITEMS.fields, Field("pair", "float32", size=2))))
    vault.append({"user": [1, 2], "time": [1, 2], "item": [1, 2], "pair": np.ones((2, 2))})
    vault.flush()
    process, handle = other(vault.path), seqvault.open(vault.path, cache_bytes=0)
    assert ask(process, "len(vault)") == "2"
    vault.forget([1])
    for fields in ("['item']", "['pair']"):
        assert ask(process, f"vault.get(2, fields={fields})").startswith("UnavailableError: "), fields
        assert "call refresh()" in ask(process, f"vault.gather([2], fields={fields})"), fields
        with pytest.raises(seqvault.UnavailableError, match=r"call refresh\(\)"):
            handle.get(2, fields=eval(fields))
    assert ask(process, "vault.refresh() or vault.get(2, fields=['pair', 'item'])['item'].tolist()") == "[2]"
    handle.refresh()
    assert items(handle, 2) == [2] and items(handle, 1) == []


def test_a_dead_writers_worker_writes_nothing_any_more(make):
    """Its merge has read a user's events already; who forgets the user then must not see them come back."""
    vault = make(Schema(user="string", fields=ITEMS.fields))
    code = """
        import sys
        from laser_jax import vault as seqvault
        options = seqvault.WriterOptions(tail_bytes=4000, merge_bytes_per_s=4000, merge_parts=1)
        vault = seqvault.open(sys.argv[1], writing=options)
        number = 0
        while True:
            vault.append({"user": ["somebody"] * 10, "time": [number] * 10, "item": [number] * 10})
            number += 1
    """
    process = python(code, vault.path)
    folder = os.path.join(vault.path, "parts")
    deadline = time.monotonic() + 60
    while not os.path.isdir(folder) or len(os.listdir(folder)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.5)  # the merge is being slow now, with everything in memory
    process.kill()
    process.communicate()
    assert vault.forget(["somebody"]) > 0
    for _ in range(7):
        assert files_with(vault.path, b"somebody") == []
        time.sleep(0.5)


@pytest.mark.parametrize("said", [b"", b"\x10\0", (1000).to_bytes(8, "little") + b"\x80\x05half a task"])
def test_a_worker_ends_with_its_writer(said):
    """In the middle of a sentence too: a worker that stays would keep the writer's lock for ever."""
    process = python("from laser_jax.vault.worker import main; main()", stderr=subprocess.PIPE)
    try:
        process.stdin.buffer.write(said)
        process.stdin.close()
        assert process.wait(60) == 0
        assert process.stderr.read() == ""
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


# The cache of decoded histories.


def test_the_cache_changes_no_answer(make):
    writer = make(BRANDS, cache_bytes=1 << 20)
    rng = np.random.default_rng(0)
    plain = seqvault.open(writer.path, cache_bytes=0)
    cached = seqvault.open(writer.path, cache_bytes=1 << 16)

    def check():
        for handle in (plain, cached):
            handle.refresh()
        sequence = writer.next_sequence
        for _ in range(6):
            user, n = int(rng.integers(5)), int(rng.choice([0, 1, 3, 40, 500]))
            before = None if rng.random() < 0.4 else int(rng.integers(500))
            as_of = None if rng.random() < 0.4 else int(rng.integers(sequence + 1))
            fields = [None, ["item"], ["brand", "item"], ["time"]][rng.integers(4)]
            answers = []
            for handle in (plain, cached, writer):
                found = handle.get(user, n, before, as_of, fields)
                answers.append({name: found[name].tolist() for name in found.columns})
                answers[-1] |= {"as_of": found.as_of, "exhausted": found.exhausted}
            assert answers[0] == answers[1] == answers[2]

    for number in range(60):
        size = int(rng.integers(1, 60))
        moments = rng.integers(0, 500, size)
        columns = {"user": rng.integers(0, 5, size), "time": moments, "item": np.arange(size) + 1000 * number}
        writer.append(columns | {"brand": np.array([f"b{n % 7}" for n in range(size)], object)})
        if number % 7 == 6:
            writer.flush()
        if number % 20 == 19:
            writer.merge()
        if number == 45:
            writer.forget([3])
        check()
    stats = writer.stats()["cache"]
    assert stats["hits"] > 0 and stats["misses"] > 0 and stats["bytes"] <= stats["budget_bytes"]
    assert plain.stats()["cache"] is None


def test_the_cache_forgets_what_an_old_schema_read(make):
    vault = make(Schema(fields=(Field("item", "int32"),)), cache_bytes=1 << 20)
    vault.append(events([1, 1]))
    vault.flush()
    reader = seqvault.open(vault.path, cache_bytes=1 << 20)
    for handle in (vault, reader):
        assert [items(handle, 1) for _ in range(5)] == [[0, 1]] * 5
    vault.evolve(Schema(fields=(*ITEMS.fields, Field("scene", "int8", default=3))))
    reader.refresh()
    for handle in (vault, reader):
        found = handle.get(1)
        assert found["scene"].tolist() == [3, 3] and found["item"].dtype == np.int64
    vault.append(events([1], 2, scene=[4]))
    reader.refresh()
    for handle in (vault, reader):
        assert handle.get(1, before=9)["scene"].tolist() == [3, 3, 4]


def test_what_a_cache_shares_cannot_be_changed(make):
    vault = make(ITEMS, cache_bytes=1 << 20)
    vault.append(events([1, 1]))
    vault.flush()
    for _ in range(3):
        found = vault.get(1)
        assert found["item"].tolist() == [0, 1]
        if found["item"].flags.writeable:
            found["item"][:] = 9


# Schemas.


@pytest.mark.parametrize("killed", [True, False])
def test_evolution_behind_a_log_file_that_holds_no_event(make, monkeypatch, killed):
    """Of the old schema, made by a writer that was killed, or met a full disk, before its first event."""
    vault = make(ITEMS)
    vault.append(events([1]))
    vault.flush()
    begun = LogWriter._open_file

    def full(*arguments):
        begun(*arguments)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(LogWriter, "_open_file", full)
        with pytest.raises(seqvault.UnavailableError, match="No space left"):
            vault.append(events([1], 1))
    if killed:
        vault.close()
    vault.evolve(Schema(fields=(Field("item", "int64"), Field("x", "int8", default=4))))
    for x in (5, 6):
        vault.append(events([1], x, x=[x]))
        assert seqvault.open(vault.path).get(1)["x"].tolist() == vault.get(1)["x"].tolist() == [4, *range(5, x + 1)]
        vault = reopened(vault)
    assert vault.verify() == []
    vault.close()


def test_a_read_while_the_schema_changes_leaves_no_old_types_behind(make, monkeypatch):
    vault = make(Schema(fields=(Field("x", "int8"),)), cache_bytes=0)
    vault.append({"user": [1], "time": [0], "x": [1]})
    vault.flush()
    asked, new = vault_reader.Asked, Schema(fields=(Field("x", "int16"), Field("y", "int64", default=7)))

    def overtaken(fields):
        """Another thread changes the schema while a read that has begun looks what is asked for."""
        if vault.schema != new:
            vault.evolve(new)
        return asked(fields)

    monkeypatch.setattr(vault_reader, "Asked", overtaken)
    assert vault.get(1)["x"].tolist() == vault.get(1, fields=["x"])["x"].tolist() == [1]
    vault.append({"user": [1], "time": [1], "x": [300], "y": [8]})
    assert vault.get(1)["x"].tolist() == [1, 300] and vault.get(1)["y"].tolist() == [7, 8]
    assert vault.get(1, fields=["x"])["x"].tolist() == [1, 300]


def test_users_that_are_asked_for_once_do_not_fill_the_memory():
    """As by a scan of all users, or by ids that nobody has."""
    cache, state = HistoryCache(1 << 18), types.SimpleNamespace(stamp=1, epoch=1, manifest={"schemas": [1]})
    for user in range(50_000):
        assert cache.find(user, state) is None
        if user % 2:
            cache.keep(user, state, [(1, user, user)], {"time": np.zeros(100, np.int64)}, True, 8)
    assert len(cache._strangers) < 4000 and 0 < cache.stats()["users"] < 200


def test_evolution_adds_fields_and_widens_numbers(make):
    vault = make(Schema(fields=(Field("item", "int32"), Field("score", "float16"))))
    vault.append({"user": [1, 1], "time": [0, 1], "item": [-1, 2**31 - 1], "score": [0.1, 2.0]})
    wide = Schema(
        fields=(Field("item", "int64"), Field("score", "float64"), Field("count", "uint64", default=2**64 - 1))
    )
    vault.evolve(wide)
    vault.append({"user": [1], "time": [2], "item": [2**40], "score": [0.1], "count": [7]})
    widest = Schema(
        fields=(*wide.fields, Field("pair", "float32", size=2, default=0.5), Field("tag", "string", default="?"))
    )
    vault.evolve(widest)
    vault.append({"user": [1], "time": [3], "item": [0], "score": [0], "count": [0], "pair": [[1, 2]], "tag": ["x"]})
    low = float(np.float16(0.1))
    expected = {
        "item": [-1, 2**31 - 1, 2**40, 0],
        "score": [low, 2.0, 0.1, 0.0],
        "count": [2**64 - 1, 2**64 - 1, 7, 0],
        "pair": [[0.5, 0.5]] * 3 + [[1.0, 2.0]],
        "tag": ["?", "?", "?", "x"],
    }
    for move in (lambda: None, vault.flush, vault.close, vault.merge, lambda: vault.forget([2])):
        move()
        found = vault.get(1, fields=widest.names)
        assert {name: found[name].tolist() for name in widest.names} == expected
        assert found["item"].dtype == np.int64 and found["score"].dtype == np.float64
        batch = vault.gather([1, 2], fields=widest.names)[0]
        assert {name: batch[name].tolist() for name in widest.names} == expected
        assert vault.get(1, where={"count": 2**64 - 1, "tag": "?"})["time"].tolist() == [0, 1]
    assert vault.verify() == []
    for fields in (widest.fields[1:], (*widest.fields, Field("new", "int8"))):
        with pytest.raises(seqvault.SchemaError):
            vault.evolve(Schema(fields=fields))
    with pytest.raises(seqvault.SchemaError, match="int64 cannot become int32"):
        vault.evolve(Schema(fields=(Field("item", "int32"), *widest.fields[1:])))
    assert vault.schema == widest


def test_a_vault_of_version_1_is_written_on(tmp_path):
    path = tmp_path / "vault"
    shutil.copytree(os.path.join(GOLDEN, "int64"), path)
    with seqvault.open(path, writing=QUIET) as vault:
        names = vault.schema.names
        users = vault.users()
        old = {int(user): vault.get(user, 10**6, fields=names) for user in users}
        gone, *others = old
        count = vault.next_sequence
        newest = {name: old[others[0]][name][-1:] for name in names}
        late = {"user": [others[0]], "time": old[others[0]]["time"][-1:]} | newest
        assert vault.append(late) == count + 1
        with open(path / "manifest.json", encoding="utf-8") as file:
            assert json.load(file)["version"] == 3, "older code must not read a log-less half of it"
        vault.snapshot("first")
        assert vault.forget([gone]) == len(old[gone])
        vault.merge()
        for handle in (vault, seqvault.open(path, at="first"), seqvault.open(path)):
            assert len(handle.get(gone)) == 0
            for user in others:
                found = handle.get(user, 10**6, as_of=count, fields=names)
                assert {name: found[name].tolist() for name in names} == {
                    name: old[user][name].tolist() for name in names
                }
            assert len(handle.get(others[0], 10**6)) == len(old[others[0]]) + 1
        assert vault.verify() == []
