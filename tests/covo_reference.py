"""The reference case of Covo-Audio: tiny weights drawn from the seed they were made with, and recorded outputs.

The recorded tensors come from the published code run in float32 on a CPU. All weights but the last adapter layer,
which was rescaled after drawing, are reproduced by one generator over the parameters in order.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from covo_rl.models.covo_audio import CovoAudioConfig, CovoAudioForConditionalGeneration

FOLDER = Path(__file__).parent / "fixtures" / "covo_audio"
SEED = 20260210
PROMPT = 176


@cache
def case_a() -> dict[str, np.ndarray]:
    with np.load(FOLDER / "case_a.npz") as data:
        return {name: data[name] for name in data.files}


def read_json(name: str):
    return json.loads((FOLDER / name).read_text())


@cache
def weights() -> dict[str, torch.Tensor]:
    """Tensors under the published keys."""
    config = CovoAudioConfig(**read_json("config.json"))
    blank = CovoAudioForConditionalGeneration(config).state_dict()
    generator = torch.Generator().manual_seed(SEED)
    drawn = {}
    for name, tensor in blank.items():
        if name == "encoder.embed_positions.weight":
            drawn[name] = tensor.clone()  # sinusoids
            continue
        normal = torch.randn(tensor.shape, generator=generator)
        drawn[name] = _scaled(name, normal)
    last = "audio_adapter.downsample_layers.2.linear2."
    drawn[last + "weight"] = torch.from_numpy(case_a()["adapter_last_weight"])
    drawn[last + "bias"] = torch.from_numpy(case_a()["adapter_last_bias"])
    return drawn


def _scaled(name: str, normal: torch.Tensor) -> torch.Tensor:
    if name.endswith("bias"):
        return 0.02 * normal
    if normal.ndim == 1:
        return 1 + 0.1 * normal
    if name == "llm.model.embed_tokens.weight":
        return normal
    if name == "llm.lm_head.weight":
        return 0.7 * normal
    gain = 1.3
    if name.startswith("encoder.conv"):
        gain = 6.0
    elif name.startswith("audio_adapter"):
        gain = 1.45
    elif any(part in name for part in (".q_proj.", ".k_proj.", ".v_proj.", ".o_proj.")):
        gain = 2.0
    return gain / normal[0].numel() ** 0.5 * normal


def write_checkpoint(folder: Path) -> Path:
    """A folder like the published one: config.json and two safetensors shards."""
    names = list(weights())
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    halves = [names[: len(names) // 2], names[len(names) // 2 :]]
    for file, half in zip(files, halves, strict=True):
        save_file({name: weights()[name].contiguous() for name in half}, folder / file, metadata={"format": "pt"})
    index = {name: file for file, half in zip(files, halves, strict=True) for name in half}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "config.json").write_text((FOLDER / "config.json").read_text())
    return folder
