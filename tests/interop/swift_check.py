"""ms-swift as it is installed: it loads our rows, and scores completions with our rewards under names of a plug-in.

PYTHON_OF_MS_SWIFT tests/interop/swift_check.py      needs ms-swift 4.6, msgspec, soxr; prints the scores it got
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import soundfile
import torch
from swift.dataset import load_dataset
from swift.rewards import orms
from swift.rl_core.data import GRPOSample
from swift.rl_core.grpo_algorithm import compute_rewards_per_func
from swift.utils.utils import import_external_file

from covo_rl.config import PromptConfig
from covo_rl.data import write
from covo_rl.interop.rows import trainer_rows
from covo_rl.types import Clip, Example

TEXTS = ["<think>It meows.</think><answer>cat</answer>", "<think>Woof.</think><answer>dog</answer>", "cat"]
PLUGIN = """
from covo_rl.interop.swift import register

register("covo_accuracy", "accuracy")
register("covo_total", "accuracy=1,format=0.5")
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        soundfile.write(f"{folder}/a.wav", np.zeros(8000), 8000)
        Path(folder, "plugin.py").write_text(PLUGIN)
        example = Example("r0", (Clip(path=f"{folder}/a.wav"),), "Which?", ("dog", "cat"), "cat", {"mixed": [1, "a"]})
        write(trainer_rows([example] * 4, "swift", folder, PromptConfig()), f"{folder}/train.jsonl")
        rows, _ = load_dataset(f"{folder}/train.jsonl", load_from_cache_file=False, remove_unused_columns=False)
        assert len(rows) == 4, "ms-swift dropped rows"
        import_external_file(f"{folder}/plugin.py")
    reasons = ["stop", "stop", "stop", "length"]
    samples = []
    for row, text, reason in zip(rows, [*TEXTS, TEXTS[0]], reasons, strict=True):
        sample = GRPOSample.from_row(row)
        sample.messages = [*row["messages"], {"role": "assistant", "content": text}]
        sample.finish_reason = reason
        samples.append(sample)
    functions = [orms[name](args=None) for name in ("covo_accuracy", "covo_total")]
    rewards = compute_rewards_per_func(samples, functions, None, torch.device("cpu"))
    print(json.dumps(rewards.tolist()))
    assert rewards.tolist() == [[1.0, 1.5], [0.0, 0.5], [0.0, 0.0], [1.0, 1.0]]


if __name__ == "__main__":
    main()
