"""Which batches of which clients were written: what makes it harmless to send one again.

A client numbers its batches, one after the other: a number that is not above the last one written is a repetition. The
log keeps (client, number) with the events; what has left the log is kept in the manifest.
"""

import re
from typing import Any

from laser_jax.vault.errors import SchemaError

#: Number of a client's last batch, and the sequence number behind its events.
Origin = tuple[int, int]
#: Clients that are remembered: those who wrote last.
MOST = 4096
_CLIENT = re.compile(r"[\x21-\x7e]{1,100}")


def checked_origin(origin: Any) -> tuple[str, int] | None:
    """(client, number) as given to `append`.

    Raises:
      SchemaError: it is not a pair of a name (1 to 100 printable ASCII characters without blanks) and an integer >= 0.
    """
    if origin is None:
        return None
    if isinstance(origin, (tuple, list)) and len(origin) == 2:
        client, number = origin
        known = isinstance(client, str) and _CLIENT.fullmatch(client)
        if known and isinstance(number, int) and not isinstance(number, bool) and 0 <= number < 2**63:
            return client, number
    raise SchemaError(
        f"origin={origin!r}: need (client, number), a name of 1 to 100 printable ASCII characters without blanks and "
        "an integer >= 0 that grows with every batch of that client"
    )


def newest(origins: dict[str, Origin]) -> dict[str, Origin]:
    """Those of the clients who wrote last, at most MOST."""
    if len(origins) <= MOST:
        return origins
    return dict(sorted(origins.items(), key=lambda entry: entry[1][1])[-MOST:])


def origins_of(manifest: dict[str, Any]) -> dict[str, Origin]:
    """Those that a manifest keeps: of events in parts."""
    return {client: (number, sequence) for client, (number, sequence) in manifest.get("origins", {}).items()}
