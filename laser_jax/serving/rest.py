"""The Open Inference Protocol v2 over HTTP, with its binary data, and Prometheus metrics at /metrics."""

import asyncio
import hmac
import re
import time
from collections.abc import Awaitable, Callable

import prometheus_client
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

import laser_jax
from laser_jax.serving.catalog import Catalog, TokenError, TooLargeError, describe, meaning
from laser_jax.serving.tensors import InputError, from_http, to_http

_LENGTH = "Inference-Header-Content-Length"
EXTENSIONS = ("binary_tensor_data",)
#: Seconds that a caller has to send a body.
_BODY_S = 10.0


def application(catalog: Catalog, token: str | None, most_bytes: int) -> Starlette:
    """The web application.

    Args:
      catalog: of the models.
      token: that callers must send as `Authorization: Bearer TOKEN`; None lets everybody in.
      most_bytes: of a body.
    """

    def guarded(handler: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        async def handle(request: Request) -> Response:
            started, model = time.perf_counter(), request.path_params.get("model", "")
            status = 200
            try:
                given = request.headers.get("authorization", "")
                if token is not None and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
                    raise TokenError("the token is missing or wrong: send Authorization: Bearer TOKEN")
                return await handler(request)
            except ClientDisconnect:
                status = 499
                return Response(status_code=status)
            except Exception as error:
                status, _, text = meaning(error)
                return JSONResponse({"error": text}, status)
            finally:
                if model:
                    known = model if model in catalog.names() else "unknown"
                    catalog.metrics.call(known, status, time.perf_counter() - started)

        return handle

    async def live(_: Request) -> Response:
        return JSONResponse({"live": True})

    async def ready(_: Request) -> Response:
        return JSONResponse({"ready": catalog.ready}, 200 if catalog.ready else 503)

    async def server(_: Request) -> Response:
        return JSONResponse({"name": "laser_jax", "version": laser_jax.__version__, "extensions": list(EXTENSIONS)})

    async def metadata(request: Request) -> Response:
        return JSONResponse(describe(_found(catalog, request)))

    async def model_ready(request: Request) -> Response:
        endpoint = _found(catalog, request)
        return JSONResponse({"name": endpoint.name, "ready": catalog.ready}, 200 if catalog.ready else 503)

    async def infer(request: Request) -> Response:
        name, version = request.path_params["model"], request.path_params.get("version", "")
        catalog.find(name, version)  # before a large body is read
        body = await _body(request, most_bytes)
        length = request.headers.get(_LENGTH)
        if length is not None and not re.fullmatch(r"[0-9]{1,18}", length):
            raise InputError(f"{_LENGTH} is {length!r}: need the length of the JSON")
        asked = from_http(body, None if length is None else int(length))
        endpoint, outputs = await catalog.infer(name, version, asked, _remaining(request))
        answer, length = to_http(endpoint.name, endpoint.version, asked, outputs)
        if length is None:
            return Response(answer, media_type="application/json")
        return Response(answer, media_type="application/octet-stream", headers={_LENGTH: str(length)})

    async def metrics(_: Request) -> Response:
        text = prometheus_client.generate_latest(catalog.metrics.registry)
        return Response(text, media_type=prometheus_client.CONTENT_TYPE_LATEST)

    routes = [
        Route("/v2/health/live", live),
        Route("/v2/health/ready", ready),
        Route("/metrics", metrics),
        Route("/v2", guarded(server)),
    ]
    for path in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        routes += [
            Route(path, guarded(metadata)),
            Route(f"{path}/ready", guarded(model_ready)),
            Route(f"{path}/infer", guarded(infer), methods=["POST"]),
        ]
    return Starlette(routes=routes)


def _found(catalog: Catalog, request: Request):
    return catalog.find(request.path_params["model"], request.path_params.get("version", ""))


def _remaining(request: Request) -> float | None:
    """Seconds that the caller says that it waits: the header `Timeout-Ms`."""
    given = request.headers.get("timeout-ms")
    if given is None:
        return None
    try:
        seconds = float(given) / 1000
    except ValueError as error:
        raise InputError(f"Timeout-Ms is {given!r}: need milliseconds") from error
    if not 0 < seconds < float("inf"):
        raise InputError(f"Timeout-Ms is {given!r}: need milliseconds, more than 0")
    return seconds


async def _body(request: Request, most: int) -> bytes:
    """The whole body, refused as soon as it is known to be too large, or to come too slowly."""
    told = request.headers.get("content-length", "")
    if re.fullmatch(r"[0-9]{1,18}", told) and int(told) > most:
        raise TooLargeError(f"the body has {told} bytes; at most {most} are taken")

    async def read() -> bytes:
        parts, size = [], 0
        async for part in request.stream():
            parts.append(part)
            size += len(part)
            if size > most:
                raise TooLargeError(f"the body has more than {most} bytes, which are the most that is taken")
        return b"".join(parts)

    try:
        return await asyncio.wait_for(read(), _BODY_S)
    except TimeoutError as error:
        raise InputError(f"the body did not come within {_BODY_S:.0f} s") from error
