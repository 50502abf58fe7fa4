"""Spoken replies of a report: the audio codes of rollouts, played by the decoder that the run names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from covo_rl.models.builtin import resolve_model
from covo_rl.run.report.sound import Sounds
from covo_rl.run.report.values import Notes, Progress, readable
from covo_rl.types import UserError

if TYPE_CHECKING:
    from covo_rl.models.covo_audio.voice import Voice

#: codes of a reply that a page has; at 25 a second five minutes
MAX_CODES = 7500
#: codes that a report speaks: ten minutes, of which a CPU may need as many
_MAX_SPOKEN = 15_000


class Replies:
    """Makes sounds of codes, once of each reply, until they take `room` bytes of the page, or are too many.

    `all_` sets no bound.
    """

    def __init__(self, clips: Sounds, room: float, *, all_: bool = False) -> None:
        self.clips, self.room, self.left = clips, room, float("inf") if all_ else _MAX_SPOKEN
        self.taken = 0.0
        self._voices: dict[str, Voice | None] = {}

    def speak(self, groups: Iterable[Mapping[str, Any]], decoders: Mapping[int, tuple[str | None, Notes]],
              progress: Progress) -> None:  # fmt: skip
        """Give the rollouts that hold codes their `reply`, a key of the clips or None; `decoders` are by run."""
        spoken = [(group["run"], rollout) for group in groups for rollout in group["rollouts"] if "codes" in rollout]
        for number, (run, rollout) in enumerate(spoken):
            name, notes = decoders[run]
            progress("replies", number, len(spoken))
            rollout["reply"] = self._entry(name, rollout["codes"], notes)
        if spoken:
            progress("replies", len(spoken), len(spoken))

    def _entry(self, name: str | None, codes: list[int], notes: Notes) -> str | None:
        """The key of this reply's sound; None where there is no decoder, or no room."""
        if name is None:
            notes.count("replies hold audio codes that nothing plays: name a decoder (--speech-decoder)")
            return None
        key = f"reply {sha256(f'{name} {codes}'.encode()).hexdigest()}"
        if key in self.clips.entries:
            return key
        voice = self._voice(name, notes)
        if voice is None:
            return None
        if self.taken < self.room and len(codes) <= self.left:
            try:
                wave_T = voice.say(codes).numpy()
            except UserError as error:
                self.clips.add_missing(key, "the reply", str(error))
                return key
            self.left -= len(codes)
            if taken := self.clips.add_wave(key, "the reply", wave_T, self.room - self.taken):
                self.taken += taken
                return key
        notes.count("replies are not played: their sounds would take too much (--max-mb, --sounds all)")
        return None

    def _voice(self, name: str, notes: Notes) -> Voice | None:
        """The decoder of a folder; loaded once."""
        if name not in self._voices:
            from covo_rl.speech.voices import open_voice

            self._voices[name] = None
            try:
                self._voices[name] = open_voice(name)
            except (UserError, OSError) as error:
                notes.add(f"replies are not played: speech_decoder {readable(name)}: {error}")
        return self._voices[name]


def decoder_codes(name: str) -> int:
    """How many audio codes a decoder speaks, by its configuration alone; `name` is its folder, or builtin:NAME.

    Raises:
        WeightsError, FileNotFoundError: there is none.
    """
    from covo_rl.models.covo_audio.token2wav import Token2WavConfig

    return Token2WavConfig.from_file(Path(resolve_model(name)) / "config.json").flow.token_vocab_size


def codes_in_row(row: Mapping[str, Any], notes: Notes) -> dict[str, Any]:
    """`codes` of a row of a rollouts file, and its `reply` to come; nothing where it holds none."""
    codes = row.get("completion_codes") or []
    if not isinstance(codes, list) or not all(type(code) is int and 0 <= code < 2**31 for code in codes):
        notes.count("replies have completion_codes that are no list of codes; they are left out")
        return {}
    notes.count(f"replies are cut after {MAX_CODES} audio codes", len(codes) > MAX_CODES)
    return {"codes": codes[:MAX_CODES], "reply": None} if codes else {}
