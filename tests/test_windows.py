"""Sliding windows, shared keys, capped heads and second embeddings: packed rows and decoding against the model's own
forward of one row after the other."""

from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import policy_cases as cases
import pytest
import torch
from text_families import PROMPTS, expected_logps, own_forward, text_family, text_groups, text_prompt

from covo_rl.config import RolloutConfig
from covo_rl.engines import decoding
from covo_rl.engines.decoder import FusedDecoder, ModuleDecoder, decoder_for
from covo_rl.engines.decoding import sample_draws
from covo_rl.policy import Policy, attention
from covo_rl.policy.attention import PackedLayout, key_layer
from covo_rl.policy.packing import pack
from covo_rl.policy.rows import packed_hidden
from covo_rl.types import Group, Rollout

#: one key, shorter than completion and prompt, as long as them, one more, as long as the longest row, one more
WINDOWS = (1, 4, 5, 9, 10, 11, 12, 19, 20)
MODELS = ("mistral", "qwen2", "gemma3", "gemma3n", "gemma4")
LESS_COMMON = [pytest.param(name, marks=pytest.mark.slow) for name in ("qwen2", "gemma3", "gemma3n")]


def _policy(name, window, **options):
    """What trains: everything, so that gradients are those of all weights."""
    family = text_family(name, window, **options)
    own = own_forward(family)
    family.model.requires_grad_(True)
    return Policy(family), own


def _force(monkeypatch, method):
    monkeypatch.setattr(PackedLayout, "_default_method", lambda layout, q: method)


@pytest.mark.parametrize("name", MODELS)
def test_a_packed_row_sees_through_the_models_own_window(name):
    """Each of these windows gives numbers of its own, but the last two: no row is longer."""
    groups, scores = text_groups(), []
    for window in WINDOWS:
        made, own = _policy(name, window)
        with torch.no_grad():
            scores.append(made("logps", groups, made.features([])).logps_NC)
        torch.testing.assert_close(scores[-1], expected_logps(own, groups), atol=1e-5, rtol=0)
    steps = [float((one - other).abs().max()) for one, other in pairwise(scores)]
    assert min(steps[:-1]) > 1e-3 and steps[-1] < 1e-5


@pytest.mark.parametrize("window", [4, 12])
@pytest.mark.parametrize("method", ["split", "concat", "varlen"])
@pytest.mark.parametrize("name", ["qwen2", "gemma4"])
def test_gradients_of_every_method_are_those_of_plain_rows(name, method, window, monkeypatch):
    """Layers without a window go by the method, those with one by the mask. One row after the other by autograd."""
    made, _ = _policy(name, window)
    groups = text_groups()
    weight = cases.weights(groups)
    _force(monkeypatch, method)
    scored = made("logps", groups, made.features([]), temperature=0.7, entropy=True)
    (scored.logps_NC * weight + 0.3 * scored.entropy_NC * weight).sum().backward()
    ours = cases.gradients(made)
    made.family.packable = False
    for module in made.family.decoder.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = "eager"
    plain = made("logps", groups, made.features([]), temperature=0.7, entropy=True)
    torch.testing.assert_close(scored.logps_NC, plain.logps_NC, atol=1e-5, rtol=0)
    torch.testing.assert_close(scored.entropy_NC, plain.entropy_NC, atol=1e-5, rtol=0)
    (plain.logps_NC * weight + 0.3 * plain.entropy_NC * weight).sum().backward()
    assert cases.relative_difference(ours, cases.gradients(made)) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", ["split", "concat", "varlen"])
@pytest.mark.parametrize("name", ["mistral", "gemma4"])
def test_in_16_bits_windows_differ_from_float32_by_rounding(name, method, dtype, monkeypatch):
    """As far from float32 as the model's own 16-bit rows are, and no further than twice that."""
    groups = text_groups()
    exact = expected_logps(own_forward(text_family(name, 4)), groups)
    made, own = _policy(name, 4, dtype=dtype)
    _force(monkeypatch, method)
    with torch.no_grad():
        scored = made("logps", groups, made.features([])).logps_NC
    rounding = (expected_logps(own, groups) - exact).abs()
    assert (scored - exact).abs().mean() < 2 * rounding.mean() + 1e-3


def _sampled_error(made, own, length, *, keep=False, varlen=False, monkeypatch=None, **options):
    if varlen:
        monkeypatch.setattr(decoding, "flash", SimpleNamespace(available=lambda *device: True))
    prompts = [text_prompt(length_, n) for n, length_ in enumerate(PROMPTS)]
    config = RolloutConfig(max_completion_length=length, num_generations=3, **options)
    draws = made(sample_draws, prompts, made.features([]), config, seed=3, generations=3, keep_prompts=keep)
    groups = []
    for p, prompt in enumerate(prompts):
        rows = range(3 * p, 3 * p + 3)
        ids = [tuple(draws.ids_NC[n, : draws.lengths_N[n]].tolist()) for n in rows]
        groups.append(Group(prompt, tuple(Rollout(i, (0.0,) * len(i), "", "length") for i in ids)))
    assert max(len(r.completion_ids) for g in groups for r in g.rollouts) == length
    expected = expected_logps(own, groups)
    return float((draws.logps_NC[:, : expected.shape[1]] - expected).abs().max()), groups


@pytest.mark.parametrize("varlen", [False, True], ids=["grid", "varlen"])
@pytest.mark.parametrize("name", ["mistral", "gemma4", *LESS_COMMON])
def test_completions_outgrow_the_window_while_they_are_written(name, varlen, monkeypatch):
    """Prompts of 5 and 11; 24 positions are written, so that windows of 4 to 20 end inside them, and rows of unequal
    ages come in as others finish."""
    for window in (1, 11, 20):
        made, own = _policy(name, window)
        error, _ = _sampled_error(made, own, 24, varlen=varlen, monkeypatch=monkeypatch, decode_rows=4)
        assert error < 1e-5, window


@pytest.mark.parametrize("varlen", [False, True], ids=["grid", "varlen"])
@pytest.mark.parametrize("fused", [False, True], ids=["modules", "fused"])
def test_both_decoders_see_through_the_window(fused, varlen, monkeypatch):
    """Mistral's layers read theirs from the configuration, Qwen2's have it."""
    for name in ("mistral", "qwen2"):
        made, own = _policy(name, 7)
        made.fused_decode = fused
        assert type(decoder_for(made, rows=3, longest=30)) is (FusedDecoder if fused else ModuleDecoder)
        error, _ = _sampled_error(made, own, 16, varlen=varlen, monkeypatch=monkeypatch)
        assert error < 1e-5
        made.model.bfloat16()  # both ways of the grid
        own_half = own_forward(made.family)
        error, _ = _sampled_error(made, own_half, 16, varlen=varlen, monkeypatch=monkeypatch)
        assert error < 0.5


def test_a_window_that_the_modules_ignore_is_ignored():
    """Llama's configuration may say one, left over from another model; its layers do not read it."""
    made, own = _policy("llama", 7)
    assert type(decoder_for(made, rows=3, longest=30)) is FusedDecoder
    assert made.model.config.sliding_window == 7
    error, _ = _sampled_error(made, own, 16)
    assert error < 1e-5


def test_a_decoder_that_takes_more_than_embeddings_is_left_to_the_modules():
    for name in ("gemma3n", "gemma4"):
        made, _ = _policy(name, 7)
        assert type(decoder_for(made, rows=3, longest=30)) is ModuleDecoder
    made, _ = _policy("qwen2", 7)
    made.family.__class__ = type("More", (type(made.family),), {"decoder_inputs": lambda self, ids, embeds: {}})
    assert type(decoder_for(made, rows=3, longest=30)) is ModuleDecoder


@pytest.mark.parametrize("method", ["split", "concat", "varlen"])
@pytest.mark.parametrize("name", ["mistral", "gemma4", pytest.param("gemma3n", marks=pytest.mark.slow)])
def test_cached_prompt_keys_serve_layers_with_windows_and_shared_keys(name, method, monkeypatch):
    for window in (3, 30):
        made, own = _policy(name, window)
        error, groups = _sampled_error(made, own, 12, keep=True)
        assert error < 1e-5
        assert made.prompt_cache is not None
        _force(monkeypatch, method)
        before = made.counters.prompt_positions
        some = [groups[1], groups[0]]
        scored = made("old_logps", some, made.features([]))
        assert made.counters.prompt_positions == before, "prompts were not computed again"
        torch.testing.assert_close(scored.logps_NC, expected_logps(own, some), atol=1e-5, rtol=0)


def test_layers_that_share_keys_read_those_of_the_last_own_layer_of_their_type():
    """Four layers, window and full in turn; the last two have no keys of their own. Kept once, not twice."""
    for name in ("gemma3n", "gemma4"):
        made, own = _policy(name, 5)
        assert [key_layer(layer.self_attn) for layer in made.family.decoder.layers] == [0, 1, 0, 1]
        _sampled_error(made, own, 6, keep=True)
        assert sorted(made.prompt_cache.keys) == [0, 1]


def test_ids_that_are_never_drawn_have_no_share_of_the_softmax():
    """Gemma's last ten here. Greedy or hot, none of them is drawn, and the others' log-probs sum to 1."""
    made, own = _policy("gemma4", 5)
    ids = set()
    cuts = [{"top_k": 85}, {"top_p": 0.9999}, {"min_p": 1e-9}, {"greedy": True}]  # more than there are to draw
    for temperature, how in [(0.1, {}), (1.0, {}), (50.0, {}), *((50.0, cut) for cut in cuts)]:
        prompts, greedy = [text_prompt(11)], how.pop("greedy", False)
        config = RolloutConfig(max_completion_length=40, num_generations=8, temperature=temperature, **how)
        draws = made(sample_draws, prompts, made.features([]), config, seed=1, generations=8, greedy=greedy)
        ids |= set(draws.ids_NC.flatten().tolist())
        first_logits = own(torch.tensor([prompts[0].input_ids]))[0, -1] / temperature
        torch.testing.assert_close(
            draws.logps_NC[:, 0], first_logits.log_softmax(-1)[draws.ids_NC[:, 0]], atol=1e-5, rtol=0
        )
    assert len(ids) > 60 and max(ids) < 80
    groups = text_groups()
    scored = made("logps", groups, made.features([]), entropy=True)
    (scored.entropy_NC.sum() + scored.logps_NC.sum()).backward()
    assert all(torch.isfinite(grad).all() for grad in cases.gradients(made).values())
    wrong = replace(groups[1], rollouts=(Rollout((3, 85), (0.0, 0.0), "", "length"),))
    with pytest.raises(ValueError, match=r"row text-1: a completion holds ids \[85\]"):
        made("logps", [groups[0], wrong], made.features([]))


def test_audio_ids_outside_the_table_are_embedded_as_padding():
    """Granite, Gemma: such an id is only a place, and never reaches the table."""
    made, _ = _policy("mistral", 7)
    prompt = text_prompt(11)
    scores = []
    for i in (5000, made.family.pad_token_id):
        ids = (*prompt.input_ids[:4], i, *prompt.input_ids[5:])
        group = replace(text_groups()[0], prompt=replace(prompt, input_ids=ids))
        scores.append(made("logps", [group], made.features([])).logps_NC)
    torch.testing.assert_close(*scores, atol=0, rtol=0)


@pytest.mark.parametrize("window", [3, 12])
def test_a_window_taken_in_pieces_is_the_window(window, monkeypatch):
    """Pieces that end inside prompts of 11 and completions of 9, the last one shorter."""
    groups = text_groups()
    made, own = _policy("mistral", window)
    scores = []
    for piece in (256, 4):
        monkeypatch.setattr(attention, "PIECE", piece)
        scored = made("logps", groups, made.features([])).logps_NC
        torch.testing.assert_close(scored, expected_logps(own, groups), atol=1e-5, rtol=0)
        (scored * cases.weights(groups)).sum().backward()
        scores.append(cases.gradients(made))
    assert cases.relative_difference(*scores) < 1e-4


def test_masks_of_a_window_do_not_grow_with_the_prompt():
    """By the elements of the masks: as wide as a piece and its window, not as the prompt."""
    made, _ = _policy("mistral", 16)
    packed = pack([Group(text_prompt(900), text_groups()[0].rollouts)], 5000, "cpu")
    layout = PackedLayout(packed)
    with torch.no_grad():
        packed_hidden(
            made.family, packed.input_ids_L, made.family.embed_tokens(packed.input_ids_L), packed.position_ids_L, layout
        )
    assert layout._bands
    assert sum(mask.numel() for mask in layout._bands.values()) < 900 * 900 / 3
