"""One of two services is killed, or halted: nothing acknowledged is lost, nothing wrong answered, nobody else waits."""

import concurrent.futures
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from laser_jax import vault as seqvault
from laser_jax.schema import Field, Schema
from laser_jax.vault.partitioning import partition_of, partition_path

SCHEMA = Schema(fields=(Field("item", "int64"), Field("brand", "string")))
USERS = 8


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(path: str, port: int) -> subprocess.Popen:
    """A service that listens."""
    command = [sys.executable, "-m", "laser_jax.vault", "serve", path, f"--port={port}"]
    with open(path + ".said", "w") as said:
        process = subprocess.Popen(command, stdout=said)
    deadline = time.monotonic() + 120
    while "serving" not in pathlib.Path(path + ".said").read_text():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    return process


def halt(process: subprocess.Popen) -> None:
    """Stops a service where it is; on a busy machine its threads run on for a while after the signal."""
    process.send_signal(signal.SIGSTOP)
    os.waitpid(process.pid, os.WUNTRACED)  # until all have stopped


class Load:
    """Threads that append and read. User u gets the items u, u + USERS, ... in this order, at the same times."""

    def __init__(self, vault):
        self.vault = vault
        self.sent = [0] * USERS
        self.acknowledged = [0] * USERS
        self.unavailable = [0] * USERS
        self.reads = [0] * USERS
        self.failures: list[BaseException] = []
        self.done = threading.Event()
        threads = [threading.Thread(target=self._run, args=(self._append, user), daemon=True) for user in range(USERS)]
        threads += [
            threading.Thread(target=self._run, args=(call,), daemon=True)
            for call in (self._get, self._gather, self._get)
        ]
        self._threads = threads
        for thread in threads:
            thread.start()

    def wait(self, number: int) -> None:
        """Until so many appends of every user are acknowledged."""
        deadline = time.monotonic() + 120
        while min(self.acknowledged) < number:
            assert time.monotonic() < deadline and not self.failures, self.failures
            time.sleep(0.02)

    def stop(self) -> None:
        self.done.set()
        for thread in self._threads:
            thread.join(120)
            assert not thread.is_alive()
        if self.failures:
            raise self.failures[0]

    def _run(self, call, *arguments) -> None:
        try:
            while not self.done.is_set():
                call(*arguments)
        except BaseException as error:
            self.failures.append(error)

    def _append(self, user: int) -> None:
        number = self.sent[user]
        self.sent[user] += 1
        item = number * USERS + user
        self.vault.append({"user": [user], "time": [number], "item": [item], "brand": [f"b{number // 20}"]})
        self.acknowledged[user] += 1
        time.sleep(0.005)

    def _get(self) -> None:
        user = int(np.random.default_rng().integers(USERS))
        before = self.acknowledged[user]
        try:
            found = self.vault.get(user, 10**5)
            self.check(user, found["item"].tolist(), found["brand"].tolist(), before)
            self.reads[user] += 1
        except seqvault.UnavailableError:
            self.unavailable[user] += 1
            time.sleep(0.02)

    def _gather(self) -> None:
        before = list(self.acknowledged)
        try:
            found = self.vault.gather(np.arange(USERS), n=10**5)
            for user in range(USERS):
                self.check(user, found[user]["item"].tolist(), found[user]["brand"].tolist(), before[user])
        except seqvault.UnavailableError:
            time.sleep(0.02)

    def check(self, user: int, items: list, brands: list, at_least: int) -> None:
        """What a user's history must be."""
        assert items == [number * USERS + user for number in range(len(items))]
        assert brands == [f"b{number // 20}" for number in range(len(items))]
        assert at_least <= len(items) <= self.sent[user]


@pytest.mark.parametrize("killed", [0, 1])
def test_one_of_two_services_is_killed_under_load(tmp_path, killed):
    with seqvault.create(tmp_path / "vault", SCHEMA, partitions=2):
        pass
    paths = [partition_path(str(tmp_path / "vault"), number) for number in range(2)]
    ports = [free_port() for _ in paths]
    services = [start(path, port) for path, port in zip(paths, ports, strict=True)]
    owner = partition_of(SCHEMA, np.arange(USERS), 2).tolist()
    assert set(owner) == {0, 1}
    try:
        vault = seqvault.open(",".join(f"grpc://127.0.0.1:{port}" for port in ports), timeout_s=60)
        load = Load(vault)
        load.wait(10)
        services[killed].send_signal(signal.SIGKILL)
        services[killed].wait()
        lost, kept = (next(user for user in range(USERS) if owner[user] == number) for number in (killed, 1 - killed))
        started = time.monotonic()
        with pytest.raises(seqvault.UnavailableError):
            vault.get(lost)
        assert time.monotonic() - started < 10, "at once, and not when the time is up"
        assert len(vault.get(kept)) > 0
        time.sleep(0.5)
        services[killed] = start(paths[killed], ports[killed])
        load.wait(load.acknowledged[lost] + 20)
        load.stop()
        for user in range(USERS):
            # Whoever never lost its service never heard of it.
            assert owner[user] == killed or load.unavailable[user] == 0
            assert load.acknowledged[user] == load.sent[user] > 20
            found = vault.get(user, 10**5)
            load.check(user, found["item"].tolist(), found["brand"].tolist(), load.sent[user])
        assert sum(load.unavailable) > 0 and min(load.reads) > 0
        vault.close()
        for service in services:
            service.terminate()
            assert service.wait(60) == 0
    finally:
        for service in services:
            service.kill()
            service.wait()
    with seqvault.open(tmp_path / "vault") as local:
        assert local.verify() == []
        for user in range(USERS):
            found = local.get(user, 10**5)
            load.check(user, found["item"].tolist(), found["brand"].tolist(), load.sent[user])


def test_a_halted_service_holds_up_its_own_users_only(tmp_path):
    with seqvault.create(tmp_path / "vault", SCHEMA, partitions=2):
        pass
    paths = [partition_path(str(tmp_path / "vault"), number) for number in range(2)]
    ports = [free_port() for _ in paths]
    services = [start(path, port) for path, port in zip(paths, ports, strict=True)]
    owner = partition_of(SCHEMA, np.arange(USERS), 2).tolist()
    kept, lost = (owner.index(number) for number in range(2))
    everybody = np.arange(USERS)

    def event(user: int, number: int) -> dict:
        return {"user": [user], "time": [number], "item": [number], "brand": ["b"]}

    try:
        vault = seqvault.open(",".join(f"grpc://127.0.0.1:{port}" for port in ports), timeout_s=5)
        for user in range(USERS):
            vault.append(event(user, 0))
        halt(services[1])
        # As many as wait for a partition, and more: neither reads nor appends of the others stand in line behind them.
        with concurrent.futures.ThreadPoolExecutor(24) as pool:
            began = time.monotonic()
            waiting = [pool.submit(vault.gather, everybody) for _ in range(20)]
            appends = [vault.append_async(event(lost, number)) for number in (1, 2)]
            time.sleep(0.2)
            found = [len(vault.get(kept)), len(vault.gather([kept])[0])]
            vault.append_async(event(kept, 1)).result()
            assert found == [1, 1] and not any(future.done() for future in waiting)
            assert time.monotonic() - began < 5
            for future in [*waiting, *appends]:
                with pytest.raises(seqvault.UnavailableError):
                    future.result(60)
        # It is known by now: whoever asks for its users hears so before the time is up.
        began = time.monotonic()
        for call in [lambda: vault.get(lost), lambda: vault.gather(everybody)] * 5:
            with pytest.raises(seqvault.UnavailableError, match="did not answer in time; it is asked again"):
                call()
        assert time.monotonic() - began < 5
        for call in (vault.partitions[1].stats, vault.partitions[1].users):
            with pytest.raises(seqvault.UnavailableError):
                call()
        services[1].send_signal(signal.SIGCONT)
        deadline = time.monotonic() + 60
        while not readable(vault, lost):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        before = len(vault.get(lost))
        vault.append(event(lost, 9))
        # Those that nobody vouched for may be there or not, each at most once.
        assert vault.get(lost)["item"].tolist() in ([0, 9], [0, 1, 9], [0, 2, 9], [0, 1, 2, 9]) and before <= 3
    finally:
        for service in services:
            service.kill()
            service.wait()


def test_merging_ends_when_the_service_is_halted(tmp_path):
    with seqvault.create(tmp_path / "vault", SCHEMA):
        pass
    port = free_port()
    service = start(str(tmp_path / "vault"), port)
    try:
        patient = seqvault.open(f"grpc://127.0.0.1:{port}")  # on a busy disk an append may take its second
        patient.append({"user": [1], "time": [1], "item": [1], "brand": ["b"]})
        patient.merge()
        vault = seqvault.open(f"grpc://127.0.0.1:{port}", timeout_s=1)
        assert len(vault.get(1)) == 1
        halt(service)
        for call in (vault.merge, vault.flush, vault.users, vault.verify):
            with pytest.raises(seqvault.UnavailableError, match="does not answer any more"):
                call()
    finally:
        service.kill()
        service.wait()


def readable(vault, user: int) -> bool:
    try:
        return len(vault.get(user)) > 0
    except seqvault.UnavailableError:
        return False
