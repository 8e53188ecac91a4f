"""What waits is answered together, within limits, and everybody hears what became of their request."""

import asyncio
import threading
import time

import pytest

from laser_jax.serving.batching import Batcher, DeadlineError, OverloadedError
from laser_jax.vault.errors import UnavailableError


def together(sizes, most=32, queue=100, most_size=10, answer=None):
    """Asks for all of them at once while the first keeps the ranker busy; the batches, and what each was told."""
    batches, busy = [], threading.Event()

    def answers(requests):
        batches.append(requests)
        if requests == ["first"]:
            busy.wait(10)
            return ["first"]
        return answer(requests) if answer else [f"{request}!" for request in requests]

    async def run():
        batcher = Batcher(answers, most, queue, lambda r: 1 if r == "first" else r, most_size)
        first = asyncio.create_task(batcher.answer("first", time.monotonic() + 60))
        while not batches:
            await asyncio.sleep(0.01)
        tasks = [asyncio.create_task(batcher.answer(size, time.monotonic() + 60)) for size in sizes]
        await asyncio.sleep(0.05)
        busy.set()
        told = await asyncio.gather(*tasks, return_exceptions=True)
        assert await first == "first"
        await asyncio.get_running_loop().run_in_executor(None, batcher.close)
        return told

    return asyncio.run(run()), batches[1:]


def test_batches_keep_to_their_size_and_number_in_the_order_of_coming():
    told, batches = together([4, 4, 4, 1, 30, 2, 2])
    assert batches == [[4, 4], [4, 1], [30], [2, 2]], "one that is too large is answered alone"
    assert told == ["4!", "4!", "4!", "1!", "30!", "2!", "2!"]
    assert together([1] * 5, most=2)[1] == [[1, 1], [1, 1], [1]]


def test_who_does_not_fit_into_the_queue_is_told():
    told, batches = together([1, 2, 3], queue=2)
    assert told[:2] == ["1!", "2!"] and isinstance(told[2], OverloadedError) and batches == [[1, 2]]


def test_who_gets_an_error_for_an_answer_hears_it_and_nobody_else():
    def answer(requests):
        return [UnavailableError("of user 3") if request == 3 else f"{request}!" for request in requests]

    told, batches = together([1, 3, 2], answer=answer)
    assert told[0] == "1!" and told[2] == "2!" and isinstance(told[1], UnavailableError)
    assert batches == [[1, 3, 2]]


def test_time_that_is_up_is_told():
    async def run():
        batcher = Batcher(lambda requests: time.sleep(0.3) or requests, 1, 10)
        with pytest.raises(DeadlineError):
            await batcher.answer(1, time.monotonic() + 0.05)
        assert await batcher.answer(2, time.monotonic() + 60) == 2
        await asyncio.get_running_loop().run_in_executor(None, batcher.close)

    asyncio.run(run())


def test_no_time_is_spent_on_whoever_would_be_answered_too_late():
    batches, queued, seconds = [], threading.Event(), {"usual": 3, "alone": 1}

    def answers(requests):
        batches.append(requests)
        if requests == ["busy"]:
            queued.wait(10)
        time.sleep(seconds.get(requests[0], 0))
        return requests

    async def run():
        batcher = Batcher(answers, 2, 10)
        until = time.monotonic() + 60
        assert await batcher.answer("usual", until) == "usual"  # a quarter of 3 s is what is expected from now on
        busy = asyncio.create_task(batcher.answer("busy", until))
        while len(batches) < 2:
            await asyncio.sleep(0.01)
        others = [batcher.answer("late", time.monotonic() + 0.5), batcher.answer("in time", until)]
        tasks = [asyncio.create_task(other) for other in others]
        await asyncio.sleep(0)
        queued.set()
        late, in_time = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(late, DeadlineError) and "no time left" in str(late)
        assert (await busy, in_time) == ("busy", "in time")
        # Alone it is tried: what is usual may have changed.
        with pytest.raises(DeadlineError, match="was up"):
            await batcher.answer("alone", time.monotonic() + 0.3)
        await asyncio.get_running_loop().run_in_executor(None, batcher.close)

    asyncio.run(run())
    assert batches == [["usual"], ["busy"], ["in time"], ["alone"]]


def test_a_thread_that_is_free_leaves_the_other_its_share():
    batches, together = [], threading.Barrier(2, timeout=20)

    def answers(requests):
        batches.append(requests)
        together.wait()  # breaks unless both threads are at it at the same time
        return requests

    async def run():
        batcher = Batcher(answers, 32, 100, threads=2)
        until = time.monotonic() + 60
        assert await asyncio.gather(batcher.answer(1, until), batcher.answer(2, until)) == [1, 2]
        await asyncio.get_running_loop().run_in_executor(None, batcher.close)

    asyncio.run(run())
    assert sorted(batches) == [[1], [2]]
