"""May a run start, or go on, in its folder? Asked before a model is loaded, which changes nothing; then it owns it."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from covo_rl.config import ConfigError, Options
from covo_rl.data.files import RecordError, plain
from covo_rl.models import family_fingerprint
from covo_rl.records.console import console
from covo_rl.records.folder import Run, environment
from covo_rl.resolve import reward_files
from covo_rl.rewards import Component, RewardError
from covo_rl.rewards.functions import FunctionReward
from covo_rl.rewards.judging import template_hashes
from covo_rl.train.checkpoint import CheckpointError, CheckpointStore
from covo_rl.train.checkpoint.identity import (
    adapter_fingerprint,
    check_changes,
    differences,
    reward_fingerprint,
)
from covo_rl.train.checkpoint.store import read_values
from covo_rl.train.checkpoint.timeline import ASIDE, PLAN, logged_bytes
from covo_rl.train.ranks import Ranks
from covo_rl.types import Prompt


class RunFinished(SystemExit):
    """`--resume` of a run that has nothing left to do: exit code 0, and its folder as it was."""

    def __init__(self) -> None:
        super().__init__(0)


@dataclass(frozen=True)
class Start:
    """What `look_at` saw: what stands in the way, what is worth saying, whether nothing is left to do, and what the
    checkpoint that is taken up says about its run (None without one)."""

    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    finished: bool = False
    saved: Mapping[str, Any] | None = None

    def changes(self, options: Options, contents: Mapping[str, Any] | None) -> list[str]:
        """What is wrong where other rows or another base model train than in the checkpoint: `contents` are the
        `run_contents`, known once both are loaded."""
        if self.saved is None or contents is None:
            return []
        return _refused(self.saved, {"config": self.saved["config"], **contents}, options)


def continues(run: Run, options: Options) -> bool:
    """Whether --resume goes on with the run in this folder, and not from a checkpoint that lies elsewhere."""
    source = options.train.resume
    return source == "auto" or bool(source and Path(source).resolve().is_relative_to(run.folder.resolve()))


def take_up(run: Run, options: Options, ranks: Ranks) -> Start:
    """The run folder as it is, before anything is loaded, by the main process for all.

    Raises:
        ConfigError: somebody else writes there, another run lies there, or --resume does not fit its checkpoint.
        RunFinished: --resume of a run that has nothing left to do.
    """
    start = ranks.from_main(look_at(run, options, ranks.world) if ranks.main else None)
    for note in start.notes if ranks.main else ():
        console.print(note)
    if start.problems:
        raise ConfigError(start.problems)
    if start.finished:
        raise RunFinished
    return start


def look_at(run: Run, options: Options, world: int) -> Start:
    """The folder of `run` before a start with `options` on `world` ranks; reads, and changes nothing."""
    train, store = options.train, CheckpointStore(run.folder / "checkpoints")
    named = train.resume in (None, "auto") or Path(train.resume).is_dir()  # else that is what is said
    if named and (occupied := run.lock.refusal() or run.refusal(overwrite=train.overwrite or continues(run, options))):
        return Start(notes=(f"a start would be refused: {occupied}",)) if train.dry_run else Start((occupied,))
    interrupted = any((run.folder / ASIDE).glob(f"*/{PLAN}"))  # the checkpoints are in motion: resuming sorts them out
    if not train.resume or (interrupted and named):
        return Start()
    try:
        path, _ = store.meant(train.resume)
        if path is None:
            return Start()
        about = store.about(path, world)
        state, rewards = read_values(path / "state.json"), reward_fingerprint(options.reward.rewards)
        adapter = adapter_fingerprint(options.adapter.adapter)
        if here := path.resolve().parent == store.folder.resolve():
            logged_bytes(run.folder, state["metrics_bytes"])
    except (CheckpointError, RewardError) as error:
        return Start((str(error),))
    saved = {**state, "update": about["update"]}
    now = {"config": plain(options.flat()), "data": saved["data"], "rewards": rewards, "adapter": adapter,
           "family": family_fingerprint(options.model.family)}  # fmt: skip
    problems = _refused(saved, now, options)
    if not problems and here and about["step"] >= train.max_steps and (run.folder / "result.json").is_file():
        note = (f"{run.folder} holds this run, finished: nothing to do. `covo-rl eval` evaluates it on other rows, a "
                "larger --max-steps with --allow_changed_config trains on")  # fmt: skip
        return Start(notes=(note,), finished=True)
    return Start(tuple(problems), saved=saved)


def _refused(saved: Mapping[str, Any], now: Mapping[str, Any], options: Options) -> list[str]:
    """What `now` changes that a resume may not change."""
    try:
        allowed, mid_batch = options.train.allow_changed_config, bool(saved["update"])
        check_changes(differences(saved, now)[0], allowed=allowed, mid_batch=mid_batch)
    except ConfigError as error:
        return error.problems
    return []


def run_origin(
    options: Options, terms: Sequence[Component], files: Mapping[str, Path], in_memory: Mapping[str, str],
    prompts: Sequence[Prompt], family: object,
) -> tuple[dict[str, Path], dict[str, Any]]:  # fmt: skip
    """What environment.json says of rows and rewards: (files, which are hashed there; source and hash of functions that
    no file holds, what the rows in memory were, the family's class, and `prompts` as its chat template writes them)."""
    functions = {term.name: term.reward for term in terms if isinstance(term.reward, FunctionReward)}
    rewards = reward_files([term.name for term in terms if term.name not in functions])
    code = {name: {"sha256": reward.sha256, "code": reward.code} for name, reward in functions.items()}
    more = {"in_memory": dict(in_memory), "reward_functions": code,
            "family": f"{type(family).__module__}:{type(family).__name__}",
            "prompts": {prompt.example.id: prompt.text for prompt in prompts}}  # fmt: skip
    files = {**files, **{f"reward:{name}": path for name, path in rewards.items()}}
    files |= {f"family:{path}": Path(path).expanduser() for path in family_fingerprint(options.model.family)}
    return files, {name: content for name, content in more.items() if content}


def not_shared(run: Run, ranks: Ranks, patience: float = 30.0) -> str | None:
    """Why the ranks cannot write one run, or None; a collective. Each must see the lock that the main one takes, as its
    part of every checkpoint lies beside it. `patience`: seconds after which a file system shows a file everywhere."""
    if ranks.world == 1:
        return None
    why, content = ranks.from_main((run.lock.hold(), run.lock.content()) if ranks.main else None)
    if why:
        return why
    end = time.monotonic() + patience
    while (seen := run.lock.content()) != content and time.monotonic() < end:
        time.sleep(0.2)
    place = f"rank {ranks.rank} ({run.folder.absolute()} on {socket.gethostname()})"
    blind = [other for other in ranks.gathered(None if seen == content else place) if other]
    if not blind:
        return None
    run.lock.release()
    return (f"{', '.join(blind[:3])}{' ...' * (len(blind) > 3)} cannot see what rank 0 writes: several machines need "
            "one --output that all of them reach by the same path")  # fmt: skip


def own(run: Run, options: Options, files: Mapping[str, Path], more: Mapping[str, Any] | None = None) -> str | None:
    """Lock the folder, make room where --overwrite says so, write config.yaml and environment.json, which holds the
    hashes of `files` and `more`; returns what went wrong, or None."""
    train, record = options.train, {**environment(files), **(more or {})}
    if options.reward.judge:
        record["judge_templates"] = template_hashes(options.reward.judge_audio)
    if why := run.lock.hold() or run.refusal(overwrite=train.overwrite or continues(run, options)):
        run.lock.release()
        return why
    try:
        run.sweep()
        if train.overwrite:
            run.clear()
        run.write_json("environment.json", record)
        run.write_config(options.flat())
    except (OSError, RecordError) as error:
        run.lock.release()
        return f"{run.folder} cannot be written: {error}"
    return None
