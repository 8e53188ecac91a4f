"""Vaults in key-value stores: memory, S3 as a local server speaks it, read-only http."""

import functools
import http.server
import os
import re
import shutil
import tempfile
import threading
import urllib.request

import numpy as np
import pytest

from laser_jax import vault as seqvault
from laser_jax.schema import Schema
from laser_jax.vault.remote import ingest_anywhere
from laser_jax.vault.storage import KvStorage
from tests.vault.conftest import FIELDS, Model, assert_same, random_log

SCHEMA = Schema(user="string", fields=FIELDS)
USERS = np.array([f"u{i}" for i in range(8)], object)


@pytest.fixture(scope="module")
def s3():
    """URL of a bucket of a local S3 server."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    names = {"AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    urllib.request.urlopen(urllib.request.Request(f"{endpoint}/bucket", method="PUT")).close()
    yield "s3://bucket"
    for name, value in before.items():
        os.environ.pop(name)
        if value is not None:
            os.environ[name] = value
    server.stop()


def assert_whole(vault, log) -> None:
    """Every read gives the log's events."""
    model, names = Model(log), vault.schema.names
    batch = vault.gather(USERS, 5000, 300, fields=names)
    for position, user in enumerate(USERS):
        assert_same(vault, batch[position], model.read(user, 300, 5000), names)
        assert_same(vault, vault.get(user, 9999, fields=names), model.read(user, 9999, None), names)
    assert len(vault.get("nobody")) == 0
    assert vault.verify() == [] and vault.stats()["events"] == len(log["time"])


def test_memory(request):
    url = f"memory://{request.node.name}"
    log = random_log(SCHEMA, USERS, 3000, 0)
    with seqvault.create(url, SCHEMA, buffer_events=1000) as writer:
        writer.write(log)
    vault = seqvault.open(url)
    assert len(vault.state.parts) == 3
    assert_whole(vault, log)
    with pytest.raises(seqvault.VaultExistsError):
        seqvault.create(url, SCHEMA)
    with pytest.raises(seqvault.VaultError, match="need a vault in a local directory"):
        vault.append({"user": ["a"], "time": [1]})
    with pytest.raises(seqvault.NotAVaultError):
        seqvault.open("memory://nothing")


def test_s3(s3, tmp_path):
    log = random_log(SCHEMA, USERS, 3000, 1)
    with seqvault.create(f"{s3}/made", SCHEMA, buffer_events=1000) as writer:
        writer.write(log)
    assert_whole(seqvault.open(f"{s3}/made"), log)


def test_ingest_to_s3(s3, tmp_path):
    (tmp_path / "log.csv").write_text("user,time,brand\n" + "".join(f"u{i % 8},{i},b{i % 3}\n" for i in range(2000)))
    schema = Schema.from_json({"user": "string", "fields": [{"name": "brand", "type": "string"}]})
    report = ingest_anywhere(schema, str(tmp_path / "log.csv"), f"{s3}/logs")
    assert report.events == 2000 and report.path == f"{s3}/logs"
    vault = seqvault.open(f"{s3}/logs")
    for user in range(8):
        assert vault.get(f"u{user}", 9999)["time"].tolist() == list(range(user, 2000, 8))
        assert (
            vault.get(f"u{user}", 3, before=1000)["brand"].tolist() == [f"b{i % 3}" for i in range(user, 1000, 8)][-3:]
        )
    assert vault.gather([f"u{user}" for user in range(8)], n=10).num_events == 80


def test_what_would_be_left_out_is_not_published(tmp_path):
    path, url = str(tmp_path / "vault"), "memory://left_out"
    with seqvault.create("file://" + path, SCHEMA):
        pass
    with seqvault.open(path, writing=seqvault.WriterOptions(background=False)) as vault:
        vault.append(random_log(SCHEMA, USERS, 50, 2))
    with pytest.raises(seqvault.VaultError, match=f"{path}: 50 events are in its log only.*make a snapshot"):
        seqvault.publish(path, url)
    with seqvault.open(path, writing=seqvault.WriterOptions(background=False)) as vault:
        vault.flush()
    assert seqvault.publish("file://" + path, url) > 0 and seqvault.open(url).num_events == 50
    with seqvault.create(tmp_path / "parted", SCHEMA, partitions=2):
        pass
    for wrong, message in (
        (
            str(tmp_path / "parted"),
            "is a vault in partitions: publish each of them, .*/parted/partition-00000 and so on",
        ),
        ("grpc://host:1", "give the directory of a vault"),
        (url, "give the directory of a vault"),
    ):
        with pytest.raises(seqvault.VaultError, match=message):
            seqvault.publish(wrong, "memory://nowhere")


def test_what_cannot_be_uploaded_stays(s3, tmp_path, monkeypatch):
    """Neither ingestion nor writer throws away what it has built; the error says where it lies."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    os.mkdir(tmp_path / "temporary")
    (tmp_path / "log.csv").write_text("user,time,brand\n" + "".join(f"u{i % 8},{i},b{i % 3}\n" for i in range(2000)))
    schema = Schema.from_json({"user": "string", "fields": [{"name": "brand", "type": "string"}]})

    def by_ingestion(url):
        ingest_anywhere(schema, str(tmp_path / "log.csv"), url)

    def by_writer(url):
        with seqvault.create(url, schema) as writer:
            writer.write({name: [f"{name} {i}" for i in range(2000)] for name in ("user", "brand")} | TIMES)

    for number, build in enumerate((by_ingestion, by_writer)):
        url = f"{s3}/late{number}"
        with monkeypatch.context() as patch:
            patch.setattr(KvStorage, "write", refuse)
            with pytest.raises(seqvault.UnavailableError, match="no room.*the vault itself is whole: publish ") as told:
                build(url)
        path = re.search("whole: publish (.*), or remove", str(told.value))[1]
        assert seqvault.open(path).num_events == 2000 and seqvault.verify(path) == []
        assert seqvault.publish(path, url) > 0 and seqvault.open(url).num_events == 2000
        shutil.rmtree(os.path.dirname(path))
        with pytest.raises(seqvault.VaultExistsError):
            build(url)
        with pytest.raises(seqvault.SchemaError), seqvault.create(f"{url}/not", schema) as writer:
            writer.write({"user": ["a"], "time": [-1], "brand": [""]})
        assert os.listdir(tmp_path / "temporary") == []


TIMES = {"time": list(range(2000))}


def refuse(storage, name, *_, **__):
    raise seqvault.UnavailableError(f"{storage.path(name)}: write failed: no room")


def test_http_and_published_snapshots(tmp_path):
    log = random_log(SCHEMA, USERS, 2000, 2)
    path = tmp_path / "vault"
    with seqvault.create(path, SCHEMA):
        pass
    with seqvault.open(path, writing=seqvault.WriterOptions(background=False)) as vault:
        vault.append(log)
        vault.snapshot("one")
        vault.append({name: column[:5] for name, column in log.items()})
    assert seqvault.publish(str(path), "memory://published", at="one") > 0
    assert_whole(seqvault.open("memory://published"), log)
    handler = functools.partial(_Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        # What is still in the log is local; the parts are served.
        vault = seqvault.open(f"http://127.0.0.1:{server.server_port}/vault")
        assert_whole(vault, log)
        server.shutdown()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files, also the ranges of bytes that any object store serves."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        path, asked = self.translate_path(self.path), self.headers.get("Range")
        if asked is None or not os.path.isfile(path):
            super().do_GET()
            return
        with open(path, "rb") as file:
            data = file.read()
        first, last = asked.removeprefix("bytes=").split("-")
        begin = int(first) if first else len(data) - int(last)
        end = min(int(last) + 1, len(data)) if first and last else len(data)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(data)}")
        self.send_header("Content-Length", str(end - begin))
        self.end_headers()
        self.wfile.write(data[begin:end])


def test_a_lost_or_damaged_object_is_an_error(tmp_path, request):
    log = random_log(SCHEMA, USERS, 500, 3)
    with seqvault.create(tmp_path / "vault", SCHEMA) as writer:
        writer.write(log)
    for kind in ("lost", "damaged"):
        url = f"memory://{request.node.name}-{kind}"
        seqvault.publish(str(tmp_path / "vault"), url)
        vault = seqvault.open(url, cache_bytes=0)
        part = next(iter(vault.state.parts.values()))
        store = vault._storage
        for name in ("pages/c/0/0/0", "vectors/tiny/c/0/0/0"):
            whole = store.read(f"{part.folder.name}/{name}")
            if kind == "lost":
                store.remove(f"{part.folder.name}/{name}")
            else:
                store.write(f"{part.folder.name}/{name}", whole[:40] + bytes([whole[40] ^ 1]) + whole[41:])
            again = seqvault.open(url, cache_bytes=0)
            with pytest.raises(seqvault.CorruptionError, match=part.name):
                again.gather(USERS, n=9999, fields=again.schema.names)
            with pytest.raises(seqvault.CorruptionError, match=part.name):
                for user in USERS:
                    again.get(user, 9999, fields=again.schema.names)
            assert again.verify()
            store.write(f"{part.folder.name}/{name}", whole)
