"""The form of a full-duplex dialogue: which ids may follow which, decisions <-> ids, replies -> chunks, the context."""

import itertools
import random
import re
from dataclasses import replace

import pytest
import torch

from covo_rl.duplex.grid import CHUNK_CODES, CHUNK_SAMPLES, CHUNK_SECONDS, chunk_of, decision_time, sound_start
from covo_rl.duplex.ids import DuplexIds, DuplexIdsError, TokenKind
from covo_rl.duplex.layout import (
    ChunkDecision,
    ContextWindow,
    DuplexHistory,
    build,
    check,
    chunk_ids,
    legal_of,
    read_chunks,
)
from covo_rl.duplex.machine import DuplexState, LayoutError, Legal, LegalMasks
from covo_rl.duplex.plan import PlanError, ReplyPlan, overflow_problem, plan_chunks

# THINK, SHIFT, BREAK, text_pad, two text ids, the placeholder, the two audio marks, ChatML's, three codes
T, S, B, PAD, W, V, U, BOS, EOS, MARK, C = range(11)
IDS = DuplexIds(T, S, B, PAD, U, BOS, EOS, first_code=C, num_codes=3, silence_codes=(2, 0), marks=(MARK,))
VOCABULARY = C + 3
LETTERS = {"T": T, "S": S, "B": B, "_": PAD, "w": W, "U": U, "c": C, "x": MARK}
DIALOGUE = re.compile(
    r"((UT)*US(Uwcccc)*(U_cccc)*UB)*"
    r"((UT)*U?|(UT)*US(Uwcccc)*(U(wc{0,3})?)?|(UT)*US(Uwcccc)*(U_cccc)*(U(_c{0,3})?)?)"
)


def accepts(text):
    try:
        check([LETTERS[letter] for letter in text], IDS)
    except LayoutError:
        return False
    return True


def test_the_chunk_of_a_time_and_the_time_of_its_decision():
    assert CHUNK_SAMPLES == 24_000 * CHUNK_SECONDS and CHUNK_CODES == 25 * CHUNK_SECONDS
    assert [chunk_of(t) for t in (0, 0.15, 0.70, 0.80, 1.92)] == [0, 0, 4, 5, 12]
    assert all(chunk_of(CHUNK_SECONDS * k) == k for k in range(20_000))  # whatever 0.16 k rounds to
    assert decision_time(4) == pytest.approx(0.8)
    assert sound_start(5) / 24_000 == pytest.approx(0.96 + 0.0128, abs=1e-4)


def test_check_accepts_exactly_the_dialogues():
    """Against a regular expression, over every short string; four codes are one letter, so that long ones are short."""
    pieces = [*LETTERS, "cccc"]
    strings = ["".join(some) for n in range(5) for some in itertools.product(pieces, repeat=n)]
    strings += [f"US{text}" for text in strings]
    accepted = [text for text in strings if accepts(text)]
    assert accepted == [text for text in strings if DIALOGUE.fullmatch(text)]
    assert all(map(accepts, ("UTUTUSUBUT", "USU_ccccUBUSU", "USUwccccU_ccc")))
    assert not any(map(accepts, ("UTUTUB", "USU_ccccUw", "USUwcccU", "USUTU", "T", "UU", "USUBUB")))
    assert len(accepted) > 25


def test_check_says_what_is_wrong_and_what_would_be_right():
    with pytest.raises(LayoutError, match=r"position 5, chunk 2, id 4: text is not legal here; legal: THINK, SHIFT"):
        check([U, T, U, T, U, W], IDS)
    with pytest.raises(LayoutError, match=r"position 9, chunk 2, id 4: text is .* legal: text_pad, BREAK"):
        check([U, S, U, PAD, C, C, C, C, U, W], IDS)
    with pytest.raises(LayoutError, match="an id without a place here is not legal"):
        check([U, C + 3], IDS)


def walk(seed, chunks):
    """A random dialogue."""
    rng, state, decisions = random.Random(seed), DuplexState(), []
    for _ in range(chunks):
        state = state.after(TokenKind.USER)
        token = rng.choice({Legal.LISTENING: [T, S], Legal.OPEN: [W, V, PAD, B], Legal.CLOSED: [PAD, B]}[state.legal])
        state = state.after(IDS.kind(token))
        codes = tuple(rng.randrange(3) for _ in range(state.codes_left))
        decisions.append(ChunkDecision(token, codes))
        state = replace(state, codes_left=0, due=False)
    return decisions


def test_decisions_become_ids_and_ids_the_same_decisions():
    for seed in range(50):
        decisions = walk(seed, 30)
        ids = chunk_ids(decisions, IDS)
        assert read_chunks(ids, IDS) == decisions
        assert chunk_ids(read_chunks(ids, IDS), IDS) == ids
        assert len(legal_of(decisions, IDS)) == len(ids)
    assert chunk_ids([ChunkDecision(S), ChunkDecision(W, (0, 1, 2, 0))], IDS) == [U, S, U, W, C, C + 1, C + 2, C]


def test_ids_that_end_within_a_chunk_are_no_decisions():
    for ids, missing in (([U, T, U], "the decision"), ([U, S, U, W, C], "3 codes")):
        check(ids, IDS)
        with pytest.raises(LayoutError, match=f"end within a chunk: {missing}"):
            read_chunks(ids, IDS)
    with pytest.raises(LayoutError, match="position 6, chunk 2"):  # a chunk that begins within another
        chunk_ids([ChunkDecision(S), ChunkDecision(W, (0, 1)), ChunkDecision(B)], IDS)


def test_what_is_legal_has_all_the_probability_drawn_and_scored():
    masks = LegalMasks(IDS, VOCABULARY)
    sets = {Legal.LISTENING: [T, S], Legal.OPEN: [B, PAD, W, V], Legal.CLOSED: [B, PAD], Legal.CODE: [C, C + 1, C + 2]}
    logits_LV = torch.randn(len(sets), VOCABULARY, generator=torch.Generator().manual_seed(0))
    probs_LV = masks.masked(logits_LV, list(sets)).softmax(-1)
    for row, legal in enumerate(sets.values()):
        assert probs_LV[row].nonzero()[:, 0].tolist() == sorted(legal)
        scored = masks.logps(logits_LV[[row] * VOCABULARY], torch.arange(VOCABULARY), [[*sets][row]] * VOCABULARY)
        assert torch.allclose(scored.exp(), probs_LV[row])
    assert masks.logps(logits_LV[:2], torch.tensor([U, B]), [Legal.FORCED] * 2).tolist() == [0, 0]


def test_scoring_has_finite_gradients_and_none_where_nothing_was_chosen():
    logits_LV = torch.zeros(3, VOCABULARY, requires_grad=True)
    LegalMasks(IDS, VOCABULARY).logps(logits_LV, torch.tensor([U, T, B]), [0, Legal.LISTENING, 0]).sum().backward()
    grad_LV = logits_LV.grad
    assert grad_LV[1, [T, S]].tolist() == [0.5, -0.5] and grad_LV.abs().sum() == 1


def test_ids_must_differ_and_lie_below_the_codes():
    with pytest.raises(DuplexIdsError, match=r"think and shift are one id, 0; .*text_pad: id 10 is not below 10"):
        replace(IDS, shift=T, text_pad=C)
    with pytest.raises(DuplexIdsError, match="silence_codes: 3 is no code; there are 0 to 2"):
        replace(IDS, silence_codes=(3,))


def letters(decisions):
    names = {T: "T", S: "S", B: "B", PAD: "_", W: "w", V: "v"}
    return " ".join(names[decision.token] + "".join(map(str, decision.codes)) for decision in decisions)


def test_a_reply_is_laid_out_as_text_and_codes_then_pads_then_the_end():
    reply = ReplyPlan(1, (W, V), (0, 1, 2, 0, 1, 1, 1, 1, 0, 0, 0, 0))
    assert letters(plan_chunks([reply], 7, IDS)) == "T S w0120 v1111 _0000 B T"
    assert letters(plan_chunks([reply], 4, IDS)) == "T S w0120 v1111"  # the stream ends first
    two = [ReplyPlan(0, (W,), (0,) * 4), ReplyPlan(3, (V,), (1,) * 4)]
    assert letters(plan_chunks(two, 7, IDS)) == "S w0000 B S v1111 B T"


def test_a_barge_in_drops_what_would_have_come():
    """The user starts in chunk 12; BREAK three chunks later, and three chunks of text before it."""
    reply = ReplyPlan(5, (W,) * 12, (0,) * 48, break_at=chunk_of(1.92) + 3)
    plan = plan_chunks([reply], 17, IDS)
    assert letters(plan) == " ".join(["T"] * 5 + ["S"] + ["w0000"] * 9 + ["B", "T"])
    assert plan[15] == ChunkDecision(B)


def test_codes_and_text_are_padded_to_whole_chunks_with_the_models_silence():
    assert letters(plan_chunks([ReplyPlan(0, (W,), (1,))], 3, IDS)) == "S w1020 B"  # silence is 2, 0, 2, 0 ...
    long = ReplyPlan(0, (W, V, W), (1,) * 4)
    assert letters(plan_chunks([long], 5, IDS)) == "S w1111 v2020 w2020 B"
    with pytest.raises(DuplexIdsError, match="3 codes of silence are needed"):
        plan_chunks([ReplyPlan(0, (W,), (1,))], 3, replace(IDS, silence_codes=()))


def test_text_may_outlast_the_codes_of_one_reply_in_twenty():
    long, right = ReplyPlan(0, (W, V), (1,) * 4), ReplyPlan(0, (W,), (1,) * 4)
    assert long.overflows and not right.overflows and overflow_problem(1, 20) == ""
    assert "the text of 1 of 19 replies outlasts their codes, over 5%" in overflow_problem(1, 19)


def test_all_that_is_wrong_with_replies_is_said_at_once():
    replies = [ReplyPlan(0, (W, U), (9, 0, 0, 0)), ReplyPlan(2, (), (0,) * 4, break_at=9), ReplyPlan(20, (), ())]
    with pytest.raises(PlanError) as error:
        plan_chunks(replies, 12, IDS)
    assert str(error.value).splitlines() == [
        "reply 0: id 6 is the user's chunk, not text",
        "reply 0: code 9; there are 0 to 2",
        "reply 1: SHIFT in chunk 2; it may be in 4 to 11",
        "reply 1: BREAK in chunk 9; after SHIFT and by its own end it may be in 3 to 4",
        "reply 2: SHIFT in chunk 20; it may be in 10 to 11",
    ]


def history(decisions):
    return DuplexHistory((MARK, BOS), tuple(decisions), torch.arange(2.0 * len(decisions)).reshape(-1, 2))


def test_the_context_is_the_system_block_and_the_chunks():
    decisions = [ChunkDecision(T), ChunkDecision(S), ChunkDecision(W, (0, 1, 2, 0)), ChunkDecision(B, forced=True)]
    context = build(history(decisions), IDS, ended=True)
    assert context.ids == (MARK, BOS, U, T, U, S, U, W, C, C + 1, C + 2, C, U, B, EOS)
    assert [int(legal) for legal in context.legal] == [0, 0, 0, 1, 0, 1, 0, 2, 4, 4, 4, 4, 0, 0, 0]
    assert context.features_SD[:, 0].tolist() == [0, 2, 4, 6]
    with pytest.raises(LayoutError, match="3 decisions for 4 features"):
        build(replace(history(decisions), decisions=tuple(decisions[:3])), IDS)


def test_beyond_the_limit_whole_oldest_turns_go():
    """A turn of T S w B is 12 positions, the system block 2: with 32 two turns fit, and room for six more ids."""
    turn = [ChunkDecision(T), ChunkDecision(S), ChunkDecision(W, (0,) * 4), ChunkDecision(B)]
    window, firsts = ContextWindow(2, 32, IDS), []
    for decision in turn * 4:
        assert window.positions + 6 <= 32
        window.add(decision)
        firsts.append(window.first)
    assert firsts == [0] * 8 + [4] * 4 + [8] * 4  # at 2 + 24 + 2 positions there is no room for a chunk of 6
    context = build(history(turn * 4), IDS, max_positions=32)
    assert context.first_chunk == 8 and context.ids[:6] == (MARK, BOS, U, T, U, S) and len(context.ids) == 26
    assert context.features_SD[0, 0] == 16


def test_listening_without_a_turn_loses_its_older_half():
    window = ContextWindow(2, 30, IDS)
    assert [window.add(ChunkDecision(T)) for _ in range(12)] == [0] * 11 + [6]
    assert window.positions == 2 + 6 * 2
    window.add(ChunkDecision(S))
    assert [window.add(ChunkDecision(W, (0,) * 4)) for _ in range(2)] == [0, 3]  # of T T T T T T S w w
    with pytest.raises(LayoutError, match="hold one turn alone: raise max_positions"):
        for _ in range(3):
            window.add(ChunkDecision(W, (0,) * 4))
