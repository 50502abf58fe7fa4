"""A whole evaluation: options -> rows and model, all checked -> records -> report. Behind `covo-rl eval` and Python."""

from __future__ import annotations

from dataclasses import asdict, replace
from importlib.metadata import packages_distributions
from typing import TYPE_CHECKING, Any

from covo_rl.config import RewardConfig
from covo_rl.data.files import weights_sha256
from covo_rl.evaluate.answer import CONDITIONS, PolicyAnswerer
from covo_rl.evaluate.cascade import cascade_record, is_cascade
from covo_rl.evaluate.duplex_streams import stream_inputs, write_stream_report
from covo_rl.evaluate.engine import engine_settings
from covo_rl.evaluate.folder import check_folder, claim_folder, joined_ranks, owned
from covo_rl.evaluate.inputs import Inputs, read_inputs
from covo_rl.evaluate.report import write_report
from covo_rl.evaluate.runner import Request, SpeechMode, answer_rows, run_predictions
from covo_rl.evaluate.sets import EvalInputError, EvalSet, PromptStyle, letter_set
from covo_rl.evaluate.speech.run import is_speech_set, run_speech
from covo_rl.evaluate.through_duplex import session_problems, session_prompt, silent_rows
from covo_rl.records.folder import package_versions

if TYPE_CHECKING:
    from covo_rl.data.memory import Source

#: what a number depends on; a predictions file depends on the first alone
PACKAGES = ("covo-rl", "torch", "transformers", "peft", "numpy", "soxr")


def run_request(
    request: Request, *, rows: Source | None = None, eval_set: EvalSet | None = None,
    answerer: PolicyAnswerer | None = None, quiet: bool = False,
) -> None:  # fmt: skip
    """One evaluation from options to report, which rank 0 writes, and shows unless `quiet`.

    A program may hand over `rows` in place of a file, a set of its own, and the model that the request names, loaded.

    Raises:
        EvalInputError: everything wrong with options, data, clips and predictions, before a model is loaded.
    """
    if eval_set is None and is_speech_set(request.set_):
        return run_speech(request, answerer=answerer, quiet=quiet)
    inputs, style = checked_inputs(request, rows, eval_set)
    eval_set = inputs.eval_set
    assert request.output is not None
    settings = evaluation_settings(request, inputs, style)
    ranks = joined_ranks()
    with owned(request.output, ranks):
        if request.model is None:
            check_folder(request.output, settings, ranks, overwrite=request.overwrite)
            claim_folder(request.output, settings, ranks, overwrite=request.overwrite)
            by_audio = (
                {"real": run_predictions(inputs, request.output, request.reward_config())} if ranks.main else None
            )
        else:
            conditions = CONDITIONS if request.listen else ("real",)
            if answerer is not None:
                answerer = replace(answerer, rollout_config=request.rollout_config(), style=style)
            by_audio = answer_rows(request, inputs, settings, conditions, ranks, style=style, answerer=answerer)
        if by_audio is not None and eval_set.streams:
            write_stream_report(inputs, by_audio["real"], settings, request.output, quiet=quiet)
        elif by_audio is not None:
            write_report(inputs, by_audio, settings, request.output, plots=request.plots, quiet=quiet)


def checked_inputs(
    request: Request, rows: Source | None = None, eval_set: EvalSet | None = None
) -> tuple[Inputs, PromptStyle | None]:
    """The rows of a set of letters, and its wording.

    Raises:
        EvalInputError: everything wrong with options, data, clips and predictions.
    """
    if request.set_ is not None and eval_set is None:
        letter_set(request.set_)  # an unknown name first, before options are said to be for another kind of set
    if problems := [*request.problems(), *request.speech_problems()]:
        raise EvalInputError(problems)
    eval_set = eval_set or letter_set(str(request.set_))
    style = eval_set.style(request.prompt)
    problems = [*session_problems(request, eval_set), *request.model_problems()]
    if eval_set.streams and rows is not None:
        problems.append(f"{eval_set.name} is read from a folder of streams: give its path as data")
    if eval_set.streams and (request.noise_snr is not None or is_cascade(request.model)):
        what = "--noise-snr" if request.noise_snr is not None else f"--model {request.model}"
        problems.append(f"{what}: {eval_set.name} asks a duplex model about streams of its own, which have their noise")
    try:
        if eval_set.streams:
            inputs = stream_inputs(eval_set, request.data, request.limit)
        else:
            inputs = read_inputs(
                eval_set, request.data if rows is None else rows, request.audio_dir, predictions=request.predictions,
                limit=request.limit, allow_outside=request.allow_outside_audio, columns=request.columns,
            )  # fmt: skip
    except EvalInputError as error:
        raise EvalInputError([*error.problems, *problems]) from error
    problems += silent_rows(inputs.examples) if request.through else []
    if problems:
        raise EvalInputError(problems)
    return inputs, style


def evaluation_settings(request: Request, inputs: Inputs, style: PromptStyle | None) -> dict[str, Any]:
    """What the figures depend on: a folder never mixes two."""
    from covo_rl.models import family_fingerprint
    from covo_rl.models.builtin import resolve_model
    from covo_rl.policy.saved_adapter import read_adapter

    rewards = request.rewards or RewardConfig().rewards
    if request.model is None:
        packages = package_versions(PACKAGES[:1])
        return {**inputs.meta, "set": inputs.eval_set.name, "rewards": rewards, "packages": packages}
    notes = read_adapter(request.adapter, model=resolve_model(request.model)).notes if request.adapter else ()
    return {
        **inputs.meta,
        **({"adapter_notes": notes} if notes else {}),
        **({"cascade": cascade_record(request.model)} if is_cascade(request.model) else {}),
        **({"noise_snr": request.noise_snr} if request.noise_snr is not None else {}),
        "model": request.model,
        "model_sha256": weights_sha256(resolve_model(request.model)),
        "adapter": request.adapter,
        "adapter_sha256": weights_sha256(request.adapter) if request.adapter else None,
        "dtype": str(request.dtype),
        **({"load_in_4bit": True} if request.load_in_4bit else {}),
        **({"speech_mode": str(request.speech_mode)} if request.speech_mode != SpeechMode.a2ta else {}),
        **({"family": request.family, "family_sha256": family_fingerprint(request.family)} if request.family else {}),
        **({"through": request.through} if request.through else {}),
        "prompt": _prompt_settings(request, inputs, style),
        "decoding": {
            "greedy": request.greedy, "num_generations": request.num_generations, "seed": request.seed,
            "temperature": None if request.greedy else request.temperature, "top_p": request.top_p,
            "max_completion_length": request.max_completion_length, "batch_size": request.batch_size,
        },
        **engine_settings(request.engine),
        "rewards": rewards,
        "packages": package_versions([*PACKAGES, *_more_packages(request)]),
    }  # fmt: skip


def _prompt_settings(request: Request, inputs: Inputs, style: PromptStyle | None) -> dict[str, Any]:
    if not (request.through or inputs.eval_set.streams):
        return {"name": request.prompt, **asdict(style or request.prompt_config())}
    return session_prompt()


def _more_packages(request: Request) -> list[str]:
    engine = request.engine
    builds = packages_distributions().get("vllm", []) if engine.use_vllm and engine.vllm_mode == "colocate" else []
    return [*builds, *(["bitsandbytes"] if request.load_in_4bit else [])]
