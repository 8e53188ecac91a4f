"""Whether a vault's service answers at all, found out beside the calls."""

import threading
import time
import weakref
from collections.abc import Callable

import pyarrow as pa
from pyarrow import flight

from laser_jax.vault.errors import UnavailableError

#: Seconds until a service that does not answer is asked again.
PAUSE_S = 0.25


class Outage:
    """Knows that a service does not answer, so that calls fail at once until it does.

    A service that is halted or cut off would hold up each call for its whole time-out, and with them callers that wait
    for the same thread. One that has died needs no such thing: its machine refuses the connection at once.
    """

    def __init__(self, where: str, ask: Callable[[], object]):
        """
        Args:
          where: the service's URL, for messages.
          ask: whether it is there: returns, or raises FlightTimedOutError if there is no answer.
        """
        self._where, self._ask = where, ask
        self._lock = threading.Lock()
        self._lost = False

    def check(self) -> None:
        """Raises UnavailableError while the service does not answer."""
        if self._lost:
            raise UnavailableError(f"{self._where} did not answer in time; it is asked again every {PAUSE_S} s")

    def suspect(self) -> None:
        """A call was not answered in time: until the service answers another one, it counts as lost."""
        with self._lock:
            if self._lost:
                return
            self._lost = True
        # It must not keep alive who has been given up.
        threading.Thread(target=_ask_until_back, args=(weakref.ref(self),), name="vault-outage", daemon=True).start()

    def answers(self) -> bool:
        """Asks the service. Whatever it says, it is there; one that has died is told of by the call itself."""
        try:
            self._ask()
        except flight.FlightTimedOutError:
            return False
        except (flight.FlightError, pa.ArrowException):
            pass
        return True

    def _end(self) -> None:
        with self._lock:
            self._lost = False


def _ask_until_back(found: "weakref.ref[Outage]") -> None:
    while (outage := found()) is not None:
        if outage.answers():
            outage._end()
            return
        del outage
        time.sleep(PAUSE_S)
