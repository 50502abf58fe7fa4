"""For NeMo RL: our rewards as its environment of audio, and a dataset of converted rows.

    uv run python -m covo_rl.interop.nemo_rl examples/run_vlm_grpo.py --config mine.yaml

runs their script with our environment in the place of theirs; docs/interop.md has mine.yaml, and how rows are made.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import runpy
import sys
from typing import Any

import ray
import torch
from datasets import load_dataset
from nemo_rl.data.datasets.raw_dataset import RawDataset
from nemo_rl.data.processors import vlm_hf_data_processor
from nemo_rl.distributed.ray_actor_environment_registry import ACTOR_ENVIRONMENT_REGISTRY
from nemo_rl.distributed.virtual_cluster import PY_EXECUTABLES
from nemo_rl.environments.interfaces import EnvironmentInterface, EnvironmentReturn
from nemo_rl.environments.utils import ENV_REGISTRY

from covo_rl.data.chat import TAG
from covo_rl.interop.rows import waveform_at
from covo_rl.interop.scoring import lone_scores, lone_terms


def audio_processor(datum: dict[str, Any], spec: Any, processor: Any, limit: int, number: int) -> dict[str, Any]:
    """A converted row through NeMo RL's own processor, which takes tasks that it knows: audiomcq, formatted already."""
    rate, clips = processor.feature_extractor.sampling_rate, datum["audios"]
    parts: list[Any] = [{"type": "audio", "audio": waveform_at(path, rate)} for path in clips]
    parts.append({"type": "text", "text": datum["messages"][0]["content"].removeprefix(TAG * len(clips))})
    chat = [{"role": "user", "content": parts}, {"role": "assistant", "content": datum["solution"]}]
    result = vlm_hf_data_processor({"messages": chat, "task_name": "audiomcq"}, spec, processor, limit, number)
    return result | {"task_name": datum["task_name"], "extra_env_info": {"covo_row": datum["covo_row"]}}


class AudioRows(RawDataset):
    """Rows of `data convert --to nemo-rl`, and a held-out part of them if `split_validation_size` says so."""

    def __init__(self, data_path: str, split_validation_size: float = 0, seed: int = 42, **settings: Any) -> None:
        self.task_name, self.val_dataset, self.preprocessor = "covo", None, None
        rows = load_dataset("json", data_files=data_path, split="train")
        self.dataset = rows.add_column("task_name", [self.task_name] * len(rows))
        self.split_train_validation(split_validation_size, seed)

    def set_processor(self) -> None:
        self.processor = audio_processor


@ray.remote
class AudioRewards(EnvironmentInterface):
    """One turn: the assistant's text is scored, the episode ends. `cfg["covo"]`: options of `lone_scores`."""

    def __init__(self, cfg: dict[str, Any]) -> None:
        self.options = {"rewards": "accuracy,format", **(cfg.get("covo") or {})}
        lone_terms(self.options["rewards"])

    def step(self, message_log_batch: list[Any], metadata: list[dict[str, Any]]) -> EnvironmentReturn:
        texts = ["".join(turn["content"] for turn in log if turn["role"] == "assistant") for log in message_log_batch]
        scores = lone_scores([each.get("covo_row") for each in metadata], texts, **self.options)
        said = [{"role": "environment", "content": "Environment: scored"} for _ in texts]
        rewards, done = torch.tensor([each["score"] for each in scores]), torch.ones(len(texts))
        return EnvironmentReturn(said, metadata, [None] * len(texts), rewards, done, None)

    def global_post_process_and_metrics(self, batch: Any) -> tuple[Any, dict[str, float]]:
        shares = {"reward": batch["rewards"], "fraction_of_samples_properly_ended": batch["is_end"]}
        return batch, {name: values.float().mean().item() for name, values in shares.items()}


if __name__ == "__main__":
    environment = "covo_rl.interop.nemo_rl.AudioRewards"
    ENV_REGISTRY["vlm"] = {"actor_class_fqn": environment}
    ACTOR_ENVIRONMENT_REGISTRY[environment] = PY_EXECUTABLES.SYSTEM
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
