"""A stream while it is made: turns on the clock of chunks, what happens beside them, the sound of both. No torch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from covo_rl.duplex.data import DuplexMark, DuplexStream, DuplexTurn
from covo_rl.duplex.grid import CHUNK_SAMPLES, CHUNK_SECONDS, chunk_of, sound_start
from covo_rl.duplex.presets import AFTER, BEFORE, BREAK_CHUNKS, SimulationPreset, StreamKind, draw_pause, shift_chunk
from covo_rl.duplex.sound import FADE, Rng, UserChannel, faded_end, noise_floor, two_channels
from covo_rl.duplex.sources import Recording, SourceDialogue, SourceTurn, Surroundings
from covo_rl.speech.grid import RATE, pad_to_codes
from covo_rl.speech.pitch import track_f0
from covo_rl.synth.back_channels import BACK_CHANNEL_SECONDS, listener, say_back_channel

_Part = TypeVar("_Part", DuplexTurn, DuplexMark)
#: seconds before the first turn, between a reply and the next turn, and after the last turn of a stream by its end
LEAD, BETWEEN = (0.3, 1.0), (0.4, 1.2)
TAIL_LISTENING, TAIL_SPEAKING = 4.0, 1.0
#: dB: noise under the user's speech, back-channels and side talk against it, echo against the model's
SNR, BACK_CHANNEL_LEVEL, SIDE_TALK_LEVEL, ECHO_LEVEL = (10.0, 40.0), (-6.0, 0.0), (-20.0, -10.0), (-40.0, -25.0)
SIDE_TALK_SHARE, ECHO_SECONDS = 0.1, 0.1
#: deviation of the model's channel where it says nothing
_HISS = 4 / 32_768


class Timeline:
    """A stream while it is made: turns and marks in seconds, pieces of sound in samples."""

    def __init__(
        self, name: str, dialogue: SourceDialogue, preset: SimulationPreset, rng: Rng, around: Surroundings
    ) -> None:
        self.name, self.dialogue, self.preset, self.rng, self.around = name, dialogue, preset, rng, around
        self.missed: Counter[str] = Counter()
        self.source = [dialogue.id]
        self.turns: list[DuplexTurn] = []
        self.marks: list[DuplexMark] = []
        self.heard: list[tuple[int, np.ndarray]] = []  # pieces of the user's channel
        self.said: list[tuple[int, np.ndarray]] = []
        self.tones: list[tuple[int, np.ndarray]] = []
        self.recordings: list[Recording] = []
        self.now = rng.uniform(*LEAD)
        self.least = 0  # the first chunk in which the model may begin to speak
        self.end = 0.0
        self.answer: str | None = None

    # -- kinds ---------------------------------------------------------------------------------------------------------

    def follow(self, kind: StreamKind) -> bool:
        """Lay out a stream of a kind; whether the dialogue has a place for what the kind needs."""
        if kind == "dialogue":
            return self.whole()
        return self.listen(kind) if kind in ("single", "pause") else self.speak(kind)

    def whole(self) -> bool:
        """The dialogue with the model's delays, and what happens in its replies."""
        turns, number, joined, cut = list(self.dialogue.turns), 0, False, False
        while number < len(turns):
            turn = turns[number]
            if turn.channel == "user":
                self.user(turn, self._drawn_pauses, barges=cut)
                cut = False
            else:
                draw = self.rng.random()
                wants = draw < self.preset.barge_in_share
                if wants and number + 1 == len(turns) and not joined:
                    turns, joined = [*turns, *self._goes_on()], True
                wave_T = pad_to_codes(turn.load())
                cut = wants and number + 1 < len(turns) and len(wave_T) / RATE >= BEFORE + AFTER + FADE
                self.missed["barge_in"] += wants and not cut
                reply = self.reply(turn, wave_T, interrupted=cut)
                if not wants and draw < self.preset.barge_in_share + self.preset.back_channel_share:
                    self.missed["back_channel"] += not self.back_channel(reply)
            number += 1
        self.end = max(part.end for part in self.turns) + TAIL_SPEAKING
        return True

    def listen(self, kind: StreamKind) -> bool:
        """Up to a user's turn, which is to be answered; its context has nothing that was drawn."""
        places = [i for i, turn in enumerate(self.dialogue.turns) if turn.channel == "user"]
        place = places[int(self.rng.integers(len(places)))]
        self._context(self.dialogue.turns[:place])
        self.user(self.dialogue.turns[place], self._some_pauses if kind == "pause" else _no_pauses)
        self.answer = next((turn.text for turn in self.dialogue.turns[place + 1 :]), "") or None
        self.end = self.turns[-1].end + TAIL_LISTENING
        return kind != "pause" or self.preset.name != "test" or not self.missed["pause"]

    def speak(self, kind: StreamKind) -> bool:
        """Up to a reply, which is said to its end; in it the user says "mm", takes the turn, or nothing."""
        needs = BEFORE + AFTER + (BACK_CHANNEL_SECONDS[1] if kind == "back_channel" else FADE)
        turns = self.dialogue.turns
        waves = {i: pad_to_codes(turn.load()) for i, turn in enumerate(turns) if turn.channel == "model"}
        places = [i for i, wave_T in waves.items() if i and len(wave_T) / RATE >= needs]
        if not places:
            return False
        place = places[int(self.rng.integers(len(places)))]
        self._context(turns[:place])
        reply = self.reply(turns[place], waves[place])
        if kind == "back_channel" and not self.back_channel(reply):
            return False
        if kind == "barge_in":
            if not (following := [*turns[place + 1 :]] or self._goes_on()):
                return False
            self.now = reply.start + self.rng.uniform(BEFORE, reply.end - reply.start - AFTER)
            self.user(following[0], _no_pauses, barges=True)
        self.end = max(part.end for part in self.turns) + TAIL_SPEAKING
        return True

    def _context(self, turns: Sequence[SourceTurn]) -> None:
        for turn in turns:
            if turn.channel == "user":
                self.user(turn, _no_pauses)
            else:
                self.reply(turn, pad_to_codes(turn.load()))

    def _goes_on(self) -> list[SourceTurn]:
        """What the same user says next, and the model's replies to it; nothing where no such dialogue is known."""
        other = self.around.continuation(self.dialogue, self.rng)
        self.source += [] if other is None else [other.id]
        return [] if other is None else list(other.turns)

    # -- parts ---------------------------------------------------------------------------------------------------------

    def user(self, turn: SourceTurn, pauses: Callable[[Recording], dict[int, float]], *, barges: bool = False) -> None:
        """A turn of the user from now on; `pauses(recording)` gives seconds by island."""
        recording = Recording(turn)
        laid = recording.lay(pauses(recording))
        start = round(self.now * RATE)
        self.recordings.append(recording)
        # a tone begins halfway into the silence before its recording
        self.tones.append((max(round((start / RATE + self._silent_since()) / 2 * RATE), 0), recording.tone_B))
        self.heard += [(start + round(offset * RATE), piece_T) for offset, piece_T in laid.pieces]
        at = start / RATE
        fragments = tuple((_rounded(at + a), _rounded(at + b)) for a, b in laid.fragments)
        spoken = DuplexTurn("user", fragments[0][0], fragments[-1][1], turn.text, fragments)
        self.turns.append(spoken)
        self.marks += [DuplexMark("pause", "user", *pause) for pause in spoken.pauses]
        if barges:
            self.marks.append(DuplexMark("barge_in", "user", spoken.start, spoken.end))
        self.now = spoken.end

    def _silent_since(self) -> float:
        return max((turn.end for turn in self.turns if turn.channel == "user"), default=0.0)

    def reply(self, turn: SourceTurn, wave_T: np.ndarray, *, interrupted: bool = False) -> DuplexTurn:
        """The model's reply to what was said until now, which then is when the next turn, or the barge-in, begins."""
        first = sound_start(shift_chunk(self.now, self.rng, self.least) + 1)
        start, end, stop = first / RATE, (first + len(wave_T)) / RATE, None
        if interrupted:
            self.now = start + self.rng.uniform(BEFORE, len(wave_T) / RATE - AFTER)
            at = chunk_of(self.now) + BREAK_CHUNKS
            end = stop = sound_start(at) / RATE
            wave_T = faded_end(wave_T[: sound_start(at) - first])
        else:
            self.now = end + self.rng.uniform(*BETWEEN)
            at = chunk_of(end)
        self.least = at + 1
        self.said.append((first, wave_T))
        spoken = DuplexTurn("model", _rounded(start), _rounded(end), turn.text, codes=turn.codes,
                            interrupted_at=None if stop is None else _rounded(stop))  # fmt: skip
        self.turns.append(spoken)
        return spoken

    def back_channel(self, reply: DuplexTurn) -> bool:
        """A sound of the user in a reply that leaves the turn to the model; whether there is a place for it."""
        text, sound_T = self._back_channel_sound()
        seconds = len(sound_T) / RATE
        if reply.end - reply.start < BEFORE + seconds + AFTER:
            return False
        start = round(self.rng.uniform(reply.start + BEFORE, reply.end - AFTER - seconds) * RATE)
        self.heard.append((start, sound_T))
        at = start / RATE
        self.marks.append(DuplexMark("back_channel", "user", _rounded(at), _rounded(at + seconds), text))
        return True

    def _back_channel_sound(self) -> tuple[str, np.ndarray]:
        """What is said and its sound, -6 to 0 dB against the user's speech."""
        of_user = [turn for turn in self.around.back_channels if turn.speaker in self.dialogue.speakers]
        recorded = of_user or self.around.back_channels
        if recorded:
            recording = Recording(recorded[int(self.rng.integers(len(recorded)))])
            start, end = recording.islands[0][0], recording.islands[-1][1]
            text, sound_T = recording.turn.text, recording.wave_T[round(start * RATE) : round(end * RATE)]
            level = recording.levels.speech
        else:
            heard_Z = track_f0(self.recordings[-1].wave_T[: 2 * RATE], RATE) if self.recordings else np.zeros(1)
            f0 = float(np.median(heard_Z[heard_Z > 0])) if (heard_Z > 0).any() else 140.0
            text, sound_T = say_back_channel(self.dialogue.language, listener(f0, self.rng), self.rng)
            level = 0.1
        gain = 10 ** (self.rng.uniform(*BACK_CHANNEL_LEVEL) / 20)
        return text, sound_T * gain * self._speech_level() / max(level, 1e-6)

    def _speech_level(self) -> float:
        levels = [recording.levels.speech for recording in self.recordings]
        return float(np.mean(levels)) if levels else 0.1

    def _drawn_pauses(self, recording: Recording) -> dict[int, float]:
        return self._some_pauses(recording) if self.rng.random() < self.preset.pause_share else {}

    def _some_pauses(self, recording: Recording) -> dict[int, float]:
        """One pause, in three of ten turns two, each after another island."""
        count = 1 + int(self.rng.random() < 0.3)
        places = self.rng.permutation(len(recording.islands) - 1)[:count].tolist()
        self.missed["pause"] += not places
        return {place: draw_pause(self.rng, self.preset) for place in places}

    # -- sound ---------------------------------------------------------------------------------------------------------

    def render(self, seed: int) -> tuple[DuplexStream, np.ndarray]:
        """The stream and its wave, a whole number of chunks long."""
        samples = math.ceil(self.end / CHUNK_SECONDS) * CHUNK_SAMPLES
        model_T = _HISS * self.rng.standard_normal(samples)
        for start, wave_T in self.said:
            model_T[start : start + len(wave_T)] += wave_T
        user = UserChannel(samples, self.tones, self.rng)
        for start, piece_T in self.heard:
            user.put(start, piece_T)
        snr = self.rng.uniform(*SNR)
        user.wave_T += noise_floor(samples, self._speech_level() * 10 ** (-snr / 20), self.rng)
        self.marks.append(DuplexMark("noise", "user", 0.0, samples / RATE, f"SNR {snr:.1f} dB"))
        if self.rng.random() < SIDE_TALK_SHARE:
            self.missed["side_talk"] += not self._side_talk(user)
        if self.around.echo:
            user.add(round(ECHO_SECONDS * RATE), model_T * 10 ** (self.rng.uniform(*ECHO_LEVEL) / 20))
        stream = DuplexStream(
            self.name, samples / RATE, self.dialogue.language, _in_order(self.turns), _in_order(self.marks),
            tuple(self.source), seed, self.dialogue.tokenizer, self.answer,
        )  # fmt: skip
        return stream, two_channels(user.wave_T, model_T)

    def _side_talk(self, user: UserChannel) -> bool:
        if (other := self.around.side_talk(self.dialogue, self.rng)) is None:
            return False
        dialogue, turn = other
        recording = Recording(turn)
        laid = recording.lay({})
        length = laid.fragments[-1][1]
        room = len(user.wave_T) / RATE - length
        if room <= 0:
            return False
        at = self.rng.uniform(0, room)
        level = self._speech_level() / max(recording.levels.speech, 1e-6)
        gain = 10 ** (self.rng.uniform(*SIDE_TALK_LEVEL) / 20) * level
        for offset, piece_T in laid.pieces:
            user.add(round((at + offset) * RATE), piece_T * gain)
        self.marks.append(DuplexMark("side_talk", "user", _rounded(at), _rounded(at + length), turn.text))
        self.source.append(dialogue.id)
        return True


def _no_pauses(recording: Recording) -> dict[int, float]:
    return {}


def _rounded(seconds: float) -> float:
    return round(seconds, 4)


def _in_order(parts: Sequence[_Part]) -> tuple[_Part, ...]:
    return tuple(sorted(parts, key=lambda part: (part.start, part.end)))
