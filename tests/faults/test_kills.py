"""A writer and its merger killed by SIGKILL at random moments, on one vault all along, while others read.

LASER_KILLS=200 kills that often and prints what was seen (run with -s).
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from laser_jax import vault as seqvault
from laser_jax.schema import Field, Schema

KILLS = int(os.environ.get("LASER_KILLS", "12"))
USERS = 7
#: Seconds in which a writer that was not killed must get something done.
PATIENCE = 60
#: Batches in which a guest has an event.
GUEST_BATCHES = 5
FIELDS = (Field("item", "int64"), Field("brand", "string"), Field("embedding", "float32", size=2))


# Which events make up batch k, known to the writer and to who checks: those from first_of(k) to first_of(k + 1) - 1.
# These functions take numbers, or arrays of them.


def first_of(k):
    """First event of a batch."""
    return 5 * k + k * (k - 1) // 2 % 4


def user_of(event):
    """The number of the user whose event it is."""
    return event * 7919 % 1000003 % USERS


def time_of(event):
    """When it happened: often late, often at the time of another."""
    return event // 3 + event * 7919 % 50


def brand_of(event: int) -> str:
    """Its string; new ones come all the time."""
    return f"brand {event // 20}"


def guest_of(k: int) -> str:
    """The user, to be forgotten one day, whose event is the first of batch k in place of the one that user_of says."""
    return f"guest-{k // GUEST_BATCHES:06d}-of-the-house"


def batch_of(k: int, guests: bool) -> dict:
    """Columns of a batch."""
    events = np.arange(first_of(k), first_of(k + 1))
    users = [f"user {number}" for number in user_of(events).tolist()]
    if guests:
        users[0] = guest_of(k)
    return {
        "user": np.array(users, object),
        "time": time_of(events),
        "item": events,
        "brand": np.array([brand_of(event) for event in events.tolist()], object),
        "embedding": np.stack([events, -events], axis=1).astype(np.float32),
    }


def write(path: str, batch: int, tail_bytes: int, merge_parts: int, guests: bool) -> None:
    """Appends batch after batch, and tells about it, until it is killed."""
    lock = threading.Lock()

    def say(*words):
        with lock:
            print(*words, flush=True)

    say("ready")
    options = seqvault.WriterOptions(tail_bytes=tail_bytes, merge_parts=merge_parts, merge_bytes_per_s=0)
    vault = seqvault.open(path, cache_bytes=0, writing=options)

    def keep_house():
        choose = random.Random(batch)
        oldest = batch // GUEST_BATCHES
        while True:
            job = choose.choice(["merge", "flush", "forget", "forget", "snapshot"])
            try:
                if job == "merge":
                    vault.merge()
                elif job == "flush":
                    vault.flush()
                elif job == "forget" and batch >= GUEST_BATCHES * (oldest + 1):
                    vault.forget([guest_of(GUEST_BATCHES * oldest)])
                    say("forgot", oldest)
                    oldest += 1
                elif job == "snapshot":
                    # Twice, perhaps, before the next batch: that may wait for room.
                    known, name = batch - 1, f"after-{batch:09d}-{time.time_ns()}"
                    vault.snapshot(name)
                    say("pinned", name, known)
                    for old in vault.snapshots()[:-3]:
                        say("unpinning", old)
                        vault.drop_snapshot(old)
            except seqvault.UnavailableError as error:
                say("refused", repr(error))

    if guests:
        threading.Thread(target=keep_house, daemon=True).start()
    while True:
        say("begin", batch)
        try:
            sequence = vault.append(batch_of(batch, guests))
        except seqvault.UnavailableError as error:
            # Nothing of it was taken: the next try must not write it twice.
            say("refused", repr(error))
            time.sleep(0.01)
            continue
        say("done", batch, sequence)
        batch += 1


class Writer:
    """A writing process, and what it said."""

    def __init__(self, path, batch: int, tail_bytes: int, merge_parts: int, guests: bool, record):
        arguments = [str(value) for value in (path, batch, tail_bytes, merge_parts, int(guests))]
        self.process = subprocess.Popen(
            [sys.executable, __file__, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.ready, self.busy, self.forgot = threading.Event(), threading.Event(), threading.Event()
        self.errors = ""
        self._record = record
        self._threads = [threading.Thread(target=target) for target in (self._listen, self._complain)]
        for thread in self._threads:
            thread.start()

    def _listen(self) -> None:
        for line in self.process.stdout:
            if not line.endswith("\n"):
                return  # cut by the kill
            word, *rest = line.split()
            self.ready.set()
            if word == "done":
                self.busy.set()
            if word == "forgot":
                self.forgot.set()
            self._record(word, rest)

    def _complain(self) -> None:
        self.errors = self.process.stderr.read()

    def workers(self) -> list[int]:
        """Processes that it started."""
        found = []
        for task in os.listdir(f"/proc/{self.process.pid}/task"):
            with contextlib.suppress(FileNotFoundError):  # a thread that has ended
                with open(f"/proc/{self.process.pid}/task/{task}/children", encoding="ascii") as file:
                    found.extend(map(int, file.read().split()))
        return found

    def kill(self) -> None:
        """SIGKILL; afterwards all that it said is known."""
        alive = self.process.poll() is None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        for thread in self._threads:
            thread.join(PATIENCE)
            assert not thread.is_alive(), "a process that the writer started outlives it"
        self.process.stdout.close()
        self.process.stderr.close()
        assert alive and not self.errors, f"the writer died by itself, or one of its threads did:\n{self.errors}"


class Truth:
    """What was acknowledged, and whether a reader finds just that. Batches come one after the other."""

    def __init__(self, guests: bool):
        self.guests = guests
        self.lock = threading.Lock()
        self.begun = self.acknowledged = -1
        #: Batches of killed writers that nobody was told of: there whole, or not at all.
        self.unsure: set[int] = set()
        self.sequences: dict[int, int] = {}
        self.forgotten: set[int] = set()
        self.pinned: dict[str, int] = {}
        self.refused: list[str] = []

    def record(self, word: str, rest: list[str]) -> None:
        """Takes in a line of a writer."""
        with self.lock:
            if word == "begin":
                self.begun = max(self.begun, int(rest[0]))
            elif word == "done":
                self.acknowledged = max(self.acknowledged, int(rest[0]))
                # Appended once more it changes nothing, and its number is that of all that came meanwhile.
                self.sequences.setdefault(int(rest[0]), int(rest[1]))
                self.unsure.discard(int(rest[0]))
            elif word == "forgot":
                self.forgotten.add(int(rest[0]))
            elif word == "pinned":
                self.pinned[rest[0]] = int(rest[1])
            elif word == "unpinning":
                self.pinned.pop(rest[0], None)
            elif word == "refused":
                self.refused.append(" ".join(rest))

    def known(self) -> tuple[int, set[int]]:
        """What a read that begins now must find: all batches up to a number, except perhaps some."""
        with self.lock:
            return self.acknowledged, set(self.unsure)

    def check(self, vault, least: int, unsure: set[int], most: int | None = None) -> int:
        """Everything that a handle sees: whole batches, all of them up to `least`, none beyond `most`.

        Returns:
          The newest batch.
        """
        users = [f"user {number}" for number in range(USERS)]
        batch = vault.gather(users, n=10**6, fields=vault.schema.names)
        found = [self.events_of(user, batch[user]) for user in range(USERS)]
        events = np.sort(np.concatenate(found))
        newest = self.check_batches(events, least, unsure, most)
        user = random.randrange(USERS)
        single = vault.get(users[user], 10**6, as_of=batch.as_of, fields=vault.schema.names)
        assert self.events_of(user, single).tolist() == found[user].tolist(), "get and gather differ"
        return newest

    def check_batches(self, events: np.ndarray, least: int, unsure: set[int], most: int | None = None) -> int:
        """Sorted events are those of whole batches, with no hole but for batches that nobody was told of."""
        assert (np.diff(events) > 0).all(), "an event is there twice"
        last = int(events[-1]) if len(events) else -1
        starts = first_of(np.arange(last + 2))
        newest = int(np.searchsorted(starts, last, side="right")) - 1
        batch = np.searchsorted(starts, events, side="right") - 1
        # With guests the first event of a batch is another user's.
        assert not self.guests or not (events == starts[batch]).any(), "an event of another user"
        found = np.bincount(batch, minlength=newest + 1)
        torn = np.flatnonzero((found > 0) & (found < np.diff(starts)[: newest + 1] - self.guests))
        assert not len(torn), f"batches {torn[:9]} are torn"
        missing = set(np.flatnonzero(found == 0).tolist()) | set(range(newest + 1, least + 1))
        assert missing <= unsure, f"acknowledged batches are lost: {sorted(missing - unsure)[:9]}"
        assert most is None or newest <= most, "an event that nobody wrote"
        with self.lock:
            # Whoever reads from now on must find those of the unsure ones that were there.
            self.unsure &= missing | set(range(newest + 1, self.begun + 1))
        return newest

    @staticmethod
    def events_of(user: int, history) -> np.ndarray:
        """The events of a history, if each is what it was when it was written, and all are in order."""
        items = history["item"]
        brands = np.array([brand_of(event) for event in range(0, int(items.max(initial=0)) + 1, 20)], object)
        assert (user_of(items) == user).all(), f"events of another user than {user}"
        assert (history["time"] == time_of(items)).all(), f"user {user}: wrong time"
        assert (history["brand"] == brands[items // 20]).all(), f"user {user}: wrong brand"
        assert (history["embedding"] == np.stack([items, -items], axis=1)).all(), f"user {user}: wrong embedding"
        # Sequence numbers are in the order of items.
        assert (np.lexsort((items, history["time"])) == np.arange(len(items))).all(), f"user {user}: out of order"
        return items


class Reader(threading.Thread):
    """Reads all the time, through one handle that is refreshed and through new ones."""

    def __init__(self, path, truth: Truth):
        super().__init__()
        self.path, self.truth = path, truth
        self.stopped = False
        self.failure: BaseException | None = None
        self.reads = 0

    def run(self) -> None:
        """Until told to stop, or something is wrong."""
        try:
            vault = seqvault.open(self.path)
            while not self.stopped:
                if random.random() < 0.2:
                    vault = seqvault.open(self.path, cache_bytes=random.choice([0, 1 << 20]))
                try:
                    self.look(vault)
                except seqvault.UnavailableError:
                    # Only forgetting takes files from under a reader.
                    if not self.truth.guests:
                        raise
                    vault = seqvault.open(self.path)
                self.reads += 1
                time.sleep(0.01)
        except BaseException as error:
            self.failure = error

    def look(self, vault) -> None:
        """One round of reading."""
        truth = self.truth
        least, unsure = truth.known()
        with truth.lock:
            forgotten = set(truth.forgotten)
            asked = random.choice(sorted(truth.sequences)) if truth.sequences else None
        vault.refresh()
        truth.check(vault, least, unsure)
        if asked is not None:
            # As of an acknowledged batch: all up to it, and nothing after it.
            batch = vault.gather([f"user {number}" for number in range(USERS)], n=10**6, as_of=truth.sequences[asked])
            truth.check_batches(np.sort(batch.columns["item"]), asked, unsure, asked)
        for guest in forgotten:
            assert len(vault.get(guest_of(GUEST_BATCHES * guest))) == 0, "a forgotten user is back"


def holds(path, text: bytes) -> list[str]:
    """Files below a directory that hold some bytes."""
    found = []
    for folder, _, names in os.walk(path):
        for name in names:
            with open(os.path.join(folder, name), "rb") as file:
                if text in file.read():
                    found.append(os.path.join(folder, name))
    return found


def wait(event: threading.Event, writer: Writer, what: str) -> None:
    """Waits for a sign of life."""
    if not event.wait(PATIENCE):
        writer.kill()
        raise AssertionError(f"the writer {what}:\n{writer.errors}")


@pytest.mark.parametrize("kind", ["retrying", "housekeeping"])
def test_nothing_acknowledged_is_lost(tmp_path, kind, capsys):
    """`retrying`: each writer appends the last two batches of the one before again, which must change nothing.

    `housekeeping`: merges, snapshots and forgetting go on beside the appends, and are killed as well.
    """
    guests = kind == "housekeeping"
    duplicates = {} if guests else {"event_key": "item", "duplicates": "drop"}
    path = tmp_path / "vault"
    with seqvault.create(path, Schema(user="string", fields=FIELDS, **duplicates)):
        pass
    truth = Truth(guests)
    reader = Reader(path, truth)
    reader.start()
    chance = random.Random(kind)
    kills = workers_killed = 0
    try:
        while kills < KILLS // 2:
            first = truth.begun + 1 if guests else max(truth.begun - 1, 0)
            tail_bytes = chance.choice([2000, 10_000, 100_000])
            writer = Writer(path, first, tail_bytes, chance.choice([1, 4]), guests, truth.record)
            try:
                wait(writer.ready, writer, "did not start")
                if chance.random() < 0.25:
                    time.sleep(chance.uniform(0, 0.1))  # while it opens the vault
                else:
                    wait(writer.busy, writer, "appends nothing")
                    if guests and chance.random() < 0.7:
                        wait(writer.forgot, writer, "forgets nobody")
                    time.sleep(chance.uniform(0, 0.5))
                if chance.random() < 0.4 and writer.busy.is_set():
                    for worker in writer.workers():
                        os.kill(worker, signal.SIGKILL)
                        workers_killed += 1
                        kills += 1
                    before = truth.acknowledged
                    writer.busy.clear()
                    wait(writer.busy, writer, "stands still since its worker was killed")
                    assert truth.acknowledged > before
                    time.sleep(chance.uniform(0, 0.3))
            finally:
                writer.kill()
            kills += 1
            if truth.begun > truth.acknowledged:
                truth.unsure.add(truth.begun)
            assert reader.failure is None, writer.errors
            forgotten = [guest_of(GUEST_BATCHES * guest) for guest in sorted(truth.forgotten)[-3:]]
            assert not [guest for guest in forgotten if holds(path, guest.encode())], "a forgotten name is still there"
            for name, batch in truth.pinned.items():
                pinned = seqvault.open(path, at=name)
                truth.check(pinned, batch, truth.known()[1])
                assert pinned.gather(forgotten).num_events == 0
    finally:
        reader.stopped = True
        reader.join()
    if reader.failure is not None:
        raise reader.failure
    with seqvault.open(path) as vault:
        vault.merge()
        truth.check(vault, *truth.known(), truth.begun)
        assert vault.verify() == []
        for guest in truth.forgotten:
            assert len(vault.get(guest_of(GUEST_BATCHES * guest))) == 0
        assert vault.state.parts.keys() == set(os.listdir(path / "parts")) or vault.snapshots()
    assert truth.acknowledged > KILLS and reader.reads > KILLS and bool(truth.forgotten) == guests
    with capsys.disabled():
        if "LASER_KILLS" in os.environ:
            print(
                f"\n{kind}: {kills} kills ({workers_killed} of them of workers), {truth.acknowledged + 1} batches with "
                f"{first_of(truth.acknowledged + 1)} events acknowledged, {len(truth.forgotten)} users forgotten, "
                f"{len(truth.refused)} calls refused, {reader.reads} reads: 0 lost, 0 torn, 0 wrong"
            )


if __name__ == "__main__":
    write(sys.argv[1], *map(int, sys.argv[2:]))
