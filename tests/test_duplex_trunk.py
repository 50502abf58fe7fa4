"""One forward over the trunk says what going token by token says."""

import pytest
import torch
from speaking_cases import FIRST_CODE, speaking_model
from transformers import DynamicCache

from covo_rl.duplex.ids import DuplexIds
from covo_rl.duplex.rollout import stop_logps
from covo_rl.duplex.trunk import (
    ReplyChunk,
    decision_states,
    listening_trunk,
    speaking_trunk,
    stop_logits,
)
from covo_rl.models.covo_audio.family import CovoAudio
from covo_rl.policy.rows import decoder_call

PREFIX = (40, 41, 42)
WIDTH = 48
REPLY = [
    ReplyChunk(text, tuple(FIRST_CODE + c for c in range(i, i + 4))) for i, text in enumerate([60, 61, None, None])
]


@pytest.fixture(scope="module")
def family():
    return CovoAudio(*speaking_model())


@pytest.fixture(scope="module")
def ids(family):
    config = family.model.config
    return DuplexIds(
        think=50, shift=51, break_=52, text_pad=config.text_end_token_id, placeholder=config.audio_placeholder_token_id,
        audio_bos=config.audio_bos_token_id, audio_eos=config.audio_eos_token_id, first_code=FIRST_CODE,
        num_codes=config.num_audio_codes, marks=(config.turn_end_token_id,),
    )  # fmt: skip


def heard(count, seed):
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def step_by_step(family, ids, trunk, features):
    """log-probs over the vocabulary at each decision, from a cache that grows by one token at a time."""
    cache, at_decision, used = DynamicCache(config=family.decoder.config), [], 0
    for place, token in enumerate(trunk.ids):
        embed = family.embed_tokens(torch.tensor([[token]]))
        if token == ids.placeholder:
            embed, used = features[used][None, None], used + 1
        hidden = decoder_call(
            family, torch.tensor([[token]]), embed, position_ids=torch.tensor([[place]]), past_key_values=cache,
            use_cache=True,
        )  # fmt: skip
        if place in trunk.due:
            at_decision.append(family.lm_head(hidden)[0, 0])
    return at_decision


def legal_logps(logits_V, legal):
    masked = torch.full_like(logits_V, -torch.inf)
    masked[legal] = logits_V[legal]
    return masked.log_softmax(-1)


def test_a_listening_trunk_is_the_token_path(family, ids):
    trunk, features = listening_trunk(PREFIX, 6, ids), heard(6, 0)
    assert trunk.ids == (*PREFIX, *[ids.placeholder, ids.think] * 5, ids.placeholder)
    assert trunk.due == trunk.places == (3, 5, 7, 9, 11, 13)
    with torch.no_grad():
        (z_K,) = stop_logits(family, [trunk], [features], ids)
    steps = [legal_logps(logits, [ids.think, ids.shift]) for logits in step_by_step(family, ids, trunk, features)]
    for stop in range(7):
        walked = sum(step[ids.think] for step in steps[:stop])
        walked = walked + steps[stop][ids.shift] if stop < 6 else walked
        assert stop_logps(z_K)[stop].item() == pytest.approx(walked.item(), abs=1e-5)


def test_a_speaking_trunk_is_the_token_path(family, ids):
    trunk, features = speaking_trunk(PREFIX, 2, REPLY, ids), heard(7, 1)
    u, t, c, pad = ids.placeholder, ids.think, REPLY, ids.text_pad
    spoken = (u, 60, *c[0].codes, u, 61, *c[1].codes, u, pad, *c[2].codes, u)
    assert trunk.ids == (*PREFIX, u, t, u, t, u, ids.shift, *spoken) and trunk.due == (9, 15, 21, 27)
    assert trunk.text_open == (True, True, True, False)  # closed by the pad of the third chunk
    with torch.no_grad():
        (z_K,) = stop_logits(family, [trunk], [features], ids)
    others = {ids.think, ids.shift, ids.placeholder, ids.audio_bos, ids.audio_eos, *ids.marks}
    opened = [i for i in range(FIRST_CODE) if i not in others]
    assert ids.break_ in opened and pad in opened
    going_on = 0.0
    for k, logits in enumerate(step_by_step(family, ids, trunk, features)):
        logps = legal_logps(logits, [ids.break_, pad] if k == 3 else opened)
        assert stop_logps(z_K)[k].item() == pytest.approx(going_on + logps[ids.break_].item(), abs=1e-5)
        going_on += torch.log1p(-logps[ids.break_].exp()).item()
    assert stop_logps(z_K)[4].item() == pytest.approx(going_on, abs=1e-5)


def test_trunks_of_a_batch_do_not_touch_each_other(family, ids):
    trunks = [listening_trunk(PREFIX, 3, ids), speaking_trunk(PREFIX, 2, REPLY, ids), listening_trunk((), 9, ids)]
    features = [heard(n, n) for n in (3, 7, 9)]
    with torch.no_grad():
        together = stop_logits(family, trunks, features, ids)
        alone = [stop_logits(family, [trunk], [each], ids)[0] for trunk, each in zip(trunks, features, strict=True)]
    for one, other in zip(together, alone, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_a_hazard_depends_on_no_later_feature(family, ids):
    features = heard(6, 3).requires_grad_()
    (z_K,) = stop_logits(family, [listening_trunk(PREFIX, 6, ids)], [features], ids)
    z_K[2].backward()
    assert (features.grad[:3].abs().sum(1) > 0).all() and features.grad[3:].abs().max() == 0


def test_text_gets_no_gradient_from_timing_where_it_is_not_legal(family, ids):
    (z_K,) = stop_logits(family, [listening_trunk(PREFIX, 4, ids)], [heard(4, 4)], ids)
    head = family.lm_head.weight
    (slope,) = torch.autograd.grad(z_K.sum(), head)
    assert set(slope.abs().sum(1).nonzero().flatten().tolist()) == {ids.think, ids.shift}


def test_earlier_turns_in_the_prefix_have_features_too(family, ids):
    past = (*PREFIX, ids.placeholder, ids.shift, ids.placeholder, ids.break_)
    trunk = listening_trunk(past, 2, ids)
    assert trunk.places == (3, 5, 7, 9) and trunk.due == (7, 9)
    with pytest.raises(ValueError, match="trunk 0 has 4 chunks and 2 features"):
        decision_states(family, [trunk], [heard(2, 6)])


@pytest.mark.parametrize(
    ("reply", "problem"),
    [([], "a reply of 0 chunks"), ([ReplyChunk(60, (1, 2, 3))], r"chunks with \[3\] codes"),
     ([REPLY[2], REPLY[3], REPLY[0]], "chunk 2 of a reply holds text after its end")],
)  # fmt: skip
def test_a_reply_that_is_none_is_refused(ids, reply, problem):
    with pytest.raises(ValueError, match=problem):
        speaking_trunk(PREFIX, 2, reply, ids)
