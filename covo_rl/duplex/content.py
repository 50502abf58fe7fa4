"""What a model says once it has stopped listening: replies decoded from a trunk, and rewards that read them.

    reader = ReplyReader.of(options, family, ids, terms)        None where no reward reads replies
    reader.read(questions, scored, stops)                       the rewards of drawn stops, with what was said there

A reply goes on from its stop as a session does (machine.py says what is legal): an id of text and four codes per chunk,
greedily, while the stream's next chunks are heard. Where the stream is over, the silence after the user's turn is heard
again. Nothing after the end of the text is decoded: rewards read text.

One forward over the trunks fills a cache; every distinct stop is a row of it in which the positions after the stop are
masked, so all replies are decoded together and each prefix is the stop's own.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import DynamicCache

from covo_rl.duplex.config import DuplexOptions
from covo_rl.duplex.grid import CHUNK_CODES
from covo_rl.duplex.ids import DuplexIds, TokenKind
from covo_rl.duplex.machine import Legal, legal_masks
from covo_rl.duplex.questions import TimingQuestion
from covo_rl.duplex.rollout import StopReply, StopRewards, greedy_stop, judge_stops
from covo_rl.duplex.trunk import decision_states
from covo_rl.policy.rows import decoder_call, evaluation_mode
from covo_rl.rewards.duplex_lint import reads_reply
from covo_rl.rewards.judge import judge_from_spec
from covo_rl.rewards.scoring import Component

if TYPE_CHECKING:
    from covo_rl.models.base import AudioFamily

#: questions whose greedy replies are decoded together
BATCH = 32


@dataclass(frozen=True)
class ReplyReader:
    """Decodes replies of up to `chunks` ids of text, and asks `terms`, rewards that read them."""

    family: AudioFamily
    ids: DuplexIds
    terms: Sequence[Component]
    chunks: int
    timeout: float
    judge: Any = None

    @classmethod
    def of(
        cls, options: DuplexOptions, family: AudioFamily, ids: DuplexIds, terms: Sequence[Component]
    ) -> ReplyReader | None:
        """By these options; None where no reward reads replies. Raises what `judge_from_spec` does."""
        if not (chunks := options.reply_chunks(terms)):
            return None
        reward = options.reward
        judge = judge_from_spec(reward.judge) if reward.judge else None
        return cls(family, ids, [term for term in terms if reads_reply(term)], chunks, reward.reward_timeout, judge)

    def read(
        self, questions: Sequence[TimingQuestion], scored: Sequence[StopRewards], stops: Sequence[Collection[int]]
    ) -> list[StopRewards]:
        """`scored`, and at these stops of a listening stream what is said there and earns; never says nothing."""
        results = list(scored)
        asked = [i for i, question in enumerate(questions) if question.stream.listening]
        streams = [questions[i].stream for i in asked]
        distinct = [sorted({int(stop) for stop in stops[i]}) for i in asked]
        said = [[stop for stop in each if stop < q.decisions] for q, each in zip(streams, distinct, strict=True)]
        replies = decode_replies(self.family, [questions[i] for i in asked], said, self.ids, self.chunks)
        columns = [
            stream.columns(each) | reply_columns(stream.answer, [own.get(stop) for stop in each])
            for stream, each, own in zip(streams, distinct, replies, strict=True)
        ]
        judged = judge_stops(streams, columns, self.terms, timeout=self.timeout, judge=self.judge)
        for i, each, own, (parts, failures, notes) in zip(asked, distinct, replies, judged, strict=True):
            total_S, spread = scored[i].total_S.copy(), dict(scored[i].parts)
            for term in self.terms:
                if term.name in parts:
                    spread[term.name] = np.full(len(total_S), np.nan)
                    spread[term.name][each] = parts[term.name]
                    total_S[each] += term.weight * parts[term.name]
            noted = {
                stop: replace(own[stop], notes={name: values[place] for name, values in notes.items()})
                for place, stop in enumerate(each) if stop in own
            }  # fmt: skip
            results[i] = StopRewards(total_S, spread, {**scored[i].failures, **failures}, noted)
        return results

    def figures(self, questions: Sequence[TimingQuestion], z: Sequence[torch.Tensor]) -> dict[str, float | None]:
        """By component, the mean over listening streams of what the greedy stop's reply earns."""
        earned: dict[str, list[float]] = {term.name: [] for term in self.terms}
        for start in range(0, len(questions), BATCH):
            part, stops = questions[start : start + BATCH], [greedy_stop(z_K) for z_K in z[start : start + BATCH]]
            nothing = [StopRewards(np.zeros(question.stream.decisions + 1), {}, {}) for question in part]
            for stop, scored in zip(stops, self.read(part, nothing, [[stop] for stop in stops]), strict=True):
                for name, part_S in scored.parts.items():
                    earned[name].append(float(part_S[stop]))
        return {name: float(np.mean(values)) if values else None for name, values in earned.items()}


def reply_columns(answer: str | None, replies: Sequence[StopReply | None]) -> dict[str, list[str | None]]:
    """The columns of rewards that read replies."""
    return {
        "reply": [None if reply is None else reply.text for reply in replies], "expected": [answer] * len(replies),
    }  # fmt: skip


def later_features(question: TimingQuestion, stop: int, count: int) -> torch.Tensor:
    """Features (count, D) of the chunks after a stop; after the stream's last chunk come again those after the user's
    turn, from the first on."""
    total, stream = len(question.features_UD), question.stream
    first = total - stream.decisions
    quiet = min(first + stream.decision_of(stream.turn_end or 0.0) + 1, total - 1)
    chunks = range(first + stop + 1, first + stop + 1 + count)
    return question.features_UD[[i if i < total else quiet + (i - total) % (total - quiet) for i in chunks]]


@torch.no_grad()
def decode_replies(
    family: AudioFamily, questions: Sequence[TimingQuestion], stops: Sequence[Collection[int]], ids: DuplexIds,
    chunks: int,
) -> list[dict[int, StopReply]]:  # fmt: skip
    """What is said, greedily, after SHIFT at each of these stops of listening questions, in at most so many chunks."""
    rows = [(number, stop) for number, each in enumerate(stops) for stop in sorted(set(each))]
    texts: list[list[int]] = [[] for _ in rows]
    alive: list[int] = []
    if rows:
        with evaluation_mode(family.model):
            alive = _speak(_Speakers(family, ids, questions, rows, chunks), texts, chunks)
    results: list[dict[int, StopReply]] = [{} for _ in questions]
    for row, (number, stop) in enumerate(rows):
        results[number][stop] = StopReply(family.tokenizer.decode(texts[row]), cut=row in alive)
    return results


def _speak(speakers: _Speakers, texts: list[list[int]], chunks: int) -> list[int]:
    """Fills `texts`; the rows of those that the limit cuts."""
    alive, last_R = list(range(len(texts))), speakers.tokens(speakers.ids.shift)
    for chunk in range(chunks):
        chosen_R = speakers.hear(chunk, last_R)
        goes_on = [speakers.ids.kind(token) is TokenKind.TEXT for token in chosen_R.tolist()]
        if not all(goes_on):  # text_pad or BREAK: no text comes any more
            kept = [place for place, on in enumerate(goes_on) if on]
            alive, chosen_R = [alive[place] for place in kept], chosen_R[kept]
            if not alive:
                break
            speakers.keep(kept)
        for row, token in zip(alive, chosen_R.tolist(), strict=True):
            texts[row].append(token)
        last_R = chosen_R
        for _ in range(CHUNK_CODES):
            last_R = speakers.say(last_R)
    return alive


class _Speakers:
    """Rows of a cache that go on from their stops; `seen_RT` are the positions that each attends to."""

    def __init__(
        self, family: AudioFamily, ids: DuplexIds, questions: Sequence[TimingQuestion],
        rows: Sequence[tuple[int, int]], chunks: int,
    ) -> None:  # fmt: skip
        self.family, self.ids, self.device = family, ids, family.embed_tokens.weight.device
        config: Any = family.decoder.config
        self.cache = DynamicCache(config=config)
        trunks = [question.trunk for question in questions]
        decision_states(family, trunks, [question.features_UD for question in questions], self.cache)
        self.cache.batch_select_indices(torch.tensor([number for number, _ in rows], device=self.device))
        ends = [trunks[number].due[stop] + 1 for number, stop in rows]  # its U included
        self.ends_R = torch.tensor(ends, device=self.device)
        self.seen_RT = torch.arange(self.cache.get_seq_length(), device=self.device) < self.ends_R[:, None]
        later = [later_features(questions[number], stop, chunks) for number, stop in rows]
        self.later_RCD = torch.stack(later).to(self.device, family.embed_tokens.weight.dtype)

    def tokens(self, token: int) -> torch.Tensor:
        """This id in every row."""
        return torch.full_like(self.ends_R, token)

    def keep(self, rows: list[int]) -> None:
        """Go on with these alone."""
        self.cache.batch_select_indices(torch.tensor(rows, device=self.device))
        self.ends_R, self.seen_RT, self.later_RCD = self.ends_R[rows], self.seen_RT[rows], self.later_RCD[rows]

    def hear(self, chunk: int, last_R: torch.Tensor) -> torch.Tensor:
        """The last id of the chunk before and the user's next chunk -> the decision."""
        ids_R2 = torch.stack([last_R, self.tokens(self.ids.placeholder)], 1)
        embeds_R2D = self.family.embed_tokens(self.family.embeddable(ids_R2))
        embeds_R2D[:, 1] = self.later_RCD[:, chunk]
        return self._next(ids_R2, embeds_R2D, Legal.OPEN)

    def say(self, last_R: torch.Tensor) -> torch.Tensor:
        """The last id -> a code."""
        return self._next(last_R[:, None], self.family.embed_tokens(last_R[:, None]), Legal.CODE)

    def _next(self, ids_RN: torch.Tensor, embeds_RND: torch.Tensor, legal: Legal) -> torch.Tensor:
        count = ids_RN.shape[1]
        positions_RN = self.ends_R[:, None] + torch.arange(count, device=self.device)
        self.ends_R = self.ends_R + count
        self.seen_RT = torch.cat([self.seen_RT, torch.ones_like(ids_RN, dtype=torch.bool)], 1)
        hidden_RND = decoder_call(
            self.family, ids_RN, embeds_RND, position_ids=positions_RN, attention_mask=self.seen_RT.long(),
            past_key_values=self.cache, use_cache=True,
        )  # fmt: skip
        logits_RV = self.family.lm_head(hidden_RND[:, -1])
        masks = legal_masks(self.ids, logits_RV.shape[-1], logits_RV.device)
        return masks.masked(logits_RV, [legal] * len(logits_RV)).argmax(-1)
