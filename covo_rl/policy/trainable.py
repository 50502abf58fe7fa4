"""What trains: LoRA on the decoder, LoRA with whole parts beside it, or the parameters of chosen parts.

Beside new LoRA the single rows of embeddings and head train that the family names (`trained_rows`).

Adapters are injected in place (PEFT), so `family.model` stays the model; nothing else keeps `requires_grad`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from covo_rl.config import AdapterConfig, number_map
from covo_rl.data.files import read_record
from covo_rl.models import checkpoint_dtype
from covo_rl.models.quantised import element_count
from covo_rl.policy import patterns
from covo_rl.policy.patterns import PatternError, check_parts, part_of, prefixes
from covo_rl.policy.products import HALF
from covo_rl.policy.saved_adapter import SavedAdapter, kind_of, put_on, read_adapter

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from rich.table import Table

    from covo_rl.models.base import AudioFamily


@dataclass(frozen=True)
class ReportRow:
    """One line of the table before training: the parameters of a part that are held the same way."""

    module: str
    parameters: int
    trainable: int
    dtype: str
    learning_rate: float | None


@dataclass(frozen=True)
class Trainable:
    """A family made ready to train. `peft_model` is None in full mode; `notes` are things the user should know.

    `replaced` names the base's own parameters that a saved adapter brought with it (embeddings, biases): with the
    adapter off they stay as the adapter has them.
    """

    family: AudioFamily
    config: AdapterConfig
    peft_model: PeftModel | None
    report: tuple[ReportRow, ...]
    trainable_parameters: int
    targets: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()


def auto_dtype(own: str | None, *, full: bool) -> str | None:
    """What `dtype: auto` loads a checkpoint in that says `own`: see `training_dtype`."""
    return "float32" if own == "float16" or (full and own == "bfloat16") else own


def training_dtype(dtype: str, path: str, *, full: bool) -> tuple[str, list[str]]:
    """(the dtype to load a model in that will train, notes for the user), before any weight is read.

    `auto` is the checkpoint's, but float32 where parameters of 16 bits would themselves train (`full`), and for
    float16 checkpoints.
    """
    own = checkpoint_dtype(path)
    if dtype == "auto" and auto_dtype(own, full=full) != own:
        why = "of 16-bit weights updates below 1/256 of a weight are lost" if full else "in float16 gradients vanish"
        return "float32", [f"dtype auto: the checkpoint is {own}, loaded as float32, because {why}; compute in 16 bits "
                           "with accelerate launch --mixed_precision bf16 (GPU)"]  # fmt: skip
    return dtype, []


def make_trainable(family: AudioFamily, config: AdapterConfig, *, learning_rate: float | None = None) -> Trainable:
    """Freeze everything, then make trainable what `config` asks for.

    LoRA parameters are float32 even on a 16-bit base. `learning_rate` only fills the report. Raises PatternError for a
    pattern or part that matches nothing or reaches the encoder unasked, AdapterError where `config.adapter` is no
    LoRA adapter of this model, WeightsError where it holds NaN or infinities.
    """
    part_rates(config, family)  # a wrong part name is an error now, not at the optimiser
    quantised = bool(getattr(family.model, "is_loaded_in_4bit", False))
    if config.load_in_4bit and not quantised:
        raise PatternError(
            "load_in_4bit: the model in memory is not quantised; load it with "
            "covo_rl.models.load_family(path, load_in_4bit=True)"
        )
    if quantised and not config.lora:
        raise PatternError("a 4-bit model cannot train its own parameters: use LoRA, or load it unquantised for --full")
    family.model.requires_grad_(False)
    peft_model, targets, notes, replaced = None, (), [], ()
    if not config.lora:
        _train_parts(family, config.train_parts)
    elif config.adapter:
        adapter = read_adapter(config.adapter, model=family.model.name_or_path)
        peft_model, replaced = put_on(family, adapter)
        notes += [*adapter.notes, *_overruled(config, adapter.config), *_untrained_rows(family, adapter)]
        if not quantised and read_record(adapter.folder / "export.json").get("load_in_4bit"):
            notes.append(f"adapter {config.adapter}: it was trained on a 4-bit base, and is put on one that is not; "
                         "load_in_4bit holds this one so too")  # fmt: skip
    else:
        peft_model, targets = _new_adapter(family, config)
    count = sum(p.numel() for p in family.model.parameters() if p.requires_grad)
    if not count:
        raise PatternError("nothing trains: set lora, modules_to_save or train_parts")
    if any(p.requires_grad and p.dtype in HALF for p in family.model.parameters()):
        notes.append("some trained weights are 16-bit: updates below 1/256 of a weight are lost; load dtype float32 "
                     "and let accelerate autocast (mixed_precision bf16)")  # fmt: skip
    if config.lora and config.lora_dropout:
        notes.append("LoRA dropout is off while sampling and scoring, so that they agree")
    report = _report(family, config, learning_rate)
    return Trainable(family, config, peft_model, report, count, targets, tuple(notes), replaced)


def _overruled(config: AdapterConfig, saved: LoraConfig) -> list[str]:
    """A line where options that shape a new adapter differ from the saved one that is trained instead."""
    names = {"lora_r": "r", "lora_alpha": "lora_alpha", "use_rslora": "use_rslora", "use_dora": "use_dora"}
    options = [f"{name} {getattr(config, name)} (its own: {getattr(saved, own)})" for name, own in names.items()
               if getattr(config, name) not in (getattr(AdapterConfig, name), getattr(saved, own))]  # fmt: skip
    options += [name for name in ("lora_target_modules", "modules_to_save") if getattr(config, name)]
    return [f"adapter {config.adapter} stays as it was made; no effect have {', '.join(options)}"] if options else []


def _untrained_rows(family: AudioFamily, adapter: SavedAdapter) -> list[str]:
    """A line where the adapter has nothing of rows that the model's training is about."""
    there = {path for key in adapter.tensors for path in family.trained_rows if f".{path}." in key}
    if not (absent := sorted(set(family.trained_rows) - there)):
        return []
    ids = ", ".join(map(str, next(iter(family.trained_rows.values()))))
    return [f"adapter {adapter.folder}: it leaves rows {ids} of {' and '.join(absent)} as the model has them, and does "
            "not train them; merge it (covo-rl export --merged), and a new adapter will"]  # fmt: skip


def _rows_beside(family: AudioFamily, targets: Sequence[str], saved: Sequence[str]) -> Mapping[str, list[int]]:
    """The family's rows, without those of modules that train as a whole, or that LoRA was told to adapt."""
    names = [name for name, _ in family.model.named_modules()]
    elsewhere = [name for name in names if name in targets or any(name.endswith(ending) for ending in saved)]
    return {path: ids for path, ids in family.trained_rows.items() if not any(n.endswith(path) for n in elsewhere)}


def _new_adapter(family: AudioFamily, config: AdapterConfig) -> tuple[PeftModel, tuple[str, ...]]:
    from peft import LoraConfig

    from covo_rl.policy.lora import adapted_modules, inject

    pattern = config.lora_target_modules
    targets = patterns.matched_modules(pattern, family) if pattern else patterns.decoder_linears(family)
    alpha: Any = config.lora_alpha  # PEFT multiplies, a float is fine
    saved = patterns.saved_modules(config.modules_to_save, family)
    rows: Any = _rows_beside(family, targets, saved)
    lora = LoraConfig(
        r=config.lora_r, lora_alpha=alpha, lora_dropout=config.lora_dropout, target_modules=targets,
        modules_to_save=saved or None, trainable_token_indices=rows or None,
        use_rslora=config.use_rslora, use_dora=config.use_dora, task_type="CAUSAL_LM",
    )  # fmt: skip
    model = inject(family.model, lora)
    adapted = adapted_modules(family.model)
    if set(adapted) != set(targets):
        missed, more = sorted(set(targets) - set(adapted)), sorted(set(adapted) - set(targets))
        shown = "; ".join(f"{what} {len(names)}, for example {names[0]!r}"
                          for what, names in (("left out", missed), ("also took", more)) if names)  # fmt: skip
        raise PatternError(
            f"LoRA was to adapt {len(targets)} modules of {family.model_type}, and PEFT {shown}. A module that "
            "modules_to_save trains in full takes no LoRA, nor can PEFT adapt router, gate_proj, up_proj and down_proj "
            "of a mixture of experts; narrow lora_target_modules"
        )
    return model, tuple(targets)


def _train_parts(family: AudioFamily, parts: Sequence[str]) -> None:
    check_parts(parts, family, "train_parts")
    empty = set(parts)
    for name, parameter in family.model.named_parameters(remove_duplicate=False):
        if (part := part_of(name, family)) in parts and parameter.is_floating_point():
            parameter.requires_grad_(True)
            empty.discard(part)
    if empty:
        raise PatternError(
            f"train_parts {', '.join(sorted(empty))}: no parameter of {family.model_type} starts with "
            f"{', '.join(prefixes(family)[part] for part in sorted(empty))}"
        )


def part_rates(config: AdapterConfig, family: AudioFamily) -> dict[str, float]:
    """Part -> learning rate, for the parts that `part_learning_rates` names."""
    rates = number_map(config.part_learning_rates, what="part_learning_rates")
    check_parts(rates, family, "part_learning_rates")
    return rates


def adamw(params: Sequence[Any], **options: Any) -> torch.optim.AdamW:
    """AdamW over parameters or groups of them: one kernel where all are on CUDA; elsewhere torch's default."""
    parts = [p for part in params for p in (part["params"] if isinstance(part, dict) else [part])]
    return torch.optim.AdamW(params, fused=True if all(p.is_cuda for p in parts) else None, **options)


def param_groups(
    model: nn.Module, config: AdapterConfig, base_lr: float, weight_decay: float, *, family: AudioFamily
) -> list[dict[str, Any]]:
    """Optimiser groups of `model`'s trainable parameters: one per part and decay.

    `model` may wrap `family.model` in any way that keeps the parameters. Parameters with one axis (norms, biases,
    DoRA magnitudes) are not decayed. A LoRA parameter has the rate of the part that it adapts. Raises PatternError for
    a part with a rate of its own in which nothing trains.
    """
    rates = part_rates(config, family)
    parts = {id(p): part_of(name, family) for name, p in family.model.named_parameters(remove_duplicate=False)}
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            key = (parts.get(id(parameter), "other"), parameter.ndim > 1)
            groups.setdefault(key, []).append(parameter)
    if idle := set(rates) - {part for part, _ in groups}:
        raise PatternError(
            f"part_learning_rates names {', '.join(sorted(idle))}, in which nothing trains; "
            f"training parts: {', '.join(sorted({part for part, _ in groups}))}"
        )
    return [
        {"name": part if decayed else f"{part} (no decay)", "params": params, "lr": rates.get(part, base_lr),
         "weight_decay": weight_decay if decayed else 0.0}
        for (part, decayed), params in groups.items()
    ]  # fmt: skip


def _report(family: AudioFamily, config: AdapterConfig, learning_rate: float | None) -> tuple[ReportRow, ...]:
    """Rows per part, with LoRA parameters and trained copies apart from the base."""
    rates = part_rates(config, family)
    groups: dict[tuple[str, str], list[nn.Parameter]] = {}
    for name, parameter in family.model.named_parameters():
        groups.setdefault((part_of(name, family), kind_of(name)), []).append(parameter)
    order = [*family.parts, "other"]
    rows = []
    for part, kind in sorted(groups, key=lambda key: (order.index(key[0]), key[1])):
        parameters = groups[part, kind]
        total = sum(map(element_count, parameters))
        trainable = sum(p.numel() for p in parameters if p.requires_grad)
        dtypes = sorted({getattr(p, "quant_type", None) or str(p.dtype).removeprefix("torch.") for p in parameters})
        rate = rates.get(part, learning_rate) if trainable else None
        rows.append(ReportRow(f"{part} {kind}".strip(), total, trainable, " ".join(dtypes), rate))
    return tuple(rows)


def render_report(rows: Sequence[ReportRow]) -> Table:
    """Rich table: module, parameters, trainable, dtype, learning rate, and the totals."""
    from rich.table import Table

    table = Table(title="what trains")
    table.add_column("module")
    for name in ("parameters", "trainable", "dtype", "learning rate"):
        table.add_column(name, justify="right")
    for row in rows:
        rate = "frozen" if not row.trainable else ("default" if row.learning_rate is None else f"{row.learning_rate:g}")
        table.add_row(row.module, f"{row.parameters:,}", f"{row.trainable:,}", row.dtype, rate,
                      style=None if row.trainable else "dim")  # fmt: skip
    total, trainable = sum(r.parameters for r in rows), sum(r.trainable for r in rows)
    table.add_section()
    table.add_row("total", f"{total:,}", f"{trainable:,}", "", f"{100 * trainable / max(total, 1):.3g} % trains")
    return table
