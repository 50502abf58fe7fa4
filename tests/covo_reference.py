"""The reference case of Covo-Audio: tiny weights drawn from a seed, recorded audio tensors, and a model put together
from transformers' own parts.

The recorded tensors (log-mel, encoder states, audio features) come from the published code run in float32 on a CPU.
All weights but the last adapter layer, which was rescaled after drawing, are reproduced by one generator over the
parameters in order. The ids of the prompt and of the response are drawn too: they say nothing.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from covo_rl.models.covo_audio import CovoAudioConfig, CovoAudioForConditionalGeneration

FOLDER = Path(__file__).parent / "fixtures" / "covo_audio"
SEED = 20260210
IDS_SEED = 11  # one of few with which every penalty changes the tokens
PROMPT = 176
SLOT, CODE_0 = 151666, 151671


@cache
def case_a() -> dict[str, np.ndarray]:
    with np.load(FOLDER / "case_a.npz") as data:
        return {name: data[name] for name in data.files}


def read_json(name: str):
    return json.loads((FOLDER / name).read_text())


def drawn_ids() -> tuple[list[int], list[int]]:
    """Prompt: system turn of 141 drawn ids, user turn of 20 audio slots. Response: 9 drawn ids around 40 codes, end."""
    rng = np.random.default_rng(IDS_SEED)
    system = rng.integers(1000, 150_000, 141).tolist()
    user = [151645, 198, 151644, 872, 198, 151665, *[SLOT] * 20, 151667, 151645, 198, 151644, 77091, 198]
    text = rng.integers(1000, 150_000, 9).tolist()
    codes = [i for i in case_a()["response_ids"].tolist() if i >= CODE_0]
    return [151644, 8948, 198, *system, *user], [*text[:5], *codes[:15], *text[5:], *codes[15:], 151645]


class Reference(nn.Module):
    """Covo-Audio written down for one clip of one segment: no cache, no batch, nothing of ours but the weights."""

    def __init__(self) -> None:
        super().__init__()
        config = read_json("config.json")
        self.encoder = WhisperEncoder(WhisperConfig(**config["encoder_config"]))
        self.llm = Qwen2ForCausalLM(Qwen2Config(**config["llm_config"]))
        stages = [
            nn.ModuleDict({"conv1d": nn.Conv1d(32, 32, 3, 2, 1), "linear1": nn.Linear(32, 2048), "linear2": last})
            for last in (nn.Linear(2048, 32), nn.Linear(2048, 32), nn.Linear(2048, 16))
        ]
        self.audio_adapter = nn.ModuleDict({"downsample_layers": nn.ModuleList(stages)})
        self.load_state_dict(weights())
        self.eval()

    def features(self, mel: torch.Tensor) -> torch.Tensor:
        """Log-mel (1, M, F) -> the 20 rows (20, D) that fill the slots of 3.2 s."""
        hidden = self.encoder(mel).last_hidden_state
        for stage in self.audio_adapter["downsample_layers"]:
            hidden = stage["conv1d"](hidden.transpose(1, 2)).transpose(1, 2).relu()
            hidden = stage["linear2"](stage["linear1"](hidden).relu())
        return hidden[0, :20]

    def logits(self, ids: list[int], features: torch.Tensor, last: int = 0) -> torch.Tensor:
        """(T, V), or of the `last` positions alone."""
        embedded = self.llm.get_input_embeddings()(torch.tensor(ids)).clone()
        embedded[torch.tensor(ids) == SLOT] = features
        return self.llm(inputs_embeds=embedded[None], logits_to_keep=last).logits[0]

    @torch.no_grad()
    def greedy(self, ids: list[int], features: torch.Tensor, count: int, *penalties) -> tuple[list[int], torch.Tensor]:
        """The next `count` ids and their scores (count, V); each of `penalties(ids (1, T), scores (1, V))` in turn."""
        sequence, steps = list(ids), []
        for _ in range(count):
            scores = self.logits(sequence, features, last=1)
            for penalty in penalties:
                scores = penalty(torch.tensor([sequence]), scores)
            sequence.append(int(scores.argmax()))
            steps.append(scores[0])
        return sequence[len(ids) :], torch.stack(steps)


@cache
def reference() -> Reference:
    return Reference()


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
