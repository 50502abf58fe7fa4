"""The options of `covo-rl eval`: for the command line, for `covo-rl data profile`, and for what they configure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from covo_rl.config import PromptConfig, RewardConfig, RolloutConfig

Dtype = StrEnum("Dtype", ["auto", "float32", "bfloat16", "float16"])
ChoiceStyle = StrEnum("ChoiceStyle", ["letters", "lines", "inline"])


@dataclass(frozen=True)
class Request:
    """The options of `covo-rl eval`."""

    set_: Annotated[
        str | None, typer.Option("--set", help="mmau-test-mini, mmau-test, mmar, mmsu, builtin, or a manifest file")
    ] = None
    data: Annotated[Path | None, typer.Option(help="questions with answers: JSON, JSONL, parquet")] = None
    audio_dir: Annotated[Path | None, typer.Option(help="folder that audio paths start from")] = None
    model: Annotated[str | None, typer.Option(help="checkpoint folder, hub name, or builtin:tiny")] = None
    adapter: Annotated[str | None, typer.Option(help="PEFT adapter folder on top of --model")] = None
    predictions: Annotated[Path | None, typer.Option(help="score the replies in this JSON or JSONL; no model")] = None
    output: Annotated[Path | None, typer.Option(help="folder of the report; an interrupted run goes on there")] = None
    limit: Annotated[int | None, typer.Option(min=1, help="only the first N rows")] = None
    greedy: Annotated[bool, typer.Option("--greedy/--sample", help="most likely token, or sampled")] = True
    num_generations: Annotated[int, typer.Option(min=1, help="replies per row with --sample")] = 1
    temperature: Annotated[float, typer.Option(min=1e-6, help="with --sample")] = 1.0
    top_p: Annotated[float, typer.Option(help="nucleus with --sample; 1 is off")] = 1.0
    max_completion_length: Annotated[int, typer.Option(min=1, help="limit in tokens")] = 1024
    batch_size: Annotated[int, typer.Option(min=1, help="rows decoded at once")] = 32
    seed: Annotated[int, typer.Option(help="of sampling")] = 0
    dtype: Annotated[Dtype, typer.Option(help="precision of the weights")] = Dtype.auto
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...; found by itself")] = None
    listen: Annotated[bool, typer.Option("--listen", help="also with silent, swapped and no audio")] = False
    prompt: Annotated[str, typer.Option(help="wording: covo (ours), or one that the set defines, e.g. official")] = (
        "covo"
    )
    instruction: Annotated[str | None, typer.Option(help="last line; default: the checkpoint's, else ours")] = None
    choice_style: Annotated[ChoiceStyle | None, typer.Option(help="how options are listed; default: as above")] = None
    rewards: Annotated[str | None, typer.Option(help="reward components to report; none: none")] = None
    plots: Annotated[bool, typer.Option("--plots/--no-plots", help="PNG plots (needs matplotlib)")] = True
    overwrite: Annotated[bool, typer.Option("--overwrite", help="start anew in a used --output")] = False
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="run the checkpoint's code")] = False
    allow_outside_audio: Annotated[
        bool, typer.Option("--allow-outside-audio", help="let audio paths leave --audio-dir")
    ] = False

    def prompt_config(self) -> PromptConfig:
        """The wording that the adapter or checkpoint was trained with where its folder has a prompt.yaml, else ours;
        flags win."""
        import yaml

        from covo_rl.resolve import resolve_model

        config = PromptConfig()
        for folder in (self.adapter, self.model):
            path = Path(resolve_model(folder)) / "prompt.yaml" if folder else None
            if path is not None and path.is_file():
                config = PromptConfig(**yaml.safe_load(path.read_text(encoding="utf-8")))
                break
        flags = {"instruction": self.instruction, "choice_style": self.choice_style and str(self.choice_style)}
        return replace(config, **{name: value for name, value in flags.items() if value is not None})

    def rollout_config(self) -> RolloutConfig:
        return RolloutConfig(
            num_generations=self.num_generations, max_completion_length=self.max_completion_length,
            temperature=self.temperature, top_p=self.top_p,
        )  # fmt: skip

    def reward_config(self) -> RewardConfig | None:
        if self.rewards == "none":
            return None
        return RewardConfig() if self.rewards is None else RewardConfig(rewards=self.rewards)

    def problems(self) -> list[str]:
        """Every option that is missing or has no meaning beside another."""
        problems = []
        if self.set_ is None:
            problems.append("--set is missing: mmau-test-mini, mmau-test, mmar, mmsu, builtin, or a manifest file")
        if self.output is None:
            problems.append("--output is missing: the folder of the report")
        if (self.model is None) == (self.predictions is None):
            problems.append("give one of --model (answer with it) and --predictions (score a file)")
        if self.predictions is not None:
            for name, value in (("--adapter", self.adapter), ("--listen", self.listen)):
                if value:
                    problems.append(f"{name} needs a --model; a predictions file is scored as it is")
        if self.greedy and self.num_generations > 1:
            problems.append(f"--num-generations {self.num_generations}: greedy replies are equal; add --sample")
        if (config := self.reward_config()) is not None:
            from covo_rl import rewards

            try:
                rewards.components(config.rewards)
            except rewards.RewardError as error:
                problems.append(f"--rewards: {error}")
        return problems
