"""Every option of a run: one dataclass per room, YAML and flags over the same flat names.

Names and meanings are TRL's wherever TRL has the option. `python recipes/grpo_mmau.py --help` prints this file.
Importing it pulls in no torch; `parse` does, through TRL's parser.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

from covo_rl.resolve import (
    COLUMNS,
    MAPPINGS,
    ConfigError,
    column_map,
    number_map,
    option_map,
    read_yaml,
    typed_values,
    unknown_names,
    value_as,
)

#: loss types with a clipped surrogate
CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
COLDEST = 1e-3  # logits over less overflow float16
LOSS_TYPES = (*CLIPPED, "cispo", "sapo", "vespo")
#: of transformers, those that need no options of their own
SCHEDULES = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
)  # fmt: skip
#: what `report_to` can name, each also the package that it needs
TRACKERS = ("tensorboard", "wandb", "trackio", "swanlab")
#: options whose text is a path, or may be one
PATHS = ("model", "adapter", "data", "audio_dir", "eval_data", "eval_audio_dir", "output", "resume", "speech_decoder",
         "scorer_model", "vllm_adapter_dir")  # fmt: skip
#: what `data` says for the built-in spoken questions
SPOKEN_SET = "builtin:spoken"
#: what covo_rl says to vLLM itself, and the option that decides it
VLLM_OWN = {
    "model": "model", "tokenizer": "model", "dtype": "dtype", "seed": "seed", "trust_remote_code": "trust_remote_code",
    "max_model_len": "vllm_max_model_length", "gpu_memory_utilization": "vllm_gpu_memory_utilization",
    "tensor_parallel_size": "vllm_tensor_parallel_size", "enable_sleep_mode": "vllm_enable_sleep_mode",
    "enable_lora": "lora", "max_lora_rank": "lora_r", "logprobs_mode": "temperature",
}  # fmt: skip
#: interval -> the numbers that must lie in it; all others only have to be finite
LIMITS = {
    "[1, inf)": "limit eval_limit max_completion_length decode_rows max_steps keep_last listen_rows "
    "vllm_max_model_length",
    "[1, 100000]": "lora_r num_generations prompts_per_step micro_batch_prompts steps_per_generation num_iterations "
    "eval_num_generations eval_batch_size vllm_tensor_parallel_size",
    "(0, inf)": "lora_alpha learning_rate sampler_correction_cap",
    "[0, inf)": "top_k beta entropy_coef overlong_buffer micro_batch_rollouts warmup_steps weight_decay max_grad_norm "
    "dynamic_sampling feature_memory_mb checkpoint_every eval_every vespo_k_pos vespo_k_neg "
    "vespo_lambda_pos vespo_lambda_neg listen_every engine_probe_tolerance",
    "[0, 1]": "skipped_rows_limit min_p reward_failure_limit rollout_ahead failed_groups_limit",
    "[0, 1)": "lora_dropout eval_fraction epsilon adam_beta1 adam_beta2",
    "(0, 1e9]": "reward_timeout vllm_server_timeout",  # seconds, as many as threads can wait
    "[0, 1e9]": "checkpoint_minutes engine_patience",
    "(0, 1]": "top_p top_entropy_quantile vllm_gpu_memory_utilization",
}

#: in no file name, variable or prompt; from \udc80 on stand bytes of a file name that is not UTF-8
_UNFIT = re.compile(r"[\0\ud800-\udc7f\udd00-\udfff]")


class Several(argparse.Action):
    """A flag that may be given more than once: its first value replaces the default, each further one is added."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        there = getattr(namespace, self.dest)
        setattr(namespace, self.dest, [*([] if there is self.default else there), *values])


def option(default: Any, help: str, choices: list[str] | None = None, **more: Any) -> Any:
    """A dataclass field with a help text for the command line, and what else argparse is to know of it."""
    metadata: dict[str, Any] = {"help": help, **more}
    if choices:
        metadata["choices"] = choices
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class ModelConfig:
    """Which audio language model, and how it is held."""

    model: str = option(
        "builtin:tiny", "folder, hub name, builtin:tiny (shipped), or builtin:tiny_NAME: random weights of a family"
    )
    dtype: str = option(
        "auto", "precision of the weights (in float16 gradients vanish)", ["auto", "float32", "bfloat16"]
    )  # fmt: skip
    attn_implementation: str | None = option(None, "attention of the encoder (the decoder's is set by covo_rl)")
    family: str | None = option(
        None, "a family of your own, ./mine.py:Class or package.module:Class; default: by the checkpoint's model_type"
    )
    trust_remote_code: bool = option(False, "run code that ships with the checkpoint")
    speech_mode: str = option(
        "a2ta", "what replies hold: text and, where the family has them, audio codes; or text alone (a2t): codes are "
        "neither drawn nor scored", ["a2ta", "a2t"],
    )  # fmt: skip


@dataclass
class AdapterConfig:
    """What trains: LoRA on the decoder (default) or all parameters of the chosen parts."""

    lora: bool = option(True, "train LoRA adapters; --full trains the parameters themselves")
    adapter: str | None = option(None, "PEFT adapter folder to start from")
    lora_r: int = option(16, "rank")
    lora_alpha: float = option(32.0, "scale is alpha / r (alpha / sqrt(r) with use_rslora)")
    lora_dropout: float = option(0.0, "dropout on the LoRA input; off while sampling")
    lora_target_modules: str | None = option(None, "regex over full module names; default: decoder linears only")
    use_rslora: bool = option(False, "rank-stabilised scaling, arXiv 2312.03732")
    use_dora: bool = option(False, "weight-decomposed adaptation, arXiv 2402.09353")
    modules_to_save: list[str] = option([], "parts trained in full beside LoRA, e.g. audio_adapter")
    train_parts: list[str] = option(
        ["llm", "lm_head"], "parts that train with --full: encoder audio_adapter llm lm_head"
    )
    part_learning_rates: str | None = option(None, "by part: audio_adapter=1e-5,llm=1e-6; in YAML also a mapping")
    load_in_4bit: bool = option(False, "QLoRA: the decoder in 4-bit NF4 (needs bitsandbytes)")


@dataclass
class DataConfig:
    """Rows, clips and what to do with long ones."""

    data: str | None = option(
        None,
        "questions: a file, a folder or hf:NAME:SPLIT in any layout of docs/data.md; builtin:spoken; default: "
        "built-in set",
    )
    audio_dir: str | None = option(None, "folder that relative audio paths start from")
    eval_data: str | None = option(None, "held-out questions; default: built-in test split")
    eval_audio_dir: str | None = option(None, "folder of the held-out clips")
    columns: str | None = option(
        None, "names that the rows use: question=prompt,answer=label,audio=wav; in YAML also a mapping"
    )  # fmt: skip
    eval_columns: str | None = option(None, "the same of eval_data; default: columns; auto: told by their fields")
    eval_fraction: float = option(0.1, "share of `data` held out by clip when no eval_data is given")
    limit: int | None = option(None, "use the first n training rows")
    eval_limit: int | None = option(None, "use the first n held-out rows")
    long_audio: str = option("error", "clips longer than the family takes", ["error", "chunk", "crop"])
    skipped_rows_limit: float = option(0.05, "share of rows whose audio fails mid-run above which the run stops")
    allow_outside_audio: bool = option(False, "let audio paths leave audio_dir")
    allow_overlap: bool = option(False, "go on when training and held-out data share clips or questions")


@dataclass
class PromptConfig:
    """How a row becomes a prompt."""

    system_prompt: str | None = option(None, "system message; none by default")
    instruction: str = option(
        "Think about what you hear inside <think> </think>, then give the answer inside <answer> </answer>.",
        "last line of the user message",
    )
    choice_style: str = option("letters", "how options are listed", ["letters", "lines", "inline"])
    written_question: bool = option(True, "write the row's question and options under the audio, which else asks alone")


@dataclass
class RolloutConfig:
    """Sampling, with the names of TRL and transformers."""

    num_generations: int = option(8, "G, completions per prompt")
    max_completion_length: int = option(1024, "limit in tokens")
    temperature: float = option(1.0, "sampling temperature, applied in scoring too")
    top_p: float = option(1.0, "nucleus; 1 is off")
    top_k: int = option(0, "0 is off")
    min_p: float = option(0.0, "0 is off")
    shared_decode: bool = option(True, "read the shared prompt keys once per group while decoding")
    decode_rows: int = option(256, "completions that are written at once; others begin as these finish")


@dataclass
class EngineConfig:
    """Who samples: the policy itself (default), or vLLM. Names with vllm_ are TRL's where TRL has the option."""

    use_vllm: bool = option(False, "sample with vLLM in place of the policy's own decoder (docs/rollouts.md)")
    vllm_mode: str = option(
        "colocate", "vLLM in the training processes, or servers that run elsewhere", ["colocate", "server"]
    )  # fmt: skip
    vllm_server_base_url: str | None = option(
        None, "addresses of the servers: http://HOST:PORT, several with commas; their key is VLLM_API_KEY"
    )
    vllm_server_timeout: float = option(240.0, "seconds that a server may take to answer")
    vllm_gpu_memory_utilization: float = option(0.3, "share of the GPU's memory for a colocated engine")
    vllm_tensor_parallel_size: int = option(1, "GPUs of one colocated engine")
    vllm_enable_sleep_mode: bool = option(True, "a colocated engine gives its memory back during the update")
    vllm_max_model_length: int | None = option(
        None, "positions of prompt and completion that vLLM makes room for; default: the longest prompt of the rows "
        "and max_completion_length"
    )  # fmt: skip
    vllm_options: str | None = option(
        None, "more of vLLM's engine arguments: name=value,name=value; in YAML also a mapping"
    )
    vllm_adapter_transport: str = option(
        "folder", "how servers get the adapter: from a folder that they see too, or over HTTP", ["folder", "http"]
    )  # fmt: skip
    vllm_adapter_dir: str | None = option(None, "that folder; default: one in memory, of this machine")
    rollout_ahead: int = option(0, "1: the next step's rollouts are sampled during the update, one version behind")
    engine_probe_tolerance: float = option(
        0.0, "largest difference of log-probs between engine and policy; 0: 1e-4 in float32, 0.3 in 16 bits"
    )
    engine_patience: float = option(600.0, "seconds to wait for a server, when none answers, before the run stops")
    failed_groups_limit: float = option(0.05, "share of a step's groups that may fail to be sampled")


@dataclass
class RewardConfig:
    """R_total = sum of weight * component."""

    rewards: str = option(
        "accuracy,format,consistency,thinking",
        "components: name,name or name=weight,name=weight; in YAML also a mapping name: weight",
    )
    reward_gate: str = option("none", "components count only if this one is 1", ["none", "accuracy", "format"])
    reward_timeout: float = option(60.0, "seconds a component may take for one step")
    reward_failure: str = option(
        "none", "a raising, hanging or nan component: stop the run, or count as not gradeable", ["none", "stop"]
    )
    reward_failure_limit: float = option(0.2, "share of a component's scores that failed in ten steps, to stop above")
    judge: str | None = option(
        None, "judge for consistency, thinking, emotion, content: openai:MODEL@URL, transformers:PATH, command:PROGRAM"
    )
    judge_audio: bool = option(
        False, "the judge of thinking is sent the clips, that of emotion the reply too (openai:, command: that hear)"
    )
    scorer_model: str | None = option(
        None, "who hears replies for the reward emotion: a folder (audio classification), module:fn or ./file.py:fn"
    )
    check_rewards: bool = option(True, "lint the rewards before the first step")


@dataclass
class LossConfig:
    """The GRPO objective, with TRL's names."""

    loss_type: str = option("dapo", "grpo bnpo dr_grpo dapo cispo sapo luspo vespo")
    beta: float = option(0.0, "KL coefficient; 0 needs no reference pass")
    kl_estimator: str = option("k3", "KL estimator", ["k1", "k2", "k3"])
    use_bias_correction_kl: bool = option(True, "multiply the KL term by the ratio: unbiased gradient (DeepSeek-V3.2)")
    epsilon: float = option(0.2, "lower clip range")
    epsilon_high: float | None = option(None, "upper clip range; default: epsilon")
    delta: float | None = option(None, "two-sided clipping, arXiv 2505.07291")
    importance_sampling_level: str = option("token", "token, or sequence (GSPO)", ["token", "sequence"])
    scale_rewards: str = option("group", "divide advantages by the deviation of", ["group", "batch", "none"])
    component_advantages: bool = option(False, "normalise each reward component in its group, then sum (GDPO)")
    policy_ids: str = option(
        "all", "ids of a reply that the loss counts: all, its text (end included), or its audio codes",
        ["all", "text", "codes"],
    )  # fmt: skip
    mask_truncated_completions: bool = option(False, "leave completions cut by length out of the loss")
    top_entropy_quantile: float = option(1.0, "train only on this share of tokens, of highest entropy; costs a pass")
    entropy_coef: float = option(0.0, "weight of an entropy bonus")
    sapo_temperature_pos: float = option(1.0, "SAPO, positive advantages")
    sapo_temperature_neg: float = option(1.05, "SAPO, negative advantages")
    vespo_k_pos: float = option(2.0, "VESPO power, advantages >= 0")
    vespo_k_neg: float = option(3.0, "VESPO power, negative advantages")
    vespo_lambda_pos: float = option(3.0, "VESPO decay, advantages >= 0")
    vespo_lambda_neg: float = option(2.0, "VESPO decay, negative advantages")
    overlong_buffer: int = option(0, "soft over-long penalty over the last n tokens (DAPO); 0 is off")
    sampler_correction: bool | None = option(
        None, "weigh tokens by the policy's probability over the engine's; default: with use_vllm or rollout_ahead",
        nargs="?", const=True,
    )  # fmt: skip
    sampler_correction_mode: str = option(
        "token_truncate", "ratio per token or of the whole sequence; above the cap it is cut to it or masked to 0",
        ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"],
    )  # fmt: skip
    sampler_correction_cap: float = option(2.0, "cap C of that ratio")


@dataclass
class TrainConfig:
    """The loop."""

    seed: int = option(42, "seeds data order, initialisation and sampling")
    output: str = option("runs/grpo", "run folder")
    overwrite: bool = option(False, "replace the run that OUTPUT holds, once everything is checked")
    max_steps: int = option(60, "generation steps")
    prompts_per_step: int = option(32, "P, unique prompts per step over all ranks")
    micro_batch_prompts: int = option(32, "whole groups per forward and backward on one rank")
    micro_batch_rollouts: int = option(
        0, "split each group over passes of this many rollouts, with micro_batch_prompts 1; 0 keeps groups whole"
    )
    steps_per_generation: int = option(
        1, "optimiser steps per generated batch and iteration: the batch is split into this many"
    )
    num_iterations: int = option(1, "passes over each generated batch")
    learning_rate: float = option(1e-6, "peak")
    lr_scheduler_type: str = option("linear", f"schedule: {', '.join(SCHEDULES)}")
    warmup_steps: int = option(0, "optimiser steps of linear warm-up, from 1/(n + 1) of the rate")
    weight_decay: float = option(0.0, "AdamW")
    adam_beta1: float = option(0.9, "AdamW")
    adam_beta2: float = option(0.999, "AdamW")
    max_grad_norm: float = option(1.0, "gradient clipping; 0 is off")
    gradient_checkpointing: bool = option(False, "recompute activations of the decoder in the backward (non-reentrant)")
    recompute: str = option(
        "mlp", "what gradient_checkpointing recomputes of a layer: norms and MLP, or all of it; docs/performance.md",
        ["mlp", "layer"],
    )  # fmt: skip
    dynamic_sampling: int = option(0, "resample rounds for groups without variance (DAPO); 0 is off")
    feature_memory_mb: int = option(512, "budget for audio features kept in memory when the encoder is frozen")
    checkpoint_every: int = option(0, "steps between checkpoints; 0: only at the end")
    checkpoint_minutes: float = option(0.0, "minutes between checkpoints; 0 is off")
    export_checkpoints: bool = option(False, "also write and verify OUTPUT/exports/step_N at every periodic checkpoint")
    keep_last: int = option(2, "checkpoints kept")
    keep_best: bool = option(False, "also keep the checkpoint of the best evaluation")
    resume: str | None = option(None, "auto, or a checkpoint folder")
    allow_changed_config: bool = option(False, "resume although configuration or data differ")
    oom_retry: bool = option(False, "on out-of-memory halve the micro-batch and repeat the step")
    dry_run: bool = option(False, "check data, configuration, model and budget, start nothing")
    log_rollouts: bool = option(True, "write rollouts/ to the run folder")
    log_token_logps: bool = option(True, "with the log-prob of every token")
    speech_decoder: str | None = option(
        None, "what plays spoken replies in the report: a decoder's folder, or builtin:NAME"
    )


@dataclass
class EvalConfig:
    """The table before and after."""

    evaluate: bool = option(True, "evaluate before and after training")
    eval_every: int = option(0, "steps between evaluations; 0 is off")
    eval_set: list[str] = option(
        [], "sets of `covo-rl eval` that are measured at the same steps, one or several: NAME, NAME=DATA, "
        "NAME=DATA,audio_dir=DIR,limit=N ... (docs/evaluation.md)", action=Several,
    )  # fmt: skip
    eval_num_generations: int = option(1, "sampled completions per held-out row")
    eval_batch_size: int = option(64, "rows decoded at once")
    listen_every: int = option(0, "steps between two looks whether the policy listens: accuracy with silence; 0 is off")
    listen_rows: int = option(64, "held-out rows for that; of fewer than 16 the monitor draws no conclusion")


@dataclass
class TrackerConfig:
    """Experiment trackers beside the run folder, with the names of TRL and transformers."""

    report_to: str = option("none", f"none, all that are installed, or some of {','.join(TRACKERS)}")
    project: str = option("covo_rl", "the trackers' project")
    run_name: str | None = option(None, "the run's name there; default: the name of the output folder")
    trackio_space_id: str | None = option(None, "Hugging Face Space that trackio sends to; default: this machine")


@dataclass
class Options:
    """All rooms together. Option names are unique over the rooms, so YAML and flags stay flat."""

    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)

    def flat(self) -> dict[str, Any]:
        """Option name -> value, the form of the YAML files."""
        return {name: value for room in asdict(self).values() for name, value in room.items()}


def corrects_sampler(sampler_correction: bool | None, use_vllm: bool, rollout_ahead: int) -> bool:
    """The option, by default on where what samples is not just the policy: vLLM, or a policy one step older."""
    return use_vllm or bool(rollout_ahead) if sampler_correction is None else sampler_correction


def rooms() -> dict[str, type]:
    """Room name -> its dataclass."""
    return {f.name: f.default_factory for f in fields(Options)}  # type: ignore[misc]  # every room has one


def option_names() -> list[str]:
    """Every option name, in the order of the rooms."""
    return [f.name for room in rooms().values() for f in fields(room)]


def flag_value(words: Sequence[str], name: str) -> str | None:
    """The last value of `--name value` or `--name=value` among the words of a command line; None without one."""
    value = None
    for word, following in zip(words, [*words[1:], ""], strict=False):
        flag, equals, rest = word.partition("=")
        if flag == f"--{name}":
            value = rest if equals else following
    return value


def tracker_names(report_to: str) -> list[str]:
    """The words of `report_to`, without none."""
    return [name for word in report_to.split(",") if (name := word.strip()) not in ("none", "")]


def taught_prompt(path: Path) -> PromptConfig:
    """The wording that a prompt.yaml says.

    Raises:
        ConfigError: it is no mapping of prompt options.
    """
    problems: list[str] = []
    config = PromptConfig(**typed_values(get_type_hints(PromptConfig), read_yaml(path), problems, str(path)))
    if problems := problems + [f"{path}: {problem}" for problem in value_problems(config)]:
        raise ConfigError(problems)
    return config


def parse_options(args: Sequence[str] | None = None) -> Options:
    """Read flags and `--config FILE` with TRL's parser; flags win over YAML, YAML over defaults.

    Raises:
        ConfigError: unknown options (with the nearest name), unreadable values, contradictions - all at once.
    """
    from trl import TrlParser  # pyright: ignore[reportPrivateImportUsage]  # lazily exported, documented

    words = list(sys.argv[1:] if args is None else args)
    words = [part for word in words for part in (["--lora", "false"] if word == "--full" else [word])]
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    problems: list[str] = []
    values: dict[str, Any] = {}
    content: dict[str, Any] = {}
    if "--config" in words:  # read here: TRL's parser takes any type, the last of equal keys, the locale's encoding
        at = words.index("--config")
        if at + 1 == len(words):
            raise ConfigError(["--config needs a file"])
        path, words = words[at + 1], words[:at] + words[at + 2 :]
        if "--config" in words:
            raise ConfigError([f"--config {path}: there is a second --config; one file holds the options"])
        content = read_yaml(path)
        values = typed_values(_hints(), content, problems, path)
    variables = values.pop("env", {})
    problems += _env_problems(variables)
    flags = [word[2:].split("=")[0].replace("-", "_") for word in words if word.startswith("--")]
    names = {*option_names(), "help", *(f"no_{name}" for name in option_names())}
    problems += unknown_names([flag for flag in flags if flag not in names], option_names(), "command line")

    class Parser(TrlParser):
        def error(self, message: str) -> Any:
            raise ConfigError([f"command line: {message}"])

    parser = Parser(list(rooms().values()), allow_abbrev=False)  # type: ignore[arg-type]  # takes any dataclass
    parser.set_defaults_with_config(**values)
    try:
        options = Options(*parser.parse_args_and_config(words)) if names.issuperset(flags) else None
    except ValueError as error:  # ConfigError is one; the parser's own is of words that belong to no option
        left = str(error).partition("HfArgumentParser: ")[2]
        text = f"what belongs to no option: {left}; options start with --" if left else str(error)
        options, problems = None, problems + getattr(error, "problems", [f"command line: {text}"])
    unread = {*map(str, content)} - {*values, "env"}
    if options is not None:  # what depends on a value that could not be read is not judged
        problems += [text for text in option_problems(options) if not any(name in text for name in unread)]
    if problems or options is None:
        raise ConfigError(problems)
    os.environ.update({str(name): str(value) for name, value in variables.items()})
    return options


def options_from(layers: Mapping[str, Mapping[str, Any]]) -> Options:
    """Options from values by name: where they were written -> {name: value}; a later layer wins.

    Raises:
        ConfigError: as `parse_options`, of all layers together.
    """
    problems: list[str] = []
    values: dict[str, Any] = {}
    for where, layer in layers.items():
        values |= typed_values(_hints(), layer, problems, where)
    variables = values.pop("env", {})
    problems += _env_problems(variables)
    parts = {name: {key: values[key] for key in get_type_hints(room) if key in values}
             for name, room in rooms().items()}  # fmt: skip
    options = Options(**{name: rooms()[name](**part) for name, part in parts.items()})
    unread = {str(name) for layer in layers.values() for name in layer} - {*values, "env"}
    problems += [text for text in option_problems(options) if not any(name in text for name in unread)]
    if problems:
        raise ConfigError(problems)
    os.environ.update({str(name): str(value) for name, value in variables.items()})
    return options


def _hints() -> dict[str, Any]:
    """The type of every option, and of `env`."""
    hints = {name: hint for room in rooms().values() for name, hint in get_type_hints(room).items()}
    return {**hints, "env": dict[str, Any]}


def _env_problems(variables: Mapping[Any, Any]) -> list[str]:
    return [f"env: {name!r:.80} {value!r:.80}: write NAME: text or number" for name, value in variables.items()
            if type(value) not in (str, int, float) or not str(name) or "=" in str(name)
            or _UNFIT.search(f"{name}{value}")]  # fmt: skip


def option_problems(options: Options) -> list[str]:
    """Contradictions and impossible values, each with what to do; empty when all is well."""
    wrong = {name: text for room in vars(options).values() for name, text in _wrong_values(room, LIMITS).items()}
    usable = {room: replace(config, **{name: getattr(type(config)(), name) for name in vars(config) if name in wrong})
              for room, config in vars(options).items()}  # fmt: skip
    contradictions = _contradictions(Options(**usable))
    return [*wrong.values(), *(text for text in contradictions if not any(name in text for name in wrong))]


def _contradictions(options: Options) -> list[str]:
    rollout, loss, train = options.rollout, options.loss, options.train
    rules = [
        (rollout.num_generations >= 2, f"num_generations {rollout.num_generations}: a group needs at least 2 rollouts"),
        (rollout.temperature >= COLDEST, f"temperature {rollout.temperature}: sampling needs at least {COLDEST}"),
        (not train.micro_batch_rollouts or train.micro_batch_prompts == 1,
         f"micro_batch_rollouts {train.micro_batch_rollouts} splits single groups: set micro_batch_prompts to 1"),
        (train.gradient_checkpointing or train.recompute == TrainConfig.recompute,
         f"recompute {train.recompute} has no effect without gradient_checkpointing"),
        (options.data.data == SPOKEN_SET or not (options.data.data or "").startswith("builtin:"),
         f"data {options.data.data!r:.80}: there is {SPOKEN_SET}; without `data` the built-in sounds are asked"),
        (bool(options.eval.eval_every) or not options.eval.eval_set,
         f"eval_set {' '.join(options.eval.eval_set):.80}: without eval_every, the steps between evaluations, it would "
         "never be measured"),
        (not (train.overwrite and train.resume), "overwrite replaces the run that resume continues: choose one"),
        (train.lr_scheduler_type in SCHEDULES,
         f"lr_scheduler_type {train.lr_scheduler_type!r:.80}: choose one of {' '.join(SCHEDULES)}"),
        (options.adapter.lora or not options.adapter.adapter, "adapter: an adapter to start from needs --lora"),
        (options.adapter.lora or not options.adapter.use_dora, "use_dora has no meaning with --full"),
        (options.adapter.lora or not options.adapter.load_in_4bit,
         "load_in_4bit: the decoder's own parameters cannot train in 4 bits: use --lora, or leave it out"),
        (not options.reward.judge_audio or (options.reward.judge or "").startswith(("openai:", "command:")),
         f"judge_audio sends the clips to an endpoint; judge is {options.reward.judge or 'none'}: write judge: "
         "openai:MODEL@URL with a model that hears, or leave judge_audio out"),
        (options.reward.reward_gate == "none" or not loss.component_advantages,
         f"reward_gate {options.reward.reward_gate} has no effect with component_advantages: choose one"),
        (loss.policy_ids != "codes" or options.model.speech_mode == "a2ta",
         "policy_ids codes: with speech_mode a2t no reply has any; leave one out"),
        (loss.overlong_buffer <= rollout.max_completion_length,
         f"overlong_buffer {loss.overlong_buffer}: max_completion_length {rollout.max_completion_length} is shorter"),
    ]  # fmt: skip
    trackers, space = tracker_names(options.tracker.report_to), options.tracker.trackio_space_id
    rules += [
        ({*trackers} <= {"all", *TRACKERS},
         f"report_to {options.tracker.report_to!r:.80}: choose none, all, or some of {', '.join(TRACKERS)}"),
        (space is None or {"all", "trackio"} & {*trackers}, "trackio_space_id has no effect without report_to trackio"),
    ]  # fmt: skip
    engine = options.engine
    corrects = corrects_sampler(loss.sampler_correction, engine.use_vllm, engine.rollout_ahead)
    loss = replace(loss, sampler_correction=corrects)
    return (
        [message for fine, message in rules if not fine] + _loss_contradictions(loss) + engine_contradictions(options)
    )


def engine_contradictions(options: Options) -> list[str]:
    """Of the engine's options, each with what to write instead."""
    engine = options.engine
    served, urls = engine.use_vllm and engine.vllm_mode == "server", server_urls(engine)
    more = option_map(engine.vllm_options, "vllm_options")
    own = [f"vllm_options: covo_rl sets {name} itself, from {VLLM_OWN[name]}" for name in more if name in VLLM_OWN]
    rules = [
        (isinstance(more.get("hf_overrides", {}), Mapping), "vllm_options: hf_overrides must be a mapping: write YAML"),
        (urls or not served, "vllm_mode server needs vllm_server_base_url: http://HOST:PORT, several with commas"),
        (served or not (engine.use_vllm and urls), "vllm_server_base_url has no effect without vllm_mode server"),
        (len({*urls}) == len(urls), "vllm_server_base_url: one address stands there twice"),
        (not (engine.use_vllm and engine.rollout_ahead) or served,
         "rollout_ahead 1 needs vllm_mode server: a colocated engine shares the GPU with the update, so nothing would "
         "overlap"),
        (served or not engine.use_vllm or engine.vllm_adapter_transport == "folder",
         "vllm_adapter_transport http is for vllm_mode server: a colocated engine reads the folder"),
    ]  # fmt: skip
    return own + [message for fine, message in rules if not fine]


def server_urls(engine: EngineConfig) -> list[str]:
    """The addresses in `vllm_server_base_url`, without the slash at their end."""
    words = (engine.vllm_server_base_url or "").split(",")
    return [url for word in words if (url := word.strip().rstrip("/"))]


def value_problems(config: Any, limits: Mapping[str, str] = LIMITS) -> list[str]:
    """Values of a dataclass that are of another type, none of the choices, not finite or outside their interval."""
    return list(_wrong_values(config, limits).values())


def _wrong_values(config: Any, limits: Mapping[str, str]) -> dict[str, str]:
    """Name of an option -> what is wrong with its value."""
    problems = {}
    hints = get_type_hints(type(config))
    intervals = {name: interval for interval, names in limits.items() for name in names.split()}
    for item in fields(config):
        name, value = item.name, getattr(config, item.name)
        choices, interval = item.metadata.get("choices", ()), intervals.get(name)
        try:
            if name in COLUMNS:
                column_map(value, name)
            elif name == "vllm_options":
                option_map(value, name)
            elif name in MAPPINGS and not isinstance(value, list):
                numbers = number_map(value, what=name, default=1.0 if name == "rewards" else None)
                if name == "part_learning_rates" and min(numbers.values(), default=1) <= 0:
                    raise ValueError("each rate must be above 0; a part that train_parts leaves out does not train")
            elif name in MAPPINGS and not all(isinstance(reward, str) or callable(reward) for reward in value):
                raise ValueError("expected names or functions; with weights: name=weight,name=weight")
            elif name not in MAPPINGS and value_as(hints[name], value) != value:
                raise ValueError(f"expected {hints[name]}, not text")
            if isinstance(value, str):
                _check_text(name, value, isinstance(config, PromptConfig))
            if choices and value not in choices:
                raise ValueError(f"choose {', '.join(choices[:-1])} or {choices[-1]}")
            if interval and isinstance(value, int | float) and not _inside(value, interval):
                raise ValueError(f"must {_SPOKEN.get(interval, f'be in {interval}')}")
        except ConfigError as error:
            problems[name] = "; ".join(error.problems)
        except ValueError as error:
            problems[name] = f"{name} {f'{value!r:.80}' if isinstance(value, str) else f'{value!s:.80}'}: {error}"
    return problems


def _check_text(name: str, text: str, is_prompt: bool) -> None:
    """Raises ValueError for text that no file name, address or prompt can be."""
    if not text and not is_prompt:
        raise ValueError("it is empty; leave it out for the default")
    if name in PATHS and text.startswith("~"):
        raise ValueError("only a shell knows ~; write the whole path")
    if _UNFIT.search(text):
        raise ValueError("no file name and no prompt can hold such a character")


_SPOKEN = {"[1, inf)": "be at least 1", "(0, inf)": "be above 0", "[0, inf)": "not be negative"}


def _inside(value: float, interval: str) -> bool:
    low, high = map(float, interval[1:-1].split(","))
    return low < value < high or (value == low and interval[0] == "[") or (value == high and interval[-1] == "]")


def _loss_contradictions(c: LossConfig) -> list[str]:
    """Of the objective's options, each with what to write instead."""
    high = c.epsilon if c.epsilon_high is None else c.epsilon_high
    hint = "; GSPO is importance_sampling_level: sequence" if c.loss_type == "gspo" else ""
    rules = [
        (c.loss_type in LOSS_TYPES, f"loss_type {c.loss_type!r}: choose one of {' '.join(LOSS_TYPES)}{hint}"),
        (high >= 0, f"epsilon_high {high}: must not be negative"),
        (c.loss_type != "cispo" or (c.epsilon_high is not None and c.epsilon_high >= 1),
         f"loss_type cispo caps the ratio itself at epsilon_high (now {high}, which would scale gradients by that): "
         "set epsilon_high: 5.0"),
        (c.loss_type != "luspo" or c.importance_sampling_level == "sequence",
         "loss_type luspo is defined at sequence level: set importance_sampling_level: sequence"),
        (c.delta is None or c.loss_type in CLIPPED, f"delta has no meaning with loss_type {c.loss_type}"),
        (c.delta is None or c.delta > 1 + high, f"delta {c.delta}: must be above 1 + epsilon_high = {1 + high}"),
        (c.sapo_temperature_pos > 0 and c.sapo_temperature_neg > 0, "sapo temperatures must be above 0"),
        (not c.sampler_correction or c.loss_type != "vespo" or c.sampler_correction_mode.startswith("token"),
         f"loss_type vespo needs token ratios: sampler_correction_mode is {c.sampler_correction_mode}"),
        (not c.component_advantages or c.scale_rewards == "group",
         f"component_advantages does its own scaling: scale_rewards {c.scale_rewards!r} would have no effect"),
    ]  # fmt: skip
    return [message for fine, message in rules if not fine]
