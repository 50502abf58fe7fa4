"""Options of pre-training and of the chat stage: one YAML for all of them, checked as a whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any, get_type_hints

from covo_rl.config import SCHEDULES, ConfigError, option, typed_values, value_problems
from covo_rl.resolve import read_yaml
from covo_rl.supervised.config import DTYPES, PARTS
from covo_rl.supervised.pretrain.distill_options import distill_options
from covo_rl.supervised.pretrain.stages import STAGES, task_problems

#: transformers' name of a cosine that ends at a share of its peak
FLOORED_COSINE = "cosine_with_min_lr"
#: what an id of a stream can be, as duplex/supervised.py has it
DUPLEX_KINDS = ("decision", "text", "code")
LIMITS = {
    "[1, inf)": "length batch_size gradient_accumulation_steps steps keep_last eval_rows",
    "(0, inf)": "learning_rate max_grad_norm",
    "[0, inf)": "warmup_steps weight_decay checkpoint_every eval_every workers",
    "[0, 1]": "sentence_share final_learning_rate",
    "[0, 1)": "adam_beta1 adam_beta2",
    "[0, 1000000000]": "seed",
}
#: what a resumed run may change; rows are compared by content, and rows an update by their number
MAY_CHANGE = frozenset(
    """
    output resume overwrite dry_run checkpoint_every keep_last workers data audio_dir text_data dialogue_data
    duplex_data tasks eval_tasks eval_rows eval_every
    check_recordings save_dtype batch_size gradient_accumulation_steps gradient_checkpointing recompute
    """.split()  # noqa: SIM905 - a list of quoted words is harder to read
)


@dataclass
class PretrainConfig:
    """Options of a file; `stage_1:`, `stage_2:`, `stage_chat:` in it are those of one stage, which win over the others.

    `stage` sets what trains, the mixture, rate, steps and warm-up as published, below all that is given. `tasks` is
    {name: {weight, data, audio_dir}}: a task has the published weight and the rows of `data`, `text_data`,
    `dialogue_data` or `duplex_data` by default. An update is batch_size x gradient_accumulation_steps x ranks rows of
    `length` ids.
    """

    output: str = option("runs/pretrain", "folder: the trained model, metrics.jsonl, checkpoints/")
    model: str | None = option(None, "folder, or builtin:NAME, of the model to start from")
    stage: Any | None = option(None, "1 (adapter alone, ASR), 2 (adapter, decoder and head) or chat (dialogues)")
    tasks: dict[str, Any] = option({}, "name: {weight, data, audio_dir}", yaml_only=True)
    data: str | None = option(None, "rows of speech: JSONL or parquet, a folder or a pattern of them")
    audio_dir: str | None = option(None, "folder of the recordings; default: that of the rows")
    text_data: str | None = option(None, "rows of text, {id, text}")
    dialogue_data: str | None = option(None, "rows of dialogues")
    duplex_data: str | None = option(None, "full-duplex streams: a folder of covo-rl data simulate-duplex, as OUT/sft")
    tokenizer: str | None = option(None, "digest of the speech tokenizer that must have made the codes")
    train_parts: list[str] = option(["audio_adapter", "llm", "lm_head"], "what trains; llm has the embeddings too")
    length: int = option(8192, "ids of a packed row; also the longest document")
    batch_size: int = option(1, "packed rows that a rank computes at once")
    gradient_accumulation_steps: int = option(1, "times that a rank does so in an update")
    steps: int = option(1000, "updates")
    learning_rate: float = option(1e-4, "the peak")
    lr_scheduler_type: str = option(FLOORED_COSINE, "the schedule", choices=[FLOORED_COSINE, *SCHEDULES])
    final_learning_rate: float = option(0.1, f"share of the peak at which {FLOORED_COSINE} ends")
    warmup_steps: int = option(0, "updates in which the rate rises to its peak")
    weight_decay: float = option(0.1, "of AdamW; not of norms, biases and embeddings")
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    max_grad_norm: float = option(1.0, "a longer gradient is shortened to this")
    dtype: str = option("auto", "of the weights; auto: the model's, float32 where that is 16 bits", choices=[*DTYPES])
    autocast: str = option("auto", "products in bfloat16; auto: on GPUs", choices=["auto", "bf16", "no"])
    save_dtype: str = option("auto", "of the trained model; auto: as it trained", choices=[*DTYPES])
    gradient_checkpointing: bool = False
    recompute: str = option("mlp", "what gradient_checkpointing computes again", choices=["mlp", "layer"])
    sentence_share: float = option(0.5, "how often interleaving is by sentence and not by phrase")
    content: str = option("continue", "fragments of one modality each, or of all", choices=["continue", "repeat"])
    query: str = option("text", "what asks for the line of a pseudo-dialogue", choices=["text", "none"])
    text_loss: bool = option(False, "teach the text of pseudo-dialogues too, a control")
    duplex_weights: dict[str, Any] | None = option(
        None, "what an id of a stream counts, if not 1: {decision, text, code}", yaml_only=True
    )
    distill: dict[str, Any] | None = option(None, "on-policy distillation from a teacher, if any", yaml_only=True)
    eval_tasks: dict[str, Any] = option({}, "held-out rows, in the form of tasks", yaml_only=True)
    eval_rows: int = option(8, "packed rows of eval_tasks, on which the loss is measured")
    eval_every: int = option(0, "updates between two measurements; 0: at the end alone")
    checkpoint_every: int = option(500, "updates between two checkpoints; 0: at the end alone")
    keep_last: int = option(2, "checkpoints that are kept")
    seed: int = 0
    workers: int = option(0, "processes that read and prepare rows, a rank; 0: none beside the training")
    check_recordings: bool = option(True, "decode every recording before the first update; false: when it is drawn")
    resume: bool = option(False, "go on from the newest checkpoint in output")
    overwrite: bool = option(False, "replace the earlier pre-training in output")
    dry_run: bool = option(False, "check options, rows and model; train and write nothing")

    @property
    def fixed(self) -> dict[str, Any]:
        """The options that a resumed run must have in common with its checkpoint."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in MAY_CHANGE}


def read_pretrain(path: str | Path | None, overrides: Mapping[str, Any] | None = None) -> PretrainConfig:
    """Options of a YAML file, and `overrides` over it (those that are None are left out).

    Raises:
        ConfigError: unknown names with the nearest valid one, impossible values, contradictions: all at once.
    """
    content = {} if path is None else read_yaml(path)
    given = {name: value for name, value in (overrides or {}).items() if value is not None}
    problems: list[str] = []
    hints = get_type_hints(PretrainConfig)
    sections = {number: _section(content, number, problems) for number in STAGES}
    typed = {number: typed_values(hints, section, problems, f"stage_{number}") for number, section in sections.items()}
    general = typed_values(hints, content, problems, "pretrain")
    options = typed_values(hints, given, problems, "pretrain")
    named = options.get("stage", general.get("stage"))
    stage = next((name for name in STAGES if str(name) == str(named)), None)
    if named is not None and stage is None:
        problems.append(f"stage {named!r:.80}: there are {', '.join(map(str, STAGES))}")
    own = {} if stage is None else typed[stage]
    forms = {"tasks": general.get("tasks"), "eval_tasks": general.get("eval_tasks")}
    forms |= {f"stage_{name}: tasks": section.get("tasks") for name, section in typed.items()}
    for where, tasks in forms.items():
        problems += task_problems(tasks, where) if tasks is not None else []
    if problems:  # of the form; what follows needs it
        raise ConfigError(problems)
    if own.get("tasks") and general.get("tasks"):  # a stage chooses and weighs; the rows of a task are said once
        rows = general["tasks"]
        own = {**own, "tasks": {name: {**rows.get(name, {}), **task} for name, task in own["tasks"].items()}}
    preset = {} if stage is None else STAGES[stage]
    config = PretrainConfig(**{**preset, **general, **own, **options, "stage": stage})
    problems += value_problems(config, LIMITS) + [text for holds, text in _rules(config) if not holds]
    if config.distill is not None:
        distill_options(config.distill, problems)
    if problems:
        raise ConfigError(problems)
    return config


def _section(content: dict[str, Any], number: int | str, problems: list[str]) -> Mapping[str, Any]:
    section = content.pop(f"stage_{number}", {})
    if isinstance(section, Mapping) and "stage" not in section:
        return section
    what = "it cannot set stage" if isinstance(section, Mapping) else f"found {type(section).__name__}"
    problems.append(f"stage_{number}: expected a mapping of options; {what}")
    return {}


def _rules(config: PretrainConfig) -> list[tuple[bool, str]]:
    """(holds, what is wrong otherwise)."""
    return [
        (config.model is not None, "give model: a folder, or builtin:tiny_covo_audio to try it out"),
        (bool(config.tasks), "give tasks, or a stage, which has some"),
        (bool(config.train_parts), "train_parts is empty: nothing would train"),
        *((part in PARTS, f"train_parts {part!r}: there are {', '.join(PARTS)}") for part in config.train_parts),
        (config.distill is None or not {"llm", "lm_head"}.isdisjoint(config.train_parts),
         f"distill teaches text, and {', '.join(config.train_parts)} cannot learn it: train llm or lm_head"),
        (config.warmup_steps < config.steps,
         f"warmup_steps {config.warmup_steps} of steps {config.steps}: the rate would never reach its peak; set both"),
        (config.final_learning_rate == type(config)().final_learning_rate or config.lr_scheduler_type == FLOORED_COSINE,
         f"final_learning_rate is an option of {FLOORED_COSINE}, not of {config.lr_scheduler_type}"),
        (not config.eval_every or bool(config.eval_tasks), "eval_every needs eval_tasks"),
        (all(name in DUPLEX_KINDS and type(weight) in (int, float) and 0 < weight < inf
             for name, weight in (config.duplex_weights or {}).items()),
         f"duplex_weights {config.duplex_weights!r:.80}: expected numbers above 0, of {', '.join(DUPLEX_KINDS)}"),
        (not (config.resume and config.overwrite), "resume goes on, overwrite begins again: give one of them"),
    ]  # fmt: skip
