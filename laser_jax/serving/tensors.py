"""Tensors of the Open Inference Protocol v2, from and to numpy: in protobuf, in JSON, and in JSON with binary data."""

import base64
import dataclasses
import json
import math
import struct
from typing import Any

import numpy as np

from laser_jax.serving.messages import MESSAGES

#: Datatype -> numpy's.
DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype(np.uint16),
    "UINT32": np.dtype(np.uint32),
    "UINT64": np.dtype(np.uint64),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype(np.int16),
    "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64),
    "FP16": np.dtype(np.float16),
    "FP32": np.dtype(np.float32),
    "FP64": np.dtype(np.float64),
    "BYTES": np.dtype(object),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_CONTENTS = {
    "BOOL": "bool_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}


class InputError(ValueError):
    """A request that is not as it must be: whose fault it is, the caller learns by the message."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """What a model's metadata says of an input or output; -1 in the shape stands for any size."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class InferRequest:
    """Inputs by name (strings as str objects), and what else a call says.

    Attributes:
      id: of the caller's. outputs: names of those that are wanted; empty for all. binary: names of the outputs that are
        to come as binary data behind the JSON; None for all of them.
    """

    inputs: dict[str, np.ndarray]
    id: str = ""
    outputs: tuple[str, ...] = ()
    binary: tuple[str, ...] | None = ()


def datatype_of(dtype: np.dtype) -> str:
    """The protocol's name of a numpy type; BYTES for objects."""
    return _NAMES[np.dtype(dtype)]


def from_message(request: Any) -> InferRequest:
    """A ModelInferRequest's tensors.

    Raises:
      InputError: a tensor is not what it says.
    """
    raw = list(request.raw_input_contents)
    if raw and len(raw) != len(request.inputs):
        raise InputError(f"{len(raw)} raw contents for {len(request.inputs)} inputs: need one for each")
    inputs = {}
    for number, tensor in enumerate(request.inputs):
        shape = _shape(tensor.name, tuple(tensor.shape))
        dtype = _dtype(tensor.name, tensor.datatype)
        if raw:
            values = _from_bytes(tensor.name, dtype, raw[number])
        else:
            name = _CONTENTS.get(tensor.datatype)
            if name is None:
                raise InputError(f"input {tensor.name!r}: {tensor.datatype} comes as raw contents only")
            values = _from_list(tensor.name, dtype, list(getattr(tensor.contents, name)))
        _add(inputs, tensor.name, values, shape)
    return InferRequest(inputs, request.id, tuple(output.name for output in request.outputs))


def to_message(name: str, version: str, id: str, outputs: dict[str, np.ndarray]) -> Any:
    """A ModelInferResponse with raw contents."""
    response = MESSAGES["ModelInferResponse"](model_name=name, model_version=version, id=id)
    for output, values in outputs.items():
        response.outputs.add(name=output, datatype=datatype_of(values.dtype), shape=values.shape)
        response.raw_output_contents.append(_to_bytes(values))
    return response


def from_http(body: bytes, header_length: int | None) -> InferRequest:
    """A REST call's body: JSON, or JSON of that length with binary data behind it.

    Raises:
      InputError: it is not as the protocol says.
    """
    if header_length is not None and not 0 <= header_length <= len(body):
        raise InputError(f"Inference-Header-Content-Length is {header_length}, the body has {len(body)} bytes")
    text = body if header_length is None else body[:header_length]
    rest = memoryview(b"" if header_length is None else body[header_length:])
    try:
        asked = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"the body is not JSON: {error}") from error
    if not isinstance(asked, dict) or not isinstance(asked.get("inputs"), list):
        raise InputError('the body must be an object with a list of "inputs"')
    inputs: dict[str, np.ndarray] = {}
    for tensor in asked["inputs"]:
        if not isinstance(tensor, dict) or not isinstance(tensor.get("name"), str):
            raise InputError('every input must be an object with a "name"')
        name = tensor["name"]
        shape, dtype = _shape(name, tensor.get("shape")), _dtype(name, tensor.get("datatype"))
        size = _parameters(tensor).get("binary_data_size")
        if size is not None:
            if type(size) is not int or not 0 <= size <= len(rest):
                raise InputError(f"input {name!r}: binary_data_size={size!r}, {len(rest)} bytes are left of the body")
            values, rest = _from_bytes(name, dtype, bytes(rest[:size])), rest[size:]
        else:
            if "data" not in tensor:
                raise InputError(f'input {name!r} has neither "data" nor binary_data_size')
            values = _from_list(name, dtype, _flat(tensor["data"]))
        _add(inputs, name, values, shape)
    if len(rest):
        raise InputError(f"{len(rest)} bytes behind the last input")
    wanted, every = asked.get("outputs", []), _parameters(asked).get("binary_data_output", False)
    named = isinstance(wanted, list) and all(isinstance(one, dict) for one in wanted)
    if not named or not all(isinstance(one.get("name"), str) for one in wanted):
        raise InputError('"outputs" must be a list of objects with a "name"')
    binary = tuple(one["name"] for one in wanted if _parameters(one).get("binary_data", every))
    id = asked.get("id", "")
    if not isinstance(id, str):
        raise InputError(f'"id" must be a string, not {id!r}')
    return InferRequest(inputs, id, tuple(one["name"] for one in wanted), binary if wanted or not every else None)


def to_http(name: str, version: str, request: InferRequest, outputs: dict[str, np.ndarray]) -> tuple[bytes, int | None]:
    """The body of a REST answer and, if there is binary data behind it, the length of its JSON."""
    described, blobs = [], []
    for output, values in outputs.items():
        entry: dict[str, Any] = {"name": output, "datatype": datatype_of(values.dtype), "shape": list(values.shape)}
        if request.binary is None or output in request.binary:
            blobs.append(_to_bytes(values))
            entry["parameters"] = {"binary_data_size": len(blobs[-1])}
        else:
            entry["data"] = values.reshape(-1).tolist()
        described.append(entry)
    answer = {"model_name": name, "model_version": version, "outputs": described}
    if request.id:
        answer["id"] = request.id
    text = json.dumps(answer).encode()
    return (text + b"".join(blobs), len(text)) if blobs else (text, None)


def _parameters(value: dict[str, Any]) -> dict[str, Any]:
    found = value.get("parameters", {})
    if not isinstance(found, dict):
        raise InputError(f'"parameters" must be an object, not {found!r}')
    return found


def _shape(name: str, shape: Any) -> tuple[int, ...]:
    known = isinstance(shape, (list, tuple)) and len(shape) <= 4
    if not known or not all(type(size) is int and 0 <= size < 2**31 for size in shape):
        raise InputError(f"input {name!r}: shape {shape!r} is not a list of at most 4 sizes")
    if math.prod(max(size, 1) for size in shape) >= 2**31:  # numpy refuses such a shape even of nothing
        raise InputError(f"input {name!r}: shape {shape!r} is too large")
    return tuple(shape)


def _dtype(name: str, datatype: Any) -> np.dtype:
    if not isinstance(datatype, str) or datatype not in DTYPES:
        raise InputError(f"input {name!r}: datatype {datatype!r} is not one of {', '.join(DTYPES)}")
    return DTYPES[datatype]


def _add(inputs: dict[str, np.ndarray], name: str, values: np.ndarray, shape: tuple[int, ...]) -> None:
    if name in inputs:
        raise InputError(f"input {name!r} is there twice")
    if math.prod(shape) != len(values):
        raise InputError(f"input {name!r}: {len(values)} values for shape {list(shape)}")
    inputs[name] = values.reshape(shape)


def _flat(data: Any) -> list[Any]:
    """Nested lists as one."""
    if not isinstance(data, list):
        raise InputError('"data" must be a list')
    while data and all(isinstance(part, list) for part in data):
        data = [value for part in data for value in part]
    return data


def _from_list(name: str, dtype: np.dtype, values: list[Any]) -> np.ndarray:
    kinds = {"b": bool, "i": int, "u": int, "f": (int, float)}.get(dtype.kind, (str, bytes))
    for value in values:
        if not isinstance(value, kinds) or (dtype.kind != "b" and isinstance(value, bool)):
            raise InputError(f"input {name!r}: {value!r} is not a value of type {_NAMES[dtype]}")
    if dtype.kind == "O":
        return _texts(name, values)
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        for value in values:
            if not limits.min <= value <= limits.max:
                raise InputError(f"input {name!r}: {value} does not fit {_NAMES[dtype]}")
    try:
        with np.errstate(over="ignore"):  # told below
            found = np.array(values, dtype)
    except (OverflowError, ValueError) as error:
        raise InputError(f"input {name!r}: {error}") from error
    if dtype.kind == "f":
        for number in np.flatnonzero(np.isinf(found)).tolist():
            if not math.isinf(values[number]):
                raise InputError(f"input {name!r}: {values[number]} does not fit {_NAMES[dtype]}")
    return found


def _from_bytes(name: str, dtype: np.dtype, data: bytes) -> np.ndarray:
    if dtype.kind == "O":
        found, at = [], 0
        while at < len(data):
            if at + 4 > len(data):
                raise InputError(f"input {name!r}: its bytes end inside a length")
            (size,) = struct.unpack_from("<I", data, at)
            at += 4
            if at + size > len(data):
                raise InputError(f"input {name!r}: its bytes end inside a string")
            found.append(data[at : at + size])
            at += size
        return _texts(name, found)
    if len(data) % dtype.itemsize:
        raise InputError(f"input {name!r}: {len(data)} bytes are no whole number of {_NAMES[dtype]}")
    if dtype.kind == "b" and data.translate(None, b"\0\1"):
        raise InputError(f"input {name!r}: a BOOL is a byte of 0 or 1")
    return np.frombuffer(data, dtype.newbyteorder("<"))


def _texts(name: str, values: list[str | bytes]) -> np.ndarray:
    found = np.empty(len(values), object)
    for number, value in enumerate(values):
        try:
            found[number] = value.encode().decode() if isinstance(value, str) else value.decode()
        except UnicodeError as error:  # as text, JSON may hold halves of characters
            shown = repr(value[:40]) if isinstance(value, str) else f"base64 {base64.b64encode(value[:40]).decode()}"
            raise InputError(f"input {name!r}: string {number} ({shown}) is not UTF-8") from error
    return found


def _to_bytes(values: np.ndarray) -> bytes:
    if values.dtype.kind == "O":
        parts = [value.encode() for value in values.reshape(-1).tolist()]
        return b"".join(struct.pack("<I", len(part)) + part for part in parts)
    return np.ascontiguousarray(values, values.dtype.newbyteorder("<")).tobytes()
