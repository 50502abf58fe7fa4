"""Before a run of learning when to speak: what can be wrong with it, then the supervised stage of a new model.

Nothing is written until all that can be known is known: the stage takes minutes.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace

from accelerate import Accelerator

from covo_rl.config import ConfigError
from covo_rl.duplex.config import NEW, DuplexOptions
from covo_rl.duplex.features import PRESETS, draw_streams
from covo_rl.duplex.recorded import take_recorded
from covo_rl.duplex.rollout import score_stops
from covo_rl.duplex.waves import feature_world
from covo_rl.policy.trainable import make_trainable
from covo_rl.records.folder import Run
from covo_rl.records.trackers import installed_trackers
from covo_rl.rewards import Component, RewardError, components
from covo_rl.rewards.duplex_lint import policy_problems, reads_reply, times, timing_problems
from covo_rl.rewards.judge import judge_from_spec
from covo_rl.run.start import take_up
from covo_rl.supervised.duplex_stage import family_to_teach, taught_already, teach_duplex
from covo_rl.train.ranks import Ranks
from covo_rl.types import UserError

#: of the checkpoint that the supervised stage leaves in the run folder, and of one that is not whole yet
TAUGHT, PARTIAL = "sft", ".sft-partial"


def timing_reward_problems(options: DuplexOptions, terms: Sequence[Component]) -> list[str]:
    """Why these rewards cannot say when to speak; they must judge streams of every kind that RL asks."""
    if others := [term.name for term in terms if not times(term)]:
        return [f"rewards: {', '.join(others)} does not judge when a duplex rollout stops"]
    if problems := _reply_problems(options, terms):
        return problems
    if options.reward.check_rewards:
        found = [(term.name, *why) for term in terms for why in timing_problems(term, full=False)]
        found += [("+".join(term.name for term in terms), *why) for why in policy_problems(terms)]
        if found:
            return [f"{name}: {check}: {why}" for name, check, why in found]
    timed = [term for term in terms if not reads_reply(term)]
    try:
        score_stops(draw_streams("rl", dict.fromkeys(PRESETS["rl"].kinds, 1), options.train.seed), timed)
    except RewardError as error:
        return [f"rewards: {error}"]
    return []


def _reply_problems(options: DuplexOptions, terms: Sequence[Component]) -> list[str]:
    """Why what is said after a stop cannot be judged."""
    names, duplex, judge = [term.name for term in terms if reads_reply(term)], options.duplex, options.reward.judge
    if not names:
        return [f"judge {judge}: of these rewards none asks it; add content, or leave it out"] if judge else []
    problems = []
    if len(names) == len(terms):
        problems.append(f"rewards: {', '.join(names)} says nothing of when to speak: add early_response, turn_taking")
    if duplex.timing_estimator != "sampled":
        problems.append(f"timing_estimator {duplex.timing_estimator} asks what every stop earns; of {', '.join(names)} "
                        "only drawn stops are known, each of which costs a reply: choose sampled")  # fmt: skip
    if duplex.control in ("shuffled", "gold"):
        problems.append(f"control {duplex.control}: it makes nothing of {', '.join(names)}; leave one of them out")
    try:
        if judge:
            judge_from_spec(judge)
    except RewardError as error:
        problems.append(str(error))
    return problems


def taught_model(options: DuplexOptions, accelerator: Accelerator) -> None:
    """Where `options` ask for a new model, teach one in the run folder, or take the one that lies there; the options
    name it from then on. A dry run only makes one in memory.

    Raises:
        ConfigError: what is wrong with rewards, launcher, trackers, folder or what trains, before anything is written.
        DivergedError: the supervised stage came to no finite loss.
    """
    ranks = Ranks(accelerator.process_index, accelerator.num_processes)
    if (kind := accelerator.distributed_type.name) in ("FSDP", "DEEPSPEED"):
        raise ConfigError([f"{kind} of the launcher: streams train on whole copies of a model: leave it out"])
    installed_trackers(options.tracker)
    if options.model.model != NEW:
        return
    run, new = Run(options.train.output, active=ranks.main), replace(options, model=replace(options.model))
    folder = run.folder / TAUGHT
    options.model.model = str(folder)  # by this name a checkpoint knows it
    take_up(run, options, ranks)
    terms = components(options.reward.rewards)
    if problems := timing_reward_problems(options, terms):
        raise ConfigError(problems)
    family = family_to_teach(new)
    if recorded := options.recorded("sft_data", "rl_data", "test_data"):
        overlap, chunks = options.data.allow_overlap, options.reply_chunks(terms)
        take_recorded(family, recorded, allow_overlap=overlap, answer_chunks=chunks)
    else:
        feature_world(family, options.duplex)
    make_trainable(family, options.adapter)
    done, there = ranks.from_main((taught_already(options, folder), folder.exists()) if ranks.main else None)
    if there and not (done or options.train.overwrite):
        raise ConfigError([f"{folder} holds another model than these options make: choose another --output, or replace "
                           "it with --overwrite"])  # fmt: skip
    if not (done or options.train.dry_run):
        ranks.together(lambda: _teach(new, run) if ranks.main else None, UserError)


def _teach(options: DuplexOptions, run: Run) -> None:
    """The supervised stage, whole or not at all, by the one process that has the folder."""
    folder, partial = run.folder / TAUGHT, run.folder / PARTIAL
    if why := run.lock.hold():
        raise ConfigError([why])
    try:
        for path in (partial, folder):
            if path.exists():
                shutil.rmtree(path)
        teach_duplex(options, partial)
        partial.rename(folder)
    finally:
        run.lock.release()
