"""rollouts/step_*.jsonl -> groups as a report shows them, and the flags by which its reader finds what matters.

wrong_high_thinking      accuracy 0, and thinking in the upper quarter of the run
right_broken_reasoning   accuracy 1, and consistency, format or thinking below 0.5
consistency_missing      consistency could not be graded
longest                  among the longest 1 % of the run, by tokens
truncated                cut by the length limit
copy                     another rollout of the group says the same
early_answer, no_answer  it says when to speak: before the user's turn is over, or never; see timelines.py
no_variance              (group) every advantage is 0
biggest_change           (group) among the row's neighbouring appearances whose mean R differs most
"""

from __future__ import annotations

from array import array
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import groupby, pairwise
from pathlib import Path
from statistics import quantiles
from typing import Any

from covo_rl.data.files import whole_lines
from covo_rl.prompt import Parsed, parse
from covo_rl.run.report.replies import codes_in_row
from covo_rl.run.report.timelines import TIMING_COLUMNS, group_timing, rollout_timing, timing_flags
from covo_rl.run.report.values import MAX_TEXT, Notes, compact, finite, mapping, readable, readable_start, texts

#: what a row of a rollouts file says of its rollout; all else is of the data, or was logged by a reward
_OWN = frozenset(
    """
    id clips clip_keys question choices answer group rollout completion completion_codes parsed_answer stop_reason
    problems rewards missing reward_total advantage length lag mean_logp token_logps timing speech
    """.split()  # noqa: SIM905
)
#: what our rewards, and a judge, say of a score, as NAME_reason, ...; and what it reads like
_REASONS = {"reason": "", "rationale": "", "problems": "", "unmet": "not met: "}
#: characters of a value of the row that a page shows
_MAX_FACT = 500
_LOW = 0.5
_LONGEST_SHARE = 0.01
#: share of the pairs of appearances, and how many at most
_CHANGES_SHARE, _MAX_CHANGES = 0.05, 50

Group = dict[str, Any]


def step_groups(path: Path, run: int, step: int, generations: int, notes: Notes) -> list[Group]:
    """The groups of a step, without flags; `clips` are (name, content key or ""), `tokens` packed: see `unpack_tokens`.

    Older files do not number groups: there, rows of one id in a row are cut into groups of `generations`.
    """
    try:
        rows, damage = whole_lines(path)
    except OSError as error:  # a resume has just moved it aside, or it may not be read
        rows, damage = [], [f"{path.name} is left out: {error}"]
    for line in damage:
        notes.add(line)
    whole = [row for row in rows if isinstance(row.get("completion"), str)]
    notes.count("rows of rollouts without a text `completion` are left out", len(rows) - len(whole))
    return [_group(number, members, run, step, notes) for number, members in enumerate(_members(whole, generations))]


def _members(rows: Sequence[Mapping[str, Any]], generations: int) -> Iterator[list[Mapping[str, Any]]]:
    if all(type(row.get("group")) is int and "clip_keys" in row for row in rows):
        numbered: dict[tuple[int, str], list[Mapping[str, Any]]] = defaultdict(list)
        for row in rows:
            numbered[row["group"], compact(row.get("id"))].append(row)
        yield from (numbered[key] for key in sorted(numbered))
        return
    for _, members in groupby(rows, key=lambda row: compact(row.get("id"))):
        members = list(members)
        for start in range(0, len(members), generations):
            yield members[start : start + generations]


def _group(number: int, rows: Sequence[Mapping[str, Any]], run: int, step: int, notes: Notes) -> Group:
    first = rows[0]
    number = first["group"] if type(first.get("group")) is int and "clip_keys" in first else number
    names, keys = first.get("clips"), first.get("clip_keys")
    names = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    keys = keys if isinstance(keys, list) and len(keys) == len(names) else [""] * len(names)
    answer = first.get("answer")
    reasons = _reasons(first)
    rollouts = [_rollout(row, reasons, notes) for row in rows]
    timing = group_timing(rows, notes)
    if timing is None:
        copies = Counter(rollout["completion"] for rollout in rollouts)
        for rollout in rollouts:
            if copies[rollout["completion"]] > 1:
                rollout["flags"].append("copy")
    else:
        for row, rollout in zip(rows, rollouts, strict=True):
            rollout |= rollout_timing(row)
            rollout["flags"] += timing_flags(rollout, timing)
    columns = _columns(rows, reasons, notes)
    return {
        "run": run,
        "step": step,
        "group": number,
        "id": compact(first.get("id")),
        "question": compact(first.get("question")),
        "choices": texts(first.get("choices")),
        "answer": None if answer is None else compact(answer),
        "clips": [(name, key if isinstance(key, str) else "") for name, key in zip(names, keys, strict=True)],
        "columns": columns if timing is None else {n: v for n, v in columns.items() if n not in TIMING_COLUMNS},
        "flags": ["no_variance"] if all(rollout["advantage"] == 0 for rollout in rollouts) else [],
        "rollouts": rollouts,
        **({} if timing is None else {"timing": timing}),
    }


def _columns(rows: Sequence[Mapping[str, Any]], reasons: Collection[str], notes: Notes) -> dict[str, str]:
    """What the data says of the row, shortly; what rewards logged differs between rollouts and is none of it."""
    facts = {name: value for name, value in rows[0].items()
             if name not in _OWN and name not in reasons and value is not None}  # fmt: skip
    shared = [name for name, value in facts.items() if all(_same(row.get(name), value) for row in rows)]
    shown = {readable(name.removeprefix("row/")): compact(facts[name]) for name in shared}
    for name in [name for name, value in shown.items() if len(value) > _MAX_FACT]:
        notes.count(f"groups have a column {name[:80]} of over {_MAX_FACT} characters, which is not shown")
        del shown[name]
    return shown


def _same(one: Any, other: Any) -> bool:
    try:
        return one == other
    except RecursionError:  # nested as deep as JSON is read
        return False


def _reasons(row: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Name of a value that a reward logged about a score -> (component, what it reads like).

    `spoken(part='text')` logs `spoken_reason`, and where another reward does too `spoken(part='text')/spoken_reason`.
    """
    rewards = mapping(row.get("rewards"))
    components = {name.partition("(")[0]: name for name in reversed([*rewards])} | {name: name for name in rewards}
    reasons = {}
    for name in row:
        owner, _, value = name.rpartition("/")
        base, _, kind = value.rpartition("_")
        component = owner if owner in rewards else components.get(base)
        if kind in _REASONS and component is not None:
            reasons[name] = component, _REASONS[kind]
    return reasons


@lru_cache(maxsize=512)
def _parts(text: str, stop: str) -> Parsed:
    return parse(text, stop)


def _rollout(row: Mapping[str, Any], logged: Mapping[str, tuple[str, str]], notes: Notes) -> dict[str, Any]:
    text, stop = row["completion"], "length" if row.get("stop_reason") == "length" else "stop"
    completion, parts = readable_start(text), _parts(text[:MAX_TEXT], stop)
    notes.count("completions are cut in the page", len(text) > MAX_TEXT)
    length, rewards = finite(row.get("length")), mapping(row.get("rewards"))
    reasons = {readable(name): f"not graded: {compact(why)}"
               for name, why in mapping(row.get("missing")).items()}  # fmt: skip
    for name, (component, label) in logged.items():
        if why := compact(row.get(name)):
            said = reasons.get(readable(component))
            reasons[readable(component)] = "; ".join(filter(None, (said, label + why)))
    return {
        "completion": completion,
        "think": None if parts.think is None else readable(parts.think),
        "answer": None if parts.answer is None else readable(parts.answer),
        "stop": stop,
        "problems": texts(row.get("problems")),
        "rewards": {readable(name): finite(value) for name, value in rewards.items()},
        "total": finite(row.get("reward_total")),
        "advantage": finite(row.get("advantage")),
        "reasons": reasons,
        "length": None if length is None else int(length),
        "logp": finite(row.get("mean_logp")),
        "tokens": _packed_tokens(row.get("token_logps"), text),
        "flags": ["truncated"] if stop == "length" else [],
        **codes_in_row(row, notes),
    }  # fmt: skip


# -- log-probs of tokens -----------------------------------------------------------------------------------------


def _packed_tokens(value: Any, text: str) -> tuple[array, array] | None:
    """(characters of the completion as it is shown, 1/100 nat) by token; None where that does not make up the text."""
    if not (isinstance(value, list) and len(value) == 2 and all(isinstance(part, list) for part in value)):
        return None
    try:
        counts, logps = array("i", value[0]), array("i", value[1])
    except (TypeError, OverflowError):
        return None
    if len(counts) != len(logps) or sum(counts) != len(text) or len(text) > MAX_TEXT or min(counts, default=0) < 0:
        return None
    if readable(text) != text:
        counts = array("i", [len(readable(piece)) for piece in _pieces(text, counts)])
    return counts, logps


def _pieces(text: str, counts: Iterable[int]) -> list[str]:
    pieces, start = [], 0
    for count in counts:
        pieces.append(text[start : start + count])
        start += count
    return pieces


def unpack_tokens(rollout: Mapping[str, Any]) -> list[list[Any]] | None:
    """[[piece of the completion..], [1/100 nat..]] by token."""
    if rollout["tokens"] is None:
        return None
    counts, logps = rollout["tokens"]
    return [_pieces(rollout["completion"], counts), list(logps)]


# -- flags -------------------------------------------------------------------------------------------------------


def flag_run(groups: Sequence[Group]) -> None:
    """Add the flags that hang on all groups of a run."""
    rollouts = [rollout for group in groups for rollout in group["rollouts"]]
    thinking = [value for rollout in rollouts if (value := _score(rollout, "thinking")) is not None]
    upper = quantiles(thinking, n=4, method="inclusive")[2] if len(thinking) > 1 else 1.0
    for rollout in rollouts:
        rollout["flags"] += _score_flags(rollout, upper)
    lengths = sorted((n for n, rollout in enumerate(rollouts) if rollout["length"]),
                     key=lambda n: -rollouts[n]["length"])  # fmt: skip
    for n in lengths[: max(1, int(_LONGEST_SHARE * len(lengths)))]:
        rollouts[n]["flags"].append("longest")
    for group in _most_changed(groups):
        if "biggest_change" not in group["flags"]:
            group["flags"].append("biggest_change")


def _score(rollout: Mapping[str, Any], component: str) -> float | None:
    """The score of a component, which may have been given with arguments."""
    rewards = rollout["rewards"]
    name = next((name for name in rewards if name.partition("(")[0] == component), None)
    return None if name is None else rewards[name]


def _score_flags(rollout: Mapping[str, Any], upper_thinking: float) -> Iterator[str]:
    accuracy, thinking = _score(rollout, "accuracy"), _score(rollout, "thinking")
    if accuracy == 0 and thinking is not None and thinking >= upper_thinking and thinking > 0:
        yield "wrong_high_thinking"
    reasoning = [_score(rollout, name) for name in ("consistency", "format", "thinking")]
    if accuracy == 1 and any(value is not None and value < _LOW for value in reasoning):
        yield "right_broken_reasoning"
    if any(name.partition("(")[0] == "consistency" and value is None for name, value in rollout["rewards"].items()):
        yield "consistency_missing"


def _most_changed(groups: Iterable[Group]) -> Iterator[Group]:
    """Both groups of the neighbouring appearances of a row between which its mean R changed most."""
    appearances: dict[str, list[tuple[float, Group]]] = defaultdict(list)
    for group in sorted(groups, key=lambda group: group["step"]):
        totals = [rollout["total"] for rollout in group["rollouts"] if rollout["total"] is not None]
        if totals:
            appearances[group["id"]].append((sum(totals) / len(totals), group))
    pairs = [
        (abs(b[0] - a[0]), a[1], b[1])
        for row in appearances.values()
        for a, b in pairwise(row)
        if a[1]["step"] != b[1]["step"]  # of few rows a step draws one more than once
    ]
    pairs.sort(key=lambda pair: -pair[0])
    for change, one, other in pairs[: min(_MAX_CHANGES, max(1, int(_CHANGES_SHARE * len(pairs))))]:
        if change > 0:
            yield from (one, other)
