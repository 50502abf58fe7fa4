"""Dialogues of digit speech that streams are simulated from where there are no data: the user says digits, the model
says them again. A user lets the last word of a turn fall and no other: who hears that need not wait. No torch.
"""

from __future__ import annotations

from functools import lru_cache, partial

import numpy as np

from covo_rl.duplex.data import Channel
from covo_rl.duplex.sources import SourceDialogue, SourceTurn
from covo_rl.synth.sounds import Rng
from covo_rl.synth.speech import DIGITS, SPEECH_SPLITS, Speaker, Utterance, say_digits, speakers

#: tones of words after which a turn goes on, and of the word that ends it
GOES_ON, ENDS = ("level", "rise"), "fall"
#: digits of a turn, at least and at most
TURN_DIGITS = (3, 6)


def digit_dialogues(split: str, count: int, seed: int = 0, *, exchanges: int = 2) -> list[SourceDialogue]:
    """Dialogues of so many questions and replies. Dialogue i depends on (seed, split, i) only.

    Raises:
        ValueError: there is no such split of voices.
    """
    voices = speakers(SPEECH_SPLITS.get(split, 1), seed, split)
    return [_dialogue(split, index, seed, voices, exchanges) for index in range(count)]


def _dialogue(split: str, index: int, seed: int, voices: list[Speaker], exchanges: int) -> SourceDialogue:
    name = f"digits-{split}-{seed}-{index}"
    rng = np.random.default_rng([seed, list(SPEECH_SPLITS).index(split), index, 19])
    user = voices[1 + int(rng.integers(len(voices) - 1))]  # the first is the model's
    turns: list[SourceTurn] = []
    for exchange in range(exchanges):
        words = tuple(str(word) for word in rng.choice(DIGITS, rng.integers(TURN_DIGITS[0], TURN_DIGITS[1] + 1)))
        who: tuple[tuple[Channel, Speaker], ...] = (("user", user), ("model", voices[0]))
        for channel, voice in who:
            place = (seed, list(SPEECH_SPLITS).index(split), index, 20, 2 * exchange + (channel == "model"))
            turns.append(_turn(channel, words, voice, place))
    return SourceDialogue(name, tuple(turns), "en")


def _turn(channel: Channel, words: tuple[str, ...], voice: Speaker, place: tuple[int, ...]) -> SourceTurn:
    """Rendered again when it is loaded, but for the latest: a long set does not fit into memory."""
    say = partial(_say, words, voice, place)
    spoken = say()
    return SourceTurn(channel, lambda: say().wave, spoken.text, spoken.words, speaker=voice.name)


@lru_cache(maxsize=64)
def _say(words: tuple[str, ...], voice: Speaker, place: tuple[int, ...]) -> Utterance:
    rng: Rng = np.random.default_rng(place)
    tones = [*(str(tone) for tone in rng.choice(GOES_ON, len(words) - 1)), ENDS]
    return say_digits(words, voice, rng, tones, [False] * len(words))
