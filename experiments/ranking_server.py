"""A ranking server in a process of its own, and what its clients send: for experiments against the real one."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from typing import Any

import numpy as np

from laser_jax.serving.messages import MESSAGES, SERVICE
from laser_jax.serving.tensors import DTYPES, datatype_of

INFER = f"/{SERVICE}/ModelInfer"


class RankingServer:
    """A server that is ready.

    Attributes:
      http, grpc: where it listens. pid: of its process. seconds: until it was ready.
    """

    def __init__(self, *arguments: str, module: str = "laser_jax.serving.server", **environment: str):
        """
        Args:
          arguments: of the module, which is run. environment: beside this process's own.

        Raises:
          RuntimeError: it ended instead of getting ready; with the end of its log.
        """
        start = time.perf_counter()
        command = [sys.executable, "-m", module, "--port=0", "--grpc-port=0", *arguments]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | environment)
        self._log: deque[str] = deque(maxlen=50)
        for line in self._process.stderr:
            self._log.append(line)
            if '"message": "ready"' in line:
                said = json.loads(line)
                self.http, self.grpc = said["http"], said["grpc"]
                break
        else:
            raise RuntimeError(f"{' '.join(command)} ended: {''.join(self._log)}")
        self.seconds = time.perf_counter() - start
        self.pid = self._process.pid
        # A full pipe would stop it.
        self._reader = threading.Thread(target=self._log.extend, args=(self._process.stderr,), daemon=True)
        self._reader.start()

    def close(self, number: int = signal.SIGTERM) -> None:
        """Ends it by a signal."""
        self._process.send_signal(number)
        self._process.wait()
        self._reader.join()
        self._process.stderr.close()

    @property
    def resident_bytes(self) -> int:
        """Memory of the process."""
        with open(f"/proc/{self.pid}/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def infer_request(model: str, columns: dict[str, Any]) -> Any:
    """A ModelInferRequest; strings are given as objects."""
    request = MESSAGES["ModelInferRequest"](model_name=model)
    for name, values in columns.items():
        values = np.asarray(values)
        if values.dtype == object:
            texts = [text.encode() for text in values.tolist()]
            data = b"".join(len(text).to_bytes(4, "little") + text for text in texts)
        else:
            data = np.ascontiguousarray(values).tobytes()
        request.inputs.add(name=name, datatype=datatype_of(values.dtype), shape=values.shape)
        request.raw_input_contents.append(data)
    return request


def outputs_of(response: bytes) -> dict[str, np.ndarray]:
    """The numbers of a ModelInferResponse, by name."""
    answer = MESSAGES["ModelInferResponse"].FromString(response)
    return {
        output.name: np.frombuffer(data, DTYPES[output.datatype]).reshape(output.shape)
        for output, data in zip(answer.outputs, answer.raw_output_contents, strict=True)
    }
