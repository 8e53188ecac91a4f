"""What a read works on: parts, index and tails of one moment. It never changes; a new one takes its place."""

import dataclasses
import functools
from typing import Any

import numpy as np

from laser_jax.schema import Schema
from laser_jax.vault import index_kernels
from laser_jax.vault.dictionary import Dictionary
from laser_jax.vault.errors import CorruptionError
from laser_jax.vault.files import Folder
from laser_jax.vault.format import DICTIONARIES
from laser_jax.vault.hashing import hash_string, hash_strings
from laser_jax.vault.index import PageTable, UserIndex, spans
from laser_jax.vault.manifest import HeldManifest
from laser_jax.vault.part import Part
from laser_jax.vault.storage import KvStorage, LocalStorage
from laser_jax.vault.tail import Tail

#: User tables that a lookup may have to look into before they are built anew as one.
_MOST_INDEXES = 6
#: Pages of removed parts in the page table, as a share of all, before it is built anew.
_MOST_GARBAGE = 0.5


@dataclasses.dataclass(frozen=True)
class State:
    """One moment of a vault.

    Attributes:
      held: the manifest, locked.
      schema: of today.
      parts: by name, in order of their numbers.
      by_number: the same by number.
      table: pages of all parts.
      indexes: users of all parts, in one or a few tables.
      tails: events in no part, older before newer.
      epoch: changes whenever pages are numbered anew.
      stamp: changes with the parts.
    """

    held: HeldManifest
    schema: Schema
    parts: dict[str, Part]
    by_number: dict[int, Part]
    table: PageTable
    indexes: tuple[UserIndex, ...]
    tails: tuple[Tail, ...]
    epoch: int
    stamp: int

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest's content."""
        return self.held.content

    @functools.cached_property
    def parts_end(self) -> int:
        """Every event in a part has a smaller sequence number."""
        return self.held.content["next_sequence"]

    @property
    def next_sequence(self) -> int:
        """Sequence number that the next event gets: every event that may be seen has a smaller one."""
        return self.tails[-1].next_sequence if self.tails else self.parts_end

    def with_tails(self, tails: tuple[Tail, ...]) -> "State":
        """The same parts with other tails."""
        return dataclasses.replace(self, tails=tails)

    def entries(self, user: Any) -> list[tuple[int, int, int]]:
        """(part number, first page, one past the last page) in every part that counts for a user, newest part first."""
        numeric = self.schema.user == "int64"
        hashed = user if numeric else signed_hash(user)
        if numeric and len(self.indexes) == 1:
            # As most often; the rest would find the same.
            count, *entry = self.indexes[0].first_entry(user)
            if count < 2:
                return [tuple(entry)] if count and entry[0] in self.by_number else []
        found = []
        for index in self.indexes:
            position = index.find_one(user, hashed)
            if position >= 0:
                for entry in range(*index.entry_start[position : position + 2].tolist()):
                    row = (index.number[entry], index.first_page[entry], index.end_page[entry], index.covers[entry])
                    found.append(tuple(map(int, row)))
        reach = np.iinfo(np.int64).max
        alive = []
        for number, first, end, covers in sorted(found, reverse=True):
            if number < reach and number in self.by_number:
                alive.append((number, first, end))
                reach = min(reach, covers)
        return alive

    def entries_of(self, users: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The same for many users: request, part number, first page, end page, int64 [E], by (request, number)."""
        hashed = users if self.schema.user == "int64" else hash_strings(users)
        rows = []
        for index in self.indexes:
            position = index.find(users, hashed)
            known = np.flatnonzero(position >= 0)
            start = index.entry_start[position[known]]
            counts = index.entry_start[position[known] + 1] - start
            entry = spans(start, counts)
            columns = (index.number, index.first_page, index.end_page, index.covers)
            rows.append((np.repeat(known, counts), *(column[entry].astype(np.int64) for column in columns)))
        if not rows:
            empty = np.zeros(0, np.int64)
            return empty, empty, empty, empty
        request, number, first, end, covers = (np.concatenate(column) for column in zip(*rows, strict=True))
        if len(self.indexes) > 1:
            order = np.lexsort((number, request))
            request, number, first, end, covers = (column[order] for column in (request, number, first, end, covers))
        lost = ~np.isin(number, np.fromiter(self.by_number, np.int64, len(self.by_number)))
        alive = np.empty(len(request), bool)
        index_kernels.alive_entries(request, number, np.where(lost, number, covers), alive)
        alive &= ~lost
        return request[alive], number[alive], first[alive], end[alive]

    def whole_index(self) -> UserIndex:
        """The users of all parts in one table; made anew unless there is only one."""
        if len(self.indexes) == 1:
            return self.indexes[0]
        return UserIndex(list(self.parts.values()), self.table)

    def users(self) -> list[Any]:
        """Every user with an event, in no particular order."""
        known: dict[Any, None] = {}
        for part in self.parts.values():
            known.update(dict.fromkeys(part.users.all()))
            part.release_users()
        for tail in self.tails:
            known.update(dict.fromkeys(tail.users()))
        return list(known)

    def num_users(self) -> int:
        """Number of users with an event."""
        count = self._users_in_parts
        for place, tail in enumerate(self.tails):
            counted, fresh = self._users_in_tails.get(place, (0, 0))
            users = tail.users(counted)
            known = np.zeros(len(users), bool)
            known[self.entries_of(users if self.schema.user == "string" else np.array(users, np.int64))[0]] = True
            older = self.tails[:place]
            fresh += sum(
                not found and not any(user in tail for tail in older)
                for user, found in zip(users, known.tolist(), strict=True)
            )
            self._users_in_tails[place] = (counted + len(users), fresh)
            count += fresh
        return count

    @functools.cached_property
    def _users_in_tails(self) -> dict[int, tuple[int, int]]:
        """Of each tail how many users were counted, and how many of these are new: tails grow under a state."""
        return {}

    @functools.cached_property
    def _users_in_parts(self) -> int:
        numbers, count = np.fromiter(self.by_number, np.int64, len(self.by_number)), 0
        for place, index in enumerate(self.indexes):
            alive = index.users_of(numbers)
            count += len(alive)
            if place and len(alive):
                earlier = dataclasses.replace(self, indexes=self.indexes[:place], tails=())
                count -= len(np.unique(earlier.entries_of(index.keys_at(alive))[0]))
        return count


def signed_hash(user: str) -> int:
    """Hash of a string user as an int64."""
    value = hash_string(user)
    return value - (1 << 64) if value >> 63 else value


def build_state(
    storage: LocalStorage | KvStorage,
    held: HeldManifest,
    dictionaries: dict[str, Dictionary],
    before: State | None,
    tails: tuple[Tail, ...],
) -> State:
    """The state that a manifest describes; what an earlier state has in memory is used again.

    Args:
      storage: of the vault.
      held: the manifest.
      dictionaries: of the string fields; they grow by what the manifest adds.
      before: an earlier state, if there is one.
      tails: of the new state.

    Raises:
      CorruptionError, UnavailableError: a part or dictionary cannot be read.
    """
    manifest = held.content
    schemas = [Schema.from_json(schema) for schema in manifest["schemas"]]
    schema = Schema.from_json(manifest["schema"])
    known = before.parts if before else {}
    parts: dict[str, Part] = {}
    for entry in sorted(manifest["parts"], key=lambda entry: entry["name"]):
        parts[entry["name"]] = known.get(entry["name"]) or Part(storage, entry, schemas)
    _load_dictionaries(storage, manifest, dictionaries)
    new = [part for name, part in parts.items() if name not in known]
    by_number = {part.number: part for part in parts.values()}
    if len(by_number) < len(parts):
        raise CorruptionError(f"{storage.root}: two parts have one number")
    replaced = any(part.number in before.by_number for part in new) if before else False
    if before is not None and not replaced:
        table, indexes = before.table, before.indexes
        if new:
            table = table.extended(new)
            indexes = (*indexes, UserIndex(new, table))
        pages = sum(part.num_pages for part in parts.values())
        if len(indexes) <= _MOST_INDEXES and pages >= (1 - _MOST_GARBAGE) * table.size:
            return State(held, schema, parts, by_number, table, indexes, tails, before.epoch, before.stamp + 1)
    # Parts that are there already keep their arrays; the old table is left to those who read from it.
    fresh = [part.reopened() for part in parts.values()]
    parts = {part.name: part for part in fresh}
    table = PageTable(fresh)
    index = (UserIndex(fresh, table),) if fresh else ()
    by_number = {part.number: part for part in fresh}
    epoch, stamp = (before.epoch + 1, before.stamp + 1) if before else (0, 0)
    return State(held, schema, parts, by_number, table, index, tails, epoch, stamp)


def _load_dictionaries(
    storage: LocalStorage | KvStorage, manifest: dict[str, Any], dictionaries: dict[str, Dictionary]
) -> None:
    for field, pieces in manifest["dictionaries"].items():
        dictionary = dictionaries.setdefault(field, Dictionary())
        code = 0
        for piece in pieces:
            if code + piece["values"] > len(dictionary):
                folder = Folder(storage, f"{DICTIONARIES}/{piece['name']}", piece["files"])
                dictionary.extend(code, read_strings(folder, piece["values"]))
            code += piece["values"]


def read_strings(folder: Folder, count: int) -> list[str]:
    """The values of a dictionary piece."""
    data = folder.array("bytes", np.uint8).tobytes()
    offsets = folder.array("offsets", np.int64, count + 1).tolist()
    return [data[a:b].decode() for a, b in zip(offsets[:-1], offsets[1:], strict=True)]
