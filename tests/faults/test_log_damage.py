"""Flipped bytes, cut and missing files of a vault that is being written: an error, or the right answer."""

import os
import shutil

import numpy as np
import pytest

from laser_jax import vault as seqvault
from laser_jax.schema import Field, Schema
from laser_jax.vault.log import FILE_HEADER, RECORD_HEADER, log_numbers, log_path, read_acknowledged

FIELDS = (Field("item", "int64"), Field("brand", "string"), Field("pair", "float32", size=2))
SCHEMA = Schema(user="string", fields=FIELDS)
USERS = ["ann", "bob", "cem"]
QUIET = seqvault.WriterOptions(background=False)
#: What a damaged file may lead to. (A flip in the manifest's format or version makes it another thing.)
ERRORS = (seqvault.CorruptionError, seqvault.NotAVaultError, seqvault.VersionError)


def events(start: int, count: int) -> dict:
    """Events of all users, some late, some with strings that are new."""
    numbers = np.arange(start, start + count)
    return {
        "user": np.array(USERS, object)[numbers % 3],
        "time": numbers // 2 + numbers * 7 % 20,
        "item": numbers,
        "brand": np.array([f"brand {number // 10}" for number in numbers.tolist()], object),
        "pair": np.stack([numbers, -numbers], axis=1).astype(np.float32),
    }


def read(vault) -> list:
    """All that a handle sees, by get and by gather."""
    found = []
    for user, history in zip(USERS, vault.gather(USERS, n=10**6, fields=vault.schema.names), strict=True):
        for one in (vault.get(user, 10**6, fields=vault.schema.names), history):
            found.append({name: one[name].tolist() for name in ("time", *vault.schema.names)})
    return found


def expected(count: int) -> list:
    """What `read` gives when events 0 to count - 1 were written."""
    log = events(0, count)
    found = []
    for user in USERS:
        rows = np.flatnonzero(log["user"] == user)
        rows = rows[np.argsort(log["time"][rows], kind="stable")]
        found += [{name: log[name][rows].tolist() for name in ("time", *SCHEMA.names)}] * 2
    return found


def flip(path, offset: int, bit: int) -> None:
    """Inverts one bit of a file."""
    with open(path, "r+b") as file:
        file.seek(offset)
        value = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([value ^ (1 << bit)]))


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    """A vault with every kind of file: bulk, delta and merged parts, a snapshot of older ones, several log files.

    Events 0 to 699 are in parts, those up to 799 in the log; the snapshot `old` holds the first 300.
    """
    path = tmp_path_factory.mktemp("damage") / "vault"
    with seqvault.create(path, SCHEMA) as writer:
        writer.write(events(0, 100))
    with seqvault.open(path, writing=QUIET) as vault:
        vault.append(events(100, 200))
        vault.snapshot("old")
        vault.append(events(300, 200))
        vault.merge()
        vault.append(events(500, 200))
        vault.flush()
        vault.append(events(700, 20))
        vault.append(events(720, 20))
    with seqvault.open(path, writing=QUIET) as vault:
        vault.append(events(740, 20))
        vault.append(events(760, 40))
        parts = [part.entry for part in vault.state.parts.values()]
        assert [entry["covers"] for entry in parts] == [True, False] and all(entry["sequence"] for entry in parts)
    assert len(log_numbers(str(path))) == 2
    assert read(seqvault.open(path)) == expected(800) and read(seqvault.open(path, at="old")) == expected(300)
    return path


@pytest.fixture
def copy(live, tmp_path):
    """The live vault, to be damaged."""
    shutil.copytree(live, tmp_path / "vault")
    return tmp_path / "vault"


def files_of(path) -> list[str]:
    """Every file but the lock, which holds nothing, and the spare copies of the manifest."""
    names = [os.path.relpath(os.path.join(folder, name), path) for folder, _, names in os.walk(path) for name in names]
    spare = ("writer.lock", "manifest.copy.json")
    return sorted(name for name in names if name not in spare and not name.startswith("manifests/"))


def outcome(path, at: str | None = None) -> str:
    """What a reader of the vault gets: "right" or "error"; anything else is a failure."""
    try:
        found = read(seqvault.open(path, at=at))
    except ERRORS:
        return "error"
    assert found == expected(800 if at is None else 300), "wrong data"
    return "right"


def writer_outcome(path) -> str:
    """The same for who writes: it appends, and must find everything afterwards."""
    try:
        with seqvault.open(path, writing=QUIET) as vault:
            vault.append(events(800, 10))
            found = read(vault)
            vault.flush()
            assert read(vault) == found
    except ERRORS:
        return "error"
    assert found == expected(810) == read(seqvault.open(path)), "wrong data"
    return "right"


def offsets_of(name: str, size: int, rng, live) -> list[int]:
    """Offsets in every part of a file that has a meaning of its own."""
    offsets = {0, 1, size // 2, size - 1, size - 4, size - 5, *rng.integers(0, size, 6).tolist()}
    if name.endswith(".log"):
        # Every byte of the file's header and of the first record's, and where the body begins.
        offsets |= set(range(min(size, FILE_HEADER + RECORD_HEADER + 12)))
    if name == "log/acknowledged":
        offsets |= set(range(size))
    return sorted(offset for offset in offsets if 0 <= offset < size)


def test_a_flipped_bit_is_an_error_or_changes_nothing(live, copy):
    rng = np.random.default_rng(0)
    in_use = {f"parts/{name}" for name in seqvault.open(live).state.parts}
    flips = 0
    for name in files_of(copy):
        size = (copy / name).stat().st_size
        only_pinned = name.startswith("snapshots/") or (
            name.startswith("parts/") and "/".join(name.split("/")[:2]) not in in_use
        )
        for offset in offsets_of(name, size, rng, live):
            bit = int(rng.integers(8))
            flip(copy / name, offset, bit)
            now, then = outcome(copy), outcome(copy, "old")
            flip(copy / name, offset, bit)
            # Every byte of every file has a checksum, which is looked at by whoever needs the file.
            # How far the log is acknowledged is told by the log itself, too: without that file all of it is read.
            spare = only_pinned or name == "log/acknowledged"
            assert now == ("right" if spare else "error"), (name, offset, bit)
            if only_pinned:
                assert then == "error", (name, offset, bit)
            flips += 1
    assert flips > 400
    assert outcome(copy) == outcome(copy, "old") == "right"


def test_verify_sees_every_flipped_bit(live, copy):
    rng = np.random.default_rng(1)
    for name in files_of(copy):
        offset, bit = int(rng.integers((copy / name).stat().st_size)), int(rng.integers(8))
        flip(copy / name, offset, bit)
        assert seqvault.verify(str(copy)), (name, offset, bit)
        flip(copy / name, offset, bit)
    assert seqvault.verify(str(copy)) == []


def test_a_writer_meets_no_damage_unseen(live, tmp_path):
    """It refuses to write on, or nothing that it needs is damaged; it never makes things worse."""
    rng = np.random.default_rng(2)
    refused = 0
    for number, name in enumerate(files_of(live)):
        # Of the parts' many small files some are enough: readers meet all of them above.
        for turn in range(3 if name.startswith(("log/", "snapshots/")) else number % 3 == 0):
            path = tmp_path / f"vault{number}-{turn}"
            shutil.copytree(live, path)
            offset, bit = int(rng.integers((path / name).stat().st_size)), int(rng.integers(8))
            flip(path / name, offset, bit)
            refused += writer_outcome(path) == "error"
            if (path / name).exists():
                flip(path / name, offset, bit)
                assert read(seqvault.open(path)) in (expected(800), expected(810)), (name, offset, bit)
            shutil.rmtree(path)
    assert refused > 10


def test_every_cut_of_the_log_is_found(live, copy):
    """All of the log was acknowledged: whatever is missing of it, nobody reads on as if nothing were."""
    for number in log_numbers(str(live)):
        path = log_path(str(copy), number)
        with open(path, "rb") as file:
            data = file.read()
        for size in sorted({*range(0, 120), *range(120, len(data), 37), len(data) - 1}):
            with open(path, "wb") as file:
                file.write(data[:size])
            with pytest.raises(seqvault.CorruptionError, match="log"):
                seqvault.open(copy)
            if size % 5 == 0:
                for _ in range(2):
                    # Trying again does not help, and what is left stays for `repair`.
                    with pytest.raises(seqvault.CorruptionError, match="log"):
                        seqvault.open(copy, writing=QUIET).append(events(800, 1))
                if size >= FILE_HEADER:
                    with open(path, "rb") as file:
                        assert file.read() == data[:size]
            with open(path, "wb") as file:
                file.write(data)
    assert outcome(copy) == "right"


@pytest.mark.parametrize("gone", [0, 1])
def test_a_missing_log_file_is_an_error(live, copy, gone):
    path = log_path(str(copy), log_numbers(str(live))[gone])
    os.remove(path)
    with pytest.raises(seqvault.CorruptionError, match=os.path.basename(path)):
        seqvault.open(copy)
    with pytest.raises(seqvault.CorruptionError, match="log"):
        seqvault.open(copy, writing=QUIET).append(events(800, 1))
    assert any(os.path.basename(path) in damage for damage in seqvault.verify(str(copy)))


def test_swapped_and_foreign_log_files_are_errors(live, copy, tmp_path):
    first, second = (log_path(str(copy), number) for number in log_numbers(str(live)))
    os.rename(first, tmp_path / "first")
    os.rename(second, first)
    os.rename(tmp_path / "first", second)
    assert outcome(copy) == writer_outcome(copy) == "error"
    shutil.copyfile(first, second)
    assert outcome(copy) == writer_outcome(copy) == "error"
    os.remove(second)
    os.mkdir(second)
    with pytest.raises(seqvault.VaultError):
        seqvault.open(copy)


def test_a_file_that_is_left_over_is_not_mistaken_for_a_log(live, copy):
    for name in ("notes.txt", "000000001.log.draft", "x.log", "-1.log"):
        (copy / "log" / name).write_bytes(b"something")
    assert outcome(copy) == "right" and writer_outcome(copy) == "right"


def test_without_the_acknowledged_file_nothing_is_lost(live, copy):
    """It is not flushed: after a crash of the machine it may be missing, or older than the log."""
    os.remove(copy / "log" / "acknowledged")
    assert outcome(copy) == "right" and seqvault.verify(str(copy)) == []
    assert writer_outcome(copy) == "right"


@pytest.fixture
def unheard(live, tmp_path):
    """A vault whose last record is in the log, but the machine died before anybody heard of it."""
    path = tmp_path / "unheard"
    shutil.copytree(live, path)
    with seqvault.open(path, writing=QUIET) as vault:
        vault.append(events(800, 5))
        heard = (path / "log" / "acknowledged").read_bytes()
        vault.append(events(805, 5))
    (path / "log" / "acknowledged").write_bytes(heard)
    return path


def test_a_record_that_was_cut_before_it_was_acknowledged_was_never_there(unheard, tmp_path):
    number = log_numbers(str(unheard))[-1]
    end = read_acknowledged(str(unheard)).offset
    size = os.path.getsize(log_path(str(unheard), number))
    assert 0 < end < size
    for cut in sorted({*range(end, end + RECORD_HEADER + 2), *range(end, size, 23), size - 1, size}):
        path = tmp_path / f"vault{cut}"
        shutil.copytree(unheard, path)
        os.truncate(log_path(str(path), number), cut)
        assert read(seqvault.open(path)) == expected(805), "a reader reads what was acknowledged"
        assert seqvault.verify(str(path)) == []
        follower = seqvault.open(path)
        count = 810 if cut == size else 805
        with seqvault.open(path, writing=QUIET) as vault:
            assert vault.append(events(count, 10)) == count + 10
            assert read(vault) == expected(count + 10)
        follower.refresh()
        assert read(follower) == read(seqvault.open(path)) == expected(count + 10)
        assert seqvault.verify(str(path)) == []
        shutil.rmtree(path)


def test_what_lies_behind_the_acknowledged_end_is_no_business_of_readers(unheard):
    number = log_numbers(str(unheard))[-1]
    path = log_path(str(unheard), number)
    end = read_acknowledged(str(unheard)).offset
    flip(path, end + RECORD_HEADER + 3, 1)
    assert read(seqvault.open(unheard)) == expected(805)
    # The writer cannot tell whether somebody heard of it: it must not go on as if it had not been there.
    with pytest.raises(seqvault.CorruptionError, match=os.path.basename(path)):
        seqvault.open(unheard, writing=QUIET).append(events(805, 1))
    with open(path, "r+b") as file:
        file.truncate(end)
        file.seek(end)
        file.write(bytes(500))
    assert read(seqvault.open(unheard)) == expected(805)
    try:
        with seqvault.open(unheard, writing=QUIET) as vault:
            assert vault.append(events(805, 5)) == 810
    except seqvault.CorruptionError:
        assert read(seqvault.open(unheard)) == expected(805)
    else:
        assert read(seqvault.open(unheard)) == expected(810)


@pytest.mark.parametrize("content", [b"", b"LJXVLOG1\x00", None], ids=["empty", "cut", "header"])
def test_a_log_file_of_which_only_the_name_was_made(live, copy, content):
    """The machine died between creating the next log file and writing its header, or behind the header."""
    number = log_numbers(str(copy))[-1] + 1
    if content is None:
        # The header alone: made by a writer whose first record was cut off.
        with seqvault.open(copy, writing=QUIET) as vault:
            vault.append(events(800, 1))
        shutil.copyfile(live / "log" / "acknowledged", copy / "log" / "acknowledged")
        os.truncate(log_path(str(copy), number), FILE_HEADER)
    else:
        with open(log_path(str(copy), number), "wb") as file:
            file.write(content)
    assert outcome(copy) == "right" and seqvault.verify(str(copy)) == []
    assert writer_outcome(copy) == "right"


def test_the_log_that_is_kept_for_repeated_events_is_checked_too(tmp_path):
    path = tmp_path / "vault"
    schema = Schema(fields=(Field("key", "int64"),), event_key="key", duplicates="drop")
    with seqvault.create(path, schema):
        pass
    with seqvault.open(path, writing=QUIET) as vault:
        for start in (0, 10):
            vault.append({"user": [1] * 10, "time": [1] * 10, "key": list(range(start, start + 10))})
            vault.flush()
    kept = log_numbers(str(path))
    assert len(kept) == 2 and vault.stats()["log_bytes"] > 0
    for number in kept:
        flip(log_path(str(path), number), FILE_HEADER + RECORD_HEADER + 50, 2)
        assert len(seqvault.open(path).get(1)) == 20, "readers do without"
        assert len(seqvault.verify(str(path))) == 1
        with pytest.raises(seqvault.CorruptionError, match=f"{number:09d}.log"):
            seqvault.open(path, writing=QUIET).append({"user": [1], "time": [1], "key": [3]})
        flip(log_path(str(path), number), FILE_HEADER + RECORD_HEADER + 50, 2)
    os.truncate(log_path(str(path), kept[0]), 100)
    with pytest.raises(seqvault.CorruptionError):
        seqvault.open(path, writing=QUIET).append({"user": [1], "time": [1], "key": [3]})


def test_a_reader_that_follows_meets_damage(live, copy):
    """What was damaged behind the place up to which it has read already."""
    reader = seqvault.open(copy)
    with seqvault.open(copy, writing=QUIET) as vault:
        vault.append(events(800, 50))
        path = log_path(str(copy), log_numbers(str(copy))[-1])
        flip(path, FILE_HEADER + RECORD_HEADER + 200, 5)
        for _ in range(2):
            with pytest.raises(seqvault.CorruptionError, match=os.path.basename(path)):
                reader.refresh()
            assert read(reader) == expected(800), "it still has what it had"
        flip(path, FILE_HEADER + RECORD_HEADER + 200, 5)
        reader.refresh()
        assert read(reader) == read(vault) == expected(850)


def test_a_damaged_log_is_not_made_into_a_part(live, copy):
    """The flush reads the log that was written, not the memory: a flip in between is an error, and nothing is lost."""
    with seqvault.open(copy, writing=QUIET) as vault:
        vault.append(events(800, 50))
        path = log_path(str(copy), log_numbers(str(copy))[-1])
        flip(path, FILE_HEADER + RECORD_HEADER + 200, 5)
        for call in (vault.flush, vault.merge, vault.snapshot, lambda: vault.forget(["ann"])):
            with pytest.raises(seqvault.CorruptionError, match=os.path.basename(path)):
                call()
            assert read(vault) == expected(850)
        flip(path, FILE_HEADER + RECORD_HEADER + 200, 5)
        vault.merge()
        assert read(vault) == read(seqvault.open(copy)) == expected(850)
    assert seqvault.verify(str(copy)) == []


def test_a_damaged_part_is_not_merged(live, copy):
    with seqvault.open(copy, writing=QUIET) as vault:
        part = list(vault.state.parts.values())[0]
        page = os.path.join(part.folder.path, "pages/c/0/0/0")
        flip(page, 30, 1)
        parts = set(vault.state.parts)
        with pytest.raises(seqvault.CorruptionError, match=part.name):
            vault.merge()
        assert part.name in set(vault.state.parts) and len(vault.state.parts) >= len(parts)
        flip(page, 30, 1)
        vault.merge()
        assert read(vault) == expected(800)
    assert seqvault.verify(str(copy)) == []
