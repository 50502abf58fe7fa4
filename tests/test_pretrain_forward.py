"""Documents that share a row do not see each other, whatever computes their attention, and the test would notice."""

import pretrain_cases as cases
import pytest
import torch

from covo_rl.models.covo_audio.processing import IGNORE
from covo_rl.policy import Policy
from covo_rl.policy.packable import attention_configs
from covo_rl.policy.rows import decoder_call, packed_hidden
from covo_rl.supervised.pretrain import forward
from covo_rl.supervised.pretrain.forward import (
    IsolationError,
    Taught,
    check_isolation,
    document_spans,
    documents_layout,
    masked_hidden,
    packed_embeddings,
    packed_logps,
)


@pytest.fixture(scope="module")
def policy():
    made = Policy(cases.tiny_family())
    made.eval()
    return made


@pytest.fixture(scope="module")
def documents(policy):
    return cases.mixed(policy.family)


def layout_hidden(policy, batch, embeds_NLD, method=None):
    layout = documents_layout(batch.position_ids, method=method)
    ids_L, positions_L = batch.input_ids.flatten(), batch.position_ids.flatten()
    hidden_LD = packed_hidden(policy.family, ids_L, embeds_NLD.flatten(0, 1), positions_L, layout)
    return hidden_LD.unflatten(0, batch.input_ids.shape)


def leaking_hidden(policy, batch, embeds_NLD, **options):
    return decoder_call(policy.family, batch.input_ids, embeds_NLD, position_ids=batch.position_ids, **options)


WAYS = {
    "by document, split": lambda *given: layout_hidden(*given, method="split"),
    "by document, concat": lambda *given: layout_hidden(*given, method="concat"),
    "transformers' mask": lambda policy, batch, embeds: masked_hidden(policy.family, batch, embeds),
}


@torch.no_grad()
def logits(policy, batch, hidden):
    """(positions, V) of all that is no padding, row by row."""
    return policy.family.lm_head(hidden(policy, batch, packed_embeddings(policy, batch)))[batch.task >= 0].float()


@pytest.fixture(scope="module")
def single(policy, documents):
    return single_logits(policy, documents)


@torch.no_grad()
def single_logits(policy, documents):
    """Every document in a batch of its own, through the model's decoder."""
    batches = [cases.packed(policy.family, [[document]]) for document in documents]
    return torch.cat([logits(policy, batch, lambda *given: leaking_hidden(*given, use_cache=False))
                      for batch in batches])  # fmt: skip


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=[pytest.mark.slow] if "concat" in way else []) for way in WAYS]
)
def test_packed_documents_have_the_logits_of_single_ones(policy, documents, single, way):
    rows = [documents[:3], documents[3:]]
    batch = cases.packed(policy.family, rows, max(sum(map(len, row)) for row in rows) + 5)  # padding in both
    assert len(batch.clips) > len(batch.waves) >= 2 and bool((batch.task < 0)[:, -1].all())
    torch.testing.assert_close(logits(policy, batch, WAYS[way]), single, atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", [{"use_cache": True}, {"attention_mask": "ones"}], ids=["cache", "mask of ones"])
def test_the_same_comparison_notices_a_cache_and_a_mask_of_ones(policy, documents, single, options):
    """The trap: with the default cache, or a mask that says nothing, documents read those before them."""
    batch = cases.packed(policy.family, [documents])
    if "attention_mask" in options:
        options = {"attention_mask": torch.ones_like(batch.input_ids), "use_cache": False}
    leaking = logits(policy, batch, lambda *given: leaking_hidden(*given, **options))
    first = len(documents[0])
    difference = (leaking - single).abs().amax(-1)
    assert difference[:first].max() < 1e-5 and difference[first:].max() > 0.1


@pytest.mark.slow
def test_in_16_bits_packed_and_single_documents_agree_to_their_rounding(documents):
    made = cases.tiny_family()
    made.model.to(torch.bfloat16)
    narrow = Policy(made)
    narrow.eval()
    batch = cases.packed(made, [documents])
    single = single_logits(narrow, documents)
    for way in ("by document, split", "transformers' mask"):
        difference = (logits(narrow, batch, WAYS[way]) - single).abs().max()
        assert difference < 0.03 * single.abs().max(), way  # bfloat16 has 8 bits; measured 0.01


def test_products_in_16_bits_stay_near_float32(policy, documents):
    batch = cases.packed(policy.family, [documents])
    taught = Taught.of(batch)

    def found():
        policy.zero_grad(set_to_none=True)
        logps_M = packed_logps(policy, batch, taught)
        logps_M.mean().backward()
        return logps_M.detach(), torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])

    exact_M, slopes = found()
    with torch.autocast("cpu", torch.bfloat16):
        narrow_M, narrow = found()
    assert narrow_M.dtype == torch.float32 and 0 < (narrow_M - exact_M).abs().max() < 0.2
    assert (narrow_M - exact_M).mean().abs() < 0.01
    assert torch.cosine_similarity(narrow, slopes, dim=0) > 0.995


def test_gradients_of_packed_documents_are_the_sums_of_single_ones(policy, documents):
    def gradients(batches):
        policy.zero_grad(set_to_none=True)
        for batch in batches:
            packed_logps(policy, batch, Taught.of(batch)).sum().backward()
        return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}

    single = gradients([cases.packed(policy.family, [[document]]) for document in documents])
    together = gradients([cases.packed(policy.family, [documents[:2], documents[2:]])])
    assert any("audio_adapter" in name for name in together) and together.keys() == single.keys()
    for name, gradient in single.items():
        scale = gradient.abs().max().clamp(min=1e-3)
        assert (together[name] - gradient).abs().max() < 1e-4 * scale, name


def test_what_is_taught_is_what_the_labels_say(policy, documents):
    batch = cases.packed(policy.family, [documents])
    taught = Taught.of(batch)
    labels = [label for item in documents for label in item.document.labels if label != IGNORE]
    assert taught.targets.tolist() == labels
    assert batch.input_ids.flatten()[taught.predictors + 1].tolist() == labels
    names = [batch.tasks[number] for number in taught.task]
    assert names == [d.document.task for d in documents for label in d.document.labels if label != IGNORE]
    with torch.no_grad():
        found = packed_logps(policy, batch, taught)
        expected = logits(policy, batch, WAYS["transformers' mask"]).log_softmax(-1)
    torch.testing.assert_close(found, expected[taught.predictors, taught.targets], atol=1e-5, rtol=0)


def test_documents_begin_where_positions_begin():
    assert document_spans(torch.tensor([[0, 1, 2, 0, 1], [0, 1, 0, 0, 1]])) == [(0, 3), (3, 5), (5, 7), (7, 8), (8, 10)]


def test_a_label_at_a_documents_first_id_is_refused(policy, documents):
    batch = cases.packed(policy.family, [documents[:2]])
    batch.labels[0, len(documents[0])] = 7
    with pytest.raises(ValueError, match="first id has a label"):
        Taught.of(batch)


def test_clips_fill_their_slots_in_order_and_a_missing_one_is_an_error(policy):
    rows = [cases.speech_row(number, 24) for number in (5, 6)]
    batch = cases.packed(policy.family, [[cases.drawn(policy.family, "asr", row) for row in rows]])
    taught = Taught.of(batch)
    with torch.no_grad():
        before = packed_logps(policy, batch, taught)
        batch.clip_order = batch.clip_order.flip(0)
        assert (packed_logps(policy, batch, taught) - before).abs().max() > 1e-3
        batch.clip_order = batch.clip_order[:-1]
        with pytest.raises(ValueError, match="12 audio slots in the rows, and 6 features of 2 clips"):
            packed_logps(policy, batch, taught)


def test_an_attention_that_was_not_shown_to_isolate_is_refused(policy, documents, monkeypatch):
    batch = cases.packed(policy.family, [documents])
    embeds = packed_embeddings(policy, batch)
    for config in attention_configs(policy.family.decoder):
        monkeypatch.setattr(config, "_attn_implementation_internal", "flash_attention_2")
    with pytest.raises(IsolationError, match="flash_attention_2"):
        masked_hidden(policy.family, batch, embeds)


def test_a_layout_that_leaks_is_noticed_before_training(policy, monkeypatch):
    assert check_isolation(policy) == 0.0
    whole = documents_layout(torch.arange(18)[None])  # two documents as if they were one
    monkeypatch.setattr(forward, "documents_layout", lambda positions: whole)
    with pytest.raises(IsolationError, match="move by"):
        check_isolation(policy)
