"""Figures of the tiny world: what a model hears, says, continues, knows, and whose voice it has.

Every one is of voices that no training heard; words are compared without punctuation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from covo_rl.models.covo_audio.processing import IGNORE, split_codes
from covo_rl.speech.measures import corpus_error_rate
from covo_rl.speech.rows import SpeechRow
from covo_rl.speech.tokenizer import SpeechTokenizer
from covo_rl.supervised.pretrain import builder
from covo_rl.supervised.pretrain.document import Document, Vocabulary
from covo_rl.supervised.pretrain.fragments import sentence_fragments, whole_row
from covo_rl.supervised.pretrain.replies import prompt_of, reply, response_loss

#: ids of the longest line of text, and codes of the longest utterance
TEXT_IDS, CODE_IDS = 24, 140
#: a document may end before speech goes on: who is asked to speak does not end before so many codes
SPOKEN = 20


class Measure:
    """Measures one model after another with the same rows and judges."""

    def __init__(self, family: Any, tokenizer: SpeechTokenizer) -> None:
        self.family, self.tokenizer = family, tokenizer
        self.vocabulary = Vocabulary.of(family)

    def split(self, ids: Sequence[int]) -> tuple[str, list[int]]:
        """A reply -> its text, its codes."""
        text, codes = split_codes(ids, self.vocabulary.first_code, self.vocabulary.codes)
        return self.family.tokenizer.decode(text, skip_special_tokens=True), codes

    def words(self, text: str) -> list[str]:
        """A text as words, without punctuation."""
        assert self.tokenizer.pieces is not None
        return self.tokenizer.pieces.normal(text).split()

    def error_rate(self, truth: Sequence[str], heard: Sequence[str]) -> float:
        return corpus_error_rate(*([" ".join(self.words(text)) for text in texts] for texts in (truth, heard)))

    # -- stages 1 and 2 ---------------------------------------------------------------------------------------------

    def hears(self, rows: Sequence[SpeechRow], others: Sequence[SpeechRow] | None = None) -> dict[str, float]:
        """`asr_wer`, `asr_loss`: recordings -> text. `others`: recordings that are heard in the place of those."""
        documents = [builder.asr(whole_row(row), self.vocabulary) for row in rows]
        if others is not None:
            prompts = [builder.asr(whole_row(row), self.vocabulary) for row in others]
            documents = [_answered(prompt, document) for prompt, document in zip(prompts, documents, strict=True)]
        known = {row.id: row for row in rows}
        replies = reply(self.family, [prompt_of(document) for document in documents], known, TEXT_IDS)
        heard = [self.split(ids)[0] for ids in replies]
        return {
            "asr_wer": self.error_rate([row.text for row in rows], heard),
            "asr_loss": response_loss(self.family, documents, known),
        }

    def speaks(self, rows: Sequence[SpeechRow]) -> dict[str, float]:
        """`tts_wer`: text -> codes, read by the tokenizer; `tts_other_wer`: the same codes beside the next row's text;
        `tts_loss`."""
        documents = [builder.tts(whole_row(row), self.vocabulary) for row in rows]
        replies = reply(self.family, [prompt_of(document) for document in documents], {}, CODE_IDS)
        read = [self.tokenizer.transcribe(self.split(ids)[1]) for ids in replies]
        texts = [row.text for row in rows]
        return {
            "tts_wer": self.error_rate(texts, read),
            "tts_other_wer": self.error_rate([*texts[1:], texts[0]], read),
            "tts_loss": response_loss(self.family, documents, {}),
        }

    def continues(self, documents: Sequence[Sequence[SpeechRow]]) -> dict[str, float]:
        """What follows on the first utterance. `text`: share of the next line's words that are said in their places;
        `codes`: the same of the third, in codes, after the second is read; `_loss` of both in nats an id."""
        known = {row.id: row for rows in documents for row in rows}
        fragments = [sentence_fragments(rows) for rows in documents]
        written = [builder.interleaved(parts[:2], "ac>t>ad", self.vocabulary) for parts in fragments]
        spoken = [_only_codes(builder.interleaved(parts[:3], "ac>t>ad", self.vocabulary), self.vocabulary)
                  for parts in fragments]  # fmt: skip
        texts = [self.split(ids)[0] for ids in reply(self.family, [*map(prompt_of, written)], known, TEXT_IDS)]
        codes = [self.split(ids)[1] for ids in reply(self.family, [*map(prompt_of, spoken)], known, CODE_IDS, SPOKEN)]
        read = [self.tokenizer.transcribe(row) for row in codes]
        return {
            "continued_text": mean(
                self._in_place(rows[1].text, text) for rows, text in zip(documents, texts, strict=True)
            ),
            "continued_text_loss": response_loss(self.family, written, known),
            "continued_codes": mean(
                self._in_place(rows[2].text, text) for rows, text in zip(documents, read, strict=True)
            ),
            "continued_codes_loss": response_loss(self.family, spoken, known),
        }

    def _in_place(self, truth: str, said: str) -> float:
        words = self.words(truth)
        return sum(a == b for a, b in zip(words, self.words(said), strict=False)) / len(words)


def _answered(prompt: Document, document: Document) -> Document:
    """The prompt of one document with the response of another."""
    start = len(prompt_of(document))
    asks = prompt_of(prompt)
    return Document(asks.ids + document.ids[start:], asks.labels + document.labels[start:], prompt.clips)


def _only_codes(document: Document, vocabulary: Vocabulary) -> Document:
    """The document whose text is context."""
    labels = [label if label >= vocabulary.first_code else IGNORE for label in document.labels]
    return Document(document.ids, labels, document.clips)


def by_document(rows: Sequence[SpeechRow]) -> list[list[SpeechRow]]:
    """Rows of each document, in their order."""
    documents: Mapping[str, list[SpeechRow]] = {}
    for row in rows:
        documents.setdefault(row.document or row.id, []).append(row)
    return [sorted(rows, key=lambda row: row.position or 0) for rows in documents.values()]
