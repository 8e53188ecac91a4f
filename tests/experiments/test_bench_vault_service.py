"""The benchmark of the vault's service at a size that proves nothing but that it runs and that all give the same."""

import json
import subprocess
import sys


def test_last_line_is_json_with_figures(tmp_path):
    command = [sys.executable, "-m", "experiments.bench.vault_service", "--users=60", "--rounds=1", "--lookups=100"]
    done = subprocess.run([*command, f"--path={tmp_path}"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert 0.5 < result["wire_bytes_over_raw"] <= 0.66
    assert all(
        result[name] > 0 for name in ("remote_p50_ms", "remote_p99_ms", "remote_over_local_p50", "lookups_per_s")
    )
    redis = [value for name, value in result.items() if name.startswith("redis")]
    assert len(redis) == 3 and (redis == [None] * 3 or min(redis) > 0)
