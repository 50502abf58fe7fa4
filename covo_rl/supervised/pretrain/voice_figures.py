"""Figures of a voice without dialogues: whose voice replies have, whether they are right, and their pitch.

Codes tell little of timbre, so a voice here is tempo and melody; a linear probe of codes, trained on recordings of all
voices that say the same lines, names it. Pitch is that of replies decoded with the speaker's own recordings as prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np

from covo_rl.models.builtin import resolve_model
from covo_rl.models.covo_audio.token2wav import Token2Wav
from covo_rl.speech import SHIPPED_DECODER
from covo_rl.speech.grid import RATE
from covo_rl.speech.latents import voice_of
from covo_rl.speech.measures import LinearProbe
from covo_rl.speech.pitch import track_f0
from covo_rl.speech.rows import SpeechRow, read_speech_rows
from covo_rl.speech.tokenizer import SpeechTokenizer
from covo_rl.supervised.pretrain.dialogue_rows import DialogueRow, read_dialogue, read_dialogues
from covo_rl.supervised.pretrain.dialogues import write_dialogue
from covo_rl.supervised.pretrain.document import Document
from covo_rl.supervised.pretrain.replies import prompt_of, reply
from covo_rl.supervised.pretrain.world_figures import CODE_IDS, TEXT_IDS, Measure
from covo_rl.synth.counting import COUNTED, NAMES, NEW, questions

#: recordings that make the speaker's prompt, and replies that are decoded
PROMPTS, DECODED = 6, 12


class VoiceMeasure:
    """The probe, trained once, and what the questions are."""

    def __init__(self, world: Path, tokenizer: SpeechTokenizer) -> None:
        self.tokenizer, self.recordings = tokenizer, read_speech_rows(world / "recordings.jsonl")
        rows = read_speech_rows(world / "voices.jsonl")
        told = [row for row in rows if (row.position or 0) % 3 != 2]
        kept = [row for row in rows if (row.position or 0) % 3 == 2]
        self.probe = LinearProbe(np.array([self.features(_codes(row)) for row in told]), [str(r.speaker) for r in told])
        self.accuracy = self.probe.accuracy(
            np.array([self.features(_codes(row)) for row in kept]), [str(row.speaker) for row in kept]
        )
        self.spoken = [row for row in read_dialogues(world / "test_dialogues.jsonl") if row.recordings]

    def features(self, codes: Sequence[int]) -> np.ndarray:
        """Which codes there are, the mean and deviation of their directions, and codes a word."""
        vectors_LC = self.tokenizer.codebook[list(codes)].float().numpy()
        share_K = np.bincount(codes, minlength=len(self.tokenizer.codebook)) / len(codes)
        words = max(1, len(self.tokenizer.transcribe(codes).split()))
        return np.concatenate([16 * share_K, vectors_LC.mean(axis=0), vectors_LC.std(axis=0), [len(codes) / words]])

    def figures(self, measure: Measure) -> dict[str, float]:
        """All figures of a model; `_other`: the same questions in the voices that dialogues have."""
        count = [(asked, answer) for asked, answer in questions() if asked.startswith("Count")]
        new = self._replies(measure, [_question(asked, NEW) for asked, _ in count])
        others = [NAMES[i % len(NAMES)] for i in range(len(count))]
        other = self._replies(measure, [_question(asked, name) for (asked, _), name in zip(count, others, strict=True)])
        truth = [answer for _, answer in count]
        named, named_other = self._named(new), self._named(other)
        written = self._replies(measure, [_question(asked, None) for asked, _ in questions()], speak=False)
        heard = self._replies(measure, [_renamed(row, NEW) for row in self.spoken], hear=True)
        said = [row.turns[1].said.text for row in self.spoken]
        return {
            "probe": self.accuracy,
            "new_voice": _share(name == NEW for name in named),
            "new_voice_other": _share(name == NEW for name in named_other),
            "right_voice_other": _share(a == b for a, b in zip(named_other, others, strict=True)),
            "written_right": self._right(measure, [answer for _, answer in questions()], written),
            "new_right": self._right(measure, truth, new),
            "new_spoken_right": self._right(measure, said, heard),
            "new_words_in_codes": 1 - measure.error_rate(truth, [self.tokenizer.transcribe(codes) for _, codes in new]),
            **self._pitch([codes for _, codes in new]),
        }

    def _replies(
        self, measure: Measure, rows: Sequence[DialogueRow], *, hear: bool = False, speak: bool = True
    ) -> list[tuple[str, list[int]]]:
        documents: list[Document] = [write_dialogue(row, measure.vocabulary, hear=hear, speak=speak) for row in rows]
        recordings: dict[str, SpeechRow] = {}
        for row in rows:
            recordings |= row.recordings
        limit = TEXT_IDS + (CODE_IDS if speak else 0)
        return [measure.split(ids) for ids in reply(measure.family, [*map(prompt_of, documents)], recordings, limit)]

    def _named(self, replies: Sequence[tuple[str, list[int]]]) -> list[str]:
        """Whose voice each reply has, "" where it has none."""
        return [self.probe.name(self.features(codes)[None])[0] if codes else "" for _, codes in replies]

    def _right(self, measure: Measure, truth: Sequence[str], replies: Sequence[tuple[str, list[int]]]) -> float:
        return _share(measure.words(a) == measure.words(b) for a, (b, _) in zip(truth, replies, strict=True))

    def _pitch(self, replies: Sequence[Sequence[int]]) -> dict[str, float]:
        """`f0_semitones`: how far the middle F0 of decoded replies is off that of the speaker's recordings; nothing
        where no reply has a voice."""
        decoder = Token2Wav.from_pretrained(resolve_model(SHIPPED_DECODER))
        waves = [row.wave() for row in self.recordings]
        prompt = voice_of(np.concatenate(waves[:PROMPTS]), self.tokenizer, decoder)
        true = median(_voiced(waves[PROMPTS : PROMPTS + DECODED]))
        heard = _voiced([decoder.synthesise([list(codes)], **prompt, seed=0)[0, 0].numpy()
                         for codes in replies[:DECODED] if len(codes) >= COUNTED])  # fmt: skip
        return {"f0_semitones": float(median(abs(12 * np.log2(f0 / true)) for f0 in heard))} if heard else {}


def _voiced(waves: Sequence[np.ndarray]) -> list[float]:
    """Median F0 of the voiced frames, Hz, of each wave that has one."""
    tracks = [track_f0(wave, RATE) for wave in waves]
    return [float(np.median(f0_Z[f0_Z > 0])) for f0_Z in tracks if (f0_Z > 0).any()]


def _codes(row: SpeechRow) -> list[int]:
    assert row.codes is not None
    return row.codes.tolist()


def _question(asked: str, speaker: str | None) -> DialogueRow:
    """A written question; the reply only has to be there, since it is the model's that is measured."""
    turns = [{"role": "user", "text": asked}, {"role": "assistant", "text": "one.", "codes": [0]}]
    return read_dialogue({"id": asked, "turns": turns, **({"speaker": speaker} if speaker else {})})


def _renamed(row: DialogueRow, speaker: str) -> DialogueRow:
    return DialogueRow(row.id, row.turns, row.system, speaker, row.emotion, row.source)


def _share(values: Any) -> float:
    return mean(map(float, values))
