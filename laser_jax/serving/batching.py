"""Requests that wait are scored together: whatever has come while the last ones were scored."""

import asyncio
import dataclasses
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any


class OverloadedError(Exception):
    """The queue is full."""


class DeadlineError(Exception):
    """A request's time was up before it was scored."""


@dataclasses.dataclass(eq=False)
class _Item:
    request: Any
    deadline: float
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future


class Batcher:
    """Hands what waits to some threads, in the order of coming.

    A thread that is free takes what waits at once, and leaves to the others that are free their share of it. Whoever
    would be answered too late is told at once: with more coming than can be answered, time spent on them would make the
    next ones late as well, until nobody is answered in time.

    Attributes:
      waiting: requests that nobody scores yet.
    """

    def __init__(
        self,
        answer: Callable[[list[Any]], list[Any]],
        most: int,
        queue: int,
        size_of: Callable[[Any], int] = lambda request: 1,
        most_size: int = sys.maxsize,
        threads: int = 1,
    ):
        """
        Args:
          answer: a batch of requests -> an answer each, or the error that it has instead. most: requests of a batch.
          queue: requests that may wait.
          size_of: a request -> its size. most_size: of the requests of a batch together, but for a single one: whoever
            is small does not wait for whoever is large.
          threads: batches that are answered at a time.
        """
        self._answer, self._most, self._queue_size = answer, most, queue
        self._size_of, self._most_size = size_of, most_size
        self._queue: deque[_Item] = deque()
        self._condition = threading.Condition()
        self._closing = False
        self._free = 0
        self._usual_s = 0.0  # that a batch takes
        self._threads = [
            threading.Thread(target=self._run, name=f"ranker-{number}", daemon=True) for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def waiting(self) -> int:
        return len(self._queue)

    async def answer(self, request: Any, deadline: float) -> Any:
        """The answer to a request.

        Args:
          deadline: by time.monotonic().

        Raises:
          OverloadedError, DeadlineError, and what `answer` raises.
        """
        loop = asyncio.get_running_loop()
        item = _Item(request, deadline, loop, loop.create_future())
        with self._condition:
            if self._closing or len(self._queue) >= self._queue_size:
                raise OverloadedError(f"{len(self._queue)} requests wait, more are not taken: try again in a moment")
            self._queue.append(item)
            self._condition.notify()
        # Much cheaper than asyncio.wait_for, which makes two more futures.
        timer = loop.call_later(max(deadline - time.monotonic(), 0), _expire, item.future)
        try:
            return await item.future
        finally:
            timer.cancel()

    def close(self) -> None:
        """Answers what waits, and takes no more."""
        with self._condition:
            self._closing = True
            self._condition.notify_all()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while True:
            with self._condition:
                self._free += 1
                while not self._queue and not self._closing:
                    self._condition.wait()
                self._free -= 1
                if not self._queue:
                    return
                items = self._next()
            items = self._in_time(items)
            if items:
                began = time.monotonic()
                self._finish(items)
                self._usual_s += (time.monotonic() - began - self._usual_s) / 4

    def _next(self) -> list[_Item]:
        """A batch, taken off the queue."""
        most = min(self._most, -(-len(self._queue) // (self._free + 1)))
        items = [self._queue.popleft()]
        size = self._size_of(items[0].request)
        while self._queue and len(items) < most:
            size += self._size_of(self._queue[0].request)
            if size > self._most_size:
                break
            items.append(self._queue.popleft())
        return items

    def _in_time(self, items: list[_Item]) -> list[_Item]:
        """Those that can be answered before their deadline; who cannot is told."""
        now = time.monotonic()
        items = [item for item in items if item.deadline > now]  # whoever gave up has been told
        hopeful = [item for item in items if item.deadline > now + self._usual_s]
        # One is tried in any case: what is usual may have changed.
        if items and not hopeful:
            hopeful = [max(items, key=lambda item: item.deadline)]
        for item in items:
            if item not in hopeful:
                _set(item, error=DeadlineError("there is no time left to score the request before its deadline"))
        return hopeful

    def _finish(self, items: list[_Item]) -> None:
        try:
            answers = self._answer([item.request for item in items])
        except Exception as error:  # whatever it is: who waits must hear of it
            answers = [error] * len(items)
        for item, answer in zip(items, answers, strict=True):
            if isinstance(answer, Exception):
                _set(item, error=answer)
            else:
                _set(item, answer)


def _expire(future: asyncio.Future) -> None:
    if not future.done():
        future.set_exception(DeadlineError("the time was up before the request was scored"))


def _set(item: _Item, answer: Any = None, error: Exception | None = None) -> None:
    def finish() -> None:
        if not item.future.done():
            if error is None:
                item.future.set_result(answer)
            else:
                item.future.set_exception(error)

    item.loop.call_soon_threadsafe(finish)
