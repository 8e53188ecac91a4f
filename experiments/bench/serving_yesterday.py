"""The server as it is, but for its histories: yesterday's store, RocksDB with all events of a user as one JSON array.

  python -m experiments.bench.serving_yesterday --store=DIR --model=DIR --vault=DIR ...

The vault gives the schema only. All of a user's events are parsed with all of their fields, as JSON has to be, before
the newest are taken. What the model reads of a user is looked up anew for every request: there is no version in such a
store by which anything could be kept.
"""

import json
import sys
from operator import itemgetter
from typing import Any

import numpy as np
from rocksdict import AccessType, Rdict

from experiments.bench.vault_peers import SMALL_CACHE, rocksdb_options
from laser_jax import vault as seqvault
from laser_jax.schema import Schema
from laser_jax.serving import server
from laser_jax.vault.history import History

COMPRESSION = "zstd"


class JsonHistories:
    """Reads as a vault does."""

    local = True

    def __init__(self, path: str, store: str):
        self.path = store
        with seqvault.open(path) as vault:
            self.schema: Schema = vault.schema
            self.num_events, self.next_sequence = vault.num_events, vault.next_sequence
        self._db = Rdict(store, rocksdb_options(COMPRESSION, SMALL_CACHE), access_type=AccessType.read_only())

    def get(self, user: int, n: int, before: int, fields: tuple[str, ...]) -> History:
        """As Vault.get."""
        value = self._db.get(str(user).encode())
        events = [] if value is None else json.loads(value)
        events = [event for event in events if event["time"] < before][-n:]
        types = {"time": np.dtype(np.int64)} | {name: self.schema.field(name).dtype for name in fields}
        columns = {name: np.fromiter(map(itemgetter(name), events), dtype) for name, dtype in types.items()}
        return History(columns, lambda name: None, self.next_sequence, len(events) < n)

    def refresh(self) -> None:
        """Nobody writes."""

    def close(self) -> None:
        self._db.close()


def fill(path: str, store: str) -> None:
    """Writes all histories of a vault into a new store."""
    options = rocksdb_options(COMPRESSION, SMALL_CACHE)
    options.create_if_missing(True)
    options.prepare_for_bulk_load()
    with seqvault.open(path) as vault:
        database = Rdict(store, options)
        for user in vault.users().tolist():
            columns = vault.get(user, 1_000_000, fields=vault.schema.names).columns
            rows = zip(*(values.tolist() for values in columns.values()), strict=True)
            events = [dict(zip(columns, row, strict=True)) for row in rows]
            database[str(user).encode()] = json.dumps(events, separators=(",", ":")).encode()
        database.compact_range(None, None)
        database.close()


def main() -> int:
    store = next(argument for argument in sys.argv if argument.startswith("--store=")).partition("=")[2]
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--store=")]

    def open_vault(path: str, **_: Any) -> JsonHistories:
        return JsonHistories(path, store)

    return server.main([*arguments, "--read-only", "--user-cache=0"], open_vault)


if __name__ == "__main__":
    sys.exit(main())
