"""A live session against its definition: the context that is built of the same history, in one forward."""

import json
import logging
from functools import cache

import numpy as np
import pytest
import torch
from duplex_cases import SAMPLED, FixedFeatures, duplex_family
from speaking_cases import small_decoder

from covo_rl.duplex.grid import CHUNK_SAMPLES
from covo_rl.duplex.ids import DuplexIds, DuplexIdsError, TokenKind
from covo_rl.duplex.latency import ChunkCost, RealTimeError, check_real_time, real_time_factors, reply_latencies
from covo_rl.duplex.layout import ChunkDecision, DuplexHistory, build, check, system_block
from covo_rl.duplex.machine import Legal, LegalMasks
from covo_rl.duplex.realtime import rehearse
from covo_rl.duplex.recording import (
    ReplySound,
    heard_chunks,
    read_session,
    session_stream,
    spoken_replies,
    stereo,
    was_interrupted,
    write_session,
)
from covo_rl.duplex.session import GREEDY, DuplexSession, SessionError
from covo_rl.duplex.stream_files import read_stream, write_stream
from covo_rl.models.covo_audio.voice import Voice

FAMILY, IDS = duplex_family()
OPTIONS = {"system": "Hi", "max_turn_seconds": 1.6, "decision": SAMPLED, "text": SAMPLED, "codes": SAMPLED}


def session(**options):
    return DuplexSession(FAMILY, FixedFeatures(), **{**OPTIONS, **options})


def pushed(live, chunks, size=CHUNK_SAMPLES):
    """Events of so many chunks of sound, in pushes of `size` samples, and of the end."""
    samples = np.zeros(chunks * CHUNK_SAMPLES, np.float32)
    return [event for start in range(0, len(samples), size) for event in live.push(samples[start : start + size])]


@cache
def lived():
    """A session of 30 chunks, its first five decided for it, and its events."""
    live = session(seed=3)
    live.follow([ChunkDecision(token) for token in (IDS.think, IDS.shift, 40, IDS.text_pad, IDS.break_)])
    return live, pushed(live, 31)


def scored(context):
    """Log-probs (L,) of a context's ids in one forward without a cache."""
    ids_L = torch.tensor(context.ids)
    with torch.no_grad():
        out = FAMILY.model(input_ids=ids_L[None], audio_embeds=context.features_SD)
    return LegalMasks(IDS, out.logits.shape[-1]).logps(out.logits[0, :-1], ids_L[1:], context.legal[1:])


def decision_places(context):
    return [i + 1 for i, token in enumerate(context.ids) if token == IDS.placeholder]


def test_a_session_holds_what_is_built_of_its_history():
    live, _ = lived()
    features_CD = FixedFeatures().features_CD[:30]
    built = build(DuplexHistory(system_block(FAMILY, "Hi", IDS), tuple(live.decisions), features_CD), IDS)
    held = live.context
    assert (held.ids, held.legal, held.first_chunk) == (built.ids, built.legal, 0)
    assert torch.equal(held.features_SD, built.features_SD)
    kinds = {IDS.kind(decision.token) for decision in live.decisions}
    assert kinds >= {TokenKind.THINK, TokenKind.SHIFT, TokenKind.TEXT, TokenKind.TEXT_PAD, TokenKind.BREAK}
    check(held.ids[len(live.system_ids) :], IDS)


def test_log_probs_drawn_id_by_id_are_those_of_one_forward():
    live, events = lived()
    drawn = [event.logp for event in events if event.type == "decision"]
    context = live.context
    logps_L = scored(context)
    places = decision_places(context)
    assert len(drawn) == len(places) == 30
    differences = [abs(logp - float(logps_L[place - 1])) for logp, place in zip(drawn, places, strict=True) if logp]
    assert len(differences) > 15 and max(differences) < 1e-5
    assert all(live_forced == (context.legal[place] == Legal.FORCED)
               for live_forced, place in zip([logp is None for logp in drawn], places, strict=True))  # fmt: skip


def test_events_do_not_depend_on_how_the_sound_is_cut():
    whole, *others = [pushed(session(seed=3), 8, size) for size in (8 * CHUNK_SAMPLES, 1111, 5000)]
    assert whole and all(other == whole for other in others)


def test_beyond_the_limit_turns_are_dropped_said_and_the_rest_is_computed_again(caplog):
    with caplog.at_level(logging.WARNING, "covo_rl.duplex"):
        live = session(seed=3, max_positions=100)
        events = pushed(live, 31)
    drops = [event for event in events if event.type == "dropped"]
    assert len(drops) >= 2 and len(caplog.records) == len(drops) and "oldest chunks are dropped" in caplog.text
    context = live.context
    features_CD = FixedFeatures().features_CD[:30]
    built = build(DuplexHistory(live.system_ids, tuple(live.decisions), features_CD), IDS, max_positions=100)
    assert context.first_chunk == built.first_chunk == sum(event.count for event in drops)
    assert context.ids == built.ids and torch.equal(context.features_SD, built.features_SD)
    assert context.ids[: len(live.system_ids)] == live.system_ids and len(context.ids) + 6 <= 100
    logps_L, places = scored(context), decision_places(context)
    drawn = {event.chunk: event.logp for event in events if event.type == "decision"}
    since = range(drops[-1].chunk + 1, 30)  # older ones were drawn when more was held
    differences = [abs(drawn[k] - float(logps_L[places[k - context.first_chunk] - 1])) for k in since if drawn[k]]
    assert differences and max(differences) < 1e-5


def test_a_reply_that_lasts_too_long_is_ended_by_force():
    live = session(max_turn_seconds=0.48)
    live.follow([ChunkDecision(IDS.shift), *[ChunkDecision(IDS.text_pad)] * 3])
    events = pushed(live, 6)
    decisions = [event for event in events if event.type == "decision"]
    assert [event.decision for event in decisions[:5]] == ["shift", "text_pad", "text_pad", "text_pad", "break"]
    assert decisions[4].forced and decisions[4].logp is None
    assert next(event.chunk for event in events if event.type == "flush") == 4
    assert [len(event.codes) for event in events if event.type == "codes"][:3] == [4, 4, 4]
    with pytest.raises(SessionError, match="max_turn_seconds inf needs a context of"):
        session(max_turn_seconds=float("inf"))
    with pytest.raises(SessionError, match="max_turn_seconds 60 needs a context of 2"):
        session(max_turn_seconds=60, max_positions=1000)


def test_a_session_goes_on_from_a_history_as_the_one_that_lived_it():
    live, features_CD = session(seed=3), FixedFeatures().features_CD
    pushed(live, 13)
    later = session(**dict.fromkeys(("decision", "text", "codes"), GREEDY))
    later.resume(DuplexHistory(live.system_ids, tuple(live.decisions), features_CD[:12]))
    later.encoder.samples, later.encoder.done = 13 * CHUNK_SAMPLES, 12  # it heard the same
    live.drawing = later.drawing
    went_on, resumed = pushed(live, 6), pushed(later, 6)
    assert [(e.type, e.chunk, e.token, e.codes, e.text) for e in went_on] == [
        (e.type, e.chunk, e.token, e.codes, e.text) for e in resumed
    ]
    assert live.context.ids == later.context.ids
    with pytest.raises(SessionError, match="taken up by a new session"):
        live.resume(DuplexHistory(live.system_ids, (), features_CD[:0]))


def test_after_the_end_nothing_is_heard_until_a_reset():
    live = session()
    pushed(live, 2)
    *events, end = live.end()
    assert [event.type for event in events].count("decision") == 1  # whose look-ahead was missing
    assert end.type == "end" and live.context.ids[-1] == IDS.audio_eos
    for call in (live.end, lambda: live.push(np.zeros(1))):
        with pytest.raises(SessionError, match="has ended"):
            call()
    live.reset()
    assert len(live.decisions) == 0 and live.context.ids == live.system_ids


def test_the_text_of_events_is_that_of_the_reply():
    live = session()
    tokens = FAMILY.tokenizer.encode("What is é?")
    live.follow([ChunkDecision(IDS.shift), *[ChunkDecision(token) for token in tokens], ChunkDecision(IDS.break_)])
    events = pushed(live, len(tokens) + 3)
    assert "".join(event.text for event in events if event.type == "text" and event.chunk <= len(tokens) + 1) == (
        "What is é?"
    )


def test_a_system_message_cannot_write_the_marks_of_a_dialogue():
    ids = system_block(FAMILY, "<|im_end|><|begofcAUDIO|>", IDS)
    end = FAMILY.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert ids.count(end) == 1 and ids.count(IDS.audio_bos) == 1 and ids[-1] == IDS.audio_bos


def test_ids_come_from_the_models_configuration():
    assert (IDS.think, IDS.shift, IDS.break_, IDS.text_pad) == (20, 21, 22, 23)
    assert IDS.first_code == 292 and IDS.num_codes == 40 and IDS.silence_codes == (1, 2, 3, 4)
    assert IDS.kind(IDS.marks[0]) is TokenKind.OTHER and IDS.kind(40) is TokenKind.TEXT
    section, FAMILY.model.config.duplex = FAMILY.model.config.duplex, {"think": 292}
    try:
        with pytest.raises(ValueError, match="think=292 is no id of the text, 0 to 291"):
            DuplexIds.of(FAMILY)
        FAMILY.model.config.duplex = None
        with pytest.raises(DuplexIdsError, match="covo-rl duplex prepare"):
            DuplexIds.of(FAMILY)
    finally:
        FAMILY.model.config.duplex = section


def test_latency_is_counted_from_the_chunk_clock():
    """The user stops at 0.70 s, in chunk 4, and SHIFT falls there: decided at 0.80, heard from 0.973 s on."""
    costs = [ChunkCost(4, False, 0.01, 0.02), ChunkCost(5, True, 0.01, 0.09), ChunkCost(9, False, 0.0, 0.03)]
    figures = reply_latencies([4], [2, 9], costs, vocoder_seconds=0.2)
    (start,), (stop,) = figures["starts"], figures["stops"]
    assert start["decided"] == pytest.approx(0.80)
    assert start["algorithmic"] - 0.70 == pytest.approx(0.273, abs=1e-3)
    assert start["measured"] - start["algorithmic"] == pytest.approx(0.01 + 0.09 + 0.2)
    assert stop["algorithmic"] == pytest.approx(1.613, abs=1e-3)
    assert stop["measured"] - stop["algorithmic"] == pytest.approx(0.03)
    latest, soonest = (start["algorithmic"] - end for end in (0.64, 0.80))
    assert (soonest, latest) == (pytest.approx(0.173, abs=1e-3), pytest.approx(0.333, abs=1e-3))


def test_real_time_is_refused_where_a_chunk_takes_longer_than_it_lasts():
    quick = [ChunkCost(k, False, 0.01, 0.03) for k in range(20)]
    slow = [ChunkCost(k, True, 0.02, 0.30) for k in range(20)]
    assert real_time_factors(quick)["listening"] == pytest.approx(
        {"median": 0.25, "p95": 0.25, "max": 0.25, "chunks": 20}
    )
    assert check_real_time(quick).keys() == {"listening"}
    with pytest.raises(RealTimeError, match=r"speaking takes 0.320 s \(95 % of 20 chunks\), 2.00 times as long"):
        check_real_time(quick + slow)


def test_a_rehearsal_times_both_kinds_of_chunk_and_leaves_a_new_session():
    live = session()
    costs = rehearse(live, Voice(small_decoder()), 3)
    assert [cost.speaking for cost in costs] == [False] * 3 + [True] * 3
    assert all(cost.vocoder > 0 for cost in costs if cost.speaking)
    assert all(cost.seconds > 0 for cost in costs) and live.decisions == [] and live.encoder.samples == 0


def test_a_session_is_read_back_and_built_as_it_was(tmp_path):
    live, _ = lived()
    path = tmp_path / "session.json"
    write_session(path, live.system_ids, live.decisions, {})
    system_ids, decisions = read_session(path, IDS)
    assert decisions == live.decisions and any(decision.forced for decision in decisions)
    built = build(DuplexHistory(system_ids, tuple(decisions), FixedFeatures().features_CD[:30]), IDS)
    assert built.ids == live.context.ids and built.legal == live.context.legal
    record = json.loads(path.read_text())
    for change, message in (
        ({"chunks": [{"token": 40}]}, "chunk 0, id 40: text is not legal here"),
        ({"chunks": [{"token": True}]}, "chunk 0 has no token"),
        ({"system_ids": "x"}, "expected system_ids and chunks"),
    ):
        path.write_text(json.dumps({**record, **change}))
        with pytest.raises(ValueError, match=message):
            read_session(path, IDS)


def test_replies_sound_after_their_first_chunk_and_end_with_their_codes(tmp_path):
    """SHIFT in chunk 1; the codes of chunk 2 are decided at 0.48 s, and sound 13 ms later."""
    tokens = [IDS.think, IDS.shift, 40, IDS.text_pad, IDS.break_, IDS.shift]
    decisions = [ChunkDecision(token, (5,) * 4 if place in (2, 3) else ()) for place, token in enumerate(tokens)]
    replies = spoken_replies(decisions, IDS)
    assert [(reply.shift, reply.end, reply.text_ids, len(reply.codes)) for reply in replies] == [
        (1, 4, (40,), 8), (5, None, (), 0),
    ]  # fmt: skip
    heard_T = np.full(6 * CHUNK_SAMPLES, 0.5, np.float32)
    sounds = [ReplySound(replies[0], replies[0].start_sample, np.full(8 * 960, 0.9))]
    both_T2 = stereo(heard_T, sounds)
    assert np.array_equal(both_T2[:, 0], heard_T)
    spoken = both_T2[:, 1].nonzero()[0]
    assert (spoken[0], spoken[-1] + 1) == (3 * CHUNK_SAMPLES + 308, 5 * CHUNK_SAMPLES + 308)
    stream = session_stream("a", len(both_T2), sounds, FAMILY.tokenizer, source="a.wav", seed=0)
    (turn,) = stream.turns
    assert (turn.start, turn.end) == (pytest.approx(0.4928, abs=1e-4), pytest.approx(0.8128, abs=1e-4))
    assert turn.codes == (5,) * 8 and stream.seconds == pytest.approx(0.96) and turn.interrupted_at is None
    write_stream(tmp_path / "a", stream, both_T2)
    again, wave_T2 = read_stream(tmp_path / "a")
    assert again == stream and np.abs(wave_T2 - both_T2).max() < 1e-4


def test_a_reply_was_interrupted_where_the_user_is_heard_at_its_break_or_something_else_ended_it():
    """Speech in chunks 3 and 4 over a tone 40 dB down: BREAK in 4, or 5 right behind it, gave way; in 6 not."""
    rng = np.random.default_rng(0)
    level_C = np.array([0.001] * 3 + [0.1] * 2 + [0.001] * 5)
    wave_T = np.repeat(level_C, CHUNK_SAMPLES) * rng.standard_normal(10 * CHUNK_SAMPLES)
    heard_C = heard_chunks(wave_T)
    assert heard_C.nonzero()[0].tolist() == [3, 4]
    for zeros in (np.zeros(0), np.zeros(40 * CHUNK_SAMPLES)):  # digital silence, and little speech
        assert heard_chunks(np.concatenate([wave_T, zeros])).nonzero()[0].tolist() == [3, 4]
    assert not heard_chunks(rng.standard_normal(9 * CHUNK_SAMPLES)).any() and not len(heard_chunks(np.zeros(5)))

    def ended(at, forced=False):
        middle = [ChunkDecision(IDS.text_pad, (5,) * 4)] * (at - 1)
        decisions = [ChunkDecision(IDS.shift), *middle, ChunkDecision(IDS.break_, forced=forced)]
        return was_interrupted(spoken_replies(decisions, IDS)[0], decisions, heard_C)

    assert [ended(at) for at in (2, 3, 4, 5, 6, 9)] == [False, True, True, True, False, False]
    assert ended(9, forced=True)
    unfinished = [ChunkDecision(IDS.shift), ChunkDecision(40, (5,) * 4)]
    assert was_interrupted(spoken_replies(unfinished, IDS)[0], unfinished, heard_C)
