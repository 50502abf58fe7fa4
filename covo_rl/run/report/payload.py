"""What a report holds, read from run folders: see `report_payload`. No torch, but where replies are spoken.

    run folders -> overview.py (curves, evaluations) + groups.py (rollouts, flags) + sound.py (clips) -> one budget

The form of the payload is written down, and checked, in tests/report_contract.py; docs/report.md says what goes first
where the budget is short.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from covo_rl.run.report.groups import Group, flag_run, step_groups, unpack_tokens
from covo_rl.run.report.overview import comparison, run_overview
from covo_rl.run.report.replies import Replies
from covo_rl.run.report.sound import Sounds as Clips
from covo_rl.run.report.values import Notes, Progress, finite

#: which sounds go into the page: by interest as far as the budget goes, none, or all whatever they take
Sounds = Literal["interest", "none", "all"]
#: bytes of the page without its payload
_PAGE = 200_000
#: of a clip's entry, without sound
_ENTRY = 150
#: share of the budget that log-probs of tokens leave to sounds, where there are any
_FOR_SOUNDS = 0.25
#: share of the room for sounds that those of replies may take
_FOR_REPLIES = 0.5
_SERIOUS = {"wrong_high_thinking", "right_broken_reasoning", "consistency_missing", "truncated"}
_STEP = re.compile(r"step_([0-9]+)\.jsonl")


@dataclass
class _Run:
    """A run folder while it is read."""

    number: int
    folder: Path
    overview: dict[str, Any]
    files: dict[int, Path]
    notes: Notes
    groups: list[Group] = field(default_factory=list)
    left_out: int = 0

    @property
    def generations(self) -> int:
        return max(1, int(finite(self.overview["config"].get("num_generations")) or 1))

    @property
    def decoder(self) -> str | None:
        name = self.overview["config"].get("speech_decoder")
        return name if isinstance(name, str) and name else None


def report_payload(
    folders: Sequence[str | Path], *, max_mb: float = 20.0, sounds: Sounds = "interest",
    page: str | Path | None = None, speech_decoder: str | None = None,
    progress: Progress = lambda part, done, total: None,
) -> dict[str, Any]:  # fmt: skip
    """Everything that a report of these run folders shows, JSON-ready.

    Args:
        folders: run folders; a run may be under way, cut, damaged, or of an older version. What is missing is in the
            `notes`, with counts.
        max_mb: MB of 10^6 bytes that the page may weigh.
        page: the file that the page will be; links to sounds are relative to its folder. Default: in the first run.
        speech_decoder: what plays spoken replies: a folder, or builtin:NAME. Default: what each run names.
        progress: is told how far it is, often.
    """
    notes, runs = Notes(), [_opened(number, Path(folder)) for number, folder in enumerate(folders)]
    compared = comparison([run.overview for run in runs], notes)
    room = max_mb * 1e6 - _PAGE - _packed([[run.overview for run in runs], compared])
    text, tokens = _read(runs, room, progress)
    for run in runs:
        flag_run(run.groups)
    groups = [group for run in runs for group in run.groups]
    has_sounds = sounds != "none" and any(group["clips"] or _is_spoken(group) for group in groups)
    room -= text
    tokens, tokens_left_out = _with_tokens(groups, tokens, room - _FOR_SOUNDS * has_sounds * max_mb * 1e6)
    clips = Clips(Path(page).parent if page else folders[0], notes)
    decoders = {run.number: (speech_decoder or run.decoder, run.notes) for run in runs}
    _add_sounds(runs, clips, room - tokens, sounds, decoders, progress)
    payload = {
        "version": 1,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "runs": [{**run.overview, "notes": run.notes.lines()} for run in runs],
        "groups": groups,
        "clips": clips.entries,
        "comparison": compared,
    }
    counts = _counts(payload, runs, tokens_left_out)
    _say_what_is_left_out(counts, notes, max_mb)
    return {**payload, "notes": notes.lines(), "counts": counts}


def _opened(number: int, folder: Path) -> _Run:
    notes = Notes()
    overview = run_overview(folder, notes)
    files = {int(match[1]): path for path in (folder / "rollouts").glob("step_*.jsonl")
             if (match := _STEP.fullmatch(path.name))}  # fmt: skip
    logged = {step for row in overview["metrics"] if isinstance(step := row.get("step"), int)}
    if overview["config"].get("log_rollouts") is False:
        notes.add("rollouts were not logged (log_rollouts is false)")
    else:
        notes.count("steps of metrics.jsonl have no rollouts file", len(logged - files.keys()))
    return _Run(number, folder, overview, dict(sorted(files.items())), notes)


# -- what goes in ------------------------------------------------------------------------------------------------


def _read(runs: Sequence[_Run], room: float, progress: Progress) -> tuple[float, float]:
    """Read steps into `groups` until their text fills the room: the last one, the first, then evenly between.

    The last step of a run is always there.

    Returns:
        (bytes of the text, bytes of the log-probs of all tokens) in the page.
    """
    text, tokens, clips = 0.0, 0.0, set()
    waiting = {run.number: _spread(list(run.files)) for run in runs}
    number, total = 0, sum(len(run.files) for run in runs)
    while waiting:
        for run in [run for run in runs if run.number in waiting]:
            step = next(waiting[run.number], None)
            if step is None:
                del waiting[run.number]
                continue
            progress("rollouts", number, total)
            number += 1
            groups = step_groups(run.files[step], run.number, step, run.generations, run.notes)
            if not groups:
                run.notes.count("rollouts files are empty, or were gone when they were read")
            new = {clip for group in groups for clip in group["clips"]} - clips
            size = _packed([_without_tokens(group) for group in groups]) + _ENTRY * len(new)
            if text + size > room and run.groups:
                run.left_out = 1 + len(list(waiting[run.number]))
                del waiting[run.number]
                continue
            text += size
            clips |= new
            tokens += _packed([unpack_tokens(rollout) for group in groups for rollout in group["rollouts"]])
            run.groups += groups
    if number:
        progress("rollouts", total, total)
    for run in runs:
        run.groups.sort(key=lambda group: (group["step"], group["group"]))
    return text, tokens


def _spread(steps: Sequence[int]) -> Iterator[int]:
    """The last, the first, then those between so that what was given so far lies evenly (van der Corput)."""
    bits = len(steps).bit_length()
    order = [len(steps) - 1, 0, *(int(f"{n:0{bits}b}"[::-1], 2) for n in range(2**bits))]
    yield from (steps[n] for n in dict.fromkeys(order) if 0 <= n < len(steps))


def _without_tokens(group: Group) -> Group:
    return {**group, "rollouts": [{**rollout, "tokens": None} for rollout in group["rollouts"]]}


def _packed(content: Any) -> float:
    """Bytes that this takes in the page: JSON, compressed, as base64."""
    return 4 / 3 * len(zlib.compress(json.dumps(content, separators=(",", ":")).encode(), 6))


def _with_tokens(groups: Sequence[Group], size: float, room: float) -> tuple[float, int]:
    """Unpack the log-probs of tokens: of all rollouts, or, where there is no room, of those with a flag, last first.

    Returns:
        (bytes that they take, rollouts whose log-probs are left out)
    """
    rollouts = [(group, rollout) for group in groups for rollout in group["rollouts"] if rollout["tokens"]]
    total = sum(len(rollout["tokens"][1]) for _, rollout in rollouts)
    if size > room:
        rollouts = [(group, rollout) for group, rollout in rollouts if _interest(group, [rollout])]
        rollouts.sort(key=lambda pair: -pair[0]["step"])
    taken, left = 0.0, set()
    for _, rollout in rollouts:
        share = size * len(rollout["tokens"][1]) / total
        if size <= room or taken + share <= room:
            taken += share
            left.add(id(rollout))
    dropped = 0
    for rollout in (rollout for group in groups for rollout in group["rollouts"]):
        dropped += rollout["tokens"] is not None and id(rollout) not in left
        rollout["tokens"] = unpack_tokens(rollout) if id(rollout) in left else None
    return taken, dropped


def _interest(group: Group, rollouts: Iterable[dict[str, Any]]) -> int:
    """How much there is to look at."""
    flags = [flag for rollout in rollouts for flag in rollout["flags"] if flag in _SERIOUS]
    return 2 * ("biggest_change" in group["flags"]) + len(set(flags))


def _is_spoken(group: Group) -> bool:
    return any("codes" in rollout for rollout in group["rollouts"])


def _add_sounds(
    runs: Sequence[_Run], clips: Clips, room: float, sounds: Sounds, decoders: Mapping[int, tuple[str | None, Notes]],
    progress: Progress,
) -> None:  # fmt: skip
    """Name the clips of all groups, and embed them: those of groups to look at first, then of the last steps.

    Before them replies are spoken, in the same order, which take at most a share of the room.
    """
    for run in runs:
        for group in run.groups:
            group["clips"] = [clips.add(name, key, run.folder) for name, key in group["clips"]]
    groups = [group for run in runs for group in run.groups]
    groups.sort(key=lambda group: (-_interest(group, group["rollouts"]), -group["step"]))
    room = {"interest": room, "none": 0.0, "all": float("inf")}[sounds]
    replies = Replies(clips, _FOR_REPLIES * room, all_=sounds == "all")
    if sounds != "none":
        replies.speak(groups, decoders, progress)
    room -= replies.taken
    clips.embed(list(dict.fromkeys(entry for group in groups for entry in group["clips"])), room, progress)
    clips.check_links()


# -- what is said of it ------------------------------------------------------------------------------------------


def _counts(payload: dict[str, Any], runs: Sequence[_Run], tokens_left_out: int) -> dict[str, int]:
    groups, clips = payload["groups"], payload["clips"].values()
    return {
        "rollouts": sum(len(group["rollouts"]) for group in groups),
        "groups": len(groups),
        "steps": len({(group["run"], group["step"]) for group in groups}),
        "steps_left_out": sum(run.left_out for run in runs),
        "sounds_embedded": sum(clip["src"] is not None for clip in clips),
        "sounds_linked": sum(clip["src"] is None and clip["href"] is not None for clip in clips),
        "sounds_missing": sum(clip["src"] is None and clip["href"] is None for clip in clips),
        "tokens_left_out": tokens_left_out,
        "bytes": _PAGE + int(_packed(payload)),
    }


def _say_what_is_left_out(counts: dict[str, int], notes: Notes, max_mb: float) -> None:
    budget = f"the budget of {max_mb:g} MB (--max-mb)"
    notes.count(f"logged steps are left out, between the first and the last: {budget}", counts["steps_left_out"])
    notes.count(f"rollouts are without the log-probs of their tokens: {budget}", counts["tokens_left_out"])
    notes.count("sounds are not in the page but linked: they play where their files lie", counts["sounds_linked"])
    notes.count("sounds are missing; the groups say why", counts["sounds_missing"])
    if counts["bytes"] > max_mb * 1e6:
        notes.add(
            f"the page takes about {counts['bytes'] / 1e6:.1f} MB, more than {budget}: what it must hold is larger"
        )
