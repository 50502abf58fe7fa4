"""As much of vLLM 0.31's offline `LLM` as an engine in this process uses, answered by a policy of its own.

    monkeypatch.setattr / sys.modules by `install(monkeypatch, policy)`; the engines made since then are in `.made`

It keeps what makes vLLM dangerous: an adapter number that is known is not loaded again, a clip is known by its uuid,
nothing is sampled asleep, the generators are seeded, and torch's process group ends with it.
"""

from __future__ import annotations

import dataclasses
import random
import sys
import types
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from covo_rl.policy import Policy
from covo_rl.types import Clip

sys.path.insert(0, str(Path(__file__).parent / "serving"))
from fake_server import BASE, FakeServer


@dataclasses.dataclass
class EngineArgs:
    """The names that arguments are checked against."""

    model: str = ""
    dtype: str = ""
    seed: int = 0
    trust_remote_code: bool = False
    max_model_len: int = 0
    max_num_batched_tokens: int = 0
    enable_prefix_caching: bool = False
    enable_chunked_prefill: bool = True
    enforce_eager: bool = False
    block_size: int = 0
    logprobs_mode: str = ""
    generation_config: str = ""
    limit_mm_per_prompt: Any = None
    hf_overrides: Any = None
    enable_lora: bool = False
    max_lora_rank: int = 0
    max_loras: int = 0
    max_cpu_loras: int = 0
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.0
    enable_sleep_mode: bool = False
    max_num_seqs: int = 0


@dataclasses.dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str


class VLLMError(Exception):
    pass


def one(**values: Any) -> types.SimpleNamespace:
    return types.SimpleNamespace(**values)


class FakeLLM:
    """`calls` says what was asked; `failures` of the next samplings; `no_op` loads adapters that change nothing."""

    failures = 0
    no_op = False

    def __init__(self, policy: Policy, **arguments: Any) -> None:
        assert dist.is_initialized()
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        torch.set_num_threads = lambda count: None
        self.arguments, self.calls, self.asleep = arguments, [], False
        self.fake, self.numbers = FakeServer(policy), {}
        self.model = one(embed_multimodal=lambda clips: clips)
        self.llm_engine = one(
            add_lora=self.add_lora, list_loras=lambda: {*self.numbers}, reset_encoder_cache=self.fake.clips.clear,
            engine_core=one(shutdown=self.shutdown),
        )  # fmt: skip
        self.queries = self.hits = 0

    def apply_model(self, function: Any) -> list[Any]:
        return [function(self.model)]

    def add_lora(self, request: LoRARequest) -> bool:
        assert not self.asleep
        self.calls.append(f"load {request.lora_name}")
        if request.lora_int_id in self.numbers:
            return True
        self.fake.no_op = self.no_op
        self.fake._load(request.lora_name, Path(request.lora_path), False)
        self.numbers[request.lora_int_id] = request.lora_name
        return True

    def generate(self, requests: list[dict], params: list[Any], *, lora_request: Any, use_tqdm: bool) -> list[Any]:
        assert not self.asleep and not use_tqdm
        self.calls.append(f"sample {len(requests)}")
        if FakeLLM.failures:
            FakeLLM.failures -= 1
            raise RuntimeError("CUDA error: an illegal memory access was encountered\x1b[2J")
        name = self.numbers[lora_request.lora_int_id] if lora_request else BASE
        return [self._output(request, fields, name) for request, fields in zip(requests, params, strict=True)]

    def _output(self, request: dict, fields: dict, name: str) -> Any:
        clips = request.get("multi_modal_data", {}).get("audio", ())
        uuids = request.get("multi_modal_uuids", {}).get("audio", ())
        new = [(uuid, clip) for uuid, clip in zip(uuids, clips, strict=True) if uuid not in self.fake.clips]
        for uuid, (samples, rate) in self.model.embed_multimodal(clips=new) if new else ():
            self.fake.clips[uuid] = self.fake.policy.clips.key(Clip(array=samples, sampling_rate=rate))
        parts = [{"uuid": uuid} for uuid in uuids]
        prompt = self.fake._prompt({"token_ids": request["prompt_token_ids"], "content_parts": parts})
        group = self.fake._sample(prompt, fields, name)
        self.queries += len(prompt.input_ids) * fields["n"]
        self.hits += len(prompt.input_ids) * (fields["n"] - 1)
        outputs = [
            one(token_ids=list(r.completion_ids), finish_reason=r.stop_reason,
                logprobs=[{i: one(logprob=logp)} for i, logp in zip(r.completion_ids, r.logps, strict=True)])
            for r in group.rollouts
        ]  # fmt: skip
        return one(prompt_token_ids=list(prompt.input_ids), outputs=outputs)

    def sleep(self, level: int) -> None:
        assert level == 1 and not self.asleep
        self.asleep = True
        self.calls.append("sleep")

    def wake_up(self) -> None:
        assert self.asleep
        self.asleep = False
        self.calls.append("wake")

    def get_metrics(self) -> list[Any]:
        counts = {"queries": self.queries, "hits": self.hits}
        return [one(name=f"vllm:prefix_cache_{name}", value=value) for name, value in counts.items()]

    def shutdown(self) -> None:
        self.calls.append("shutdown")
        self.fake.die()
        sys.modules["vllm.v1.engine.core"].cleanup_dist_env_and_memory()


def install(monkeypatch: Any, policy: Policy) -> list[FakeLLM]:
    """Put the modules in place of vLLM's; returns the engines that are made from now on."""
    made: list[FakeLLM] = []

    def llm(**arguments: Any) -> FakeLLM:
        made.append(FakeLLM(policy, **arguments))
        return made[-1]

    def cleanup() -> None:
        with suppress(ValueError):
            dist.destroy_process_group()

    contents: dict[str, dict[str, Any]] = {
        "vllm": {"LLM": llm, "SamplingParams": dict},
        "vllm.engine.arg_utils": {"EngineArgs": EngineArgs},
        "vllm.lora.request": {"LoRARequest": LoRARequest},
        "vllm.exceptions": {"VLLMError": VLLMError},
        "vllm.v1.engine.core": {"cleanup_dist_env_and_memory": cleanup},
        **{name: {} for name in ("vllm.engine", "vllm.lora", "vllm.v1", "vllm.v1.engine")},
    }
    for name, content in contents.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["vllm.v1.engine"].core = sys.modules["vllm.v1.engine.core"]  # type: ignore[attr-defined]
    monkeypatch.setattr(FakeLLM, "failures", 0)
    monkeypatch.setattr(FakeLLM, "no_op", False)
    return made
