"""Tiny weights under the names of the published checkpoints, by the tables of tests/fixtures/published/NAME.json.

    {"source": "where the published names come from",
     "names": [[published, ours], ...],
     "config": {...}}

`ours` is a name in `model.state_dict()`. In both, `*` stands for the same text, the first star for the first and so
on, and the first line whose `ours` fits a name counts. Every name must have a line: ["*", "*"] says "as it is".
Stacked experts: a `#` in `published` is the number of the expert (the tensor's first axis), and names joined by " + "
share each expert's rows:

    ["thinker.model.layers.*.mlp.experts.#.gate_proj.weight + thinker.model.layers.*.mlp.experts.#.up_proj.weight",
     "model.language_model.layers.*.mlp.experts.gate_up_proj"]

`config` replaces the whole config.json by {"model_type": ..., ...} where the published one is another (the full Omni
model holds the thinker's as `thinker_config`); the string "$CONFIG" in it is where the tiny model's own goes. Without
it the tiny model's own is written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

FOLDER = Path(__file__).parent / "fixtures" / "published"


def tables() -> dict[str, dict[str, Any]]:
    """Family -> its table."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.json"))}


def published_name(name: str, names: list[list[str]]) -> str:
    """The published name, or pattern with `#`, of a tensor; raises KeyError where no line fits."""
    for published, ours in names:
        if match := re.fullmatch("(.+)".join(map(re.escape, ours.split("*"))), name):
            return " + ".join(_filled(part, match.groups()) for part in published.split(" + "))
    raise KeyError(f"no line of the table fits {name}")


def _filled(pattern: str, texts: tuple[str, ...]) -> str:
    first, *others = pattern.split("*")
    assert len(others) <= len(texts), f"{pattern} has more stars than its other side"
    return first + "".join(text + rest for text, rest in zip(texts, others, strict=False))


def published_tensors(name: str, tensor: torch.Tensor, names: list[list[str]]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of the published checkpoint that hold this one."""
    patterns = published_name(name, names).split(" + ")
    if "#" not in patterns[0]:
        assert len(patterns) == 1, f"{patterns}: only stacked experts are several tensors"
        yield patterns[0], tensor
        return
    for expert, rows in enumerate(tensor):
        for pattern, part in zip(patterns, rows.chunk(len(patterns)), strict=True):
            yield pattern.replace("#", str(expert)), part


def write_published(model: Any, processor: Any, table: dict[str, Any], folder: Path) -> dict[str, torch.Tensor]:
    """Write the model as its authors do; returns its tensors, by our names, tied ones once."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    ours = {name: tensor.clone() for name, tensor in model.state_dict().items() if name not in tied}
    pieces = [piece for name, tensor in ours.items() for piece in published_tensors(name, tensor, table["names"])]
    state = {name: tensor.contiguous() for name, tensor in pieces}
    assert len(state) == len(pieces), "two tensors have the same published name"
    model.config.architectures = [type(model).__name__]  # which servers go by
    model.config.save_pretrained(str(folder))
    own = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if (config := table.get("config")) is not None:
        text = json.dumps(config).replace('"$CONFIG"', json.dumps(own))
        (folder / "config.json").write_text(text, encoding="utf-8")
    if model.generation_config is not None:
        model.generation_config.save_pretrained(str(folder))
    processor.save_pretrained(str(folder))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return ours
