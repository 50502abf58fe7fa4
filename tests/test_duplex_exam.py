"""Streams and recorded questions in a live session: the hazards of the trunk, and what is said in the first turn."""

from dataclasses import replace
from itertools import groupby

import numpy as np
import pytest
import torch
from duplex_cases import FixedFeatures, duplex_family

from covo_rl.data import DataError
from covo_rl.duplex import first_turn as first
from covo_rl.duplex.data import DuplexStream, DuplexTurn
from covo_rl.duplex.exam import exam_problems, examine, led_decisions
from covo_rl.duplex.first_turn import first_turn, heard_question, tail_for
from covo_rl.duplex.grid import CHUNK_SAMPLES, CHUNK_SECONDS, sound_start
from covo_rl.duplex.layout import ChunkDecision
from covo_rl.duplex.rollout import greedy_stop
from covo_rl.duplex.session import DuplexSession
from covo_rl.duplex.targets import last_question
from covo_rl.duplex.trunk import ReplyChunk, listening_trunk, speaking_trunk, stop_logits

RATE = 24_000
FAMILY, IDS = duplex_family()
ASKED = DuplexTurn("user", 0.3, 1.1, "one", ((0.3, 1.1),))


def session(seed=1, **options):
    encoder = FixedFeatures()
    encoder.features_CD = torch.randn(400, 48, generator=torch.Generator().manual_seed(seed))
    return DuplexSession(FAMILY, encoder, system="Hi", **{"max_turn_seconds": 1.6, **options})


def stream(chunks, *turns):
    return DuplexStream("s", chunks * CHUNK_SECONDS, None, turns)


def said(shift, codes, text="no", chunks=None):
    """The model's turn whose SHIFT is in this chunk."""
    start = sound_start(shift + 1) / RATE
    seconds = chunks * CHUNK_SECONDS if codes is None else len(codes) / 25
    return DuplexTurn("model", start, start + seconds, text, codes=codes)


def tokens(text):
    return FAMILY.tokenize(text, [])


def sound(chunks):
    return np.zeros(chunks * CHUNK_SAMPLES, np.float32)


def test_hazards_of_a_session_that_listens_are_those_of_the_trunk():
    live = session()
    found = examine(live, stream(20, ASKED), sound(20))
    (z_K,) = stop_logits(FAMILY, [listening_trunk(live.system_ids, 20, IDS)], [live.encoder.features_CD[:20]], IDS)
    assert (found.stream.kind, found.stream.first_chunk, found.stream.decisions) == ("single", 0, 20)
    assert (found.stream.turn_end, found.text_cut, found.dropped) == (1.1, 0, 0)
    assert (found.z_K - z_K).abs().max() < 1e-5 and found.z_K.std() > 0.1


def test_hazards_of_a_session_that_speaks_are_those_of_the_trunk():
    """A reply of two ids and 10 codes: three chunks, the last filled up with silence."""
    live, codes = session(), tuple(range(10))
    found = examine(live, stream(20, ASKED, said(8, codes)), sound(20))
    text = [*tokens("no"), None, None][:3]
    filled = [*codes, *IDS.silence(10, 2)]
    reply = [
        ReplyChunk(token, tuple(IDS.first_code + code for code in filled[4 * i : 4 * i + 4]))
        for i, token in enumerate(text)
    ]
    trunk = speaking_trunk(live.system_ids, 8, reply, IDS)
    (z_K,) = stop_logits(FAMILY, [trunk], [live.encoder.features_CD[:12]], IDS)
    assert (found.stream.kind, found.stream.first_chunk, found.stream.decisions) == ("hold", 9, 3)
    assert (found.z_K - z_K).abs().max() < 1e-5


def test_a_free_session_stops_where_the_hazards_say():
    stops = []
    for seed in range(2, 6):
        live = session(seed)
        stop = greedy_stop(examine(live, stream(12, ASKED), sound(12)).z_K)
        live.reset()
        shifts = []
        while not shifts and len(live.decisions) < 11:
            shifts = [event.chunk for event in live.push(sound(1)) if event.decision == "shift"]
        assert shifts == ([stop] if stop < 11 else [])
        stops.append(stop)
    assert max(stops) > 0


def test_a_reply_without_codes_is_said_with_codes_of_the_sessions_own():
    long = "no audio " * 8
    plan, text_cut = led_decisions(stream(30, ASKED, said(8, None, long, chunks=5)), IDS, tokens)
    assert [decision.token for decision in plan[:9]] == [IDS.think] * 8 + [IDS.shift]
    assert [decision.token for decision in plan[9:14]] == tokens(long)[:5] and plan[14].token == IDS.break_
    assert text_cut == len(tokens(long)) - 5 and not any(decision.codes for decision in plan)
    live = session()
    found = examine(live, stream(30, ASKED, said(8, None, long, chunks=5)), sound(30))
    assert found.text_cut == text_cut and all(len(decision.codes) == 4 for decision in live.decisions[9:14])


def test_streams_that_cannot_be_put_are_told_before():
    live = session(max_positions=100)
    told = [exam_problems(live, stream(30, ASKED, turn)) for turn in (said(8, (99,) * 8), said(8, (1,) * 60))]
    assert "code 99; there are 0 to 39" in told[0][0]
    assert "longest reply needs" in told[1][0] and "the model has 100" in told[1][0]
    mute = session(ids=replace(live.ids, silence_codes=()))
    assert exam_problems(mute, stream(30, ASKED, said(8, (1,) * 7)))[0].startswith("s: 1 codes of silence are ")
    with pytest.raises(DataError, match="asks nothing"):
        last_question(stream(30))
    with pytest.raises(DataError, match="decisions up to chunk 9, and 19 is asked"):
        examine(session(), stream(20, ASKED), sound(10))


def tone(seconds):
    return 0.3 * np.sin(2 * np.pi * 300 * np.arange(round(seconds * RATE)) / RATE)


def test_a_question_is_followed_by_its_room_and_never_by_digital_silence():
    wave_T = np.concatenate([np.zeros(6000), tone(0.6), np.zeros(round(1.2 * RATE)), tone(0.5), np.zeros(4800)])
    heard = heard_question(wave_T, 2.0, np.random.default_rng(0))
    assert heard.seconds == len(wave_T) / RATE and len(heard.wave_T) == len(wave_T) + 2 * RATE
    assert heard.speech_end == pytest.approx(0.25 + 0.6 + 1.2 + 0.5, abs=0.02)
    assert heard.longest_pause == pytest.approx(1.2, abs=0.03)
    assert np.abs(heard.wave_T[: len(wave_T)] - wave_T).max() < 0.01
    runs = groupby(np.round(heard.wave_T * 32_767).astype(int))
    assert max(len([*run]) for _, run in runs) < 0.01 * RATE
    hiss = np.random.default_rng(1).normal(0, 0.003, len(wave_T))
    noisy = heard_question(wave_T + hiss, 2.0, np.random.default_rng(0))
    assert noisy.wave_T[-RATE:].std() == pytest.approx(0.003, rel=0.2)


class Led(DuplexSession):
    """A session that says the same in every dialogue."""

    plan = ()

    def reset(self):
        super().reset()
        self.follow(self.plan)


def led(*tokens):
    live = Led(FAMILY, FixedFeatures(), system="Hi", max_turn_seconds=0.8)
    live.plan = [ChunkDecision(token) for token in tokens]
    return live


def heard(live):
    return heard_question(np.concatenate([tone(0.5), np.zeros(RATE), tone(0.5)]), tail_for(live),
                          np.random.default_rng(0))  # fmt: skip


def test_the_first_turn_is_what_is_said_from_shift_to_break():
    think, no = [IDS.think] * 20, tokens("no")
    live = led(*think[:6], IDS.shift, *no, IDS.text_pad, IDS.break_, IDS.shift, *tokens("audio"))
    turn = first_turn(live, heard(live))
    assert (turn.text, turn.ending, turn.shift_time) == ("no", "break", pytest.approx(7 * 0.16))
    assert len(turn.codes) == 4 * (len(no) + 1) and live.decisions[-1].token == IDS.break_
    live = led(*think, IDS.shift, *[tokens("o")[0]] * 5)  # a turn has 0.8 s: five chunks
    turn = first_turn(live, heard(live))
    assert (turn.text, turn.ending, len(live.decisions)) == ("ooooo", "limit", 20 + 1 + 5 + 1)


def test_a_session_that_never_answers_is_waited_for_and_then_left(monkeypatch):
    monkeypatch.setattr(first, "WAIT_SECONDS", 3.0)
    live = led(*[IDS.think] * 200)
    turn = first_turn(live, heard(live))
    assert (turn.text, turn.codes, turn.shift_time, turn.ending) == ("", (), None, "never")
    waited = len(live.decisions) * CHUNK_SECONDS - 2.0
    assert 3.0 < waited <= 3.0 + CHUNK_SECONDS + 1e-6
