"""vLLM in the training processes: an engine per rank, asleep during the update, given every version of the policy.

LoRA goes to it natively, never merged, under a name and number that no load had before, so that no cache holds anything
of another one (vLLM 0.31 keys a prompt's blocks by the adapter's name). Where encoder or audio adapter train, clips get
names of their own per load too.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, is_initialized

from covo_rl.engines.base import EngineLost, Failed, Pending, SyncReport, TextDecoder, check_groups
from covo_rl.engines.draws import prompt_seeds
from covo_rl.engines.policy_files import AdapterFiles, adapter_name
from covo_rl.engines.probe import Probe
from covo_rl.engines.vllm_arguments import engine_arguments
from covo_rl.engines.vllm_process import VLLMFailure, VLLMProcess
from covo_rl.engines.vllm_requests import clip_uuid, clip_waveform, group_of, prompt_ids, sampling_fields
from covo_rl.models.builtin import resolve_model
from covo_rl.policy.entries import published_weights
from covo_rl.policy.published import ADAPTER
from covo_rl.policy.saved_adapter import largest_rank
from covo_rl.types import Group, Prompt

if TYPE_CHECKING:
    from covo_rl.config import Options, RolloutConfig
    from covo_rl.policy.policy import Policy
    from covo_rl.policy.trainable import Trainable


class VLLMColocate:
    """`trainable` is what `sync` sends, its adapter or all weights; None: the engine holds the base alone.

    Made and synced by all ranks together. With `vllm_tensor_parallel_size` above 1 neighbouring ranks share an engine,
    and collect together too.

    Raises:
        EngineError: vLLM does not start, or does not run the policy.
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
        autocast = is_initialized() and AcceleratorState().mixed_precision == "bf16"
        self.dtype = torch.bfloat16 if autocast else self.family.embed_tokens.weight.dtype
        peft_model: Any = trainable and trainable.peft_model
        self.trainable = trainable
        rank_of_lora = largest_rank(peft_model.peft_config[ADAPTER]) if peft_model else None
        self.arguments = engine_arguments(
            options, self.family, path=resolve_model(options.model.model), dtype=str(self.dtype).split(".")[1],
            max_model_len=max_model_len, lora_rank=rank_of_lora,
            cpu=policy.device.type == "cpu",
        )  # fmt: skip
        self.arguments |= {
            "tensor_parallel_size": self.tensor_parallel,
            "gpu_memory_utilization": engine.vllm_gpu_memory_utilization,
            "enable_sleep_mode": self.sleeps,
            "seed": rank // self.tensor_parallel,  # one schedule in all ranks of an engine
        }
        self.decoder = TextDecoder(self.family)
        self.version = self.loads = self.restarts = 0
        self.newest = ("", 0, "")  # name, number and folder of an adapter
        self.adapter: Any = None
        self.asleep = False
        self.seconds: dict[str, float] = {}
        self.moves: dict[str, float] = {}  # seconds of sleep and wake-up since the last rollouts
        self.figures: dict[str, float] = {}
        self.counted: Mapping[str, float] = {}
        self.probe = Probe(policy, probe_prompt, engine.engine_probe_tolerance, dtype=self.dtype)
        self.files = None
        if trainable and peft_model:
            self.files = AdapterFiles(trainable, engine.vllm_adapter_dir, dtype=self.dtype, each_machine=True)
        self.process = VLLMProcess(self.arguments, rank=rank)
        if trainable:
            self.probe.check_random(self)
        self.sync(0)

    # -- weights ---------------------------------------------------------------------------------------------------

    def sync(self, version: int) -> SyncReport:
        start, before = time.perf_counter(), self.version
        folder = str(self.files.write(version)) if self.files else ""  # first: ranks whose engine fails are here too
        saved = time.perf_counter()
        self._wake()
        self.version, self.loads = version, self.loads + 1
        self.newest = (f"{adapter_name(version)}-{self.loads}", self.loads, folder)
        try:
            self._load()
        except VLLMFailure as error:
            if self.loads == 1:  # it has never run the policy
                raise
            self._restart(error)
        if self.files and before != version:
            self.files.release(before)
        seconds = {"save": saved - start, "load": time.perf_counter() - saved}
        known = self.figures, self.seconds, self.moves
        difference = self.probe.check(self, version)
        self.figures, self.seconds, self.moves = known  # of rollouts, not of the probe's
        return SyncReport(version, seconds, difference, self.files.rounding if self.files else None)

    def _load(self) -> None:
        if self.files:
            self.adapter = self.process.load_adapter(*self.newest)
        elif self.trainable:
            self.process.load_weights(published_weights(self.family.model, self.dtype))

    # -- rollouts --------------------------------------------------------------------------------------------------

    def submit(
        self, prompts: Sequence[Prompt], config: RolloutConfig, *, seed: int, generations: int, greedy: bool = False
    ) -> Pending:
        fields = [
            sampling_fields(config, self.family, generations=generations, seed=one, greedy=greedy)
            for one in prompt_seeds(prompts, seed)
        ]
        return Pending(tuple(prompts), generations, self.version, (fields, self.loads, self.adapter))

    def collect(self, pending: Pending) -> list[Group]:
        self._wake()
        start, self.counted = time.perf_counter(), self.process.counters()
        fields, load, adapter = pending.work
        requests = [self._request(prompt, load) for prompt in pending.prompts]
        answers = self._answers(requests, fields, adapter)
        groups = [
            group_of(prompt, *answer, limit=one["max_tokens"], decoder=self.decoder, version=pending.version,
                     copies=pending.generations // one["n"])
            for prompt, one, answer in zip(pending.prompts, fields, answers, strict=True)
        ]  # fmt: skip
        check_groups(groups, pending, self.family)
        self.seconds, self.moves = {**self.moves, "sample": time.perf_counter() - start}, {}
        self._measure(pending)
        return groups

    def _request(self, prompt: Prompt, load: int) -> dict[str, Any]:
        request: dict[str, Any] = {"prompt_token_ids": prompt_ids(prompt, self.family)}
        if prompt.clip_keys:
            assert self.policy.clips is not None
            version = None if self.policy.embedder.frozen else load
            clips = [clip_waveform(key, self.policy.clips, self.family) for key in prompt.clip_keys]
            request["multi_modal_data"] = {"audio": clips}
            request["multi_modal_uuids"] = {"audio": [clip_uuid(key, version) for key in prompt.clip_keys]}
        return request

    def _answers(self, requests: list[Any], fields: list[Any], adapter: Any) -> list[Any]:
        """Every rank of an engine asks for what all of them want, and takes its own."""
        count, before = len(requests), 0
        if self.tensor_parallel > 1:
            from vllm.distributed import get_tp_group  # pyright: ignore[reportMissingImports]

            parts: list[Any] = [None] * self.tensor_parallel
            dist.all_gather_object(parts, (requests, fields), group=get_tp_group().cpu_group)
            before = sum(len(part) for part, _ in parts[: self.rank % self.tensor_parallel])
            requests, fields = ([one for part in parts for one in part[i]] for i in range(2))
        return self._complete(requests, fields, adapter)[before : before + count]

    def _complete(self, requests: list[Any], fields: list[Any], adapter: Any) -> list[Any]:
        """Once more from a new engine where one failed: it may lack what it believes to hold."""
        try:
            return self.process.complete(requests, fields, adapter)
        except VLLMFailure as error:
            self._restart(error)
        try:
            return self.process.complete(requests, fields, adapter)
        except VLLMFailure as error:
            raise EngineLost(f"started again, {error}") from error

    def _restart(self, failure: VLLMFailure) -> None:
        """A new engine with the newest weights in place of one that failed.

        Raises:
            EngineLost: that fails too, or there are other ranks: all start an engine together.
        """
        if self.world > 1:
            raise EngineLost(f"rank {self.rank}: {failure}") from failure
        warnings.warn(f"{failure}; it is started again", stacklevel=2)
        try:
            self.process.close()
            self.process, self.counted, self.asleep = VLLMProcess(self.arguments), {}, False
            self.restarts += 1
            self._load()
        except VLLMFailure as error:
            raise EngineLost(f"started again, {error}") from error

    # -- memory and figures ----------------------------------------------------------------------------------------

    def _wake(self) -> None:
        start = time.perf_counter()
        if self.asleep:
            try:
                self.process.wake()
            except VLLMFailure as error:
                self._restart(error)
            self.asleep = False
            self.moves["wake"] = time.perf_counter() - start

    def rest(self) -> None:
        start = time.perf_counter()
        self.policy.release()
        if self.sleeps and not self.asleep:
            try:
                self.process.sleep()
            except VLLMFailure as error:  # without its memory there is no update
                raise EngineLost(f"rank {self.rank}: {error}") from error
            self.asleep = True
            self.moves["sleep"] = time.perf_counter() - start

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
        """Of the last rollouts: clips, how many were encoded, share of prompt positions that were not computed again;
        seconds of sampling, and of sleep and wake-up before it; and how often the engine was started again."""
        return {**self.figures, **{f"{phase}_s": seconds for phase, seconds in self.seconds.items()}}
