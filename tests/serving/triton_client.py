"""A client that knows nothing of laser_jax: NVIDIA's, over HTTP and gRPC. Prints what it was told, as JSON.

python triton_client.py HTTP GRPC MODEL REQUEST.json; needs tritonclient[http,grpc].
"""

import json
import sys

import numpy as np
import tritonclient.grpc
import tritonclient.http

DTYPES = {"INT64": np.int64}


def talk(library, url: str, model: str, request: dict) -> dict:
    client = library.InferenceServerClient(url)
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready(model)
    metadata = client.get_model_metadata(model)
    inputs = []
    for entry in request["inputs"]:
        values = np.array(entry["data"], DTYPES[entry["datatype"]])
        made = library.InferInput(entry["name"], list(values.shape), entry["datatype"])
        made.set_data_from_numpy(values)
        inputs.append(made)
    found = client.infer(model, inputs, request_id="7")
    some = client.infer(model, inputs, outputs=[library.InferRequestedOutput("logit")])
    assert some.as_numpy("events") is None
    np.testing.assert_array_equal(some.as_numpy("logit"), found.as_numpy("logit"))
    try:
        client.infer("none", inputs)
        refused = ""
    except library.InferenceServerException as error:
        refused = str(error)
    name = metadata["name"] if isinstance(metadata, dict) else metadata.name
    values = {output: found.as_numpy(output).tolist() for output in ("logit", "unseen", "events")}
    return {"name": name, "refused": refused, **values}


if __name__ == "__main__":
    http, rpc, model, path = sys.argv[1:]
    with open(path, encoding="utf-8") as file:
        request = json.load(file)
    told = {}
    for library, url in ((tritonclient.http, http), (tritonclient.grpc, rpc)):
        told[library.__name__.rsplit(".", 1)[-1]] = talk(library, url, model, request)
    print(json.dumps(told))
