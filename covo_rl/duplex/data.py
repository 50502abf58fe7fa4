"""A stream of two channels and what is true of it: a wav (24 kHz, 16 bit; left the user, right the model), events.json.

    {"id": "d1", "seconds": 9.6, "language": "en", "turns": [
        {"channel": "user", "start": 0.4, "end": 3.1, "text": "one two", "fragments": [[0.4, 0.9], [2.2, 3.1]]},
        {"channel": "model", "start": 3.84, "end": 5.6, "text": "three", "codes": [17, 3], "interrupted_at": 5.6}],
     "events": [{"type": "pause", "channel": "user", "start": 0.9, "end": 2.2}], "source": ["d1"], "seed": 0}

Times are in seconds. `fragments` are what pauses separate. `text` and `codes` of a reply that is interrupted are those
of the whole reply, and its `end` is where its sound ends. There may also be a `tokenizer`, and an `answer`: what the
model should say next, where the user's turn is the last. `stream_files.py` reads and writes both. No torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

from covo_rl.data.files import plain
from covo_rl.data.read import DataError, Problem, printable
from covo_rl.duplex.grid import CHUNK_SECONDS
from covo_rl.models.text import unfit
from covo_rl.speech.grid import CODE_SECONDS, RATE

Channel = Literal["user", "model"]
MarkType = Literal["pause", "back_channel", "barge_in", "noise", "side_talk"]
#: seconds by which times that should agree may differ
SLACK = 1e-3
#: seconds of the longest wav of two channels: its length in bytes has 32 bits
MAX_SECONDS = 2**32 // (4 * RATE)
Span = tuple[float, float]


@dataclass(frozen=True)
class DuplexTurn:
    """Who speaks from when to when. `fragments`: of the user; `codes`, `interrupted_at`: of the model."""

    channel: Channel
    start: float
    end: float
    text: str = ""
    fragments: tuple[Span, ...] = ()
    codes: tuple[int, ...] | None = None
    interrupted_at: float | None = None

    @property
    def pauses(self) -> tuple[Span, ...]:
        """From the end of each fragment to the start of the next."""
        return tuple((before[1], after[0]) for before, after in pairwise(self.fragments))


@dataclass(frozen=True)
class DuplexMark:
    """Something that happens in a channel and is no turn; a barge-in is marked beside the turn that it is."""

    type: MarkType
    channel: Channel
    start: float
    end: float
    text: str | None = None


@dataclass(frozen=True)
class DuplexStream:
    """All that is known of a stream, turns and marks in order of their starts.

    `source`: ids of the dialogues that it is made of. `tokenizer`: digest of what made the codes. `answer`: what the
    model should say next, where the last turn is the user's.
    """

    id: str
    seconds: float
    language: str | None = None
    turns: tuple[DuplexTurn, ...] = ()
    events: tuple[DuplexMark, ...] = ()
    source: tuple[str, ...] = ()
    seed: int | None = None
    tokenizer: str | None = None
    answer: str | None = None

    def turns_of(self, channel: Channel) -> list[DuplexTurn]:
        """The turns of a channel."""
        return [turn for turn in self.turns if turn.channel == channel]

    def marks(self, kind: MarkType) -> list[DuplexMark]:
        """The marks of a type."""
        return [mark for mark in self.events if mark.type == kind]


# -- events --------------------------------------------------------------------------------------------------------


def stream_content(stream: DuplexStream) -> dict[str, Any]:
    """The stream as events.json has it: what is not there is left out."""
    optional = {"codes", "interrupted_at", "text", "tokenizer", "answer"}
    content = plain(asdict(stream))
    content["turns"] = [
        {key: value for key, value in turn.items()
         if not (value is None and key in optional) and not (key == "fragments" and turn["channel"] == "model")}
        for turn in content["turns"]
    ]  # fmt: skip
    content["events"] = [{k: v for k, v in mark.items() if v is not None} for mark in content["events"]]
    return {key: value for key, value in content.items() if not (value is None and key in optional)}


def parse_stream(content: Any, name: str = "stream") -> DuplexStream:
    """A stream from the content of events.json.

    Raises:
        DataError: everything that is wrong with it: missing and unknown keys, values of another kind, times out of
            order or beyond the stream, two turns of a channel that overlap.
    """
    reader = _StreamReader()
    stream = reader.stream(content)
    if stream is None or reader.problems:
        raise DataError(name, reader.problems)
    if problems := [Problem(stream.id, what) for what in _together(stream)]:
        raise DataError(name, problems)
    return stream


class _StreamReader:
    """Notes what is wrong with the parts of a stream; `where` is the part that is read."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.where = "stream"

    def stream(self, content: Any) -> DuplexStream | None:
        keys = ("id", "seconds", "language", "turns", "events", "source", "seed")
        if not self.keys(content, keys, ("tokenizer", "answer")):
            return None
        seed, source = content["seed"], content["source"]
        source = [source] if isinstance(source, str) else source
        if seed is not None and type(seed) is not int:
            self.wrong(f"its seed is {printable(seed)}, not a whole number")
        if not isinstance(source, list) or not all(isinstance(id, str) for id in source):
            self.wrong(f"its source is {printable(source)}, not a list of ids")
            source = []
        if content["id"] is None or not str(content["id"]).strip():
            self.wrong("its id is empty")
        values = {key: self.text(key, content[key]) for key in ("id", "language")}
        seconds = self.time("its seconds", content["seconds"])
        tokenizer, answer = (self.text(key, content.get(key)) for key in ("tokenizer", "answer"))
        parts = {key: [*self.parts(key, content[key])] for key in ("turns", "events")}
        order = {key: tuple(sorted(filter(None, parts[key]), key=lambda part: part.start)) for key in parts}
        return DuplexStream(str(values["id"]), seconds, values["language"], order["turns"], order["events"],
                            tuple(source), seed, tokenizer, answer)  # fmt: skip

    def parts(self, key: str, values: Any) -> Iterator[Any]:
        if not isinstance(values, list):
            self.wrong(f"its {key} are {printable(values)}, not a list")
            return
        for number, value in enumerate(values, 1):
            self.where = f"{key.removesuffix('s')} {number}"
            yield self.turn(value) if key == "turns" else self.mark(value)
        self.where = "stream"

    def turn(self, value: Any) -> DuplexTurn | None:
        of_user = isinstance(value, Mapping) and value.get("channel") == "user"
        own = ("fragments",) if of_user else ()
        more = () if of_user else ("codes", "interrupted_at")
        if not self.keys(value, ("channel", "start", "end", "text", *own), more) or not self.channel(value):
            return None
        if value["text"] is None:
            self.wrong("its text is null: write an empty one")
        stop, codes = value.get("interrupted_at"), value.get("codes")
        if codes is not None and not (isinstance(codes, list) and all(type(c) is int and c >= 0 for c in codes)):
            self.wrong(f"its codes are {printable(codes)}, not a list of whole numbers from 0")
            codes = None
        fragments = tuple(self.fragments(value["fragments"])) if of_user else ()
        return DuplexTurn(
            value["channel"], *self.span(value["start"], value["end"], "its"), self.text("text", value["text"]) or "",
            fragments, None if codes is None else tuple(codes),
            None if stop is None else self.time("its interrupted_at", stop),
        )  # fmt: skip

    def fragments(self, values: Any) -> Iterator[Span]:
        pairs = isinstance(values, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in values)
        if not pairs or not values:
            self.wrong(f"its fragments are {printable(values)}, not a list of [start, end]")
            return
        for number, pair in enumerate(values, 1):
            yield self.span(pair[0], pair[1], f"its fragment {number}:")

    def mark(self, value: Any) -> DuplexMark | None:
        if not self.keys(value, ("type", "channel", "start", "end"), ("text",)) or not self.channel(value):
            return None
        if value["type"] not in get_args(MarkType):
            self.wrong(f"its type is {printable(value['type'])}; there are {', '.join(get_args(MarkType))}")
            return None
        start, end = self.span(value["start"], value["end"], "its")
        return DuplexMark(value["type"], value["channel"], start, end, self.text("text", value.get("text")))

    def keys(self, value: Any, needed: Sequence[str], more: Sequence[str]) -> bool:
        if not isinstance(value, Mapping):
            self.wrong(f"it is {printable(value)}, not an object")
            return False
        absent = [key for key in needed if key not in value]
        strange = [key for key in value if key not in (*needed, *more)]
        if absent:
            self.wrong(f"it has no {', '.join(absent)}")
        if strange:
            self.wrong(f"it has the keys {printable(strange)}; there are {', '.join((*needed, *more))}")
        return not absent

    def channel(self, value: Mapping[str, Any]) -> bool:
        known = value["channel"] in get_args(Channel)
        if not known:
            self.wrong(f"its channel is {printable(value['channel'])}; there are {', '.join(get_args(Channel))}")
        return known

    def span(self, start: Any, end: Any, what: str) -> Span:
        first, last = self.time(f"{what} start", start), self.time(f"{what} end", end)
        if last < first:
            self.wrong(f"{what} end {last} s is before its start {first} s")
        return first, last

    def time(self, key: str, value: Any) -> float:
        if type(value) not in (int, float) or not 0 <= value <= MAX_SECONDS:
            self.wrong(f"{key} is {printable(value)}, not a time in seconds, 0 to {MAX_SECONDS}")
            return 0.0
        return float(value)

    def text(self, key: str, value: Any) -> str | None:
        if not isinstance(value, str | None):
            self.wrong(f"its {key} is {printable(value)}, not a text")
            return None
        if value and (why := unfit(value)):
            self.wrong(f"its {key} {why}; remove it")
        return value

    def wrong(self, what: str) -> None:
        self.problems.append(Problem(self.where, what))


def _together(stream: DuplexStream) -> Iterator[str]:
    """What is wrong with the parts of a stream together."""
    for part in (*stream.turns, *stream.events):
        if part.end > stream.seconds + SLACK:
            yield f"{_named(part)} ends after the stream, which has {stream.seconds} s"
    for turn in stream.turns:
        yield from _turn_problems(turn)
    for channel in get_args(Channel):
        spoken = [
            *stream.turns_of(channel),
            *(mark for mark in stream.marks("back_channel") if mark.channel == channel),
        ]
        spoken.sort(key=lambda part: part.start)
        for before, after in pairwise(spoken):
            if after.start < before.end - SLACK:
                yield f"{_named(before)} and {_named(after)} overlap: a channel has one voice"
    for mark in stream.marks("barge_in"):
        if not any(abs(mark.start - turn.start) <= SLACK for turn in stream.turns_of(mark.channel)):
            yield f"{_named(mark)} begins with no turn of that channel"
    for mark in stream.marks("pause"):
        pauses = [pause for turn in stream.turns_of(mark.channel) for pause in turn.pauses]
        if not any(abs(mark.start - a) <= SLACK and abs(mark.end - b) <= SLACK for a, b in pauses):
            yield f"{_named(mark)} is not between two fragments of a turn"


def _turn_problems(turn: DuplexTurn) -> Iterator[str]:
    edges = [second for span in turn.fragments for second in span]
    if any(after < before for before, after in pairwise(edges)):
        yield f"the fragments of {_named(turn)} overlap or are out of order"
    elif edges and (abs(edges[0] - turn.start) > SLACK or abs(edges[-1] - turn.end) > SLACK):
        yield f"the fragments of {_named(turn)} reach from {edges[0]} to {edges[-1]} s: they are all of the turn"
    stop = turn.interrupted_at
    if stop is not None and not turn.start - SLACK <= stop <= turn.end + SLACK:
        yield f"{_named(turn)} is interrupted at {stop} s, outside of it"
    if turn.codes is not None:
        seconds, lasts = len(turn.codes) * CODE_SECONDS, turn.end - turn.start
        if seconds < lasts - CHUNK_SECONDS or (stop is None and seconds > lasts + CHUNK_SECONDS):
            yield f"{_named(turn)} has {len(turn.codes)} codes, which are {seconds:.2f} s, and lasts {lasts:.2f} s"


def _named(part: DuplexTurn | DuplexMark) -> str:
    name = "turn" if isinstance(part, DuplexTurn) else part.type.replace("_", "-")
    return f"the {part.channel}'s {name} from {part.start} to {part.end} s"
