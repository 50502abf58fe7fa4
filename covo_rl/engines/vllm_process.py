"""vLLM inside this process, as one of the launcher's ranks: started, fed, put to sleep, counted, ended.

The one module that imports vLLM for an engine of our own.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import gc
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist

from covo_rl.config import ConfigError
from covo_rl.engines.base import EngineError
from covo_rl.engines.vllm_requests import Completion
from covo_rl.resolve import unknown_names
from covo_rl.types import visible

#: what vLLM fails with besides its own VLLMError: torch's, assertions, what it could not read
FAILURES = (RuntimeError, ValueError, AssertionError, LookupError, TypeError, OSError)


class VLLMFailure(EngineError):
    """vLLM raised; after that its encoder cache may lack clips that it believes to hold, so it is not asked again."""


class VLLMProcess:
    """vLLM's `LLM` over `arguments` in this process. `encoded` counts the clips that went through its encoder.

    Raises:
        EngineError: an argument that vLLM does not know, or it does not start.
    """

    def __init__(self, arguments: Mapping[str, Any], *, rank: int = 0) -> None:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # it would report to its makers
        from vllm import LLM
        from vllm.engine.arg_utils import EngineArgs

        known = [item.name for item in fields(EngineArgs)]
        if problems := unknown_names([name for name in arguments if name not in known], known, "vllm_options"):
            raise ConfigError(problems)
        self.encoded = 0
        self.alone = not dist.is_initialized()
        if self.alone:  # vLLM wants a group, and an address for it where there is none
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]  # public, but not in its __all__
            dist.init_process_group(backend, store=store, rank=0, world_size=1)
        local_rank = str(torch.cuda.current_device() if torch.cuda.is_available() else rank)
        with _failures("it does not start"), _untouched(), _environment(RANK=str(rank), LOCAL_RANK=local_rank):
            self.llm: Any = LLM(**arguments, distributed_executor_backend="external_launcher", disable_log_stats=False)
        self.llm.apply_model(self._count)

    def _count(self, model: Any) -> None:
        encode = model.embed_multimodal

        def counted(**inputs: Any) -> Any:
            embeddings = encode(**inputs)
            self.encoded += len(embeddings)
            return embeddings

        model.embed_multimodal = counted

    def load_adapter(self, name: str, number: int, folder: str) -> Any:
        """Read an adapter now; returns what requests name it by. Neither name nor number may have been used before."""
        from vllm.lora.request import LoRARequest

        request = LoRARequest(name, number, folder)
        with _failures(f"it cannot load the adapter {name}"):
            if number in self.llm.llm_engine.list_loras():
                raise EngineError(f"vLLM has an adapter number {number} already, and would go on with its weights")
            self.llm.llm_engine.add_lora(request)
        return request

    def load_weights(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        """All weights, by published name; then forget what was computed with others, which vLLM does not."""
        with _failures("it cannot load the policy's weights"):
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
            if not self.llm.reset_prefix_cache():
                raise VLLMFailure("vLLM would go on with the keys of older weights: it is still sampling")
            self.llm.llm_engine.reset_encoder_cache()

    def complete(
        self, requests: Sequence[Mapping[str, Any]], fields: Sequence[Mapping[str, Any]], adapter: Any
    ) -> list[tuple[list[int], list[Completion]]]:
        """The prompt ids that each request was expanded to, and its completions, in order."""
        from vllm import SamplingParams

        with _failures("it stopped while sampling"):
            params = [SamplingParams(**one) for one in fields]
            outputs = self.llm.generate(list(requests), params, lora_request=adapter, use_tqdm=False)
        return [(output.prompt_token_ids, [_completion(one) for one in output.outputs]) for output in outputs]

    def sleep(self) -> None:
        """Weights to the host, keys forgotten. Level 2 would drop weights and buffers, and sample gibberish."""
        with _failures("it does not give its memory back"):
            self.llm.sleep(level=1)

    def wake(self) -> None:
        torch.cuda.empty_cache()  # what the update no longer needs
        with _failures("it does not wake up"):
            self.llm.wake_up()

    def counters(self) -> dict[str, float]:
        """Since its start: clips that were encoded, prompt positions asked for, and those that were there already."""
        values = {metric.name: getattr(metric, "value", 0) for metric in self.llm.get_metrics()}
        names = ("prefix_cache_queries", "prefix_cache_hits")
        return {"encoder_runs": float(self.encoded), **{name: float(values[f"vllm:{name}"]) for name in names}}

    def close(self) -> None:
        """End the engine. vLLM would end torch's process group with it, which is the launcher's."""
        from vllm.v1.engine import core

        with nullcontext() if self.alone else patch.object(core, "cleanup_dist_env_and_memory"):
            self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()
        torch.cuda.empty_cache()


def _completion(output: Any) -> Completion:
    ids = tuple(output.token_ids)
    logps = tuple(step[token].logprob for token, step in zip(ids, output.logprobs or (), strict=False))
    return Completion(ids, logps, output.finish_reason)


@contextmanager
def _failures(what: str) -> Iterator[None]:
    from vllm.exceptions import VLLMError

    try:
        yield
    except (VLLMError, *FAILURES) as error:
        if isinstance(error, EngineError):
            raise
        raise VLLMFailure(f"vLLM: {what}: {type(error).__name__}: {visible(error)[:2000]}") from error


@contextmanager
def _untouched() -> Iterator[None]:
    """vLLM seeds the generators of Python, numpy and torch, and on a CPU takes torch's number of threads over."""
    state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(), patch.object(torch, "set_num_threads", torch.set_num_threads):
        yield
    random.setstate(state)
    np.random.set_state(numpy_state)


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Variables that vLLM reads when it starts, as they were afterwards: later processes inherit them."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
