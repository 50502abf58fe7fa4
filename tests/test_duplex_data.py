"""Streams of two channels: what is written is read again, and whatever is wrong is named."""

import json
import wave
from dataclasses import replace

import numpy as np
import pytest
import soundfile

from covo_rl.data import DataError
from covo_rl.duplex.data import DuplexMark, DuplexStream, DuplexTurn, parse_stream, stream_content
from covo_rl.duplex.grid import decision_time
from covo_rl.duplex.stream_files import (
    EVENTS,
    STEREO,
    read_events,
    read_stereo,
    read_stream,
    read_streams,
    write_stream,
)
from covo_rl.duplex.targets import stream_questions, stream_replies

ASKED = DuplexTurn("user", 0.4, 1.9, "one two", ((0.4, 0.8), (1.5, 1.9)))
#: SHIFT at 2.4 s in chunk 14, so that sound begins with chunk 16
REPLY = DuplexTurn("model", 2.56, 3.36, "three", codes=tuple(range(20)))
STREAM = DuplexStream(
    "s1", 4.0, "en", (ASKED, REPLY),
    (DuplexMark("pause", "user", 0.8, 1.5), DuplexMark("back_channel", "user", 2.7, 3.0, "mm")), ("d1",), 3,
)  # fmt: skip


def sound(seconds=4.0):
    return np.random.default_rng(0).uniform(-0.5, 0.5, (round(seconds * 24_000), 2)).astype(np.float32)


def wrong(change):
    """What is said of the stream's content after a change of it."""
    content = json.loads(json.dumps(stream_content(STREAM)))
    change(content)
    with pytest.raises(DataError) as error:
        parse_stream(content)
    return [str(problem) for problem in error.value.problems]


def test_what_is_written_is_read_again(tmp_path):
    write_stream(tmp_path / "a", STREAM, sound())
    stream, wave_T2 = read_stream(tmp_path / "a")
    assert stream == STREAM
    np.testing.assert_allclose(wave_T2, sound(), atol=1 / 32_000)
    assert read_streams(tmp_path) == {tmp_path / "a": STREAM}
    content = json.loads((tmp_path / "a" / EVENTS).read_text())
    assert content["turns"][0] == {"channel": "user", "start": 0.4, "end": 1.9, "text": "one two",
                                   "fragments": [[0.4, 0.8], [1.5, 1.9]]}  # fmt: skip
    assert set(content["turns"][1]) == {"channel", "start", "end", "text", "codes"}


def test_an_interrupted_reply_keeps_its_whole_text_and_codes():
    cut = replace(REPLY, end=2.88, interrupted_at=2.88)
    stream = replace(STREAM, turns=(ASKED, cut), events=STREAM.events[:1])
    assert parse_stream(stream_content(stream)) == stream
    uninterrupted = replace(stream, turns=(ASKED, replace(cut, interrupted_at=None)))
    with pytest.raises(DataError, match=r"has 20 codes, which are 0.80 s, and lasts 0.32 s"):
        parse_stream(stream_content(uninterrupted))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.update(speaker="anna"), "stream: it has the keys ['speaker']; there are id, seconds"),
        (lambda c: c.pop("seed"), "stream: it has no seed"),
        (lambda c: c.update(seed=True), "stream: its seed is True, not a whole number"),
        (lambda c: c.update(id=" "), "stream: its id is empty"),
        (lambda c: c.update(id=None), "stream: its id is empty"),
        (lambda c: c.update(seconds=10**400), "stream: its seconds is 1000"),
        (lambda c: c.update(seconds=1e308), "stream: its seconds is 1e+308, not a time in seconds, 0 to 44739"),
        (lambda c: c.update(source=[1]), "stream: its source is [1], not a list of ids"),
        (lambda c: c.update(turns={}), "stream: its turns are {}, not a list"),
        (lambda c: c["turns"].append(7), "turn 3: it is 7, not an object"),
        (lambda c: c["turns"][0].update(start=-1), "turn 1: its start is -1, not a time in seconds"),
        (lambda c: c["turns"][0].update(end=True), "turn 1: its end is True, not a time in seconds"),
        (lambda c: c["turns"][1].update(end=2.0), "turn 2: its end 2.0 s is before its start 2.56 s"),
        (lambda c: c["turns"][1].update(channel="left"), "turn 2: its channel is 'left'; there are user, model"),
        (lambda c: c["turns"][1].update(fragments=[]), "turn 2: it has the keys ['fragments']"),
        (lambda c: c["turns"][0].update(codes=[1]), "turn 1: it has the keys ['codes']"),
        (lambda c: c["turns"][1].update(codes=[1, -2]), "turn 2: its codes are [1, -2], not a list of whole numbers"),
        (lambda c: c["turns"][0].update(fragments=[[0.4]]), "turn 1: its fragments are [[0.4]], not a list of [start"),
        (lambda c: c["turns"][0].update(text=None), "turn 1: its text is null"),
        (lambda c: c["events"][0].update(type="laugh"), "event 1: its type is 'laugh'; there are pause, back_channel"),
        (lambda c: c.update(seconds=3.0), "s1: the model's turn from 2.56 to 3.36 s ends after the stream"),
        (lambda c: c["turns"][0].update(end=2.2), "s1: the fragments of the user's turn from 0.4 to 2.2 s reach"),
        (lambda c: c["turns"][0].update(fragments=[[0.4, 1.6], [1.5, 1.9]]), "s1: the fragments of the user's turn"),
        (lambda c: c["turns"][1].update(interrupted_at=3.9), "s1: the model's turn from 2.56 to 3.36 s is interrupted"),
        (lambda c: c["turns"].append(c["turns"][1]), "s1: the model's turn from 2.56 to 3.36 s and the model's turn"),
        (lambda c: c["events"][1].update(start=1.8), "s1: the user's turn from 0.4 to 1.9 s and the user's back"),
        (lambda c: c["events"][0].update(end=1.2), "s1: the user's pause from 0.8 to 1.2 s is not between"),
        (lambda c: c["events"][1].update(type="barge_in"), "s1: the user's barge-in from 2.7 to 3.0 s begins with no"),
        (lambda c: c["events"][1].update(type="barge_in", start=2.56), "s1: the user's barge-in from 2.56 to 3.0 s"),
        (lambda c: c["events"][0].update(channel="model"), "s1: the model's pause from 0.8 to 1.5 s is not between"),
    ],
)  # fmt: skip
def test_every_fault_is_named(change, said):
    assert any(line.startswith(said) for line in wrong(change)), wrong(change)


def test_all_faults_are_said_at_once():
    def change(content):
        content["seed"], content["extra"] = "x", 1
        content["turns"][0]["start"] = "now"
        content["events"][1]["channel"] = 2

    assert [line.split(":")[0] for line in wrong(change)] == ["stream", "stream", "turn 1", "event 2"]


def test_files_that_do_not_fit_are_refused(tmp_path):
    write_stream(tmp_path / "a", STREAM, sound())
    with pytest.raises(DataError, match=r"3.0000 s of sound, its events say 4.0000 s"):
        write_stream(tmp_path / "b", STREAM, sound(3))
    with pytest.raises(DataError, match="it clips"):
        write_stream(tmp_path / "b", STREAM, 3 * sound())
    assert not (tmp_path / "b").exists()
    path = tmp_path / "a" / STEREO
    data = path.read_bytes()
    path.write_bytes(data[:-4000])
    with pytest.raises(DataError, match=r"truncated, 95000 of 96000 samples"):
        read_stereo(path)
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes(b"\0" * 320)
    with pytest.raises(DataError, match="1 channels, 16 bit, 16000 Hz; a stream has 2 channels, 16 bit, 24000 Hz"):
        read_stereo(path)
    path.write_bytes(data[:20])
    with pytest.raises(DataError, match="it ends within its header"):
        read_stereo(path)
    for kind in ({"subtype": "FLOAT"}, {"subtype": "PCM_16", "format": "WAVEX"}):
        soundfile.write(path, sound(), 24_000, **kind)
        with pytest.raises(DataError, match=r"unknown format.*; a stream has 2 channels.*ffmpeg"):
            read_stereo(path)
    soundfile.write(path, sound()[:0], 24_000, subtype="PCM_16")
    with pytest.raises(DataError, match="it holds no sound"):
        read_stereo(path)
    (tmp_path / "a" / EVENTS).write_text('{"id": "a", "id": "b", "seconds": NaN}')
    with pytest.raises(DataError, match="the key 'id' occurs twice") as error:
        read_events(tmp_path / "a" / EVENTS)
    assert "NaN" in str(error.value)


def test_every_folder_that_is_wrong_is_named(tmp_path):
    for name in ("a", "b", "c"):
        write_stream(tmp_path / name, STREAM if name != "c" else replace(STREAM, id="s2"), sound())
    (tmp_path / "c" / STEREO).unlink()
    write_stream(tmp_path / "d", replace(STREAM, id="s3"), sound())
    (tmp_path / "d" / EVENTS).unlink()
    (tmp_path / "d" / EVENTS).symlink_to(EVENTS)  # a loop
    (tmp_path / "notes").mkdir()  # no stream, and none that lacks something
    with pytest.raises(DataError) as error:
        read_streams(tmp_path)
    assert [str(problem) for problem in error.value.problems] == [
        "b: its id 's1' is also that of a", "c: it has no stereo.wav", "d: it has no events.json",
    ]  # fmt: skip
    with pytest.raises(DataError, match="no stream"):
        read_streams(tmp_path / "c")


def test_a_stream_by_chunks():
    """The user's turn ends at 1.9 s, in chunk 11; SHIFT in 14, five chunks of four codes, BREAK in 20; 25 chunks."""
    (reply,) = stream_replies(STREAM)
    assert (reply.shift, reply.chunks, reply.end) == (14, 5, 20)
    assert decision_time(reply.shift) == pytest.approx(2.4)
    spoken, after = stream_questions(STREAM)
    assert [spoken.kind, after.kind] == ["pause", "back_channel"]
    assert (spoken.first_chunk, spoken.decisions, spoken.turn_end, spoken.pauses) == (0, 15, 1.9, ((0.8, 1.5),))
    assert (after.first_chunk, after.decisions, after.onset, after.turn_end) == (15, 5, 2.7, 3.0)


def test_an_interrupted_reply_ends_in_the_chunk_in_which_its_sound_does():
    """Quiet from 2.88 s on, so BREAK in chunk 17; its five chunks of codes are known all the same."""
    cut = replace(REPLY, end=2.88, interrupted_at=2.88)
    stream = replace(STREAM, turns=(ASKED, cut), events=STREAM.events[:1])
    (reply,) = stream_replies(stream)
    assert (reply.break_at, reply.end, reply.chunks, reply.codes) == (17, 17, 5, REPLY.codes)


def test_replies_without_room_are_named():
    early = replace(REPLY, start=0.2, end=1.0)
    with pytest.raises(DataError, match=r"from 0.2 s needs its SHIFT in chunk -1, and the first that is free is 0"):
        stream_replies(replace(STREAM, turns=(early,), events=()))
