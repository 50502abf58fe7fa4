"""Are the weights of a model those of its files: all of them, of the right shapes, and finite?"""

from __future__ import annotations

from collections.abc import Iterable
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError

from covo_rl.data.noise import quiet, quiet_bars
from covo_rl.types import UserError


class WeightsError(UserError, OSError):
    """A checkpoint or adapter is incomplete or damaged; the message names tensors."""


def load_whole(model_class: Any, path: str, **options: Any) -> Any:
    """`model_class.from_pretrained(path)`, whose every tensor came from the files, finite.

    transformers warns of tensors in the files that the model has no place for.

    Raises:
        WeightsError: files or tensors are missing (they would be random), of another shape, or hold NaN or infinities.
    """
    quiet()  # for programs and notebooks; commands have called it
    quiet_bars()
    try:
        model, report = model_class.from_pretrained(
            path, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except (SafetensorError, UnpicklingError, EOFError, OSError, TypeError) as error:  # TypeError: a strange index
        text = str(error).strip().split("\n", 1)[0] or type(error).__name__
        raise WeightsError(f"{path}: its weights cannot be read: {text}. Is the download complete?") from error
    shapes = [f"{name} ({tuple(saved)} in the file, {tuple(ours)} in the model)"
              for name, saved, ours in sorted(report["mismatched_keys"])]  # fmt: skip
    mismatched = {name for name, *_ in report["mismatched_keys"]}
    problems = [
        f"{what}: {_shown(names)}"
        for what, names in (
            ("missing in the checkpoint, they would be random", sorted(set(report["missing_keys"]) - mismatched)),
            ("of another shape than config.json says", shapes),
        )
        if names
    ]
    if problems:
        raise WeightsError(f"{path}: tensors {'; tensors '.join(problems)}. Is the download complete?")
    check_finite(model.named_parameters(), path)
    return model


def check_finite(tensors: Iterable[tuple[str, torch.Tensor]], where: str) -> None:
    """Raise WeightsError that names the floating-point tensors with NaN or infinities, and how they are held."""
    broken = [f"{name} ({str(value.dtype).removeprefix('torch.')})" for name, value in tensors if not _finite(value)]
    if broken:
        raise WeightsError(
            f"{where}: NaN or infinite numbers in {_shown(broken)}. The file is damaged, its training diverged, or the "
            "dtype is too narrow for its values (float16 ends at 65,504)"
        )


@torch.no_grad()
def _finite(value: torch.Tensor) -> bool:
    if not value.is_floating_point() or value.is_meta:
        return True
    # one sum is quicker than a mask of the tensor's size; it may overflow where no number does
    return bool(torch.isfinite(value.sum(dtype=torch.float32))) or bool(torch.isfinite(value).all())


def _shown(names: list[str]) -> str:
    return f"{len(names)} ({', '.join(names[:5])}{', ...' if names[5:] else ''})"
