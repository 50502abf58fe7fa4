"""Does vLLM in the training process run the policy, and does a run stop where it does not? Run in an environment with
vLLM (make_env.sh makes one):

    VLLM_CPU_KVCACHE_SPACE=1 python tests/serving/rollouts_check.py covo_audio      # or qwen2_audio; exit code 0: yes

Trains a tiny model for a few steps, LoRA and all parameters, with weights moved further than any update would; then
puts in, one at a time, what goes wrong without a message elsewhere, and expects the next step to stop the run.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import vllm_check
from vllm_trainer import move, vllm_trainer

from covo_rl.config import Options
from covo_rl.engines import vllm_local
from covo_rl.engines.base import EngineError
from covo_rl.train.loop import Trainer

TOLERANCE = 1e-4  # float32 log-probs
PROMPTS = 6


def options(model: str, folder: Path, *, lora: bool) -> Options:
    made = Options()
    made.model.model, made.model.dtype, made.adapter.lora = model, "float32", lora
    made.adapter.train_parts = ["audio_adapter", "llm", "lm_head"]
    made.prompt.instruction, made.prompt.choice_style = "", "inline"
    made.rollout.num_generations, made.rollout.max_completion_length = 8, 24
    made.train.prompts_per_step, made.train.output, made.engine.use_vllm = PROMPTS, str(folder / "run"), True
    return made


def trainer(model: str, folder: Path, *, lora: bool) -> Trainer:
    """On the built-in questions, sampling with vLLM."""
    return vllm_trainer(options(model, folder, lora=lora), probe_apart=True)


def step(made: Trainer) -> dict[str, Any]:
    """One step after weights that moved."""
    move(made)
    return made.train_step()[0]


def sound(made: Trainer, what: str) -> bool:
    """Three steps are as they must be: log-probs, clips encoded, prompts shared."""
    rows = [step(made) for _ in range(3)]
    differences = [max(row["engine/max_abs"], row["engine/probe_abs"]) for row in rows]
    runs, hits = ([row[f"engine/{name}"] for row in rows] for name in ("encoder_runs", "prefix_hit_rate"))
    fine = max(differences) <= TOLERANCE and set(runs) == {PROMPTS} and min(hits) >= 0.6
    print(f"{what}: |engine - policy| {max(differences):.2g}, clips encoded {runs} of {PROMPTS} with "
          f"{8 * PROMPTS} rollouts, prefix hits {min(hits):.0%}: {'ok' if fine else 'FAILED'}", flush=True)  # fmt: skip
    return fine


def stops(made: Trainer, what: str, put_in: Callable[[], Any]) -> bool:
    """With the fault a step ends the run."""
    with put_in():
        try:
            step(made)
            message = ""
        except EngineError as error:
            message = str(error)
    fine = "does not run the policy" in message or "already" in message
    print(f"{what}: {message or 'the run went on'}: {'ok' if fine else 'FAILED'}", flush=True)
    return fine


def check(family: str, folder: Path) -> bool:
    model = "builtin:tiny"
    if family != "covo_audio":
        model = str(folder / "base")
        vllm_check.write_base(family, folder / "base")
    made = trainer(model, folder, lora=True)
    engine: Any = made.engine
    process = engine.process

    def again(name: str, number: int, path: str) -> Any:
        """What a loader does that keeps its number: vLLM has it already, and reads nothing."""
        from vllm.lora.request import LoRARequest

        request = LoRARequest("policy", 1 << 20, path)
        process.llm.llm_engine.add_lora(request)
        return request

    results = [sound(made, f"{family}, LoRA")]
    again("", 0, engine.adapter.lora_path)
    results += [
        stops(made, "a number of our own that is used again", lambda: patch.object(engine, "loads", engine.loads - 1)),
        stops(made, "an adapter that is not applied", lambda: patch.object(process, "load_adapter", lambda *_: None)),
        stops(made, "an adapter id that is used again", lambda: patch.object(process, "load_adapter", again)),
        sound(made, "without them"),
    ]
    engine.close()
    made = trainer(model, folder, lora=False)
    results.append(sound(made, f"{family}, audio adapter and decoder in full"))
    vllm: Any = made.engine.process.llm.llm_engine  # pyright: ignore[reportAttributeAccessIssue]
    runner = vllm.model_executor.driver_worker.worker.model_runner
    with (
        patch.object(vllm_local, "clip_uuid", lambda key, version: key),
        patch.object(vllm, "reset_encoder_cache"),
        patch.object(runner, "reset_encoder_cache"),
    ):
        made.engine.sync(made.learner.applied + 500)  # the probe's clip is in the cache now
        results.append(stops(made, "an encoder cache of older weights", nullcontext))
    made.engine.close()
    return all(results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("family", choices=["covo_audio", "qwen2_audio"])
    family = parser.parse_args().family
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        raise SystemExit(0 if check(family, Path(folder)) else 1)


if __name__ == "__main__":
    main()
