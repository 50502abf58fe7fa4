"""Does an export do what the trained policy does, when someone else loads it?

A fresh process loads the folder with plain transformers and PEFT (`fresh.py`) and computes logits on stored prompts
with audio; `judge.py` compares them with those of the policy that was trained, and of the base model.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from covo_rl.export.errors import ExportError
from covo_rl.export.judge import Expected, Target, Verification, judge

if TYPE_CHECKING:
    from covo_rl.audio import ClipStore
    from covo_rl.models.base import AudioFamily
    from covo_rl.policy.trainable import Trainable
    from covo_rl.types import Prompt

KEEP = 8  # last positions compared: each of them has heard all the audio
FRESH_TIMEOUT = 3600.0


# -- what the trained policy says --------------------------------------------------------------------------------


def synthetic_prompts(family: AudioFamily, clips: ClipStore) -> list[Prompt]:
    """Two fixed questions with sound that needs no data set: a rising tone, and noise that fades."""
    from covo_rl.config import PromptConfig
    from covo_rl.prompt import build_prompt
    from covo_rl.types import Clip, Example

    rate = 16000
    t = np.arange(2 * rate) / rate
    rising = 0.3 * np.sin(2 * np.pi * (200 + 400 * t) * t)
    fading = 0.2 * np.random.default_rng(0).standard_normal(t.size) * np.linspace(1, 0, t.size)
    rows = [
        Example("export-tone", (Clip(array=rising.astype(np.float32), sampling_rate=rate),),
                "Which sound do you hear?", ("a rising tone", "noise that fades")),
        Example("export-noise", (Clip(array=fading.astype(np.float32), sampling_rate=rate),),
                "Does the sound get louder or softer?", ("louder", "softer")),
    ]  # fmt: skip
    return [build_prompt(row, family, clips, PromptConfig()) for row in rows]


def inputs_of(prompt: Prompt, family: AudioFamily, clips: ClipStore) -> dict[str, torch.Tensor]:
    """The plain model's inputs for one prompt: ids, mask, and the processor's audio tensors (rows of all clips)."""
    ids = torch.tensor([prompt.input_ids])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    features = [family.clip_features(*clips.waveform(key)) for key in prompt.clip_keys]
    for name in features[0].tensors if features else ():
        inputs[name] = torch.cat([clip.tensors[name] for clip in features]).contiguous()
    return inputs


@torch.no_grad()
def policy_logits(prompt: Prompt, family: AudioFamily, clips: ClipStore) -> torch.Tensor:
    """Logits (KEEP, V) float32 at the last prompt positions, the way rollouts and scoring compute them."""
    device: Any = family.embed_tokens.weight.device
    ids = torch.tensor([prompt.input_ids], device=device)
    embeds = family.embed_tokens(ids)
    if prompt.clip_keys:
        audio = family.encode([family.clip_features(*clips.waveform(key)) for key in prompt.clip_keys])
        slots = (ids == family.audio_token_id)[..., None]
        embeds = embeds.masked_scatter(slots, torch.cat(audio).to(embeds))
    hidden = family.decoder(
        inputs_embeds=embeds, attention_mask=torch.ones_like(ids), use_cache=False
    ).last_hidden_state
    return family.lm_head(hidden[0, -KEEP:]).float().cpu()


def expect(modes: Trainable, prompts: Sequence[Prompt], clips: ClipStore) -> Expected:
    """Ask the policy in memory, with dropout off and with the adapter on and off.

    Raises:
        ExportError: no prompt carries audio.
    """
    if not any(prompt.clip_keys for prompt in prompts):
        raise ExportError("verification needs at least one prompt with audio")
    family = modes.family
    was_training = family.model.training
    family.model.eval()
    try:
        trained = [policy_logits(prompt, family, clips) for prompt in prompts]
        base = None
        if modes.peft_model is not None:
            with modes.peft_model.disable_adapter():
                base = [policy_logits(prompt, family, clips) for prompt in prompts]
    finally:
        family.model.train(was_training)
    return Expected(
        [inputs_of(prompt, family, clips) for prompt in prompts],
        trained,
        base,
        [prompt.example.id for prompt in prompts],
        [[dict(message) for message in prompt.messages] for prompt in prompts],
        [prompt.text for prompt in prompts],
    )


# -- the fresh process -------------------------------------------------------------------------------------------


def _needs_covo_rl(family: AudioFamily) -> bool:
    return type(family.model).__module__.partition(".")[0] == "covo_rl"


def _device(family: AudioFamily) -> str:
    """The policy's device where it has room for a second copy, else the CPU."""
    device = next(family.model.parameters()).device
    if device.type != "cuda":
        return "cpu"
    size = sum(p.numel() * p.element_size() for p in family.model.parameters())
    return str(device) if torch.cuda.mem_get_info(device)[0] > 1.3 * size else "cpu"


def run_fresh(
    family: AudioFamily, base: str, targets: Sequence[Target], expected: Expected, *, load_kwargs: dict | None = None
) -> tuple[dict[str, list[torch.Tensor]], dict[str, Any]]:
    """Logits by target name and `base.DTYPE`, and notes, from a process that starts from nothing.

    Families of transformers run isolated (`python -I`) with covo_rl forbidden.

    Raises:
        ExportError: the process failed; the message ends with what it printed.
    """
    from safetensors.torch import load_file, save_file

    own = _needs_covo_rl(family)
    kind = type(family.model)
    with tempfile.TemporaryDirectory(prefix="covo-rl-verify-") as scratch:
        work = Path(scratch)
        flat = {f"{i}.{name}": t for i, inputs in enumerate(expected.inputs) for name, t in inputs.items()}
        save_file(flat, work / "prompts.safetensors")
        spec = {
            "imports": [kind.__module__.rsplit(".", 1)[0]] if own else [],
            "forbid": [] if own else ["covo_rl"],
            "model_class": f"{kind.__module__ if own else 'transformers'}:{kind.__name__}",
            "base": base,
            "device": _device(family),
            "keep": KEEP,
            "load_kwargs": load_kwargs or {},
            "prompts": str(work / "prompts.safetensors"),
            "output": str(work / "logits.safetensors"),
            "notes": str(work / "notes.json"),
            "targets": [
                {"name": t.name, "kind": t.kind, "folder": str(t.folder.resolve()), "dtype": t.dtype,
                 "messages": expected.messages if t.kind == "merged" else None}
                for t in targets
            ],
        }  # fmt: skip
        (work / "spec.json").write_text(json.dumps(spec), encoding="utf-8")
        script = Path(__file__).with_name("fresh.py")
        command = [sys.executable, *([] if own else ["-I"]), str(script), str(work / "spec.json")]
        _run(command, own)
        logits = load_file(work / "logits.safetensors")
        notes = json.loads((work / "notes.json").read_text(encoding="utf-8"))
    names = {name.rsplit(".", 1)[0] for name in logits}
    return {n: [logits[f"{n}.{i}"] for i in range(len(expected.inputs))] for n in names}, notes


def _run(command: list[str], own: bool) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_"))}
    environment["TOKENIZERS_PARALLELISM"] = "false"
    if own:  # a checkout that was not installed is found as well
        package = str(Path(__file__).resolve().parents[2])
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=FRESH_TIMEOUT, check=False, cwd=os.sep
    )
    if done.returncode:
        tail = "\n".join((done.stderr or done.stdout).splitlines()[-15:])
        raise ExportError(f"the export does not load in a fresh process (exit code {done.returncode}):\n{tail}")


def verify(
    modes: Trainable,
    targets: Sequence[Target],
    expected: Expected,
    *,
    base: str,
    base_model: str | None = None,
    allow_noop: bool = False,
) -> dict[str, Verification]:
    """Check all targets in one fresh process; the results by target name, failed or not.

    `base` is where the fresh process loads the base model; `base_model` what the records call it.
    """
    start = time.perf_counter()
    logits, notes = run_fresh(modes.family, base, targets, expected)
    dtype = str(next(modes.family.model.parameters()).dtype).removeprefix("torch.")
    results = {
        t.name: judge(t, expected, logits, notes, base_model=base_model or base, allow_noop=allow_noop,
                      trained_dtype=dtype)
        for t in targets
    }  # fmt: skip
    for result in results.values():
        result.seconds = round(time.perf_counter() - start, 2)
    return results
