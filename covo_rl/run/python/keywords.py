"""Options by keyword, as `GRPO` takes them: those of the command line, TRL's names for them, and what to write in place
of names of TRL's that mean nothing here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from covo_rl.config import PATHS, ConfigError, Options, options_from
from covo_rl.data.memory import IN_MEMORY, source_problems
from covo_rl.resolve import read_yaml
from covo_rl.run.defaults import default_config, options_of_model

#: TRL's name -> ours, where both mean the same
ALIASES = {
    "reward_funcs": "rewards", "train_dataset": "data", "eval_dataset": "eval_data", "output_dir": "output",
    "overwrite_output_dir": "overwrite", "resume_from_checkpoint": "resume", "save_total_limit": "keep_last",
    "model_name_or_path": "model", "torch_dtype": "dtype",
}  # fmt: skip
#: a name of TRL's without our like -> what to write
HINTS = {
    "args": "options are keywords of GRPO itself",
    "per_device_train_batch_size": "prompts_per_step counts prompts of a step over all ranks, micro_batch_prompts "
    "whole groups of a pass on one",
    "per_device_eval_batch_size": "eval_batch_size counts rows that are decoded at once",
    "generation_batch_size": "prompts_per_step times num_generations completions are generated in a step",
    "gradient_accumulation_steps": "micro_batch_prompts splits an update over passes, with the same gradient",
    "num_train_epochs": "max_steps times prompts_per_step rows are drawn",
    "logging_steps": "every step is logged to metrics.jsonl",
    "log_completions": "log_rollouts writes all of them to the run folder",
    "save_steps": "checkpoint_every counts generation steps",
    "save_strategy": "checkpoint_every, checkpoint_minutes",
    "eval_steps": "eval_every counts generation steps",
    "eval_strategy": "eval_every; evaluate says whether before and after",
    "load_best_model_at_end": "keep_best keeps the checkpoint of the best evaluation",
    "max_prompt_length": "no prompt is ever cut; rows that do not fit are named before training",
    "bf16": "dtype, or mixed precision of accelerate launch",
    "fp16": "in float16 gradients vanish; dtype, or bf16 of accelerate launch",
    "peft_config": "lora_r, lora_alpha, lora_target_modules ...; adapter starts from a saved one",
    "reward_weights": "rewards takes a mapping: {\"accuracy\": 1.0, my_function: 0.5}",
    "processing_class": "the model's folder holds its processor",
    "callbacks": "on_step is called with every step",
    "warmup_ratio": "warmup_steps",
    "optim": "AdamW it is",
    "generation_kwargs": "temperature, top_p, top_k, min_p",
    "vllm_importance_sampling_correction": "sampler_correction",
    "vllm_importance_sampling_mode": "sampler_correction_mode",
    "vllm_importance_sampling_cap": "sampler_correction_cap",
    "vllm_server_host": "vllm_server_base_url takes http://HOST:PORT, several with commas",
    "vllm_server_port": "vllm_server_base_url takes http://HOST:PORT, several with commas",
    "disable_dropout": "dropout is off unless lora_dropout says otherwise",
}  # fmt: skip


def read_keywords(config: str | os.PathLike[str] | None, given: Mapping[str, Any]) -> tuple[Options, dict[str, Any]]:
    """Options, and the rows in memory among them by name (data, eval_data), which the options call IN_MEMORY.

    Below the keywords lie those of the file `config`; without one, what the recipe takes for such a model.

    Raises:
        ConfigError: unknown names (with the nearest), values of another type, contradictions: all at once.
    """
    problems: list[str] = []
    values = _own_names(given, problems)
    memory = {name: values[name] for name in ("data", "eval_data")
              if values.get(name) is not None and not isinstance(values[name], str | os.PathLike)}  # fmt: skip
    values |= dict.fromkeys(memory, IN_MEMORY)
    for name in PATHS:
        if isinstance(values.get(name), os.PathLike):
            values[name] = os.fspath(values[name])
    model = values.get("model")
    if model is not None and (wrong := model_problems("GRPO", model)):
        problems += wrong
        del values["model"]
        model = None
    for name, source in memory.items():
        problems += [f"GRPO: {name}: {what}" for what in source_problems(source)]
    _list_rewards(values, problems)
    if isinstance(values.get("report_to"), list | tuple):
        values["report_to"] = ",".join(map(str, values["report_to"])) or "none"
    layers: dict[str, Mapping[str, Any]] = {}
    try:
        path = str(config) if config is not None else str(default_config(model))
        layers[path] = read_yaml(path)
        if config is None:
            layers[f"{model}/prompt.yaml"] = options_of_model(model)
    except ConfigError as error:
        problems += error.problems
    try:
        options = options_from({**layers, "GRPO": values})
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems)
    return options, memory


def model_problems(where: str, model: object) -> list[str]:
    """What is wrong with the name of a model."""
    if isinstance(model, str | os.PathLike):
        return []
    what = "rows, which are data=..." if isinstance(model, list) else f"a {type(model).__name__}"
    return [f"{where}: model is {what}: give the folder or hub name that it was loaded from"]


def _list_rewards(values: dict[str, Any], problems: list[str]) -> None:
    """One function, or a tuple, as the list that it stands for."""
    rewards = values.get("rewards")
    if callable(rewards):
        values["rewards"] = [rewards]
    elif isinstance(rewards, tuple):
        values["rewards"] = list(rewards)
    elif rewards is not None and not isinstance(rewards, str | list | Mapping):
        values.pop("rewards")
        problems.append(f"GRPO: rewards is a {type(rewards).__name__}: give a name, a function, a list of these, or "
                        "{reward: weight}")  # fmt: skip


def _own_names(given: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """The keywords under our names; what cannot be translated goes to `problems`. None of a keyword is its default."""
    values: dict[str, Any] = {}
    for name, value in given.items():
        own = ALIASES.get(name, name)
        if own in values:
            problems.append(f"GRPO: {name} and {own} are the same option: give one of them")
        elif name in HINTS:
            problems.append(f"GRPO: there is no {name}; {HINTS[name]}")
        elif name == "resume_from_checkpoint" and isinstance(value, bool):
            values[own] = "auto" if value else None
        else:
            values[own] = value
    return values
