"""Any sequence of writing calls leaves a vault that reads like a plain dict of lists.

LASER_STATE_EXAMPLES=1000 runs that many sequences, chosen anew each time, some with work going on in the background.
"""

import dataclasses
import os
import shutil
import tempfile
import time

import numpy as np
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from laser_jax import vault as seqvault
from laser_jax.schema import Field, Schema

LONG = int(os.environ.get("LASER_STATE_EXAMPLES", "0"))
USERS = {"int64": [0, -3, 2**62, 7], "string": ["ann", "bøb", "a\0", "ann "]}
FIRST = (
    Field("item", "int64"),
    Field("action", "uint8"),
    Field("brand", "string"),
    Field("embedding", "float32", size=2),
)
SECOND = (*FIRST, Field("score", "float32", default=1.5), Field("scene", "string", default="home"))
#: Widens an integer and a float, adds a vector, an integer and a string without a value.
THIRD = (
    FIRST[0],
    Field("action", "int16"),
    FIRST[2],
    Field("embedding", "float64", size=2),
    Field("score", "float64", default=1.5),
    SECOND[5],
    Field("bits", "uint8", size=3, default=9),
    Field("count", "uint64", default=2**64 - 1),
    Field("note", "string", default=""),
)
FIELDS = (FIRST, SECOND, THIRD)

times = st.integers(0, 12) | st.integers(0, 400) | st.sampled_from([2**31 - 1, 2**32 - 10**9, 4102444799])
counts = st.sampled_from([0, 1, 2, 5, 60, 256, 1000])
places = st.integers(0, 3)


def value_of(field: Field, number: int):
    """What event `number` holds in a field; float32 holds every float of it."""
    values = {
        "item": number,
        "action": number % 5,
        "brand": ["", "ü☃", f"brand {number // 7}"][number % 3],
        "embedding": [number / 4, -number],
        "score": number / 8,
        "scene": ["home", "search", f"scene {number // 50}"][number % 3],
        "bits": [number % 256, 0, 7],
        "count": 2**63 + number,
        "note": f"note {number % 2}",
    }
    return values[field.name]


@dataclasses.dataclass
class View:
    """What a reader is to find: events [(time, sequence number, values)] of each user.

    Attributes:
      fields: of the schema. next_sequence: see Vault.
      torn: whether users were forgotten since: files of this view are gone, so that a read may be refused.
    """

    fields: tuple[Field, ...]
    next_sequence: int
    events: dict
    torn: bool = False

    def visible(self, user, before, as_of) -> list:
        """All events within the bounds, in order."""
        found = self.events.get(user, [])
        return sorted(
            (event for event in found if (before is None or event[0] < before) and (as_of is None or event[1] < as_of)),
            key=lambda event: event[:2],
        )

    def column(self, name: str, events: list) -> list:
        """Values of a column."""
        if name == "time":
            return [time for time, _, _ in events]
        field = next(field for field in self.fields if field.name == name)
        default = field.default if field.size is None else [field.default] * field.size
        return [values.get(name, default) for _, _, values in events]

    def copy(self) -> "View":
        """A view that stays as it is."""
        return View(self.fields, self.next_sequence, {user: list(found) for user, found in self.events.items()})


class VaultMachine(RuleBasedStateMachine):
    """One writing handle, one reading handle, snapshots; and the model."""

    def __init__(self):
        super().__init__()
        self.folder = tempfile.mkdtemp()
        self.path = os.path.join(self.folder, "vault")
        self.number = 0
        self.retention = {}
        self.snapshots: dict[str, View] = {}

    @initialize(
        user=st.sampled_from(["int64", "string"]),
        unit=st.sampled_from(["s", "ms"]),
        bulk=st.lists(st.tuples(places, times), max_size=30),
        cached=st.booleans(),
        background=st.booleans() if LONG else st.just(False),
    )
    def create(self, user, unit, bulk, cached, background):
        self.users = USERS[user]
        self.make = lambda fields: Schema(user=user, time_unit=unit, fields=fields)
        self.level = 0
        self.view = View(FIRST, 0, {})
        with seqvault.create(self.path, self.make(FIRST), buffer_events=20) as writer:
            writer.write(self.events(bulk))
        # In what order the bulk writer numbers events of different users is its own affair.
        self.bulk = self.view.next_sequence
        self.options = seqvault.WriterOptions(
            tail_bytes=6000, background=background, merge_parts=2, merge_bytes_per_s=0
        )
        self.open(cached)
        self.reader = seqvault.open(self.path, cache_bytes=0 if cached else 1 << 20)
        self.seen = self.view.copy()

    def teardown(self):
        try:
            if hasattr(self, "seen"):
                for user in [*self.users, self.unknown()]:
                    self.compare_get(self.vault, self.view, user, 10_000, None, None, None)
                    self.compare_get(self.reader, self.seen, user, 10_000, None, None, None)
                assert set(self.vault.users().tolist()) == {user for user in self.view.events if self.view.events[user]}
                assert self.vault.verify() == []
        finally:
            if hasattr(self, "vault"):
                self.vault.close()
            shutil.rmtree(self.folder)

    def unknown(self):
        return 10**15 if isinstance(self.users[0], int) else "nobody"

    def open(self, cached: bool) -> None:
        self.vault = seqvault.open(self.path, cache_bytes=1 << 20 if cached else 0, writing=self.options)

    def events(self, rows: list) -> dict:
        """Columns for events of (user's place, time), which are put into the model too."""
        events = {"user": [self.users[place] for place, _ in rows], "time": [time for _, time in rows]}
        if not isinstance(self.users[0], int):
            events["user"] = np.array(events["user"], object)
        numbers = range(self.number, self.number + len(rows))
        for field in self.view.fields:
            values = [value_of(field, number) for number in numbers]
            if field.type == "string":
                events[field.name] = np.array(values, object)
            elif field.size is None:
                events[field.name] = np.array(values, field.dtype)
            else:
                events[field.name] = np.array(values, field.dtype).reshape(len(rows), field.size)
        for (place, moment), number in zip(rows, numbers, strict=True):
            values = {field.name: value_of(field, number) for field in self.view.fields}
            self.view.events.setdefault(self.users[place], []).append((moment, self.view.next_sequence, values))
            self.view.next_sequence += 1
        self.number += len(rows)
        return events

    # Writing.

    @rule(rows=st.lists(st.tuples(places, times), max_size=8))
    def append(self, rows):
        events = self.events(rows)
        assert self.vault.append(events) == self.view.next_sequence == self.vault.next_sequence

    @rule(place=places, start=times, size=st.sampled_from([50, 256, 300, 600]), step=st.sampled_from([0, 1, -1]))
    def append_many_of_one_user(self, place, start, size, step):
        rows = [(place, min(max(0, start + step * row), 4102444799)) for row in range(size)]
        assert self.vault.append(self.events(rows)) == self.view.next_sequence

    @rule(batches=st.lists(st.lists(st.tuples(places, times), min_size=1, max_size=4), min_size=1, max_size=4))
    def append_async(self, batches):
        promised = []
        for rows in batches:
            events = self.events(rows)
            promised.append((self.vault.append_async(events), self.view.next_sequence))
        for future, sequence in promised:
            assert future.result(60) == sequence

    @rule()
    def append_nonsense(self):
        """Refused whole: nothing of it is there."""
        good = self.view.copy()
        events = self.events([(0, 1), (1, 2)])
        self.view, self.number = good, self.number - 2
        events["time"] = [1, -2]
        try:
            self.vault.append(events)
        except seqvault.SchemaError:
            return
        raise AssertionError("a negative time was taken")

    @rule()
    def flush(self):
        self.vault.flush()

    @rule()
    def merge(self):
        self.vault.merge()
        now = int(time.time() * (1000 if self.vault.schema.time_unit == "ms" else 1))
        newest = min(now, max((event[0] for found in self.view.events.values() for event in found), default=0))
        for user, found in self.view.events.items():
            found = sorted(found, key=lambda event: event[:2])
            if "age" in self.retention:
                found = [event for event in found if newest - event[0] < self.retention["age"]]
            if "events" in self.retention:
                found = found[-self.retention["events"] :]
            self.view.events[user] = found

    # Merges in the background would apply it at some moment or other.
    @precondition(lambda self: not self.options.background)
    @rule(events=st.none() | st.sampled_from([1, 3, 300]), age=st.none() | st.sampled_from([1, 10, 300]))
    def retain(self, events, age):
        self.vault.retain(events, age)
        self.retention = {name: value for name, value in (("events", events), ("age", age)) if value is not None}

    @rule(chosen=st.lists(places, max_size=2), stranger=st.booleans())
    def forget(self, chosen, stranger):
        users = [self.users[place] for place in chosen] + [self.unknown()] * stranger
        removed = self.vault.forget(users if users or not isinstance(self.users[0], int) else np.zeros(0, np.int64))
        gone = 0
        for user in set(users):
            gone += len(self.view.events.pop(user, []))
            for pinned in self.snapshots.values():
                pinned.events.pop(user, None)
        assert removed >= gone
        self.seen.torn = True

    @rule(name=st.none() | st.sampled_from(["one", "two.v2"]))
    def snapshot(self, name):
        given = self.vault.snapshot(name, replace=True)
        assert name is None or given == name
        self.snapshots[given] = self.view.copy()
        assert self.vault.snapshots() == sorted(self.snapshots)

    @precondition(lambda self: self.snapshots)
    @rule(data=st.data())
    def drop_snapshot(self, data):
        name = data.draw(st.sampled_from(sorted(self.snapshots)))
        self.vault.drop_snapshot(name)
        del self.snapshots[name]
        assert self.vault.snapshots() == sorted(self.snapshots)

    @precondition(lambda self: self.level < 2)
    @rule()
    def evolve(self):
        self.read_everything_often(10_000, False)
        self.level += 1
        self.view.fields = FIELDS[self.level]
        self.vault.evolve(self.make(self.view.fields))
        self.read_everything_often(10_000, False)

    @rule(cached=st.booleans(), check=st.booleans())
    def reopen(self, cached, check):
        self.vault.close()
        if check:
            assert seqvault.open(self.path).verify() == []
        self.open(cached)
        assert self.vault.next_sequence == self.view.next_sequence

    @rule()
    def close(self):
        """Reading goes on, and the next writing call takes the lock again."""
        self.vault.close()

    @rule()
    def refresh(self):
        self.reader.refresh()
        self.seen = self.view.copy()
        assert self.reader.next_sequence == self.seen.next_sequence

    # Reading.

    @rule(n=st.sampled_from([3, 300, 10_000]), both=st.booleans())
    def read_everything_often(self, n, both):
        """So that it lies in a cache."""
        for user in self.users * 3:
            self.compare_get(self.vault, self.view, user, n, None, None, None)
            if both:
                self.compare_get(self.reader, self.seen, user, n, None, None, None)

    @rule(place=st.integers(0, 4), n=counts, data=st.data())
    def get(self, place, n, data):
        vault, view = self.handle(data)
        user = [*self.users, self.unknown()][place]
        before, as_of = data.draw(st.none() | times), self.draw_as_of(data, view)
        fields = self.draw_fields(data, view)
        self.compare_get(vault, view, user, n, before, as_of, fields)

    @rule(asked=st.lists(st.integers(0, 4), max_size=6), n=counts, data=st.data())
    def gather(self, asked, n, data):
        vault, view = self.handle(data)
        users = [[*self.users, self.unknown()][place] for place in asked]
        each = data.draw(st.booleans())
        if each:
            before = [data.draw(times) for _ in users]
            as_of = [self.draw_as_of(data, view, none=False) for _ in users]
        else:
            before = [data.draw(st.none() | times)] * len(users)
            as_of = [self.draw_as_of(data, view)] * len(users)
        fields = self.draw_fields(data, view)
        bounds = [np.array(bound, np.int64) if each else next(iter(bound), None) for bound in (before, as_of)]
        keys = np.array(users, np.int64) if isinstance(self.users[0], int) else users
        try:
            found = vault.gather(keys, bounds[0], n, bounds[1], fields)
        except seqvault.UnavailableError:
            assert view.torn
            return
        assert len(found) == len(users) and found.as_of == view.next_sequence
        for position, user in enumerate(users):
            expected = view.visible(user, before[position], as_of[position])
            self.compare(view, found[position], expected[max(0, len(expected) - n) :], fields)

    @rule(place=places, n=counts, data=st.data())
    def get_where(self, place, n, data):
        vault, view = self.handle(data)
        user = self.users[place]
        before, as_of = data.draw(st.none() | times), self.draw_as_of(data, view)
        limit = data.draw(st.none() | st.sampled_from([0, 1, 4, 300]))
        conditions = {"action": data.draw(st.integers(0, 6) | st.lists(st.integers(0, 6), max_size=3))}
        if data.draw(st.booleans()):
            conditions["brand"] = data.draw(st.sampled_from(["", ["ü☃", "brand 0"], "no such brand"]))
        if data.draw(st.booleans()) and len(view.fields) > len(FIRST):
            conditions["scene"] = data.draw(st.sampled_from(["home", ["search", "scene 0"]]))
        fields = self.draw_fields(data, view)
        try:
            found = vault.get(user, n, before, as_of, fields, where=conditions, max_scan=limit)
        except seqvault.UnavailableError:
            assert view.torn
            return
        total = view.visible(user, before, as_of)
        assert len(found) <= n and len(found) <= found.scanned <= min(
            len(total), len(total) if limit is None else limit
        )
        looked_at = total[len(total) - found.scanned :]
        kept = [
            event
            for event in looked_at
            if all(
                view.column(name, [event])[0] in (wanted if isinstance(wanted, list) else [wanted])
                for name, wanted in conditions.items()
            )
        ]
        self.compare(view, found, kept[max(0, len(kept) - n) :], fields)
        assert found.exhausted or len(found) == n or found.scanned == limit < len(total)
        assert not found.exhausted or found.scanned == len(total)

    @precondition(lambda self: self.snapshots)
    @rule(data=st.data(), n=counts)
    def read_snapshot(self, data, n):
        name = data.draw(st.sampled_from(sorted(self.snapshots)))
        view = self.snapshots[name]
        pinned = seqvault.open(self.path, at=name)
        assert pinned.next_sequence == view.next_sequence
        assert pinned.schema.names == tuple(field.name for field in view.fields)
        before, as_of = data.draw(st.none() | times), self.draw_as_of(data, view)
        for user in self.users:
            self.compare_get(pinned, view, user, n, before, as_of, None)
        keys = np.array(self.users) if isinstance(self.users[0], int) else self.users
        batch = pinned.gather(keys, before, n, as_of, pinned.schema.names)
        for position, user in enumerate(self.users):
            expected = view.visible(user, before, as_of)
            self.compare(view, batch[position], expected[max(0, len(expected) - n) :], pinned.schema.names)

    def handle(self, data):
        """One of the two handles, and what it is to see."""
        if data.draw(st.integers(0, 3), "handle"):
            return self.vault, self.view
        return self.reader, self.seen

    def draw_as_of(self, data, view, none=True):
        numbers = st.integers(self.bulk, view.next_sequence + 1) | st.just(0)
        return data.draw(st.none() | numbers if none else numbers)

    def draw_fields(self, data, view):
        names = [field.name for field in view.fields]
        return data.draw(st.sampled_from([None, names, ["time"], ["embedding"], ["brand", "action"], names[::-1]]))

    def compare_get(self, vault, view, user, n, before, as_of, fields) -> None:
        try:
            found = vault.get(user, n, before, as_of, fields)
        except seqvault.UnavailableError:
            assert view.torn
            return
        bound = view.next_sequence if as_of is None else min(as_of, view.next_sequence)
        assert found.as_of == bound
        expected = view.visible(user, before, as_of)
        self.compare(view, found, expected[max(0, len(expected) - n) :], fields)
        assert not found.exhausted or len(found) == len(expected)
        assert found.exhausted or len(found) == n

    def compare(self, view, found, expected, fields) -> None:
        if fields is None:
            fields = [field.name for field in view.fields if field.size is None]
        assert set(found.columns) == {"time", *fields}
        assert len(found) == len(expected)
        for name in found.columns:
            assert found[name].tolist() == view.column(name, expected), name
            if name != "time":
                dtype = next(field.dtype for field in view.fields if field.name == name)
                assert found.columns[name].dtype == dtype, name


VaultMachine.TestCase.settings = settings(
    max_examples=LONG or 25,
    stateful_step_count=60 if LONG else 30,
    derandomize=not LONG,
    deadline=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
TestVault = VaultMachine.TestCase
