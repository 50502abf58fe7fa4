"""For verl: our rewards as its reward function, and a dataset that hears clips by path.

    python -m verl.trainer.main_ppo algorithm.adv_estimator=grpo data.train_files=train.parquet \
        data.custom_cls.path=pkg://covo_rl.interop.verl data.custom_cls.name=AudioQuestions \
        reward.custom_reward_function.path=pkg://covo_rl.interop.verl \
        reward.custom_reward_function.name=compute_score \
        '+reward.custom_reward_function.reward_kwargs.rewards="accuracy=1,format=1"' ...

with rows of `covo-rl data convert IN train.parquet --to verl` (docs/interop.md).
"""

# pyright: reportMissingImports=false
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from verl.utils.dataset.rl_dataset import RLHFDataset

from covo_rl.interop.rows import waveform_at
from covo_rl.interop.scoring import lone_scores

#: of every audio processor that verl's models have; `data.mm_processor_kwargs.sampling_rate` says another
RATE = 16_000


class AudioQuestions(RLHFDataset):
    """verl's dataset, with waveforms where the row names files: its own hands paths on, which no processor takes."""

    @classmethod
    def _process_multi_modal_info(cls, messages: list[dict[str, Any]], image_patch_size: int, config: Any) -> Any:
        images, videos, audios = super()._process_multi_modal_info(messages, image_patch_size, config)
        rate = int((config.get("mm_processor_kwargs") or {}).get("sampling_rate", RATE))
        heard = [waveform_at(clip, rate) if isinstance(clip, str) else clip for clip in audios or ()]
        return images, videos, heard or None


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: Mapping[str, Any] | None = None, **options: Any
) -> dict[str, float]:
    """verl's signature; `score` is trained on, the components are logged. `options` are those of `lone_scores`."""
    return lone_scores([(extra_info or {}).get("covo_row")], [solution_str], **options)[0]
