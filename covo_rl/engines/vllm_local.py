"""vLLM in the training processes: an engine per rank, asleep during the update, given every version of the policy.

LoRA goes to it natively, never merged, under a name that no version had before, so that no cache holds anything of
another one (vLLM 0.31 keys a prompt's blocks by the adapter's name). Where encoder or audio adapter train, clips get
names of their own per version too.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, is_initialized

from covo_rl.engines.adapter_files import AdapterFiles
from covo_rl.engines.base import EngineLost, Failed, Pending, SyncReport, TextDecoder, check_groups
from covo_rl.engines.draws import prompt_seeds
from covo_rl.engines.probe import Probe
from covo_rl.engines.vllm_arguments import adapter_rank, engine_arguments
from covo_rl.engines.vllm_process import VLLMFailure, VLLMProcess
from covo_rl.engines.vllm_requests import clip_uuid, clip_waveform, group_of, prompt_ids, sampling_fields
from covo_rl.models.builtin import resolve_model
from covo_rl.types import Group, Prompt

if TYPE_CHECKING:
    from covo_rl.config import Options, RolloutConfig
    from covo_rl.policy.policy import Policy
    from covo_rl.policy.trainable import Trainable


class VLLMColocate:
    """`trainable` is what `sync` sends; None: the engine holds the base, and nothing trains.

    With `vllm_tensor_parallel_size` above 1 neighbouring ranks share an engine, and must call `collect` together.
    """

    name = "vllm"
    exact = False
    failed: Sequence[Failed] = ()

    def __init__(
        self, policy: Policy, trainable: Trainable | None, options: Options, *, max_model_len: int,
        probe_prompt: Prompt, rank: int = 0, world: int = 1,
    ) -> None:  # fmt: skip
        engine, self.policy, self.family = options.engine, policy, policy.family
        self.rank, self.world, self.tensor_parallel = rank, world, engine.vllm_tensor_parallel_size
        self.sleeps = engine.vllm_enable_sleep_mode and policy.device.type == "cuda"
        peft_model = trainable and trainable.peft_model
        autocast = is_initialized() and AcceleratorState().mixed_precision == "bf16"
        dtype = torch.bfloat16 if autocast else self.family.embed_tokens.weight.dtype
        self.arguments = engine_arguments(
            options, self.family, path=resolve_model(options.model.model), dtype=str(dtype).split(".")[1],
            max_model_len=engine.vllm_max_model_length or max_model_len, lora_rank=adapter_rank(peft_model),
            cpu=policy.device.type == "cpu",
        )  # fmt: skip
        self.arguments |= {
            "tensor_parallel_size": self.tensor_parallel,
            "gpu_memory_utilization": engine.vllm_gpu_memory_utilization,
            "enable_sleep_mode": self.sleeps,
            "seed": rank // self.tensor_parallel,  # one schedule in all ranks of an engine
        }
        self.decoder = TextDecoder(self.family)
        self.files = (
            AdapterFiles(trainable, engine.vllm_adapter_dir, dtype=dtype, each_machine=True) if peft_model else None
        )
        self.process = VLLMProcess(self.arguments, rank=rank)
        self.asleep, self.version, self.loads, self.restarts = False, 0, 0, 0
        self.adapter: Any = None
        self.seconds: dict[str, float] = {}
        self.figures: dict[str, float] = {}
        self.counted: Mapping[str, float] = {}
        self.probe = Probe(policy, probe_prompt, engine.engine_probe_tolerance, dtype=dtype)
        if trainable is not None:
            self.probe.check_random(self)
        self.sync(0)

    def sync(self, version: int) -> SyncReport:
        start, before = time.perf_counter(), self.version
        self._wake()
        self.loads += 1
        self.version = version
        folder = self.files.write(version) if self.files else None
        written = time.perf_counter()
        if self.files and folder:
            self.adapter = self.process.load_adapter(f"policy-{version}-{self.loads}", self.loads, str(folder))
            if before != version:
                self.files.release(before)
        seconds = {"save": written - start, "load": time.perf_counter() - written}
        figures, phases = self.figures, dict(self.seconds)
        report = SyncReport(version, seconds, self.probe.check(self, version))
        self.figures, self.seconds = figures, phases  # of rollouts, not of the probe's
        return report

    def submit(
        self, prompts: Sequence[Prompt], config: RolloutConfig, *, seed: int, generations: int, greedy: bool = False
    ) -> Pending:
        drawing = {"config": config, "generations": generations, "greedy": greedy, "seed": seed}
        return Pending(tuple(prompts), generations, self.version, (self.adapter, self.loads, drawing))

    def collect(self, pending: Pending) -> list[Group]:
        self._wake()
        adapter, load, drawing = pending.work
        start, self.counted = time.perf_counter(), self.process.counters()
        requests = [self._request(prompt, load) for prompt in pending.prompts]
        seeds = prompt_seeds(pending.prompts, drawing.pop("seed"))
        fields = [sampling_fields(family=self.family, seed=seed, **drawing) for seed in seeds]
        answers = self._answers(requests, fields, adapter)
        groups = [
            group_of(
                prompt, used_ids, completions, generations=pending.generations, decoder=self.decoder,
                limit=drawing["config"].max_completion_length, version=pending.version,
            )
            for prompt, (used_ids, completions) in zip(pending.prompts, answers, strict=True)
        ]  # fmt: skip
        check_groups(groups, pending, self.family)
        self.seconds["sample"] = time.perf_counter() - start
        self._measure(pending)
        return groups

    def _request(self, prompt: Prompt, load: int) -> dict[str, Any]:
        request: dict[str, Any] = {"prompt_token_ids": prompt_ids(prompt, self.family)}
        if prompt.clip_keys:
            version = None if self.policy.embedder.frozen else load
            clips = [clip_waveform(key, self.policy.clips, self.family) for key in prompt.clip_keys]
            request["multi_modal_data"] = {"audio": clips}
            request["multi_modal_uuids"] = {"audio": [clip_uuid(key, version) for key in prompt.clip_keys]}
        return request

    def _answers(self, requests: list[Any], fields: list[Any], adapter: Any) -> list[Any]:
        """From an engine of several ranks every one of them asks for all; each takes its own."""
        before = 0
        count = len(requests)
        if self.tensor_parallel > 1:
            from vllm.distributed import get_tp_group

            parts: list[Any] = [None] * self.tensor_parallel
            dist.all_gather_object(parts, (requests, fields), group=get_tp_group().cpu_group)
            place = self.rank % self.tensor_parallel
            before = sum(len(part) for part, _ in parts[:place])
            requests, fields = ([one for part in parts for one in part[i]] for i in range(2))
        return self._completed(requests, fields, adapter)[before : before + count]

    def _completed(self, requests: list[Any], fields: list[Any], adapter: Any) -> list[Any]:
        """Once more from a new engine where one failed: it may have lost what it believes to hold.

        A new one is started by all ranks together, which the others do not know of: then the run ends.
        """
        try:
            return self.process.complete(requests, fields, adapter)
        except VLLMFailure as error:
            if self.world > 1:
                raise EngineLost(f"rank {self.rank}: {error}") from error
            warnings.warn(f"{error}; it is started again", stacklevel=2)
        try:
            self.process.close()
            self.process, self.counted = VLLMProcess(self.arguments, rank=self.rank), {}
            self.restarts += 1
            if adapter is not None:
                self.process.load_adapter(adapter.lora_name, adapter.lora_int_id, adapter.lora_path)
            return self.process.complete(requests, fields, adapter)
        except VLLMFailure as error:
            raise EngineLost(f"started again, {error}") from error

    def _wake(self) -> None:
        start = time.perf_counter()
        if self.asleep:
            self.process.wake()
            self.asleep = False
            self.seconds["wake"] = time.perf_counter() - start

    def rest(self) -> None:
        self.policy.release()
        start = time.perf_counter()
        if self.sleeps and not self.asleep:
            self.process.sleep()
            self.asleep = True
            self.seconds["sleep"] = time.perf_counter() - start

    def close(self) -> None:
        self.process.close()
        if self.files:
            self.files.close()

    def _measure(self, pending: Pending) -> None:
        counters = self.process.counters()
        new = {name: value - self.counted.get(name, 0.0) for name, value in counters.items()}
        self.figures = {
            "clips": float(len({key for prompt in pending.prompts for key in prompt.clip_keys})),
            "encoder_runs": new["encoder_runs"],
            "prefix_hit_rate": new["prefix_cache_hits"] / max(new["prefix_cache_queries"], 1.0),
            "restarts": float(self.restarts),
        }

    def metrics(self) -> Mapping[str, float]:
        """Of the last collection: clips, how many were encoded, share of prompt positions that were not computed again;
        seconds of the last sampling, sleep and wake-up."""
        return {**self.figures, **{f"{phase}_s": seconds for phase, seconds in self.seconds.items()}}
