"""Do training rows give held-out rows away?

| kind     | serious | meaning                                                                               |
|----------|---------|---------------------------------------------------------------------------------------|
| row      | yes     | same sound, same question, same choices, same answer (or, without audio, same text)   |
| audio    | yes     | same sound, whatever is asked                                                         |
| near     | no      | almost surely the same recording after lossy coding or resampling (only if asked for) |
| question | no      | same question and choices about other sound: normal where questions are templates     |

Sounds are compared by `audio_fingerprint`, texts normalised (`rows.normalized`), choices in any order. There is at
most one finding of each kind per held-out row; it names the first training row and counts the others.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from covo_rl.data.check import facts_by_row, text_key
from covo_rl.data.facts import Facts
from covo_rl.data.rows import normalized
from covo_rl.types import Example

Kind = Literal["row", "audio", "near", "question"]
_MEANING = {
    "row": "asks the same about the same sound as",
    "audio": "has the same sound as",
    "near": "has almost the same sound as",
    "question": "asks the same, about another sound, as",
}


@dataclass(frozen=True)
class Overlap:
    """A held-out row and the first of `count` training rows that it shares something with."""

    kind: Kind
    held_out_id: str
    train_id: str
    count: int = 1

    @property
    def serious(self) -> bool:
        """Whether an evaluation on that row would reward memory."""
        return self.kind in ("row", "audio")

    def __str__(self) -> str:
        more = f" and {self.count - 1} more" if self.count > 1 else ""
        return f"held-out row {self.held_out_id} {_MEANING[self.kind]} training row {self.train_id}{more}"


def overlap(train: Sequence[Example], held_out: Sequence[Example], *, near: bool = False) -> list[Overlap]:
    """What held-out rows share with training rows, in the order of the held-out rows.

    A clip that cannot be decoded is left out here: `check` reports it. `near` also looks for the same recording after
    lossy coding or resampling, which decodes and compares spectra.
    """
    train_facts, held_facts = facts_by_row(train), facts_by_row(held_out)
    by_sound: dict[str, list[int]] = defaultdict(list)
    by_text: dict[Hashable, list[int]] = defaultdict(list)
    for index, (example, clips) in enumerate(zip(train, train_facts, strict=True)):
        by_text[text_key(example)].append(index)
        for facts in clips:
            if facts.error is None:
                by_sound[facts.fingerprint].append(index)
    alike = _near(train, train_facts, held_out, held_facts) if near else {}
    found: list[Overlap] = []
    for place, (example, clips) in enumerate(zip(held_out, held_facts, strict=True)):
        sound = _unique(
            index for facts in clips if facts.error is None for index in by_sound.get(facts.fingerprint, ())
        )
        text = by_text.get(text_key(example), [])
        same = [i for i in text if _same_row(train[i], train_facts[i], example, clips)]
        groups: list[tuple[Kind, list[int]]] = [
            ("row", same),
            ("audio", [] if same else sound),
            ("near", [] if sound else alike.get(place, [])),
            ("question", [] if same or sound else text),
        ]
        found += [Overlap(kind, example.id, train[rows[0]].id, len(rows)) for kind, rows in groups if rows]
    return found


def _same_row(row: Example, row_facts: Sequence[Facts], other: Example, other_facts: Sequence[Facts]) -> bool:
    """Same sound and answer, for rows whose question and choices are the same already."""
    sounds = [[facts.fingerprint or None for facts in clips] for clips in (row_facts, other_facts)]
    return (
        None not in sounds[0]
        and sounds[0] == sounds[1]
        and normalized(row.answer or "") == normalized(other.answer or "")
    )


def _unique(items: Iterable[int]) -> list[int]:
    return list(dict.fromkeys(items))


def _near(
    train: Sequence[Example], train_facts: Sequence[Sequence[Facts]],
    held_out: Sequence[Example], held_facts: Sequence[Sequence[Facts]],
) -> dict[int, list[int]]:  # fmt: skip
    """Held-out position -> training positions with almost the same sound."""
    from covo_rl.data.near import near_pairs

    def flat(rows: Sequence[Example], facts: Sequence[Sequence[Facts]]):
        return [
            (index, clip, fact)
            for index, (row, found) in enumerate(zip(rows, facts, strict=True))
            for clip, fact in zip(row.clips, found, strict=True)
            if fact.error is None
        ]

    ours, theirs = flat(train, train_facts), flat(held_out, held_facts)
    pairs = near_pairs([(c, f.seconds) for _, c, f in ours], [(c, f.seconds) for _, c, f in theirs])
    result: dict[int, list[int]] = defaultdict(list)
    for left, right in pairs:
        result[theirs[right][0]].append(ours[left][0])
    return {place: _unique(rows) for place, rows in result.items()}
