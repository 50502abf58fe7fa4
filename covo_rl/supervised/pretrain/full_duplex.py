"""A stream of two channels -> a document: what is heard, chunk by chunk, and after each what the model does.

    system | B | U T | U T | U S | U w cccc | U _ cccc | U B | U T | E

U a slot, filled with the chunk's feature; T think, S shift, B break; w text, _ text_pad, c a code. Taught are
decisions, text and codes, each of which the model chooses; U never, nor the system message and what frames audio. Of a
reply that the user cuts nothing follows its BREAK.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from covo_rl.duplex.grid import CHUNK_CODES
from covo_rl.duplex.ids import DuplexIds
from covo_rl.duplex.layout import chunk_ids
from covo_rl.duplex.targets import is_answered, plan_stream
from covo_rl.models.covo_audio.persona import SPOKEN_SYSTEM
from covo_rl.models.covo_audio.processing import IGNORE
from covo_rl.supervised.pretrain.document import BuildOptions, Document, SkippedError, Vocabulary

if TYPE_CHECKING:
    from covo_rl.supervised.pretrain.stream_rows import StreamRow

NOT_ANSWERED = "the user's last turn is not answered"


def build_full_duplex(row: StreamRow, vocabulary: Vocabulary, rng: random.Random, options: BuildOptions) -> Document:
    """The whole stream; what is left after its last whole chunk, under 0.16 s, has no decision and is no part of it.

    Raises:
        SkippedError: the user's last turn is not answered, as in streams for RL and tests: it would teach silence.
        DataError, PlanError, DuplexIdsError: see `plan_stream`.
    """
    if not is_answered(row.stream):
        raise SkippedError(NOT_ANSWERED, row.id)
    ids = duplex_ids(vocabulary)
    plans, decisions = plan_stream(row.stream, ids, vocabulary.text)
    prefix, body = stream_prefix(vocabulary), chunk_ids(decisions, ids)
    labels = [IGNORE if id == vocabulary.slot else id for id in body]
    return Document(
        [*prefix, *body, vocabulary.audio_end], [*[IGNORE] * len(prefix), *labels, IGNORE],
        ((row.id, 0, CHUNK_CODES * len(decisions)),), streamed=True,
        complete=all(plan.end < len(decisions) for plan in plans),
    )  # fmt: skip


def stream_prefix(vocabulary: Vocabulary) -> list[int]:
    """All before the first chunk, as a session writes it: the system message, and the mark that audio begins."""
    text = vocabulary.text
    system = [vocabulary.turn_start, *text(f"system\n{SPOKEN_SYSTEM}"), vocabulary.turn_end, *text("\n")]
    return [*system, vocabulary.audio_start]


def duplex_ids(vocabulary: Vocabulary) -> DuplexIds:
    """The ids of decisions; a task of streams is refused before where the model has none."""
    assert vocabulary.duplex is not None
    return vocabulary.duplex
