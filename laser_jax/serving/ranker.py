"""Live requests to scores: the user's history from the vault, features as in training, the exported model."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from laser_jax.assembly import Columns
from laser_jax.features import FieldConfig
from laser_jax.serving.exported import BATCHES, ExportedModel, Requests, joined
from laser_jax.serving.user_cache import UserCache
from laser_jax.vault.errors import UnavailableError, VaultError
from laser_jax.vault.partitions import PartitionedVault, Sequences

#: Candidates of a request that are scored together; one with more is cut into pieces.
MOST_CANDIDATES = 512
#: What a batch's time is spent on: reading the vault, making arrays of it, both of these, and the model.
STAGES = ("lookup", "assembly", "history", "scoring")
_MOST_FLOAT32 = float(np.finfo(np.float32).max)


class RequestError(ValueError):
    """A request that makes no sense. The message names the field, and what is wrong with it.

    Attributes:
      position: of the request among those given.
    """

    def __init__(self, position: int, message: str):
        super().__init__(message)
        self.position = position


@dataclasses.dataclass(frozen=True)
class RankRequest:
    """One user, and what to score for them.

    Attributes:
      user: an int64 or a string, as the vault has it.
      candidates: every item field of the model -> C values; strings for a field that holds strings in the vault.
      context: every context field of the model -> its value.
      time: in the vault's unit; only events before it count. None: behind everything that has happened by now.
    """

    user: int | str
    candidates: dict[str, Any]
    context: dict[str, Any] = dataclasses.field(default_factory=dict)
    time: int | None = None


@dataclasses.dataclass(frozen=True)
class CheckedRequest(RankRequest):
    """A request as it is scored: every column an array, strings as codes, and with a time.

    Attributes:
      texts: (side, field) -> the strings of which `candidates` or `context` hold the codes.
      unknown: (side, field) -> places of strings that the vault does not know.
    """

    texts: dict[tuple[str, str], np.ndarray] = dataclasses.field(default_factory=dict)
    unknown: dict[tuple[str, str], list[int]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Ranking:
    """The answer to one request.

    Attributes:
      logits: float32 [C]. unseen: bool [C], candidates that training never met: scored as unknown ones. Only fields
        with ids="vocab" or "dictionary" can tell; without any it is always false.
      events: of the history that were read; 0 for an unknown user.
      time, as_of: what was seen: events before that time, with a smaller sequence number. A training request with both
        sees the same.
    """

    logits: Float[np.ndarray, "C"]
    unseen: Bool[np.ndarray, "C"]
    events: int
    time: int
    as_of: int


class Ranker:
    """Scores requests with one model from one vault. Safe to share among threads.

    Attributes:
      model: that scores. vault: with the histories. cache: of what the model has read of users.
    """

    def __init__(
        self,
        model: ExportedModel,
        vault: Any,
        clock: Callable[[], float] = time.time,
        observe: Callable[[str, float], None] = lambda stage, seconds: None,
        cache_bytes: int = 512 << 20,
    ):
        """
        Args:
          model, vault: as said.
          clock: seconds since 1970, for requests without a time.
          observe: is told how long a batch took in each of STAGES.
          cache_bytes: budget of the user cache, 0 for none.

        Raises:
          ValueError: the vault is not of the kind that the model was trained on.
        """
        self.model, self.vault = model, vault
        self._clock, self._observe = clock, observe
        schema = vault.schema
        for kind in ("user", "time_unit"):
            ours, theirs = getattr(model.schema, kind), getattr(schema, kind)
            if ours != theirs:
                raise ValueError(f"{vault.path}: its {kind} is {theirs!r}, {model.path} was trained with {ours!r}")
        for name in model.event_fields:
            if name not in schema.names:
                raise ValueError(f"{vault.path} has no field {name!r}, which {model.path} reads")
            field, trained = schema.field(name), model.schema.field(name)
            if (field.type, field.size) != (trained.type, trained.size):
                raise ValueError(
                    f"{vault.path}: field {name!r} is {field.type}, {model.path} was trained with {trained.type}"
                )
        self._translations = model.translations(vault)
        self.cache = UserCache(cache_bytes, lambda columns: model.look_up(columns, self._translations))
        self._units = 1000 if schema.time_unit == "ms" else 1

    def compile(
        self,
        requests: int = BATCHES[-1],
        candidates: int = MOST_CANDIDATES,
        progress: Callable[[int, int], None] = lambda done, shapes: None,
    ) -> int:
        """Compiles every program for requests and candidates up to these, so that no request waits for it.

        Args:
          progress: see ExportedModel.compile.

        Returns:
          How many shapes there are.
        """
        return self.model.compile(requests, min(candidates, MOST_CANDIDATES), progress)

    def now(self) -> int:
        """The time of a request that has none: one unit on, since events of the running unit happened before it."""
        return int(self._clock() * self._units) + 1

    def rank(self, requests: Sequence[RankRequest]) -> list[Ranking]:
        """Scores all candidates of some requests.

        Raises:
          RequestError: a request makes no sense, and none is scored; or its scores are not finite.
          UnavailableError, CorruptionError: of the vault.
        """
        answers = self.rank_each(requests)
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return answers

    def rank_each(self, requests: Sequence[RankRequest]) -> list[Ranking | VaultError | RequestError]:
        """As `rank`, but a request whose history cannot be read, or whose numbers give no finite score, gets the error
        for an answer, and the others theirs."""
        if not requests:
            return []
        checked = [self.check(request, position) for position, request in enumerate(requests)]
        began = time.perf_counter()
        answers: list[Any] = self._histories(checked)
        read = [place for place, answer in enumerate(answers) if not isinstance(answer, VaultError)]
        if read:
            rankings = self._scored([checked[place] for place in read], [answers[place] for place in read], began)
            for place, ranking in zip(read, rankings, strict=True):
                answers[place] = ranking
                if not np.isfinite(ranking.logits).all():
                    answers[place] = RequestError(place, "its scores are not finite: are its numbers far too large?")
        return answers

    def _scored(
        self, checked: list[CheckedRequest], histories: list[tuple[Columns, int]], began: float
    ) -> list[Ranking]:
        """The answers to requests whose histories were read since `began`."""
        if any(len(self.vault.dictionary(name)) > len(codes) for name, codes in self._translations.items()):
            self._translations = self.model.translations(self.vault)  # strings have come since
        looked_up = time.perf_counter()
        events = [
            self.cache.read(request.user, columns) for request, (columns, _) in zip(checked, histories, strict=True)
        ]
        self._observe("lookup", looked_up - began)
        spent, scoring = time.perf_counter() - looked_up, 0.0  # the former on assembly
        logits: list[list[np.ndarray]] = [[] for _ in checked]
        unseen: list[list[np.ndarray]] = [[] for _ in checked]
        for group in self._groups(checked):
            started = time.perf_counter()
            assembled = self.model.assemble([events[position] for position, _, _ in group], _asked(checked, group))
            middle = time.perf_counter()
            scores = self.model.run(assembled)
            spent += middle - started
            scoring += time.perf_counter() - middle
            stop = 0
            for (position, _, _), count in zip(group, assembled.counts.tolist(), strict=True):
                start, stop = stop, stop + count
                logits[position].append(scores[start:stop])
                unseen[position].append(assembled.unseen[start:stop])
        self._observe("assembly", spent)
        self._observe("scoring", scoring)
        self._observe("history", looked_up - began + spent)
        return [
            Ranking(
                logits=joined(logits[position]),
                unseen=joined(unseen[position]),
                events=len(events[position]),
                time=request.time,
                as_of=histories[position][1],
            )
            for position, request in enumerate(checked)
        ]

    def _histories(self, requests: Sequence[RankRequest]) -> list[tuple[Columns, int] | VaultError]:
        """The columns of each request's history, and what was seen; or why it cannot be read."""
        if self.vault.local or len(requests) == 1:
            return [self._history(request) for request in requests]
        try:
            return self._gathered(requests)
        except VaultError as error:
            failed = error
        # It may be that of one partition, or of one user.
        parts = self._by_partition(requests)
        if len(parts) == 1:
            lost = isinstance(failed, UnavailableError)
            return [failed if lost else self._history(request) for request in requests]
        answers: list[Any] = [None] * len(requests)
        for places in parts:
            found = self._histories([requests[place] for place in places])
            for place, answer in zip(places, found, strict=True):
                answers[place] = answer
        return answers

    def _history(self, request: RankRequest) -> tuple[Columns, int] | VaultError:
        try:
            found = self.vault.get(
                request.user, self.model.history_length, request.time, fields=self.model.event_fields
            )
        except VaultError as error:
            return error
        return found.columns, found.as_of

    def _by_partition(self, requests: Sequence[RankRequest]) -> list[list[int]]:
        """Which of the requests are of users of the same partition."""
        if not isinstance(self.vault, PartitionedVault):
            return [list(range(len(requests)))]
        owners = self.vault.partition_of(self._users(requests))
        return [np.flatnonzero(owners == owner).tolist() for owner in np.unique(owners)]

    def _users(self, requests: Sequence[RankRequest]) -> Any:
        users = [request.user for request in requests]
        return np.array(users, np.int64) if self.vault.schema.user == "int64" else users

    def _gathered(self, requests: Sequence[RankRequest]) -> list[tuple[Columns, int]]:
        """The histories of all of them in one call."""
        vault, length, fields = self.vault, self.model.history_length, self.model.event_fields
        users = self._users(requests)
        times = np.array([request.time for request in requests], np.int64)
        batch = vault.gather(users, times, length, fields=fields)
        owners = vault.partition_of(users) if isinstance(batch.as_of, Sequences) else None
        return [
            (batch[position].columns, batch.as_of if owners is None else batch.as_of[owners[position]])
            for position in range(len(requests))
        ]

    def size_of(self, request: RankRequest) -> int:
        """Of a checked request among others: what its number of candidates is padded to."""
        return self.model.padded(_count(request.candidates))

    def _groups(self, requests: list[RankRequest]) -> list[list[tuple[int, int, int]]]:
        """(request, first candidate, behind the last) of what is scored together: alike in number of candidates."""
        by_size: dict[int, list[tuple[int, int, int]]] = {}
        for position, request in enumerate(requests):
            count = _count(request.candidates)
            for start in range(0, count, MOST_CANDIDATES):
                stop = min(start + MOST_CANDIDATES, count)
                by_size.setdefault(self.model.padded(stop - start), []).append((position, start, stop))
        groups = []
        for size, pieces in by_size.items():
            most = self.model.most_requests(size)
            groups += [pieces[at : at + most] for at in range(0, len(pieces), most)]
        return groups

    def check(self, request: RankRequest, position: int = 0) -> CheckedRequest:
        """The request as it is scored.

        Raises:
          RequestError: it makes no sense.
        """
        if isinstance(request, CheckedRequest):
            return request
        user, schema = request.user, self.vault.schema
        wanted = str if schema.user == "string" else (int, np.integer)
        if not isinstance(user, wanted) or isinstance(user, bool):
            raise RequestError(position, f"user {user!r}: this vault's users are {schema.user}")
        if schema.user == "int64" and not -(2**63) <= user < 2**63:
            raise RequestError(position, f"user {user}: beyond int64")
        moment = self.now() if request.time is None else request.time
        whole = isinstance(moment, (int, np.integer)) and not isinstance(moment, bool)
        if not whole or not 0 <= moment < schema.time_limit:
            unit = schema.time_unit
            raise RequestError(position, f"time {moment!r}: need an integer, 0 <= time < {schema.time_limit} in {unit}")
        features = self.model.features
        checked = CheckedRequest(user, {}, {}, int(moment))
        self._fill(checked, position, "candidates", features.item, request.candidates)
        candidates = checked.candidates
        lengths = {name: len(values) for name, values in candidates.items()}
        if len(set(lengths.values())) > 1:
            raise RequestError(position, f"candidates of unlike lengths: {lengths}")
        if not _count(candidates):
            raise RequestError(position, "no candidates")
        given = {name: [value] for name, value in request.context.items()}
        self._fill(checked, position, "context", features.context, given)
        return checked

    def _fill(
        self, checked: CheckedRequest, position: int, side: str, fields: tuple[FieldConfig, ...], given: dict[str, Any]
    ) -> None:
        """Puts the columns of one side into a request."""
        names = [field.name for field in fields]
        for name in given:
            if name not in names:
                raise RequestError(position, f"{side} {name!r} is none of the model's: {', '.join(names) or 'none'}")
        columns = getattr(checked, side)
        for field in fields:
            if field.name not in given:
                raise RequestError(position, f"{side} {field.name!r} is missing; need {', '.join(names)}")
            what, values = f"{side} {field.name!r}", given[field.name]
            if field.name not in self.model.strings:
                columns[field.name] = self._numbers(position, what, field, values)
                continue
            texts = np.asarray(values, object)
            if texts.ndim != 1 or not all(isinstance(text, str) for text in texts):
                raise RequestError(position, f"{what}: need a list of strings")
            codes = self.vault.encode(field.name, texts).astype(np.int64)
            checked.texts[side, field.name] = texts
            if (codes < 0).any():
                checked.unknown[side, field.name] = np.flatnonzero(codes < 0).tolist()
            translated = field.name in self._translations
            columns[field.name] = self.model.codes(field.name, texts) if translated else codes

    def _numbers(self, position: int, what: str, field: FieldConfig, given: Any) -> np.ndarray:
        try:
            values = np.asarray(given)
        except ValueError as error:
            raise RequestError(position, f"{what}: {error}") from error
        width = self.model.width_of(field)
        shape = values.shape[:1] if width is None else (*values.shape[:1], width)
        if values.ndim < 1 or values.shape != shape:
            kind = "numbers" if width is None else f"lists of {width} numbers"
            raise RequestError(position, f"{what} has shape {values.shape}: need a list of {kind}")
        allowed = "iufb" if field.ids in ("log", "vector") else "iub"
        if values.dtype.kind not in allowed and values.size:
            wanted = "numbers" if "f" in allowed else "integers"
            raise RequestError(position, f"{what} is of type {values.dtype}: need {wanted}")
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise RequestError(position, f"{what}: {values[~np.isfinite(values)][0]} is not finite")
        if values.dtype.kind == "u" and values.size and values.max() > np.iinfo(np.int64).max:
            raise RequestError(position, f"{what}: {values.max()} is beyond int64")
        if field.ids == "vector" and values.size and np.abs(values.astype(np.float64)).max() > _MOST_FLOAT32:
            raise RequestError(position, f"{what}: {values.ravel()[np.abs(values).argmax()]} is beyond float32")
        # Of one type in all requests: side by side, unsigned and signed integers would become floats.
        return values.astype(np.float64 if field.ids in ("log", "vector") else np.int64, copy=False)


def _asked(checked: Sequence[RankRequest], group: list[tuple[int, int, int]]) -> Requests:
    """What a group of (request, first candidate, behind the last) asks."""
    positions = [position for position, _, _ in group]
    first = checked[positions[0]]
    return Requests(
        np.array([checked[position].time for position in positions], np.int64),
        np.array([0, *accumulate(stop - start for _, start, stop in group)]),
        {
            name: joined([checked[p].candidates[name][start:stop] for p, start, stop in group])
            for name in first.candidates
        },
        {name: joined([checked[position].context[name] for position in positions]) for name in first.context},
    )


def _count(columns: dict[str, np.ndarray]) -> int:
    return len(next(iter(columns.values())))
