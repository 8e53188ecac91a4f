"""The models that a server has, how their calls are counted, and what an error means to a caller."""

import logging
import time
from typing import Any

import grpc
import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from laser_jax.serving.batching import DeadlineError, OverloadedError
from laser_jax.serving.endpoints import Endpoint
from laser_jax.serving.ranker import STAGES, RequestError
from laser_jax.serving.tensors import InferRequest, InputError
from laser_jax.serving.user_cache import UserCache
from laser_jax.vault.errors import CorruptionError, SchemaError, UnavailableError

logger = logging.getLogger("laser_jax.serving")
#: From .1 ms to 9 s, fine enough for percentiles.
_SECONDS = tuple(round(1e-4 * 1.2**step, 7) for step in range(63))


#: Characters of an error that a caller is told: what it names came from the caller, and gRPC has room for 8 KB in all.
_TEXT = 500


class UnknownModelError(LookupError):
    """There is no such model, or not in that version."""


class TooLargeError(ValueError):
    """A body is larger than what is taken."""


class TokenError(PermissionError):
    """The token is missing or wrong."""


#: What an error is to a caller: the HTTP status, and gRPC's. The first that fits counts.
_MEANING = (
    ((InputError, RequestError, SchemaError), 400, grpc.StatusCode.INVALID_ARGUMENT),
    (TokenError, 401, grpc.StatusCode.UNAUTHENTICATED),
    (UnknownModelError, 404, grpc.StatusCode.NOT_FOUND),
    (TooLargeError, 413, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (OverloadedError, 429, grpc.StatusCode.RESOURCE_EXHAUSTED),
    ((UnavailableError, CorruptionError), 503, grpc.StatusCode.UNAVAILABLE),
    (DeadlineError, 504, grpc.StatusCode.DEADLINE_EXCEEDED),
)


def meaning(error: Exception) -> tuple[int, grpc.StatusCode, str]:
    """HTTP status, gRPC status and text for a caller. A mistake in this code is logged; its insides are not told."""
    for kinds, status, code in _MEANING:
        if isinstance(error, kinds):
            text = str(error)
            return status, code, text if len(text) <= _TEXT else f"{text[:_TEXT]} ... ({len(text)} characters)"
    logger.error("a mistake", exc_info=error)
    return 500, grpc.StatusCode.INTERNAL, f"a mistake in the server ({type(error).__name__}); its log has more"


class Metrics:
    """Prometheus figures of a server.

    Attributes:
      registry: that holds them.
    """

    def __init__(self):
        self.registry = CollectorRegistry()
        registry = self.registry
        self._calls = Histogram("laser_call_seconds", "of calls", ["model"], buckets=_SECONDS, registry=registry)
        self._stages = Histogram("laser_stage_seconds", "of a batch", ["stage"], buckets=_SECONDS, registry=registry)
        for stage in STAGES:  # there from the start, with nothing in them
            self._stages.labels(stage)
        self._answers = Counter("laser_answers", "by HTTP status", ["model", "status"], registry=registry)
        self._events = Counter("laser_events_appended", "through this server", registry=registry)
        self.waiting = Gauge("laser_calls_waiting", "in the queue", registry=registry)
        self._cache = {
            name: Gauge(f"laser_user_cache_{name}", about, registry=registry)
            for name, about in (
                ("hits", "histories whose events were all there"),
                ("extended", "histories of which the newest events were not there"),
                ("misses", "histories that were not there"),
                ("bytes", "that it holds"),
            )
        }
        self.lost = Gauge("laser_log_lines_lost", "requests that could not be logged", registry=registry)
        self.events = Gauge("laser_events", "in the vault, as this server sees it", registry=registry)

    def stage(self, name: str, seconds: float) -> None:
        """A stage of a batch took so long."""
        self._stages.labels(name).observe(seconds)

    def call(self, model: str, status: int, seconds: float) -> None:
        """A call was answered."""
        self._calls.labels(model).observe(seconds)
        self._answers.labels(model, str(status)).inc()

    def watch_cache(self, cache: UserCache) -> None:
        """Shows the figures of the user cache of the model that serves."""
        self._cache["hits"].set_function(lambda: cache.hits)
        self._cache["extended"].set_function(lambda: cache.extended)
        self._cache["misses"].set_function(lambda: cache.misses)
        self._cache["bytes"].set_function(lambda: cache.num_bytes)

    def appended(self, events: int) -> None:
        """So many events came in."""
        self._events.inc(events)


class Catalog:
    """Endpoints by name. A new version takes the place of the old one, whose calls are answered to the end.

    Attributes:
      metrics: of the calls. deadline_s: seconds that a call may take, unless it says less.
      stopping: whether the server is about to end.
    """

    def __init__(self, metrics: Metrics, deadline_s: float):
        self.metrics, self.deadline_s = metrics, deadline_s
        self.stopping = False
        self._endpoints: dict[str, Endpoint] = {}

    @property
    def ready(self) -> bool:
        """Whether calls are taken."""
        return bool(self._endpoints) and not self.stopping

    def names(self) -> list[str]:
        """Of all models."""
        return list(self._endpoints)

    def put(self, endpoint: Endpoint) -> Endpoint | None:
        """Adds a model, or a new version of one; gives the old one, which the caller closes."""
        old = self._endpoints.get(endpoint.name)
        self._endpoints[endpoint.name] = endpoint
        return old

    def remove(self, name: str) -> Endpoint | None:
        """Takes a model out; the caller closes it."""
        return self._endpoints.pop(name, None)

    def find(self, name: str, version: str = "") -> Endpoint:
        """A model; UnknownModelError if there is none of that name and version."""
        found = self._endpoints.get(name)
        if found is None:
            raise UnknownModelError(f"there is no model {name!r}; there are {', '.join(self._endpoints) or 'none'}")
        if version and version != found.version:
            raise UnknownModelError(f"model {name!r} is here in version {found.version!r}, not {version!r}")
        return found

    async def infer(
        self, name: str, version: str, request: InferRequest, remaining_s: float | None
    ) -> tuple[Endpoint, dict[str, np.ndarray]]:
        """The outputs that a call asks for, and the model that gave them.

        Args:
          remaining_s: seconds that the caller waits; None if it did not say.
        """
        endpoint = self.find(name, version)
        if request.outputs:
            known = [tensor.name for tensor in endpoint.outputs]
            for output in request.outputs:
                if output not in known:
                    raise InputError(f"output {output!r} is none of {', '.join(known)}")
        seconds = self.deadline_s if remaining_s is None else min(self.deadline_s, remaining_s)
        outputs = await endpoint.infer(request, time.monotonic() + seconds)
        return endpoint, {output: outputs[output] for output in request.outputs or outputs}

    def close(self) -> None:
        """Answers what waits."""
        for endpoint in self._endpoints.values():
            endpoint.close()


def describe(endpoint: Endpoint) -> dict[str, Any]:
    """Metadata of a model, as the protocol has it."""

    def tensors(found: list[Any]) -> list[dict[str, Any]]:
        return [{"name": one.name, "datatype": one.datatype, "shape": list(one.shape)} for one in found]

    return {
        "name": endpoint.name,
        "versions": [endpoint.version],
        "platform": "laser_jax",
        "inputs": tensors(endpoint.inputs),
        "outputs": tensors(endpoint.outputs),
    }
