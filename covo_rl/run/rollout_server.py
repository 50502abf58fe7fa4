"""A run's rollout server: the vllm command that starts it, and whether one that runs is right."""

from __future__ import annotations

import http.client
import ipaddress
import json
import shlex
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from covo_rl.audio import ClipStore
from covo_rl.config import ConfigError, engine_contradictions
from covo_rl.data.transport import exchange
from covo_rl.engines.base import EngineError
from covo_rl.engines.choose import rollout_engine
from covo_rl.engines.probe import Probe
from covo_rl.engines.server_probe import served_models
from covo_rl.engines.servers import Servers, Unanswered
from covo_rl.engines.vllm_arguments import engine_arguments
from covo_rl.engines.vllm_checks import needed_positions, vllm_problems
from covo_rl.models import family_at, use_family
from covo_rl.models.builtin import resolve_model
from covo_rl.policy.loading import trainable_policy
from covo_rl.policy.saved_adapter import largest_rank, read_adapter
from covo_rl.policy.trainable import training_dtype
from covo_rl.prompt import build_prompt
from covo_rl.run import questions
from covo_rl.run.doctor import weights_dtype
from covo_rl.run.sizes import sizes_of, weightless_family
from covo_rl.serve import WEIGHT_BACKEND
from covo_rl.train.launch import device_of
from covo_rl.types import visible

if TYPE_CHECKING:
    from covo_rl.config import Options
    from covo_rl.types import Example

#: fails where there is no key, before anything listens
KEY = 'VLLM_API_KEY="${VLLM_API_KEY:?one secret for servers and trainers, e.g. of: openssl rand -hex 32}"'
#: wants that key at every endpoint, and fetches adapters over HTTP
GATE = "covo_rl.serve.gate.Gate"


def serve_command(options: Options, host: str, port: int, *, cpu: bool = False) -> str:
    """One command of a shell; it fails where no key is set.

    Raises:
        ConfigError, ModelError, OSError: options, rows or model that cannot be read, or what vLLM cannot serve.
    """
    served = replace(options, engine=replace(options.engine, use_vllm=True, vllm_mode="server"))
    if problems := vllm_problems(served):
        raise ConfigError(problems)
    arguments = served_arguments(options, cpu=cpu)
    program = ["python", "-m", "vllm.entrypoints.openai.api_server", "--model"] if cpu else ["vllm", "serve"]
    words = " ".join([*_environment(options, cpu=cpu), *program, shlex.quote(arguments.pop("model"))])
    flags = [f"--host {shlex.quote(host)} --port {port}", "--enable-scale-out", f"--middleware {GATE}"]
    flags += [_flag(name, value) for name, value in arguments.items() if value is not None]
    return " \\\n    ".join([words, *flags])


def served_arguments(options: Options, *, cpu: bool = False) -> dict[str, Any]:
    """vLLM's engine arguments by name, `model` among them."""

    path, adapter = resolve_model(options.model.model), options.adapter
    use_family(options.model.family, path)
    rank = largest_rank(read_adapter(adapter.adapter).config) if adapter.adapter else adapter.lora_r
    arguments = engine_arguments(
        options, family_at(path), path=path, dtype=weights_dtype(sizes_of(options.model.model), options),
        max_model_len=needed_length(options), lora_rank=rank if adapter.lora else None, cpu=cpu,
    )  # fmt: skip
    if not adapter.lora:
        arguments["weight_transfer_config"] = {"backend": WEIGHT_BACKEND}
    if options.engine.vllm_tensor_parallel_size > 1:
        arguments["tensor_parallel_size"] = options.engine.vllm_tensor_parallel_size
    return arguments


def needed_length(options: Options) -> int:
    """Positions that the server must make room for."""
    return options.engine.vllm_max_model_length or counted_positions(options)


def counted_positions(options: Options) -> int:
    """As a run counts them over the rows that train or are held out; no weight is loaded for it.

    Raises:
        ConfigError, DataError, PromptError: rows that cannot be used, or a family that counts with a loaded model only.
    """
    kind: Any = family_at(resolve_model(options.model.model))
    if not hasattr(kind, "load_processor"):
        raise ConfigError([f"name vllm_max_model_length: only a loaded {kind.__name__} counts its prompts"])
    processor = kind.load_processor(resolve_model(options.model.model))
    family, clips = weightless_family(sizes_of(options.model.model), processor), ClipStore()
    prompts = [build_prompt(row, family, clips, options.prompt) for row in all_rows(options, kind, clips)]
    return needed_positions(prompts, options.rollout.max_completion_length, family)


def all_rows(options: Options, kind: Any, clips: ClipStore) -> list[Example]:
    """All rows of the run, clips as long as the family takes them."""
    rows = questions.read_questions(options, clips)
    return questions.fit_clips([*rows.train, *rows.held_out], kind.max_clip_seconds, options.data.long_audio)[0]


def check_server(options: Options, url: str) -> Iterator[str]:
    """Hold the server at `url` to the run: a line for what it says of itself, and one for what was measured.

    Raises:
        UserError: nothing answers, another version or model, no adapters, too little room, or another policy.
    """
    options.engine = replace(
        options.engine, use_vllm=True, vllm_mode="server", vllm_server_base_url=url, rollout_ahead=0
    )
    if problems := engine_contradictions(options) + vllm_problems(options):
        raise ConfigError(problems)
    model = options.model
    model.dtype, _ = training_dtype(model.dtype, resolve_model(model.model), full=not options.adapter.lora)
    length = needed_length(options)
    yield from _facts(url)
    clips = ClipStore()
    policy, trainable = trainable_policy(
        options.model, options.adapter, clips=clips, device=device_of(None), learning_rate=options.train.learning_rate
    )
    rows = all_rows(options, policy.family, clips)
    (prompt,) = questions.readable_prompts(rows, 1, policy.family, clips, options.prompt)
    engine = rollout_engine(options, policy, trainable, max_model_len=length, probe_prompt=prompt)
    try:
        probe = Probe(policy, prompt, options.engine.engine_probe_tolerance)
        difference = probe.check(engine, 0)
    finally:
        engine.close()
    gap = f"log-probs on row {prompt.example.id} differ by at most {difference:.2g} nats, limit {probe.tolerance:g}"
    yield visible(f"{url}: runs this policy and takes what trains: {gap}")


def _facts(url: str) -> Iterator[str]:
    servers = Servers([url], lambda server: None)
    (server,) = servers.all
    try:
        version = servers.call_json(server, "/version").get("version")
        base = next(iter(served_models(servers, server)), {})
    except Unanswered as error:
        raise EngineError(str(error)) from error
    yield visible(f"{url}: vLLM {version}, {base.get('root')}, {base.get('max_model_len')} positions")
    try:
        exchange(f"{url}/v1/models", None, {}, 10.0)
    except (OSError, http.client.HTTPException, ValueError):
        return
    yield f"{url}: note: it asks for no key: whoever reaches it can load weights. Start it with VLLM_API_KEY"


# -- words of the command ----------------------------------------------------------------------------------------------


def _flag(name: str, value: Any) -> str:
    """An engine argument as vLLM's parser reads it."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag} {shlex.quote(value if isinstance(value, str) else json.dumps(value))}"


def _environment(options: Options, *, cpu: bool) -> list[str]:
    """What vLLM reads from its environment, as a shell writes it."""
    variables = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"} if options.adapter.lora else {"VLLM_SERVER_DEV_MODE": "1"}
    variables |= {"VLLM_CPU_KVCACHE_SPACE": "1"} if cpu else {}
    return [KEY, *(f"{name}={value}" for name, value in variables.items())]


def serve_notes(host: str) -> list[str]:
    """What to know beside the command."""
    notes = ["run this in an environment with vLLM and covo_rl (docs/rollouts.md)"]
    with suppress(ValueError):  # a name may be anybody's
        address = ipaddress.ip_address(host)
        if address.is_unspecified or not address.is_private:
            notes.append(
                f"note: whoever reaches {host} and has the key can replace the weights: take a private address"
            )
    return notes
