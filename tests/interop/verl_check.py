"""verl as it is installed: its dataset reads our rows, its reward manager loads our rewards and scores with them.

PYTHON_OF_VERL tests/interop/verl_check.py      needs verl 0.9, soxr, sympy; prints the scores it got
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
from omegaconf import OmegaConf
from verl import DataProto
from verl.trainer.ppo.reward import load_reward_manager
from verl.utils.dataset.rl_dataset import get_dataset_class

from covo_rl.config import PromptConfig
from covo_rl.data import write
from covo_rl.interop.rows import trainer_rows
from covo_rl.types import Clip, Example

TEXTS = ["<think>It meows.</think><answer>cat</answer>", "<think>Woof.</think><answer>dog</answer>", "cat"]
WANTED = [1.5, 0.5, 0.0]


class Letters:
    """A tokenizer of characters, and a processor of text and sound."""

    pad_token_id = 0

    def __init__(self) -> None:
        self.tokenizer, self.heard = self, []

    def decode(self, ids, skip_special_tokens=True):
        return "".join(map(chr, ids.tolist()))

    def apply_chat_template(self, messages, **options):
        return json.dumps(messages, default=str)

    def __call__(self, text, audio=None, **options):
        self.heard += audio or []
        return {"input_ids": [list(text[0])]}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        soundfile.write(f"{folder}/a.wav", np.sin(np.arange(8000) / 9), 8000)  # a second, to be heard at 16 kHz
        example = Example("r0", (Clip(path=f"{folder}/a.wav"),), "Which?", ("dog", "cat"), "cat", {"mixed": [1, "a"]})
        write(trainer_rows([example] * 3, "verl", folder, PromptConfig()), f"{folder}/train.parquet")
        custom = {"path": "pkg://covo_rl.interop.verl", "name": "AudioQuestions"}
        data = OmegaConf.create({"custom_cls": custom, "max_prompt_length": 4096, "filter_overlong_prompts": True,
                                 "filter_overlong_prompts_workers": None, "cache_dir": folder})  # fmt: skip
        letters = Letters()
        dataset = get_dataset_class(data)(f"{folder}/train.parquet", letters, data, letters)
        rows = [dataset[i] for i in range(len(dataset))]
        assert len(rows) == 3, "verl dropped rows"
        assert [len(clip) for clip in letters.heard] == [16_000] * 3, "verl did not hear the clips"
        parts = rows[0]["raw_prompt"][-1]["content"]
        assert [part["type"] for part in parts] == ["audio", "text"], parts
    kwargs = {"rewards": "accuracy=1,format=0.5"}
    function = {"path": "pkg://covo_rl.interop.verl", "name": "compute_score", "reward_kwargs": kwargs}
    manager = {"source": "register", "name": "naive"}
    config = OmegaConf.create({"reward": {"custom_reward_function": function, "reward_manager": manager}})
    manager = load_reward_manager(config, letters)
    batches = [batch(row, text) for row, text in zip(rows, TEXTS, strict=True)]
    results = [manager.loop.run_until_complete(manager.run_single(each)) for each in batches]
    print(json.dumps(results))
    assert [result["reward_score"] for result in results] == WANTED
    assert results[1]["reward_extra_info"] == {"score": 0.5, "accuracy": 0.0, "format": 1.0}


def batch(row, text):
    ids = torch.tensor([[ord(letter) for letter in text] + [0] * 5])
    tensors = {"responses": ids, "attention_mask": (ids > 0).long()}
    others = {name: np.array([row[name]], dtype=object) for name in ("data_source", "reward_model", "extra_info")}
    return DataProto.from_dict(tensors=tensors, non_tensors=others)


if __name__ == "__main__":
    main()
