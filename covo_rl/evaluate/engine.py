"""Evaluations and profiles on another rollout engine than the policy itself: its flags, and the engine they ask for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from covo_rl.config import AdapterConfig, ConfigError, EngineConfig, ModelConfig, Options

if TYPE_CHECKING:
    from covo_rl.engines.base import RolloutEngine
    from covo_rl.evaluate.answer import PolicyAnswerer
    from covo_rl.evaluate.runner import Request
    from covo_rl.train.ranks import Ranks
    from covo_rl.types import Example

#: options that mean something only while training
_OF_TRAINING = ("vllm_enable_sleep_mode", "rollout_ahead", "failed_groups_limit")
#: option -> type, of those that an evaluation has too
ENGINE_OPTIONS = {name: hint for name, hint in get_type_hints(EngineConfig).items() if name not in _OF_TRAINING}


def with_engine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The typer command with a flag for each of ENGINE_OPTIONS in place of its parameter `engine`."""

    def flagged(*words: Any, **values: Any) -> Any:
        engine = EngineConfig(**{name: values.pop(name) for name in ENGINE_OPTIONS})
        return command(*words, **values, engine=engine)

    described = {item.name: item for item in fields(EngineConfig)}
    flags = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=described[name].default,
            annotation=Annotated[hint, typer.Option(help=described[name].metadata["help"])],
        )
        for name, hint in ENGINE_OPTIONS.items()
    ]  # fmt: skip
    others = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "engine"]
    flagged.__signature__ = inspect.Signature([*others, *flags])  # pyright: ignore[reportFunctionMemberAccess]
    flagged.__name__, flagged.__doc__ = command.__name__, command.__doc__
    return flagged


def engine_settings(engine: EngineConfig) -> dict[str, Any]:
    """What figures depend on, for a record; nothing where the policy samples."""
    if not engine.use_vllm:
        return {}
    return {"engine": {"vllm_mode": engine.vllm_mode, "vllm_options": engine.vllm_options}}


def run_options(request: Request) -> Options:
    """The options of a run that would sample as `request` asks for."""
    from covo_rl.policy.saved_adapter import largest_rank, read_adapter

    model = ModelConfig(
        str(request.model), str(request.dtype), family=request.family, trust_remote_code=request.trust_remote_code,
        speech_mode=str(request.speech_mode),
    )  # fmt: skip
    adapter = AdapterConfig(lora=False, load_in_4bit=request.load_in_4bit)
    if request.adapter:
        rank = largest_rank(read_adapter(request.adapter).config)
        adapter = AdapterConfig(adapter=request.adapter, lora_r=rank)
    return Options(model=model, adapter=adapter, rollout=request.rollout_config(), engine=request.engine)


@contextmanager
def sampling_engine(
    request: Request, answerer: PolicyAnswerer, examples: Sequence[Example], ranks: Ranks
) -> Iterator[RolloutEngine | None]:
    """The engine that `request` names, started and checked, while the block runs; None where the policy samples.

    Raises:
        ConfigError: it could not take the adapter or a row.
        EngineError: it cannot start, nothing answers, or it does not run the policy.
    """
    if not request.engine.use_vllm:
        yield None
        return
    from covo_rl.engines.choose import rollout_engine
    from covo_rl.engines.vllm_checks import fit_problems, needed_positions

    options, family = run_options(request), answerer.policy.family
    prompts = [answerer.prompt(example) for example in examples]
    if answerer.saved and (problems := fit_problems(options, answerer.saved, prompts)):
        raise ConfigError(problems)
    engine = rollout_engine(
        options, answerer.policy, answerer.saved, rank=ranks.rank, world=ranks.world,
        max_model_len=needed_positions(prompts, request.max_completion_length, family),
        probe_prompt=next((prompt for prompt in prompts if prompt.clip_keys), prompts[0]),
    )  # fmt: skip
    try:
        yield engine
    finally:
        engine.close()
