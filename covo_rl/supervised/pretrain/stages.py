"""The stages of pre-training and that of chat, as options below those of a file, and the tasks with their rows.

Stage 1 teaches the adapter alone to carry speech to a frozen decoder; stage 2 trains adapter, decoder (with its
embeddings) and head on the mixture; chat trains the same on dialogues. The encoder is frozen in all.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from covo_rl.resolve import ConfigError

if TYPE_CHECKING:
    from covo_rl.supervised.pretrain.config import PretrainConfig
    from covo_rl.supervised.pretrain.stream import TaskData

#: tokens of the published mixture, in billions: a task's weight where none is given
WEIGHTS = {
    "asr": 80.0, "tts": 160.0, "audio_only": 240.0, "continuation": 160.0, "interleave_1": 360.0,
    "interleave_2": 180.0, "text": 800.0, "full_duplex": 5.0,
}  # fmt: skip
#: the tasks of stage 2; full duplex needs streams, and a model that has the ids: whoever has both names it
STAGE_2 = [name for name in WEIGHTS if name != "full_duplex"]
#: shares of the tokens of the chat stage
CHAT_WEIGHTS = {
    "general": 0.4, "dialogue": 0.3, "speech_understanding": 0.1, "speech_generation": 0.1, "audio_understanding": 0.1,
}  # fmt: skip
STAGES: dict[int | str, dict[str, Any]] = {
    1: {"train_parts": ["audio_adapter"], "tasks": {"asr": {}}, "learning_rate": 1e-4, "steps": 50_000,
        "warmup_steps": 40_000},
    2: {"train_parts": ["audio_adapter", "llm", "lm_head"], "tasks": {name: {} for name in STAGE_2},
        "learning_rate": 3e-5, "steps": 500_000, "warmup_steps": 20_000},
    "chat": {"train_parts": ["audio_adapter", "llm", "lm_head"], "tasks": {name: {} for name in CHAT_WEIGHTS},
             "learning_rate": 1e-5, "steps": 50_000, "warmup_steps": 1000},
}  # fmt: skip
#: what one draw takes -> the option that names the rows of all tasks of this kind
DEFAULT_DATA = {
    "row": "data", "document": "data", "text": "text_data", "dialogue": "dialogue_data", "stream": "duplex_data",
}  # fmt: skip


def planned_tasks(config: PretrainConfig, option: str = "tasks") -> dict[str, TaskData]:
    """The tasks of `config.tasks` (or `eval_tasks`) by name, with weights and rows; those of weight 0 are left out.

    Raises:
        ConfigError: unknown tasks, impossible weights, tasks without rows: all of them.
    """
    from covo_rl.supervised.pretrain.stream import TaskData
    from covo_rl.supervised.pretrain.tasks import TASKS

    problems: list[str] = []
    planned: dict[str, TaskData] = {}
    for name, given in getattr(config, option).items():
        task = TASKS.get(name)
        if task is None:
            near = difflib.get_close_matches(str(name), TASKS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(TASKS)}"
            problems.append(f"{option}: there is no task {name!r:.80}; {hint}")
            continue
        weight = given.get("weight", {**WEIGHTS, **CHAT_WEIGHTS}.get(name, 1.0))
        default = DEFAULT_DATA[task.unit]
        data = given.get("data", getattr(config, default))
        if data is None and weight:
            problems.append(f"{option}: {name} has weight {weight:g} and no rows: give {default}, or data of its own, "
                            "or weight 0")  # fmt: skip
        audio_dir = given.get("audio_dir", config.audio_dir if "data" not in given else None)
        if task.unit == "stream":
            if "audio_dir" in given:
                problems.append(f"{option}: {name} has audio_dir, and its streams hold their recordings: leave it out")
            audio_dir = None
        if data is not None and weight:
            planned[name] = TaskData(float(weight), data, audio_dir)
    if not planned and not problems:
        problems.append(f"{option}: no task has a weight above 0: nothing would be drawn")
    if problems:
        raise ConfigError(problems)
    return planned


def task_problems(tasks: Any, option: str) -> list[str]:
    """What is wrong with the form of `tasks: {name: {weight, data, audio_dir}}`."""
    if not isinstance(tasks, Mapping):
        return [f"{option}: expected a mapping of tasks, found {type(tasks).__name__}"]
    problems = []
    for name, given in tasks.items():
        where = f"{option}: {name!s:.80}"
        if not isinstance(given, Mapping):
            problems.append(f"{where}: expected a mapping of weight, data, audio_dir; found {given!r:.80}")
            continue
        unknown = [key for key in given if key not in ("weight", "data", "audio_dir")]
        problems += [f"{where}: unknown option {key!r:.80}; there are weight, data, audio_dir" for key in unknown]
        weight = given.get("weight", 0)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
            problems.append(f"{where}: weight {weight!r:.80}: expected a number of at least 0")
        data = given.get("data", "")
        if not (isinstance(data, str) or (isinstance(data, list) and data and all(isinstance(d, str) for d in data))):
            problems.append(f"{where}: data {data!r:.80}: expected a file, a folder, a pattern, or a list of these")
        if not isinstance(given.get("audio_dir", ""), str):
            problems.append(f"{where}: audio_dir {given['audio_dir']!r:.80}: expected a folder")
    return problems
