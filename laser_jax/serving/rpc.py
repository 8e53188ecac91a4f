"""The Open Inference Protocol v2 over gRPC."""

import hmac
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

import laser_jax
from laser_jax.serving.catalog import Catalog, TokenError, describe, meaning
from laser_jax.serving.messages import MESSAGES, METHODS, SERVICE
from laser_jax.serving.tensors import InputError, from_message, to_message

#: Methods for which no token is needed: whoever starts and watches servers has none.
_OPEN = ("ServerLive", "ServerReady")


def server(catalog: Catalog, token: str | None, most_bytes: int) -> grpc.aio.Server:
    """A server without a port, not started.

    Args:
      catalog: of the models.
      token: that callers must send as metadata `authorization: Bearer TOKEN`, but for _OPEN; None lets everybody in.
      most_bytes: of a message.
    """
    made = grpc.aio.server(options=[("grpc.max_receive_message_length", most_bytes), ("grpc.so_reuseport", 0)])
    calls = _Calls(catalog)
    handlers = {
        name: grpc.unary_unary_rpc_method_handler(_guarded(catalog, token, name, getattr(calls, name)))
        for name in METHODS
    }
    made.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    return made


def _guarded(
    catalog: Catalog, token: str | None, method: str, call: Callable[[Any, Any], Awaitable[Any]]
) -> Callable[[bytes, grpc.aio.ServicerContext], Awaitable[bytes]]:
    async def handle(data: bytes, context: grpc.aio.ServicerContext) -> bytes:
        started, status, model = time.perf_counter(), 200, ""
        try:
            if token is not None and method not in _OPEN:
                _check_token(token, context)
            try:
                request = MESSAGES[f"{method}Request"].FromString(data)
            except DecodeError as error:
                raise InputError(f"these {len(data)} bytes are no {method}Request: {error}") from error
            model = getattr(request, "model_name", "")
            return (await call(request, context)).SerializeToString()
        except Exception as error:
            status, code, text = meaning(error)
        finally:
            if model:
                known = model if model in catalog.names() else "unknown"
                catalog.metrics.call(known, status, time.perf_counter() - started)
        await context.abort(code, text)

    return handle


def _check_token(token: str, context: grpc.aio.ServicerContext) -> None:
    given = dict(context.invocation_metadata() or ()).get("authorization", "")
    if not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
        raise TokenError("the token is missing or wrong: send authorization: Bearer TOKEN")


class _Calls:
    """The methods of the service: (request, context) -> answer."""

    def __init__(self, catalog: Catalog):
        self._catalog = catalog

    async def ServerLive(self, request: Any, context: Any) -> Any:
        return MESSAGES["ServerLiveResponse"](live=True)

    async def ServerReady(self, request: Any, context: Any) -> Any:
        return MESSAGES["ServerReadyResponse"](ready=self._catalog.ready)

    async def ModelReady(self, request: Any, context: Any) -> Any:
        self._catalog.find(request.name, request.version)
        return MESSAGES["ModelReadyResponse"](ready=self._catalog.ready)

    async def ServerMetadata(self, request: Any, context: Any) -> Any:
        return MESSAGES["ServerMetadataResponse"](name="laser_jax", version=laser_jax.__version__)

    async def ModelMetadata(self, request: Any, context: Any) -> Any:
        return MESSAGES["ModelMetadataResponse"](**describe(self._catalog.find(request.name, request.version)))

    async def ModelInfer(self, request: Any, context: Any) -> Any:
        asked = from_message(request)
        endpoint, outputs = await self._catalog.infer(
            request.model_name, request.model_version, asked, context.time_remaining()
        )
        return to_message(endpoint.name, endpoint.version, asked.id, outputs)
