"""A merged export of a model with 1 B random weights streams its shards. Needs 10 GB of memory and disk."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_peak_memory_of_a_merged_export_stays_under_1_3_of_model_or_shard():
    script = Path(__file__).with_name("export_memory.py")
    done = subprocess.run(
        [sys.executable, str(script), "2048", "20", "float32"],
        capture_output=True, text=True, check=True, timeout=1100,
    )  # fmt: skip
    print(done.stdout.splitlines()[-1])
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["parameters"] > 1e9
    assert report["shard_bytes"] < 0.2 * report["model_bytes"]
    assert report["peak_over_largest"] < 1.3, report
    assert report["verified"]
