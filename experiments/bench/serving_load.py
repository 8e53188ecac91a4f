"""Load on a ranking server, from a process of its own: requests at a fixed rate, whatever the server does.

  python -m experiments.bench.serving_load < job.json

The job says where the server is, which requests to take turns with, and how to send them:

  idle        one after the other, `seconds` long or `most` of them: how long one takes
  saturation  `in_flight` at a time, the next as soon as one is answered: how many a second are possible
  open        at `rate` a second by a Poisson process, drawn beforehand; a request that is sent late has waited since
              it should have been sent

It prints one JSON object: latencies in milliseconds in the order of sending, seconds in all, and what was refused.
"""

import asyncio
import base64
import gc
import json
import sys
import time
from collections import Counter
from typing import Any

import grpc
import numpy as np
import uvloop

from laser_jax.serving.messages import SERVICE

#: Of a call; far beyond anything that is to be measured.
TIMEOUT_S = 60


class Load:
    """Sends a job's requests and keeps their latencies."""

    def __init__(self, job: dict[str, Any], call: Any):
        self._requests = [base64.b64decode(request) for request in job["requests"]]
        self._call = call
        self.milliseconds: list[float] = []
        self.refused: Counter[str] = Counter()

    async def one(self, number: int, due: float) -> None:
        """Sends a request that is due at a time of perf_counter."""
        try:
            await self._call(self._requests[number % len(self._requests)], timeout=TIMEOUT_S)
            self.milliseconds.append(1e3 * (time.perf_counter() - due))
        except grpc.RpcError as error:
            self.refused[error.code().name] += 1

    async def idle(self, seconds: float, most: int) -> None:
        start, number = time.perf_counter(), 0
        while time.perf_counter() - start < seconds and number < most:
            await self.one(number, time.perf_counter())
            number += 1

    async def saturation(self, seconds: float, in_flight: int) -> None:
        start, number = time.perf_counter(), 0

        async def worker() -> None:
            nonlocal number
            while time.perf_counter() - start < seconds:
                number += 1
                await self.one(number, time.perf_counter())

        await asyncio.gather(*(worker() for _ in range(in_flight)))

    async def open(self, seconds: float, rate: float, seed: int) -> None:
        rng = np.random.default_rng(seed)
        gaps = rng.exponential(1 / rate, int(1.2 * seconds * rate) + 20)
        dues = np.cumsum(gaps)
        start, tasks = time.perf_counter(), []
        for number, due in enumerate(dues[dues < seconds].tolist()):
            wait = start + due - time.perf_counter()
            if wait > 0:
                await asyncio.sleep(wait)
            tasks.append(asyncio.create_task(self.one(number, start + due)))
        await asyncio.gather(*tasks)


async def run(job: dict[str, Any]) -> dict[str, Any]:
    """What the job asks for."""
    async with grpc.aio.insecure_channel(job["target"]) as channel:
        load = Load(job, channel.unary_unary(f"/{SERVICE}/ModelInfer"))
        await channel.channel_ready()  # clients keep their connections
        start = time.perf_counter()
        await getattr(load, job["kind"])(**job["settings"])
        seconds = time.perf_counter() - start
    return {"milliseconds": load.milliseconds, "seconds": seconds, "refused": dict(load.refused)}


if __name__ == "__main__":
    gc.disable()  # its pauses would be counted as the server's
    print(json.dumps(uvloop.run(run(json.load(sys.stdin)))))
