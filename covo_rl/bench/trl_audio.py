"""TRL's GRPOTrainer with the few overrides that make it see audio: the baseline that users would write themselves.

Everything else is TRL: `generate` over one row per rollout, rewards, advantages, loss. Audio tensors travel beside the
rows into `generate` and into every scoring pass, so each pass encodes the clip of every rollout again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import entropy_from_logits, selective_log_softmax

from covo_rl.bench.case import Workload
from covo_rl.bench.variants import Ours, clip_tensors
from covo_rl.policy import Policy
from covo_rl.types import Prompt


class AudioGRPOTrainer(GRPOTrainer):
    """GRPO over prompts that are rendered already; a dataset row is `{"prompt": example id}`."""

    def __init__(self, policy: Policy, prompts: Sequence[Prompt], rewards: list[Any], options: GRPOConfig) -> None:
        self.source = policy
        self.rendered = {prompt.example.id: prompt for prompt in prompts}
        self.order = list(self.rendered)
        self.ids: list[str] = []
        # a sampled placeholder would make the next forward look for one more clip
        suppressed = {"suppress_tokens": [policy.family.audio_token_id]}
        options.generation_kwargs = {**dict(options.generation_kwargs or {}), **suppressed}  # pyright: ignore  # a dict or None
        super().__init__(
            model=policy.model,  # pyright: ignore[reportArgumentType]  # PEFT models are taken too
            reward_funcs=rewards,
            args=options,
            train_dataset=Dataset.from_list([{"prompt": name} for name in self.rendered]),
            processing_class=policy.family.processor.tokenizer,
        )
        self.current_gradient_accumulation_steps = 1

    def _audio(self, ids: Sequence[str]) -> dict[str, torch.Tensor]:
        """The clips' tensors, one after the other for every row."""
        return clip_tensors(self.source, [key for name in ids for key in self.rendered[name].clip_keys])

    def _tokenize_prompts(self, prompts: list) -> tuple[list[list[int]], None, dict[str, torch.Tensor]]:
        return [list(self.rendered[name].input_ids) for name in prompts], None, self._audio(prompts)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self.ids = [row["prompt"] for row in inputs]
        scored = super()._generate_and_score_completions(inputs)
        return {**scored, "audio_row": torch.tensor([self.order.index(name) for name in self.ids])}

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        self.ids = [self.order[index] for index in inputs["audio_row"].tolist()]
        return super()._compute_loss(model, inputs)

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, logits_to_keep: int, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        """Log-probs and entropies (N, C) from logits, which any family gives; TRL's fused head needs hidden states."""
        # the batch may be scored in pieces where memory is short; this baseline takes it whole
        logits_NTV = model(
            input_ids=input_ids, attention_mask=attention_mask, **self._audio(self.ids), use_cache=False,
            logits_to_keep=logits_to_keep + 1,
        ).logits  # fmt: skip
        # Qwen2-Audio returns the logits of all positions whatever is asked for
        logits_NCV = logits_NTV[:, -logits_to_keep - 1 : -1].float() / self.temperature
        logps_NC = selective_log_softmax(logits_NCV, input_ids[:, -logits_to_keep:])
        with torch.no_grad():
            entropies_NC = entropy_from_logits(logits_NCV) if kwargs.get("compute_entropy") else None
        return logps_NC, entropies_NC, None


def trl_options(folder: Path, prompts: int, generations: int, completion: int, **more: Any) -> GRPOConfig:
    """TRL's options for one whole batch per step in float32, sampled at temperature 1 without truncation."""
    return GRPOConfig(
        **{
            "output_dir": str(folder), "per_device_train_batch_size": prompts * generations,
            "num_generations": generations, "max_completion_length": completion, "temperature": 1.0, "top_p": 1.0,
            "top_k": 0, "report_to": "none", "bf16": False, "gradient_checkpointing": False,
            "use_cpu": not torch.cuda.is_available(), "save_strategy": "no", "disable_tqdm": True, **more,
        }
    )  # fmt: skip


def _order(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Some reward that differs within a group."""
    return [float(n) for n in range(len(completion_ids))]


def compare_with_trl(case: Workload, timed: Callable[[Callable[[], Any]], Any], repeats: int) -> dict[str, Any]:
    """Medians of a step as TRL's default takes it, without old log-probs: rollouts, loss and backward, interleaved."""
    cell, model = case.cell, case.policy.model
    ours, seconds = Ours(case), {"trl": [], "ours": []}
    with TemporaryDirectory() as folder:
        config = trl_options(
            Path(folder), cell.clips, cell.generations, cell.completion,
            generation_kwargs={"min_new_tokens": cell.completion},
        )  # fmt: skip
        trainer = AudioGRPOTrainer(case.policy, case.prompts, [_order], config)
        rows = [{"prompt": p.example.id} for p in case.prompts for _ in range(cell.generations)]

        def theirs(seed: int) -> None:
            torch.manual_seed(seed)
            model.train()
            trainer._compute_loss(model, trainer._generate_and_score_completions(rows)).backward()

        def mine(seed: int) -> None:
            ours.encode()
            groups = ours.sample(cell.completion, seed)
            old_NC = torch.tensor([r.logps for g in groups for r in g.rollouts], device=case.policy.device)
            ours.loss(groups, old_NC, torch.linspace(-1, 1, cell.rows, device=case.policy.device))

        for repeat in range(repeats):
            for name, step in (("trl", theirs), ("ours", mine)):
                model.zero_grad(set_to_none=True)
                seconds[name].append(timed(partial(step, repeat))[0])
    trl, own = median(seconds["trl"]), median(seconds["ours"])
    return {"trl_cpu_s": trl, "ours_like_trl_cpu_s": own, "trl_ratio": trl / own}
