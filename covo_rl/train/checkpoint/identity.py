"""What a resumed run must have in common with its checkpoint: options, rows with all they hold, rewards, base model."""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from covo_rl.audio import AudioError, content_key
from covo_rl.config import ConfigError, Options
from covo_rl.data.files import file_sha256, plain
from covo_rl.models import family_fingerprint
from covo_rl.policy.sharding import is_sharded
from covo_rl.rewards import components
from covo_rl.types import Clip, Example

#: options that change nothing about the training itself; data files are compared by content, not by path
FREE = frozenset(
    """
    output resume checkpoint_every checkpoint_minutes keep_last keep_best export_checkpoints allow_changed_config
    allow_overlap allow_outside_audio dry_run log_rollouts log_token_logps oom_retry check_rewards reward_timeout
    evaluate eval_every eval_set eval_num_generations eval_batch_size data audio_dir eval_data eval_audio_dir
    eval_columns eval_limit feature_memory_mb overwrite listen_every listen_rows report_to project run_name
    trackio_space_id vllm_server_base_url vllm_server_timeout vllm_gpu_memory_utilization vllm_enable_sleep_mode
    vllm_adapter_transport speech_decoder vllm_adapter_dir engine_probe_tolerance engine_patience failed_groups_limit
    sft_data rl_data test_data
    """.split()  # noqa: SIM905 - a list of 25 quoted words is harder to read
)
#: options that change only how the same gradient is computed: a resume is right, but not bit for bit
ROUNDING = frozenset(
    """
    micro_batch_prompts micro_batch_rollouts gradient_checkpointing recompute shared_decode decode_rows
    attn_implementation vllm_mode vllm_tensor_parallel_size vllm_max_model_length vllm_options
    """.split()  # noqa: SIM905
)
#: options of the update alone: they can change in the middle of a generated batch, whose rollouts do not depend on them
UPDATE = frozenset(
    """
    learning_rate part_learning_rates lr_scheduler_type warmup_steps weight_decay adam_beta1 adam_beta2 max_grad_norm
    max_steps num_iterations
    """.split()  # noqa: SIM905
)
#: what only the start of a run brings into force, so that a changed value would be announced and do nothing
BEGINNING = {
    r"seed:": "the order of the rows hangs on it",
    r"adapter:": "its weights were the start, the checkpoint's go on",
    r"training data: \d": "the position in an epoch has no meaning in another number of rows",
}


def data_fingerprint(examples: Sequence[Example], key: Callable[[Clip], str] = content_key) -> dict[str, Any]:
    """Number of rows and a sha256 each over their text, their clips' content and each of their columns, in order.

    `key` names the content of a clip; `ClipStore.key` knows those that it has named.
    """
    digests: dict[str, Any] = defaultdict(hashlib.sha256)
    names = {f"column {name}" for row in examples for name in row.columns}
    for row in examples:
        parts = {f"column {name}": value for name, value in row.columns.items()}
        text = [row.id, row.question, row.choices, row.answer, *([row.system] if row.system else [])]
        parts |= {"text": text, "audio": [_sound(c, key) for c in row.clips]}
        for name in {"text", "audio", *names}:  # a column that a row lacks counts as null
            digests[name].update(json.dumps(plain(parts.get(name)), sort_keys=True).encode() + b"\n")
    return {"rows": len(examples), "sha256": {name: digests[name].hexdigest() for name in sorted(digests)}}


def rows_sha256(examples: Sequence[Example], key: Callable[[Clip], str] = content_key) -> str:
    """One sha256 over all that `data_fingerprint` says: what a record calls rows that no file holds."""
    content = json.dumps(data_fingerprint(examples, key), sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _sound(clip: Clip, key: Callable[[Clip], str]) -> list[str]:
    """Name without folder, and content; a clip that cannot be read is skipped and counted by the training."""
    try:
        return [clip.name.rsplit("/", 1)[-1], key(clip)]
    except AudioError:
        return [clip.name.rsplit("/", 1)[-1], "cannot be read"]


def reward_fingerprint(rewards: Any) -> dict[str, str]:
    """sha256 of the file of each reward that is given by name and written in Python, of functions of their source."""
    return {term.name: digest for term in components(rewards) if (digest := term.reward.sha256)}


def base_fingerprint(model: nn.Module) -> str | None:
    """sha256 over the sums of the frozen parameters' bits, which no order of summing changes; None where sharded."""
    if is_sharded(model):
        return None
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[parameter.element_size()]
            bits = parameter.detach().contiguous().view(integers).sum(dtype=torch.int64)
            digest.update(f"{name} {tuple(parameter.shape)} {int(bits)}\n".encode())
    return digest.hexdigest()


def adapter_fingerprint(folder: str | None) -> dict[str, str]:
    """sha256 of the files of the adapter that a run starts from; empty where there is none here."""
    return {path.name: file_sha256(path) for path in sorted(Path(folder).glob("adapter_*"))} if folder else {}


def run_contents(
    options: Options, rows: Sequence[Example], policy: nn.Module, key: Callable[[Clip], str] = content_key
) -> dict[str, Any]:
    """What a checkpoint says of its run beside the options, by content."""
    return {
        "data": data_fingerprint(rows, key),
        "rewards": reward_fingerprint(options.reward.rewards),
        "base": base_fingerprint(policy),
        "adapter": adapter_fingerprint(options.adapter.adapter),
        "family": family_fingerprint(options.model.family),
    }


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """`config` and `run_contents` of a checkpoint against the run's; an adapter, and with its folder a model that the
    run made, may lie elsewhere.

    Returns:
        (changes that alter the training, changes of its rounding only), one readable line each.
    """
    serious, rounding = [], []
    defaults = Options().flat()  # of options that are newer than the checkpoint
    moved = {"adapter"} if saved.get("adapter") and saved["adapter"] == now.get("adapter") else set()
    if (place := _own_model(saved["config"])) and place == _own_model(now["config"]):
        moved.add("model")
    for name in sorted({*saved["config"], *now["config"]} - FREE - moved):
        before, after = saved["config"].get(name, defaults.get(name)), now["config"].get(name)
        if before != after:
            (rounding if name in ROUNDING else serious).append(f"{name}: {before!r} in the checkpoint, {after!r} now")
    before, after = saved["data"], now["data"]
    if before["rows"] != after["rows"]:
        serious.append(f"training data: {before['rows']} rows in the checkpoint, {after['rows']} now")
    elif parts := _changed(before["sha256"], after["sha256"]):
        what = "as many rows as in the checkpoint, but their content or order has changed"
        serious.append(f"training data: {what} ({parts})")
    if "rewards" in now and (names := _changed(saved["rewards"], now["rewards"])):
        serious.append(f"rewards: the file has changed ({names})")
    if "family" in now and (names := _changed(saved.get("family", {}), now["family"])):
        serious.append(f"family: its file has changed ({names})")
    if None not in (bases := [side.get("base") for side in (saved, now)]) and bases[0] != bases[1]:
        serious.append("base model: its frozen weights are others than in the checkpoint's run")
    return serious, rounding


def _own_model(config: Mapping[str, Any]) -> Path | None:
    """Where in its run folder a model lies that the run made; None of any other."""
    model, output = Path(str(config.get("model"))), Path(str(config.get("output", "")))
    return model.relative_to(output) if output.parts and model.is_relative_to(output) else None


def _changed(before: Mapping[str, str], after: Mapping[str, str]) -> str:
    return ", ".join(name for name in sorted({*before, *after}) if before.get(name) != after.get(name))


def check_changes(serious: Sequence[str], *, allowed: bool, mid_batch: bool) -> None:
    """Raise ConfigError unless every change is allowed and will be in force."""
    problems = [f"{line}: {why}" for line in serious for start, why in BEGINNING.items() if re.match(start, line)]
    if problems:
        raise ConfigError([*problems, "a resumed run cannot change that: undo it, or choose another --output"])
    if serious and not allowed:
        raise ConfigError([*serious, "the run differs from its checkpoint: undo that, choose another --output, "
                                     "or pass --allow_changed_config"])  # fmt: skip
    if mid_batch and (late := [line for line in serious if line.partition(":")[0] not in UPDATE]):
        raise ConfigError([*late, "the checkpoint was saved in the middle of a generated batch, for which that comes "
                                  "too late: name a checkpoint without a dot with --resume PATH"])  # fmt: skip
