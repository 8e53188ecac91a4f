"""What the server can be asked, as models of the Open Inference Protocol: to rank, and to append events."""

import asyncio
import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from laser_jax.schema import Schema, SchemaError
from laser_jax.serving.batching import Batcher, DeadlineError, OverloadedError
from laser_jax.serving.exported import BATCHES
from laser_jax.serving.ranker import Ranker, RankRequest
from laser_jax.serving.request_log import RequestLog
from laser_jax.serving.tensors import InferRequest, InputError, Tensor, datatype_of
from laser_jax.vault.partitions import Sequences

#: Appends whose columns are checked, or that wait for room, at a time.
_APPENDS = 4
#: Seconds after which a model that is to end looks whether calls are under way still.
_LOOK_S = 0.005
_SIDES = {"candidates": "item", "context": "context"}


class Endpoint(Protocol):
    """A model of the protocol.

    Attributes:
      name, version: by which it is called. inputs, outputs: what it takes and gives; -1 is any size.
    """

    name: str
    version: str
    inputs: list[Tensor]
    outputs: list[Tensor]

    async def infer(self, request: InferRequest, deadline: float) -> dict[str, np.ndarray]: ...

    def close(self) -> None: ...


class RankEndpoint:
    """One user and C candidates a call -> a logit a candidate.

    Inputs are `user` [1], `candidates.FIELD` [C] for every item field, `context.FIELD` [1] and, if wanted, `time` [1].
    Outputs are `logit` [C], `unseen` [C] (candidates that training never met, scored as unknown ones; see Ranking),
    `events` [1] (of the history; 0 for an unknown user), and `time` and `as_of` [1], which say what was seen.
    """

    def __init__(
        self,
        ranker: Ranker,
        queue: int,
        most_candidates: int,
        most_calls: int = BATCHES[-1],
        log: RequestLog | None = None,
        threads: int = 1,
    ):
        """
        Args:
          ranker: that answers.
          queue: calls that may wait. most_candidates: of one call. most_calls: that are scored together.
          log: what is asked and answered goes there. threads: that score, each its own calls.
        """
        model, schema = ranker.model, ranker.vault.schema
        self.name, self.version = model.name, model.version
        self.ranker, self._most, self._log = ranker, most_candidates, log
        self._batcher = Batcher(ranker.rank_each, most_calls, queue, ranker.size_of, model.most_pairs, threads)
        self._fields = {side: getattr(model.features, name) for side, name in _SIDES.items()}
        self.inputs = [Tensor("user", _user_type(schema), (1,)), Tensor("time", "INT64", (1,))]
        for side, fields in self._fields.items():
            for field in fields:
                width = model.width_of(field)
                datatype = "INT64"
                if field.name in model.strings:
                    datatype = "BYTES"
                elif field.ids in ("log", "vector"):
                    datatype = "FP32"
                shape = (-1 if side == "candidates" else 1, *(() if width is None else (width,)))
                self.inputs.append(Tensor(f"{side}.{field.name}", datatype, shape))
        # A vault elsewhere may have to be asked for the codes of strings: not in the loop that hears everybody.
        self._under_way = 0
        self._far = bool(model.strings) and not ranker.vault.local
        self._names = {side: {field.name for field in fields} for side, fields in self._fields.items()}
        self.outputs = [
            Tensor("logit", "FP32", (-1,)),
            Tensor("unseen", "BOOL", (-1,)),
            Tensor("events", "INT64", (1,)),
            Tensor("time", "INT64", (1,)),
            Tensor("as_of", "INT64", (1,)),
        ]

    @property
    def waiting(self) -> int:
        """Calls in the queue."""
        return self._batcher.waiting

    async def infer(self, request: InferRequest, deadline: float) -> dict[str, np.ndarray]:
        """See the class.

        Raises:
          InputError, RequestError: what is wrong with the call.
          OverloadedError, DeadlineError, VaultError: why it has no answer.
        """
        inputs = dict(request.inputs)
        user = _one(inputs, "user")
        moment = _one(inputs, "time") if "time" in inputs else None
        sides: dict[str, dict[str, Any]] = {side: {} for side in self._fields}
        for name, values in inputs.items():
            side, _, field = name.partition(".")
            if field not in self._names.get(side, ()):
                raise InputError(f"input {name!r} is none of {', '.join(tensor.name for tensor in self.inputs)}")
            if side == "candidates" and len(np.atleast_1d(values)) > self._most:
                raise InputError(f"input {name!r} has {len(values)} candidates; at most {self._most} are taken")
            sides[side][field] = values if side == "candidates" else _single(name, values)
        wanted = RankRequest(user, sides["candidates"], sides["context"], moment)
        self._under_way += 1
        try:
            if self._far:
                asked = await asyncio.get_running_loop().run_in_executor(None, self.ranker.check, wanted)
            else:
                asked = self.ranker.check(wanted)
            answer = await self._batcher.answer(asked, deadline)
        finally:
            self._under_way -= 1
        if self._log is not None:
            self._log.add(asked, answer, self.name, self.version)
        return {
            "logit": answer.logits,
            "unseen": answer.unseen,
            "events": np.array([answer.events]),
            "time": np.array([answer.time]),
            "as_of": np.array([answer.as_of]),
        }

    def close(self) -> None:
        """Answers what was asked. Not to be called in the loop that takes the calls."""
        while self._under_way:  # one may have to ask a vault elsewhere before it waits in the queue
            time.sleep(_LOOK_S)
        self._batcher.close()


class AppendEndpoint:
    """N events a call -> the sequence number (of a vault in partitions, all of them) behind them: they are durable.

    Inputs are `user`, `time` and every field of the vault [N] (vectors [N, size]) and, for who may send a batch again,
    `client` and `number` [1]: see laser_jax.vault.Vault.append.
    """

    name, version = "append", "1"

    def __init__(self, vault: Any, queue: int, counted: Callable[[int], None] = lambda events: None):
        """
        Args:
          vault: that takes the events. queue: calls that may be under way. counted: is told how many events came in.
        """
        self._vault, self._queue, self._counted = vault, queue, counted
        self._under_way = 0
        self._turns = asyncio.Semaphore(_APPENDS)
        schema = vault.schema
        self.inputs = [Tensor("user", _user_type(schema), (-1,)), Tensor("time", "INT64", (-1,))]
        for field in schema.fields:
            datatype = "BYTES" if field.type == "string" else datatype_of(field.dtype)
            self.inputs.append(Tensor(field.name, datatype, (-1,) if field.size is None else (-1, field.size)))
        self.inputs += [Tensor("client", "BYTES", (1,)), Tensor("number", "INT64", (1,))]
        self.outputs = [Tensor("next_sequence", "INT64", (-1,))]

    async def infer(self, request: InferRequest, deadline: float) -> dict[str, np.ndarray]:
        """See the class.

        Raises:
          InputError, SchemaError: what is wrong with the events; none is taken.
          OverloadedError: too many calls are under way; none is taken.
          DeadlineError: the time was up; the events may be written all the same.
          VaultError: why they are not taken.
        """
        events = dict(request.inputs)
        origin = None
        if "client" in events or "number" in events:
            origin = (_one(events, "client"), _one(events, "number"))
        for name, values in events.items():
            if values.ndim < 1:
                raise InputError(f"input {name!r} has shape []: need one value an event")
        count = len(events.get("time", ()))
        if not count:
            raise SchemaError("no events: input 'time' is missing or empty")
        if self._under_way >= self._queue:
            raise OverloadedError(f"{self._under_way} appends are under way, more are not taken: try again in a moment")
        self._under_way += 1
        try:
            async with asyncio.timeout(max(deadline - time.monotonic(), 0)):
                sequence = await self._append(events, origin)
        except TimeoutError as error:
            raise DeadlineError("the time was up before the events were durable; they may be written") from error
        finally:
            self._under_way -= 1
        self._counted(count)
        return {"next_sequence": np.array(sequence if isinstance(sequence, Sequences) else [sequence], np.int64)}

    async def _append(self, events: dict[str, np.ndarray], origin: Any) -> int | Sequences:
        await self._turns.acquire()
        # Checking columns and waiting for room take time: not in the loop that hears everybody.
        loop = asyncio.get_running_loop()
        checking = loop.run_in_executor(None, lambda: self._vault.append_async(events, origin))
        checking.add_done_callback(self._free_turn)
        return await asyncio.wrap_future(await asyncio.shield(checking))

    def _free_turn(self, checking: asyncio.Future) -> None:
        """Not when the caller gives up: a thread that is busy is busy."""
        self._turns.release()
        if not checking.cancelled():
            checking.exception()  # nobody may be there any more to hear of it

    def close(self) -> None:
        """Nothing waits here."""


def _user_type(schema: Schema) -> str:
    return "BYTES" if schema.user == "string" else "INT64"


def _one(inputs: dict[str, np.ndarray], name: str) -> Any:
    """The only value of an input, which is taken out."""
    if name not in inputs:
        raise InputError(f"input {name!r} is missing")
    return _single(name, inputs.pop(name))


def _single(name: str, values: np.ndarray) -> Any:
    if values.ndim < 1 or len(values) != 1:
        raise InputError(f"input {name!r} has shape {list(values.shape)}: need one value")
    found = values[0]
    return found.item() if isinstance(found, np.generic) else found
