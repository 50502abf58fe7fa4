"""The engine of a run where that is vLLM: what can be said before anything is loaded, what of the rows; its start."""

from __future__ import annotations

from collections.abc import Sequence

from covo_rl.audio import ClipStore
from covo_rl.config import Options
from covo_rl.engines.base import RolloutEngine
from covo_rl.engines.choose import rollout_engine
from covo_rl.engines.vllm_checks import fit_problems, needed_positions, server_problems, vllm_problems
from covo_rl.policy import Policy
from covo_rl.policy.trainable import Trainable
from covo_rl.records import console
from covo_rl.run.questions import readable_prompts
from covo_rl.train.ranks import Ranks
from covo_rl.types import Example, Prompt


def engine_problems(options: Options, ranks: Ranks) -> list[str]:
    """Of the options, of what is installed where any rank runs and, on the main one, of the servers; a collective."""
    problems = [*dict.fromkeys(ranks.joined(vllm_problems(options, ranks.world)))]
    asks = not problems and ranks.main and not options.train.dry_run
    return server_problems(options) if asks else problems


def needed_room(
    rows: Sequence[Example], options: Options, policy: Policy, trainable: Trainable, clips: ClipStore
) -> tuple[list[str], int]:
    """What of the run vLLM could not take, and the positions that its longest row and completion need."""
    prompts = readable_prompts(rows, len(rows), policy.family, clips, options.prompt)
    positions = needed_positions(prompts, options.rollout.max_completion_length, policy.family)
    return fit_problems(options, trainable, prompts), positions


def started_engine(
    options: Options, policy: Policy, trainable: Trainable, positions: int, prompts: Sequence[Prompt], ranks: Ranks
) -> RolloutEngine | None:
    """vLLM as the options say, given the policy and held to it; None where the policy itself samples.

    Raises:
        EngineError: it cannot start, no server answers, or it does not run the policy.
    """
    if not options.engine.use_vllm:
        return None
    with console.working("vLLM: started, given the policy, compared with it", active=ranks.main):
        return rollout_engine(
            options, policy, trainable, max_model_len=positions, probe_prompt=prompts[0],
            rank=ranks.rank, world=ranks.world,
        )  # fmt: skip
