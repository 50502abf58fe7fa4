"""Two gloo ranks under torchrun: DDP and FSDP2 give the tokens, log-probs and gradients of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path


def test_two_ranks_equal_one_process():
    worker = Path(__file__).with_name("ranks_worker.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(worker)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert done.returncode == 0 and lines, done.stderr[-4000:]
    results = json.loads(lines[0].removeprefix("RESULT "))
    assert len(results) == 9
    for case, found in results.items():
        assert found["same_tokens"] == 1.0, case
        assert found["logps"] < 1e-5 and found["reference"] < 1e-5, (case, found)
        assert found["gradients"] < 1e-4, (case, found)
