"""Runs a vault's service until it is told to stop: python -m laser_jax.vault serve."""

import os
import signal
import sys
import threading
import time

import prometheus_client

from laser_jax.vault.credentials import certificate_from, token_from
from laser_jax.vault.errors import UnavailableError, VaultError
from laser_jax.vault.service import Limits, VaultService

#: Seconds that calls under way have to end when the service is to stop.
PATIENCE_S = 5.0


def serve(
    path: str,
    host: str,
    port: int,
    metrics_port: int | None,
    cache_bytes: int,
    read_only: bool,
    certificate: str | None,
    key: str | None,
    limits: Limits,
) -> None:
    """Serves until SIGTERM or SIGINT, then ends what is under way and returns.

    Args:
      path: directory of the vault.
      host, port: to listen on; port 0 takes a free one.
      metrics_port: of the Prometheus metrics over HTTP, on the same host; None for none.
      cache_bytes: memory for decoded histories of hot users.
      read_only: see VaultService.
      certificate, key: PEM files for TLS, both or none.
      limits: what is answered at most.

    Raises:
      VaultError: what is wrong with the vault, the port or the files.
    """
    for name, value in (("port", port), ("port of metrics", metrics_port or 0)):
        if not 0 <= value < 1 << 16:
            raise VaultError(f"{name} {value}: need 0 to 65535")
    tls, token = certificate_from(certificate, key), token_from("SEQVAULT_TOKEN")
    scheme = "grpc" if tls is None else "grpc+tls"
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    started = time.monotonic()
    service = VaultService(path, f"{scheme}://{host}:{port}", cache_bytes, read_only, token, tls, limits)
    try:
        where = f"{scheme}://{host}:{service.port}"
        vault = service.vault
        said = f"serving {vault.path} ({len(vault):,} users, {vault.num_events:,} events) at {where}"
        if metrics_port is not None:
            try:
                http, _ = prometheus_client.start_http_server(metrics_port, host, service.registry)
            except OSError as error:
                raise UnavailableError(f"port {metrics_port} for metrics: {error}") from error
            said += f", metrics at http://{host}:{http.server_port}/metrics"
        if token is None and host not in ("127.0.0.1", "localhost", "::1"):
            print(f"anybody who reaches {where} may read and append: set SEQVAULT_TOKEN", file=sys.stderr, flush=True)
        print(said, flush=True)
        stop.wait()
    finally:
        ended = service.close(PATIENCE_S)
    seconds = time.monotonic() - started
    print(f"stopped after {seconds:,.0f} s; everything acknowledged is in {vault.path}", flush=True)
    if not ended:
        print("some clients did not end their calls; they are cut off", file=sys.stderr, flush=True)
        os._exit(0)  # their threads would keep the process
