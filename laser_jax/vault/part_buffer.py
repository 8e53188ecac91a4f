"""Rows in, parts out: what the bulk writer and every task of a Spark ingestion share."""

import concurrent.futures
import os
import secrets
from typing import Any

import numpy as np

from laser_jax.schema import Schema
from laser_jax.vault.columns import Coded
from laser_jax.vault.part_writer import write_part
from laser_jax.vault.sorting import repeated_events, sort_events, trailing_rows

Rows = dict[str, np.ndarray]


def part_name(number: int) -> str:
    """A name that no part ever had."""
    return f"part-{number:06d}-{secrets.token_hex(4)}"


class PartBuffer:
    """Gathers rows until they are worth a part; parts are written in a thread while the next rows come in.

    At most one part is being written and one buffer waits to be: three buffers' worth of rows are in memory at most.

    Attributes:
      started: names of all parts that there may be something of.
      parts: their entries for the manifest, in order; whole once `finish` has returned.
      events: rows in these parts.
      duplicates_dropped: rows left out because the schema drops duplicates.
    """

    def __init__(self, folder: str, schema: Schema, size: int):
        """Parts go into `folder`, `size` rows each."""
        self.started: list[str] = []
        self.parts: list[dict[str, Any]] = []
        self.events = 0
        self.duplicates_dropped = 0
        self._folder = folder
        self._schema = schema
        self._size = size
        self._blocks: list[Rows] = []
        self._buffered = 0
        self._user_codes: dict[str, int] = {}
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "part")
        self._writing: concurrent.futures.Future | None = None

    def add(self, columns: dict[str, Any]) -> None:
        """Takes rows, as `check_columns` gives them, with strings of fields as int32 codes of the dictionary."""
        rows, done = len(columns["time"]), 0
        while done < rows:
            take = min(rows - done, self._size - self._buffered)
            block = {}
            for name, column in columns.items():
                if isinstance(column, Coded):
                    block[name] = self._code_users(column, slice(done, done + take))
                else:
                    block[name] = column[done : done + take]
            self._blocks.append(block)
            self._buffered += take
            done += take
            if self._buffered >= self._size:
                self._flush(everything=False)

    def finish(self) -> None:
        """Writes what is left, and waits until all parts are durable."""
        self._flush(everything=True)
        self._wait()

    def adopt(self, parts: list[dict[str, Any]], duplicates_dropped: int) -> None:
        """Takes over parts that other buffers wrote into the same folder, and numbers them anew."""
        for entry in parts:
            name = part_name(len(self.parts))
            os.rename(os.path.join(self._folder, entry["name"]), os.path.join(self._folder, name))
            self.parts.append(entry | {"name": name, "first_sequence": self.events})
            self.events += entry["events"]
        self.duplicates_dropped += duplicates_dropped

    def close(self) -> None:
        """Nothing is being written any more when this returns, whatever came of it."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _code_users(self, column: Coded, rows: slice) -> np.ndarray:
        """Codes of string users, valid until the next flush: no table of all users is kept."""
        present, places = np.unique(column.codes[rows], return_inverse=True)
        known = self._user_codes
        codes = [known.setdefault(column.values[code], len(known)) for code in present.tolist()]
        return np.array(codes, np.int64)[places]

    def _flush(self, everything: bool) -> None:
        """Hands the buffer on as a part; unless `everything`, keeps back a trailing user who may go on."""
        if not self._buffered:
            return
        if len(self._blocks) == 1:
            rows = self._blocks[0]
        else:
            rows = {name: np.concatenate([block[name] for block in self._blocks]) for name in self._blocks[0]}
        self._blocks = []
        self._buffered = 0
        names_of_users = list(self._user_codes)
        self._user_codes = {}
        carried = 0 if everything else trailing_rows(rows["user"], rows["time"])
        if carried:
            kept = {name: column[-carried:].copy() for name, column in rows.items()}
            rows = {name: column[:-carried] for name, column in rows.items()}
            if self._schema.user == "string":
                user = Coded(np.zeros(carried, np.int64), [names_of_users[kept["user"][0]]])
                kept["user"] = self._code_users(user, slice(None))
            self._blocks = [kept]
            self._buffered = carried
        self._wait()
        self._writing = self._thread.submit(self._write_part, rows, names_of_users)

    def _wait(self) -> None:
        """Until the part that is being written is whole; raises what went wrong with it, now and ever after."""
        if self._writing is not None:
            self._writing.result()

    def _write_part(self, rows: Rows, names_of_users: list[str]) -> None:
        schema = self._schema
        order = sort_events(schema, rows)
        if order is not None:
            rows = {name: column[order] for name, column in rows.items()}
        if schema.duplicates == "drop":
            repeated = repeated_events(schema, rows)
            if repeated.any():
                self.duplicates_dropped += int(repeated.sum())
                rows = {name: column[~repeated] for name, column in rows.items()}
        user = rows["user"]
        starts = np.concatenate(([0], np.flatnonzero(user[1:] != user[:-1]) + 1))
        users: np.ndarray | list[str] = user[starts]
        if schema.user == "string":
            users = [names_of_users[code] for code in user[starts].tolist()]
        name = part_name(len(self.parts))
        self.started.append(name)
        fields = {field: rows[field] for field in schema.names}
        target = os.path.join(self._folder, name)
        entry = write_part(target, schema, users, np.append(starts, len(user)), rows["time"], fields)
        self.parts.append({"name": name, "schema": 0, "first_sequence": self.events, **entry})
        self.events += len(user)
