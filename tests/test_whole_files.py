"""What a killed or failed process leaves of a file is the file as it was before."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest

from laser_jax.whole_files import replacing


def test_a_file_is_replaced_at_the_end_and_only_without_an_error(tmp_path):
    path = str(tmp_path / "file")
    with replacing(path) as file:
        file.write(b"one")
        assert not os.path.exists(path)
    with pytest.raises(ZeroDivisionError), replacing(path) as file:
        file.write(b"two")
        1 / 0  # noqa: B018
    assert os.listdir(tmp_path) == ["file"]
    with open(path, "rb") as file:
        assert file.read() == b"one"


def test_what_a_kill_leaves(tmp_path):
    script = """
        import os, signal, sys
        from laser_jax.whole_files import replacing
        with replacing(sys.argv[1]) as file:
            file.write(b"half")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    """
    path = tmp_path / "file"
    path.write_bytes(b"whole")
    command = [sys.executable, "-c", textwrap.dedent(script), str(path)]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    assert path.read_bytes() == b"whole"
