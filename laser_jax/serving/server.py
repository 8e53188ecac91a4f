"""Serves a model: python -m laser_jax.serving.server --model=DIR --vault=DIR --port=8000 --grpc-port=8001

Speaks the Open Inference Protocol v2 over HTTP and gRPC, so that any of its clients calls it as it is: the exported
model ranks, the model `append` takes events, which the next ranking sees. --model names what `export` wrote, or a
directory of such: its newest one serves, and one that comes later takes over when its programs are compiled, without
a call being lost.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import logging
import math
import os
import resource
import signal
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import grpc
import jax
import uvicorn
import uvloop

from laser_jax import vault as seqvault
from laser_jax.serving import rest, rpc
from laser_jax.serving.catalog import Catalog, Metrics
from laser_jax.serving.endpoints import AppendEndpoint, RankEndpoint
from laser_jax.serving.exported import BATCHES, ExportedModel
from laser_jax.serving.files import MANIFEST, ModelError
from laser_jax.serving.memory import keep_pages, settle
from laser_jax.serving.patience import PatientProtocol
from laser_jax.serving.priority import let_others_first
from laser_jax.serving.ranker import Ranker
from laser_jax.serving.request_log import RequestLog
from laser_jax.vault.credentials import certificate_from, token_from

logger = logging.getLogger("laser_jax.serving")
#: Seconds between two words about programs that are being compiled.
_TELL_S = 5
#: Seconds after which a thread that computes in Python lets another one do so.
_SWITCH_S = 0.0005
#: Open files, and so connections, that a server is content with: more than callers behind a load balancer need.
_CONNECTIONS = 10_000
#: Seconds that what is being opened has, when the server is to stop.
_GIVE_UP_S = 10.0
#: How often it is looked whether somebody still holds a model that has been replaced, and the seconds in between.
_PATIENCE, _PATIENCE_S = 50, 0.1
#: Seconds at most until a newer model is tried again whose files are not what it failed for.
_RETRY_S = 60.0
#: Seconds until events of another process are seen.
_FOLLOW_S = 0.5
#: Seconds after which a vault elsewhere is asked how many events it has.
_COUNT_S = 5.0


def threads_here() -> int:
    """How many batches are best scored at a time: programs of these sizes hardly gain by a second core."""
    return min(len(os.sched_getaffinity(0)), 8)


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a server serves.

    Attributes:
      model: directory of an exported model, or of several. vault: directory, or grpc://host:port of a service.
      host: to listen on. port, grpc_port: of HTTP and gRPC, 0 for a free one.
      certificate, key: PEM files for TLS, both or none. token: that callers must send; None lets everybody in.
      deadline_s: seconds that a call may take. queue: calls that may wait. max_bytes: of a call. max_candidates: of it.
      max_batch: calls that are scored together, at most: 1, 2, 4 ... 32. read_only: no events are taken.
      request_log: directory for what is asked and answered; None for none.
      threads: batches that are scored at a time.
      user_cache_bytes: for what the model has read of users' histories.
      poll_s: seconds after which it is looked for a newer model.
    """

    model: str
    vault: str
    host: str = "127.0.0.1"
    port: int = 8000
    grpc_port: int = 8001
    certificate: str | None = None
    key: str | None = None
    token: str | None = None
    deadline_s: float = 1.0
    queue: int = 256
    max_bytes: int = 16 << 20
    max_candidates: int = 10_000
    max_batch: int = BATCHES[-1]
    read_only: bool = False
    request_log: str | None = None
    threads: int = dataclasses.field(default_factory=threads_here)
    user_cache_bytes: int = 512 << 20
    poll_s: float = 2.0


class Server:
    """The life of a server, in one event loop.

    Attributes:
      catalog: of its models. addresses: "http" and "grpc" -> where it listens, once it does.
    """

    def __init__(self, settings: Settings, open_vault: Callable[..., Any] = seqvault.open):
        """
        Args:
          settings: as said.
          open_vault: (settings.vault, timeout_s=...) -> what histories are read from and events are appended to.

        Raises:
          ValueError: settings that make no sense. VaultError: files of TLS that are none.
        """
        if not 1 <= settings.max_batch <= BATCHES[-1]:
            raise ValueError(f"max_batch={settings.max_batch}: need 1 to {BATCHES[-1]}")
        for name in ("threads", "queue", "max_bytes", "max_candidates"):
            if getattr(settings, name) < 1:
                raise ValueError(f"{name}={getattr(settings, name)}: need at least 1")
        if not 0 < settings.deadline_s < math.inf:
            raise ValueError(f"deadline_s={settings.deadline_s}: need a number of seconds above 0")
        if settings.user_cache_bytes < 0:
            raise ValueError(f"user_cache_bytes={settings.user_cache_bytes}: need 0 or more")
        for name in ("port", "grpc_port"):
            if not 0 <= getattr(settings, name) < 1 << 16:
                raise ValueError(f"{name}={getattr(settings, name)}: need 0 to 65535")
        self._tls = certificate_from(settings.certificate, settings.key)
        self.settings, self._open_vault = settings, open_vault
        self.metrics = Metrics()
        self.catalog = Catalog(self.metrics, settings.deadline_s)
        self.addresses: dict[str, str] = {}
        self._path = ""
        self._files: Any = None
        self._stop = asyncio.Event()
        self._told = time.monotonic()
        self._vault: Any = None
        self._log: RequestLog | None = None

    async def run(self) -> None:
        """Listens, loads the model, and serves until `stop`; then answers what is under way.

        Raises:
          ModelError, ValueError, VaultError: there is nothing to serve.
        """
        settings, loop = self.settings, asyncio.get_running_loop()
        # Live from the first moment on, ready when programs are compiled.
        app = rest.application(self.catalog, settings.token, settings.max_bytes)
        config = uvicorn.Config(
            app,
            log_level="warning",
            lifespan="off",
            server_header=False,
            ssl_certfile=settings.certificate,
            ssl_keyfile=settings.key,
            http=PatientProtocol,
            ws="none",
            timeout_graceful_shutdown=math.ceil(settings.deadline_s) + 1,
        )
        web = _Web(config)
        listening = _listen(settings.host, settings.port)
        serving = asyncio.create_task(web.serve([listening]))
        remote = rpc.server(self.catalog, settings.token, settings.max_bytes)
        port = _add_port(remote, f"{settings.host}:{settings.grpc_port}", self._tls)
        await remote.start()
        secure = "s" if settings.certificate else ""
        self.addresses = {
            "http": f"http{secure}://{settings.host}:{listening.getsockname()[1]}",
            "grpc": f"{settings.host}:{port}",
        }
        watching: list[asyncio.Task] = []
        try:
            try:
                await self._begin()
            except _StoppedError:
                return
            logger.info("ready", extra={"data": {"model": self._path, **self.addresses}})
            watching = [asyncio.create_task(self._watch())]
            if not self._vault.local:
                watching.append(asyncio.create_task(self._count()))
            elif settings.read_only:
                watching.append(asyncio.create_task(self._follow()))
            await self._stop.wait()
        finally:
            self.catalog.stopping = True
            for task in watching:
                task.cancel()
            await asyncio.gather(*watching, return_exceptions=True)  # they have told what they met
            web.should_exit = True
            await remote.stop(settings.deadline_s)
            await serving
            await loop.run_in_executor(None, self._close)

    def stop(self) -> None:
        """Ends `run`. To be called in its loop."""
        self._stop.set()

    async def _begin(self) -> None:
        """Lets the first model serve. Not in `run`, whose frame stays and would keep the model for ever."""
        endpoint = await self._opened()
        # In one go with the model: whoever finds the server ready finds all that it serves.
        if not self.settings.read_only:
            self.catalog.put(AppendEndpoint(self._vault, self.settings.queue, self.metrics.appended))
        await self._take_over(endpoint)

    async def _opened(self) -> RankEndpoint:
        """What _open gives; raises _StoppedError if the server is to stop meanwhile."""
        settings, loop = self.settings, asyncio.get_running_loop()
        logger.info("opening", extra={"data": {"vault": settings.vault, "model": settings.model}})
        result: asyncio.Future[RankEndpoint] = loop.create_future()
        # A thread of its own, for which the process does not wait: a vault elsewhere may let it wait for long.
        threading.Thread(target=_run_into, args=(self._open, loop, result), name="open", daemon=True).start()
        stopping = asyncio.create_task(self._stop.wait())
        await asyncio.wait([result, stopping], return_when=asyncio.FIRST_COMPLETED)
        if not result.done():
            await asyncio.wait([result], timeout=_GIVE_UP_S)
        stopping.cancel()
        if not result.done():
            raise _StoppedError
        return result.result()

    def _open(self) -> RankEndpoint:
        """Opens the vault and makes the first model ready."""
        settings = self.settings
        self._vault = self._open_vault(settings.vault, timeout_s=settings.deadline_s)
        if not settings.read_only and self._vault.local:
            self._vault.begin_writing()
        if self._vault.local:
            self.metrics.events.set_function(lambda: self._vault.num_events)
        if settings.request_log is not None:
            log = self._log = RequestLog(settings.request_log)
            self.metrics.lost.set_function(lambda: log.lost)
        paths = exported_models(settings.model)
        for path in paths[:-1]:
            try:
                return self._load(path)
            except ModelError as error:  # as of one that is still being copied; `_watch` takes it when it is whole
                logger.error("a newer model cannot be loaded: %s", error, extra={"data": {"model": path}})
        return self._load(paths[-1])

    def _load(self, path: str) -> RankEndpoint:
        """A model whose programs are compiled."""
        started, settings, files = time.monotonic(), self.settings, files_of(path)
        model = ExportedModel(path, before=self._serving())
        ranker = Ranker(model, self._vault, observe=self.metrics.stage, cache_bytes=settings.user_cache_bytes)
        # What is padded to more than `max_batch` calls has no program.
        most_calls = max(size for size in BATCHES if size <= settings.max_batch)
        shapes = ranker.compile(most_calls, settings.max_candidates, self._compiling)
        endpoint = RankEndpoint(
            ranker, settings.queue, settings.max_candidates, most_calls, self._log, settings.threads
        )
        told = {"model": path, "version": endpoint.version, "shapes": shapes, "seconds": time.monotonic() - started}
        logger.info("loaded", extra={"data": told})
        self._path, self._files = path, files
        return endpoint

    def _serving(self) -> ExportedModel | None:
        """The model that ranks now."""
        endpoints = [self.catalog.find(name) for name in self.catalog.names()]
        return next((found.ranker.model for found in endpoints if isinstance(found, RankEndpoint)), None)

    def _compiling(self, done: int, shapes: int) -> None:
        """Says how far it is; ends it if the server is to stop."""
        if self._stop.is_set():
            raise _StoppedError
        if time.monotonic() - self._told > _TELL_S:
            self._told = time.monotonic()
            logger.info("compiling", extra={"data": {"shapes_done": done, "shapes": shapes}})

    async def _take_over(self, endpoint: RankEndpoint) -> None:
        """Lets a model serve, and then answers what the one before has taken.

        In the loop that takes the calls: who finds a model there from now on finds the new one.
        """
        olds = [self.catalog.put(endpoint)]
        self.metrics.waiting.set_function(lambda: endpoint.waiting)
        self.metrics.watch_cache(endpoint.ranker.cache)
        for name in self.catalog.names():  # models of other names than the new one's
            if name not in (endpoint.name, AppendEndpoint.name):
                olds.append(self.catalog.remove(name))
        loop, replaced = asyncio.get_running_loop(), [weakref.ref(old) for old in olds if old is not None]
        await loop.run_in_executor(None, _close_all, olds)
        # Whoever was answered last may hold it for a moment still, and what is held while memory settles stays until
        # the next model comes.
        for _ in range(_PATIENCE):
            if not any(old() for old in replaced):
                break
            await asyncio.sleep(_PATIENCE_S)
        await loop.run_in_executor(None, settle)

    async def _watch(self) -> None:
        """Loads what is newer than what serves."""
        loop, told, pause = asyncio.get_running_loop(), "", 0.0
        failed: dict[str, Any] = {}  # path -> its files
        while True:
            await asyncio.sleep(self.settings.poll_s + pause)
            path, files = self.settings.model, None
            try:
                newer = self._newer(failed)
                if newer is not None:
                    path, files = newer
                    await self._take_over(await loop.run_in_executor(None, self._load, path))
                pause = 0.0
            except _StoppedError:
                return
            except Exception as error:  # whatever it is: what serves goes on, and what comes next is looked at
                if files is not None and isinstance(error, (ModelError, ValueError)):
                    failed[path] = files  # which may still be being copied: it is tried again when they have changed
                else:  # as where the vault does not answer: it may be over the next time
                    pause = min(2 * pause + self.settings.poll_s, _RETRY_S)
                if str(error) == told:
                    continue
                told = str(error)
                known = isinstance(error, (ModelError, ValueError, OSError, seqvault.VaultError))
                trace, data = None if known else error, {"model": path}
                logger.error("a newer model cannot be loaded: %s", error, extra={"data": data}, exc_info=trace)

    def _newer(self, failed: dict[str, Any]) -> tuple[str, Any] | None:
        """The newest model that does not serve yet and has not failed as it is, and its files."""
        for path in exported_models(self.settings.model):
            files = files_of(path)
            if files == self._files:
                break
            if files != failed.get(path):
                return path, files
        return None

    async def _follow(self) -> None:
        """Sees what another process writes into the vault."""
        loop, failing = asyncio.get_running_loop(), False
        while True:
            await asyncio.sleep(_FOLLOW_S)
            try:
                await loop.run_in_executor(None, self._vault.refresh)
                failing = False
            except Exception as error:  # whatever it is: the next time it may be over
                if not failing:
                    known = isinstance(error, (OSError, seqvault.VaultError))
                    logger.error("the vault cannot be followed: %s", error, exc_info=None if known else error)
                failing = True

    async def _count(self) -> None:
        """Asks a vault elsewhere how many events it has: whoever reads the metrics does not wait for it."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                events = await loop.run_in_executor(None, lambda: self._vault.num_events)
            except seqvault.VaultError:
                events = math.nan  # as is said of what is not known
            self.metrics.events.set(events)
            await asyncio.sleep(_COUNT_S)

    def _close(self) -> None:
        self.catalog.close()
        if self._log is not None:
            self._log.close()
        if self._vault is not None:
            self._vault.close()


def exported_models(path: str) -> list[str]:
    """The exported model at `path`, or those in it, the newest first.

    Raises:
      ModelError: there is none.
    """
    if os.path.exists(os.path.join(path, MANIFEST)):
        return [path]
    inner = [os.path.join(path, name, MANIFEST) for name in os.listdir(path)] if os.path.isdir(path) else []
    found = [(os.stat(name).st_mtime_ns, os.path.dirname(name)) for name in inner if os.path.exists(name)]
    found = [entry for entry in found if not entry[1].endswith(".draft")]
    if not found:
        raise ModelError(f"{path} holds no exported model")
    return [inner for _, inner in sorted(found, reverse=True)]


def files_of(path: str) -> list[tuple[str, int, int, int]]:
    """Of a directory and all in it: name, size, time and number of every file, which tell whether one has changed."""
    found = []
    for folder, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # while it was looked at
                said = os.stat(os.path.join(folder, name))
                found.append((os.path.join(folder, name), said.st_size, said.st_mtime_ns, said.st_ino))
    return sorted(found)


def _run_into(call: Callable[[], Any], loop: asyncio.AbstractEventLoop, result: asyncio.Future) -> None:
    """Gives a call's result, or its error, to a future of a loop."""

    def give(value: Any, error: BaseException | None) -> None:
        if result.cancelled():
            return
        if error is None:
            result.set_result(value)
        else:
            result.set_exception(error)

    try:
        found = (call(), None)
    except BaseException as error:  # whoever waits is to hear of it, whatever it is
        found = (None, error)
    with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody waits any more
        loop.call_soon_threadsafe(give, *found)


def _close_all(endpoints: list[Any]) -> None:
    """Takes them out of the list one by one, so that nobody holds what is closed."""
    while endpoints:
        endpoint = endpoints.pop()
        if endpoint is not None:
            endpoint.close()
        del endpoint


class _StoppedError(Exception):
    """The server is to stop before it is ready."""


class _Web(uvicorn.Server):
    """Signals are the server's business, not the web part's."""

    @contextlib.contextmanager
    def capture_signals(self):
        yield


class JsonLines(logging.Formatter):
    """A record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {"time": self.formatTime(record), "level": record.levelname, "message": record.getMessage()}
        entry |= getattr(record, "data", {})
        if record.exc_info:
            entry["trace"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
    except OSError as error:
        made.close()
        raise ValueError(f"{host}:{port} cannot be listened on: {error}") from error
    return made


def _add_port(remote: grpc.aio.Server, where: str, tls: tuple[bytes, bytes] | None) -> int:
    try:
        if tls is None:
            return remote.add_insecure_port(where)
        certificate, key = tls
        return remote.add_secure_port(where, grpc.ssl_server_credentials([(key, certificate)]))
    except RuntimeError as error:
        raise ValueError(f"{where} cannot be listened on: {error}") from error


async def serve(settings: Settings, open_vault: Callable[..., Any] = seqvault.open) -> None:
    """Serves until SIGTERM or SIGINT."""
    server = Server(settings, open_vault)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, server.stop)
    await server.run()


def _allow_connections() -> None:
    """Lets the process have as many as _CONNECTIONS open files, each connection being one, where the system lets it."""
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _CONNECTIONS if most == resource.RLIM_INFINITY else min(most, _CONNECTIONS)
    if now != resource.RLIM_INFINITY and now < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def main(arguments: list[str] | None = None, open_vault: Callable[..., Any] = seqvault.open) -> int:
    """Runs a server; returns the exit status. See Server for `open_vault`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, default = parser.add_argument, Settings("", "")
    add("--model", required=True, help="what export wrote, or a directory of such")
    add("--vault", required=True, help="directory, or grpc://host:port of its service")
    add("--host", default=default.host, help="address to listen on")
    add("--port", type=int, default=default.port, help="of HTTP; 0 for a free one")
    add("--grpc-port", type=int, default=default.grpc_port, help="of gRPC; 0 for a free one")
    add("--tls-certificate", help="PEM file; with --tls-key")
    add("--tls-key", help="PEM file")
    add("--deadline-ms", type=float, default=1000 * default.deadline_s, help="time that a call may take")
    add("--queue", type=int, default=default.queue, help="calls that may wait")
    add("--max-bytes", type=int, default=default.max_bytes, help="of a call")
    add("--max-candidates", type=int, default=default.max_candidates, help="of a call")
    add("--max-batch", type=int, default=default.max_batch, help="calls that are scored together")
    add("--read-only", action="store_true", help="take no events; those that another process appends are seen")
    add("--request-log", help="directory for what is asked and answered, see laser_jax.serving.replay")
    add("--threads", type=int, default=default.threads, help="batches that are scored at a time")
    add("--user-cache", type=int, default=default.user_cache_bytes >> 20, help="MiB for what was read of users")
    args = parser.parse_args(arguments)
    try:
        token = token_from("LASER_TOKEN")
    except seqvault.VaultError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    settings = Settings(
        args.model,
        args.vault,
        args.host,
        args.port,
        args.grpc_port,
        args.tls_certificate,
        args.tls_key,
        token,
        args.deadline_ms / 1000,
        args.queue,
        args.max_bytes,
        args.max_candidates,
        args.max_batch,
        args.read_only,
        args.request_log,
        args.threads,
        args.user_cache << 20,
    )
    if settings.token is None and settings.host not in ("127.0.0.1", "localhost", "::1"):
        logger.warning("anybody who reaches %s may rank and append: set LASER_TOKEN", settings.host)
    # The loop that hears calls and the thread that ranks share Python's lock: neither is to wait 5 ms for it.
    sys.setswitchinterval(_SWITCH_S)
    # A batch is computed in the thread that waits for it: another one would have to be woken for nothing.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    let_others_first()
    keep_pages()
    _allow_connections()
    started = time.monotonic()
    try:
        uvloop.run(serve(settings, open_vault))
    except (ModelError, ValueError, OSError, seqvault.VaultError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    seconds = time.monotonic() - started
    print(f"stopped after {seconds:,.0f} s; every call that was taken has its answer", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
