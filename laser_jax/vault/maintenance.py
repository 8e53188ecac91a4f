"""What goes on behind the writer: tails become parts, users are merged, old files go. One manifest after the other."""

import concurrent.futures
import contextlib
import dataclasses
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from laser_jax.schema import Schema
from laser_jax.vault.dictionary import Dictionary
from laser_jax.vault.errors import UnavailableError, VaultError
from laser_jax.vault.files import inventory, sync_path, sync_tree, write_strings
from laser_jax.vault.format import DICTIONARIES, MANIFEST, PARTS, VERSION
from laser_jax.vault.manifest import HeldManifest, collect_garbage, commit_manifest, read_manifest
from laser_jax.vault.merge_plan import MergePlan, all_entries, plan_everything, plan_newest
from laser_jax.vault.origins import joined, newest, origins_of, to_manifest
from laser_jax.vault.state import State, build_state
from laser_jax.vault.storage import LocalStorage
from laser_jax.vault.tail import Tail
from laser_jax.vault.tasks import LogTask, MergeTask
from laser_jax.vault.unpacking import fill_values
from laser_jax.vault.worker import Worker

#: Seconds after which it is looked, while users are merged, whether a tail is full.
_LOOK = 0.05
#: Seconds between tries after the storage refused.
_RETRY = 1.0
_LONGEST_PAUSE = 300.0


@dataclasses.dataclass(frozen=True)
class WriterOptions:
    """How a handle writes.

    Attributes:
      tail_bytes: memory for events that are in no part yet. At half of it they begin to become a part, at all of it
        appends wait.
      background: whether tails are flushed and users merged as needed, by a process of its own. If not, a full tail
        is flushed by the append that fills it, and nothing is merged but by `merge`.
      merge_bytes_per_s: bytes of decoded pages that background merges read and write in a second, at most; 0 for no
        limit.
      merge_parts: parts that a user may live in before it is merged.
      dedup_window: newest appended events among which repeated ones are found, if the schema drops duplicates.
    """

    tail_bytes: int = 128 << 20
    background: bool = True
    merge_bytes_per_s: int = 32 << 20
    merge_parts: int = 4
    dedup_window: int = 1 << 18

    def __post_init__(self):
        for name in ("tail_bytes", "merge_parts"):
            if getattr(self, name) < 1:
                raise VaultError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("merge_bytes_per_s", "dedup_window"):
            if getattr(self, name) < 0:
                raise VaultError(f"{name} must not be negative, got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True, eq=False)
class LogPiece:
    """A closed tail and the log files (number, bytes) that hold its events."""

    tail: Tail
    files: tuple[tuple[int, int], ...]


class Maintenance:
    """Owns the writer's state: everything that changes the manifest goes through here, one change at a time.

    Attributes:
      state: newest state.
    """

    def __init__(
        self,
        storage: LocalStorage,
        options: WriterOptions,
        dictionaries: dict[str, Dictionary],
        state: State,
        appender: Any,
        change: Callable[[State], None],
        lock_descriptor: int,
    ):
        self.state = state
        self.options = options
        self.root = storage.root
        self._storage = storage
        self._dictionaries = dictionaries
        self._appender = appender
        self._change = change
        self._lock = threading.RLock()
        self._state_lock = threading.Lock()
        self._work = threading.Event()
        self._room = threading.Condition()
        self._flush_failure: Exception | None = None
        self._merge_failure: Exception | None = None
        self._merge_after = 0.0
        self._merge_pause = _RETRY
        self._closing = self._closed = False
        self._merging = False
        self._worker, self._merger = Worker(lock_descriptor), Worker(lock_descriptor)
        self.bytes_written = 0
        self.events_merged = 0
        self._thread: threading.Thread | None = None
        self._new_parts: list[str] = []
        self._given = 0
        self._collect()
        if state.manifest["version"] < VERSION:
            # Readers of that version would not look for a log.
            self.commit()

    # Called by the appender.

    def add_tail(self, tail: Tail) -> None:
        """Puts a new tail behind the others."""
        with self._state_lock:
            self._set(self.state.with_tails((*(old for old in self.state.tails if old.size), tail)))

    def tail_is_full(self) -> None:
        """The newest tail has reached its budget."""
        if not self.options.background:
            self.flush()
            return
        self._appender.seal()
        self.wake()

    def wake(self) -> None:
        """Begins what has to be done in the background, if it is not under way."""
        self._merging = True
        self._merge_after = 0.0
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._run, name="vault-maintenance", daemon=True)
            self._thread.start()
        self._work.set()

    def wait_for_room(self) -> None:
        """Waits while the tails are over their budget.

        Raises:
          UnavailableError: they cannot be made into parts.
        """
        if self._tail_bytes() < self.options.tail_bytes:
            return
        self.tail_is_full()
        with self._room:
            while self._tail_bytes() >= self.options.tail_bytes:
                if self._flush_failure is not None:
                    raise UnavailableError(
                        f"{self.root}: the tail is full and cannot be made into a part: {self._flush_failure}"
                    ) from self._flush_failure
                self._work.set()
                self._room.wait(0.1)

    def close(self) -> None:
        """Ends after what is under way; a merge is given up. From then on nothing changes the vault."""
        self._closing = True
        self._work.set()
        if self._thread is not None:
            self._thread.join()
        with self._lock:  # another thread may be flushing, merging or forgetting
            self._closed = True
            self._worker.close()
            self._merger.close()

    def stats(self) -> dict[str, Any]:
        """Bytes written into parts and manifests, events rewritten by merges, bytes in tails."""
        return {
            "part_bytes_written": self.bytes_written,
            "events_merged": self.events_merged,
            "tail_bytes": self._tail_bytes(),
            "merging": self._merging,
            "flush_failure": str(self._flush_failure) if self._flush_failure else None,
            "merge_failure": str(self._merge_failure) if self._merge_failure else None,
        }

    # Work.

    def flush(self) -> None:
        """Everything in the tails becomes a part."""
        with self.locked():
            pieces = self._appender.seal()
            if pieces:
                self._flush(pieces)
                self._collect()

    def merge(self, say: Callable[[str], None]) -> None:
        """Everything of a user becomes one entry; retention is applied, and what nobody needs goes."""
        with self.locked():
            self.flush()
            retention = self.state.manifest["retention"]
            plan = plan_everything(self.state, trim=bool(retention))
            self._merge(plan, 0, keep_one=False, say=say)
            # Users who were taken out of parts may have left these mostly dead.
            plan = plan_everything(self.state, trim=False)
            if plan.pieces:
                self._merge(plan, 0, keep_one=False, say=say)
            self._collect()

    def commit(self, **changes: Any) -> None:
        """Writes a manifest with these changes, and makes its state the newest."""
        with self.locked():
            manifest = self.state.manifest | {"version": VERSION} | changes
            manifest["number"] = self.state.manifest["number"] + 1
            try:
                self._replace_manifest(manifest)
                held = HeldManifest(self._storage)
                state = build_state(self._storage, held, self._dictionaries, self.state, ())
                with self._state_lock:
                    # Tails may have come meanwhile; those whose events are in parts now go.
                    end, newest = manifest["next_sequence"], self.state.tails[-1]
                    tails = [tail for tail in self.state.tails if tail.next_sequence > end or tail is newest]
                    self._set(state.with_tails(tuple(tails)))
            except BaseException as error:
                try:
                    replaced = read_manifest(self._storage)["number"] == manifest["number"]
                except (VaultError, OSError):
                    replaced = True  # as far as anybody knows
                if replaced:
                    # The next one would be made from what memory has, and take back what this one says.
                    self._appender.refuse(f"its manifest was replaced, and then: {error!r}")
                raise

    def _replace_manifest(self, manifest: dict[str, Any]) -> None:
        try:
            commit_manifest(self.root, manifest)
            self.bytes_written += 2 * os.path.getsize(os.path.join(self.root, MANIFEST))
        except OSError as error:
            raise UnavailableError(f"{self.root}: its manifest cannot be written: {error}") from error

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Held while the vault's files are changed.

        Raises:
          UnavailableError: it was closed: somebody else may be the writer now. Or memory and disk may not agree.
        """
        with self._lock:
            if self._closed:
                raise UnavailableError(f"{self.root} was closed meanwhile: nothing of this is done")
            self._appender.check()
            yield

    def new_part_name(self, number: int | None = None) -> str:
        """A name that no part ever had, with the next number or a given one."""
        with self._lock:
            if number is None:
                number = self._next_part()
                self._given = number + 1
            return f"part-{number:06d}-{secrets.token_hex(4)}"

    def run_task(self, task: Any) -> Any:
        """The result of a task, from the worker process if there is background work."""
        try:
            return self._counted(self._worker.run(task) if self.options.background else task.run())
        except OSError as error:
            raise UnavailableError(f"{self.root}: {error}") from error

    def dictionary_pieces(self, schema: Schema | None = None) -> dict[str, Any]:
        """The manifest's dictionaries, with pieces for values that no piece holds yet, which are written now."""
        found = {name: list(pieces) for name, pieces in self.state.manifest["dictionaries"].items()}
        strings = [field.name for field in (schema or self.state.schema).fields if field.type == "string"]
        for field in strings:
            pieces = found.setdefault(field, [])
            values = self._dictionaries[field].since(sum(piece["values"] for piece in pieces))
            if values or not pieces:
                name = f"{field}-{len(pieces):06d}-{secrets.token_hex(4)}"
                folder = os.path.join(self.root, DICTIONARIES, name)
                write_strings(folder, "", values)
                sync_tree(folder)
                sync_path(os.path.dirname(folder))
                pieces.append({"name": name, "values": len(values), "files": inventory(folder, [])})
        return found

    def _counted(self, result: dict[str, Any] | None) -> dict[str, Any] | None:
        if result is not None:
            self.bytes_written += sum(file[0] for file in result["files"].values())
        return result

    def _next_part(self) -> int:
        return max(self.state.manifest["next_part"], self._given)

    def _set(self, state: State) -> None:
        self.state = state
        self._change(state)

    def _tail_bytes(self) -> int:
        return sum(tail.num_bytes for tail in self.state.tails)

    def _run(self) -> None:
        while not self._closing:
            self._work.wait()
            self._work.clear()
            self._merging = True
            try:
                with self.locked():
                    if self._flush_sealed():
                        self._collect()
                self._flush_failure = None
            except Exception as error:  # whatever it is: who waits for room must hear of it
                self._flush_failure = error
                self._work.set()
            with self._room:
                self._room.notify_all()
            if self._flush_failure is not None:
                time.sleep(_RETRY)
            elif not self._closing and time.monotonic() >= self._merge_after:
                self._merge_in_background()
            self._merging = self._work.is_set()

    def _merge_in_background(self) -> None:
        """Merges what needs it; after a failure (a damaged part, a full disk) only after a growing pause."""
        try:
            with self.locked():
                self._merge_newest()
            self._merge_failure, self._merge_pause = None, _RETRY
        except Exception as error:  # whatever it is: tails must go on becoming parts
            self._merge_failure = error
            self._merge_after = time.monotonic() + self._merge_pause
            self._merge_pause = min(2 * self._merge_pause, _LONGEST_PAUSE)

    def _flush_sealed(self) -> bool:
        """Makes a part of the tails that were closed; whether there were any."""
        with self._appender.commit_lock:
            pieces = list(self._appender.pieces)
        if pieces:
            self._flush(pieces)
        return bool(pieces)

    def _flush(self, pieces: list[LogPiece]) -> None:
        files = tuple(file for piece in pieces for file in piece.files)
        schemas = self.state.manifest["schemas"]
        name = self.new_part_name()
        entry = self.run_task(LogTask(self.root, name, files, schemas[-1]))
        self.sync_parts()
        end = pieces[-1].tail.next_sequence
        first = files[-1][0] + 1
        origins = origins_of(self.state.manifest)
        for piece in pieces:
            origins = joined(origins, piece.tail.origins)
        self.commit(
            **({"origins": to_manifest(newest(origins))} if origins else {}),
            parts=[*self.state.manifest["parts"], {"name": name, "schema": len(schemas) - 1, **entry}],
            next_part=self._next_part(),
            next_sequence=end,
            dictionaries=self.dictionary_pieces(),
            log={"first": first, "kept": self._kept(first, end)},
        )
        self._appender.flushed(pieces)
        with self._room:
            self._room.notify_all()
        self._new_parts = [*self._new_parts, name]

    def _kept(self, first: int, end: int) -> int:
        """The oldest log file that the window of repeated events reaches back to."""
        if self.state.schema.duplicates != "drop":
            return first
        return self._appender.oldest_file(end - self.options.dedup_window, first)

    def _merge_newest(self) -> None:
        """Merges those users of the newest parts who live in too many parts; then small and mostly dead parts."""
        new = [name for name in self._new_parts if name in self.state.parts]
        self._new_parts = []
        plan = plan_newest(self.state, new, self.options.merge_parts)
        if plan is not None:
            self._merge(plan, self.options.merge_bytes_per_s, keep_one=True)
            self._collect()

    def _merge(
        self, plan: MergePlan, bytes_per_s: int, keep_one: bool, say: Callable[[str], None] = lambda line: None
    ) -> None:
        retention = self.state.manifest["retention"]
        keep_from = 0
        if retention.get("age"):
            # Neither a clock nor an event that is ahead of its time may delete what is not old: the earlier one counts.
            newest = max((part.entry["last_time"] for part in self.state.parts.values()), default=0)
            now = int(time.time() * (1000 if self.state.schema.time_unit == "ms" else 1))
            keep_from = max(0, min(newest, now) - retention["age"] + 1)
        schemas = self.state.manifest["schemas"]
        fills = fill_values(self.state.schema, self._dictionaries)
        added = []
        started, total, done = time.monotonic(), sum(len(piece.users) for piece in plan.pieces), 0
        # All named before any is made: what is flushed in between must not be taken for older than they are.
        names = [self.new_part_name() for _ in plan.pieces]
        for piece, name in zip(plan.pieces, names, strict=True):
            task = MergeTask(
                self.root,
                name,
                schemas,
                fills,
                [self.state.by_number[number].entry for number in piece.parts],
                piece.part,
                piece.first,
                piece.end,
                piece.user,
                piece.users,
                piece.covers,
                retention.get("events") or 0,
                keep_from,
                keep_one,
                bytes_per_s,
            )
            entry = self._run_merge(task)
            if entry is not None:
                added.append({"name": name, "schema": len(schemas) - 1, **entry})
                self.events_merged += entry["events"]
            done += len(piece.users)
            seconds = time.monotonic() - started
            rate = done / max(seconds, 1e-9)
            say(f"merged {done:,} of {total:,} users, {rate:,.0f}/s, {(total - done) / rate:.0f} s left")
            if entry is None and keep_one:
                raise VaultError(f"{self.root}: a merge of {len(piece.users)} users left nothing; this is a bug")
        self.sync_parts()
        kept = [entry for entry in self.state.manifest["parts"] if entry["name"] not in plan.emptied]
        if added or len(kept) < len(self.state.manifest["parts"]):
            self.commit(parts=[*kept, *added], next_part=self._next_part())
        # Parts in which nothing counts any more go.
        dead = [part.name for part, alive in all_entries(self.state).live_pages.items() if not alive]
        if dead:
            self.commit(parts=[entry for entry in self.state.manifest["parts"] if entry["name"] not in dead])

    def _run_merge(self, task: MergeTask) -> dict[str, Any] | None:
        """The result of a merge. While it goes on, which may be slowly on purpose, full tails become parts."""
        given_up = UnavailableError(f"{self.root} was closed meanwhile: nothing of this merge counts")
        if self._closing:
            raise given_up
        if not self.options.background:
            return self.run_task(task)
        with concurrent.futures.ThreadPoolExecutor(1, "vault-merge") as pool:
            running = pool.submit(self._merger.run, task)
            try:
                while not concurrent.futures.wait([running], _LOOK).done:
                    if self._closing:
                        self._merger.stop()
                    elif self._flush_failure is None:
                        try:
                            self._flush_sealed()
                        except Exception as error:  # whatever it is: who waits for room must hear of it
                            self._flush_failure = error
                            self._work.set()
            except BaseException:
                self._merger.stop()  # or the pool would wait for it
                raise
        try:
            return self._counted(running.result())
        except UnavailableError as error:
            raise (given_up if self._closing else error) from error.__cause__

    def sync_parts(self) -> None:
        """Makes the names of new parts durable."""
        folder = os.path.join(self.root, PARTS)
        with contextlib.suppress(FileNotFoundError):
            sync_path(folder)

    def _collect(self, force: bool = False) -> None:
        try:
            collect_garbage(self.root, force)
        except OSError as error:
            raise UnavailableError(f"{self.root}: old files cannot be removed: {error}") from error

    def collect(self, force: bool) -> None:
        """Removes what no manifest or snapshot names; with `force` also what readers hold."""
        self._collect(force)
