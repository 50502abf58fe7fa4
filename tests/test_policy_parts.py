"""The parts of the policy: the chunked head, packing and buckets, the feature store."""

import gc
import os
import sys
import tempfile

import policy_cases as cases
import pytest
import torch
from torch import nn

from covo_rl.audio import ClipStore
from covo_rl.policy import FeatureStore
from covo_rl.policy.head import token_logps
from covo_rl.policy.packing import buckets, pack
from covo_rl.types import Group, Rollout


def _plain(hidden, targets, head, temperature):
    table = (head(hidden).float() / temperature).log_softmax(-1)
    return table.gather(1, targets[:, None])[:, 0], -(table.exp() * table).sum(-1)


@pytest.mark.parametrize("scale", [1.0, 300.0])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen head", "trainable head"])
def test_chunked_head_without_entropy(frozen, scale):
    """The case of most runs has its own in-place arithmetic; logits of hundreds must not overflow in it."""
    torch.manual_seed(0)
    head = nn.Linear(8, 30, bias=False).requires_grad_(not frozen)
    hidden, targets = (torch.randn(11, 8) * scale).requires_grad_(), torch.randint(30, (11,))
    weight = torch.randn(11)
    leaves = [hidden, *(p for p in head.parameters() if p.requires_grad)]
    logps, entropy = token_logps(hidden, targets, head, temperature=0.6, chunk=4)
    assert entropy is None
    ours = torch.autograd.grad((weight * logps).sum(), leaves)
    expected, _ = _plain(hidden, targets, head, 0.6)
    theirs = torch.autograd.grad((weight * expected).sum(), leaves)
    torch.testing.assert_close(logps, expected, atol=1e-5, rtol=1e-5)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen head", "trainable head"])
@pytest.mark.parametrize("bias", [True, False])
def test_chunked_head_equals_full_logits_with_gradients(frozen, bias):
    torch.manual_seed(0)
    head = nn.Linear(8, 30, bias=bias).requires_grad_(not frozen)
    hidden, targets = torch.randn(11, 8, requires_grad=True), torch.randint(30, (11,))
    weight = torch.randn(2, 11)
    leaves = [hidden, *(p for p in head.parameters() if p.requires_grad)]
    logps, entropy = token_logps(hidden, targets, head, temperature=0.6, entropy=True, chunk=4)
    ours = torch.autograd.grad((weight[0] * logps + weight[1] * entropy).sum(), leaves)
    expected, expected_entropy = _plain(hidden, targets, head, 0.6)
    theirs = torch.autograd.grad((weight[0] * expected + weight[1] * expected_entropy).sum(), leaves)
    torch.testing.assert_close(logps, expected)
    torch.testing.assert_close(entropy, expected_entropy)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_head_that_is_no_plain_linear_layer_is_called_chunk_by_chunk():
    torch.manual_seed(0)
    rows = []
    head = nn.Sequential(nn.Linear(8, 30))
    head.register_forward_hook(lambda m, args, out: rows.append(out.shape[0]))
    hidden, targets = torch.randn(11, 8, requires_grad=True), torch.randint(30, (11,))
    logps, entropy = token_logps(hidden, targets, head, chunk=4)
    assert entropy is None and rows == [4, 4, 3]
    logps.sum().backward()
    expected = torch.autograd.grad(_plain(hidden, targets, head, 1.0)[0].sum(), [hidden])[0]
    torch.testing.assert_close(hidden.grad, expected)


def test_no_tensor_of_the_size_of_all_logits_is_ever_made():
    """2,000 positions by 5,000 tokens are 10 M numbers; nothing larger than a chunk of 1 M may be allocated."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return out

    hidden = torch.randn(2000, 16, requires_grad=True)
    head = nn.Linear(16, 5000, bias=False).requires_grad_(False)
    targets = torch.randint(5000, (2000,))
    with Watch():
        logps, _ = token_logps(hidden, targets, head, chunk=200)
        logps.sum().backward()
    assert largest == 200 * 5000


def test_packing_by_hand():
    """Prompts of 3 and 2 ids; completions (7, 8), (9) of the first and (4, 5, 6) of the second.

    Row:        p p p q q | 7 | 4 5        the last id of a completion is no input
    Positions:  0 1 2 0 1 | 3 | 2 3
    Predictors: 7 <- 2, 8 <- 5, 9 <- 2, 4 <- 4, 5 <- 6, 6 <- 7
    """
    made = cases.policy()
    template = cases.prompts(made)[1]

    def prompt(*ids):
        return type(template)(template.example, (), "", ids)

    def rollout(*ids):
        return Rollout(ids, (0.0,) * len(ids), "", "stop")

    groups = [Group(prompt(1, 2, 3), (rollout(7, 8), rollout(9))), Group(prompt(1, 2), (rollout(4, 5, 6),))]
    packed = pack(groups, audio_token_id=-1, device="cpu")
    assert packed.input_ids_L.tolist() == [1, 2, 3, 1, 2, 7, 4, 5]
    assert packed.position_ids_L.tolist() == [0, 1, 2, 0, 1, 3, 2, 3]
    assert packed.targets_M.tolist() == [7, 8, 9, 4, 5, 6]
    assert packed.predictors_M.tolist() == [2, 5, 2, 4, 6, 7]
    assert packed.mask_NC.tolist() == [[True, True, False], [True, False, False], [True, True, True]]
    assert packed.row_spans == ((5, 6), (6, 6), (6, 8))
    with pytest.raises(ValueError, match="rollouts \\[0\\] have no completion ids"):
        pack([Group(prompt(1), (rollout(),))], audio_token_id=-1, device="cpu")


def test_buckets_cut_where_padding_would_cost():
    """Lengths 100, 90, 60, 20, 10: 90 >= 0.75 * 100 joins, 60 does not; below 32 all share a bucket."""
    spans, start = [], 0
    for length in (20, 100, 60, 10, 90):
        spans.append((start, start + length))
        start += length
    found = buckets(spans, "cpu")
    assert [(b.rows, b.length) for b in found] == [(2, 100), (1, 60), (2, 20)]
    covered = torch.cat(
        [
            torch.arange(b.start, b.start + b.rows * b.length) if b.index is None
            else b.index if b.places is None else b.index[b.places]
            for b in found
        ]
    )  # fmt: skip
    assert sorted(covered.tolist()) == list(range(start)), "every position once"


def _keys(store: ClipStore, count: int) -> list[str]:
    return [store.key(cases.clip(i, 0.5 + 0.1 * i)) for i in range(count)]


def test_feature_store_encodes_unique_missing_clips_in_one_call():
    clips, family = ClipStore(), cases.family()
    store = FeatureStore(family, clips)
    a, b, c = _keys(clips, 3)
    first = store.embeddings([a, b, a])
    assert list(first) == [a, b] and store.encoded_rows == 2
    again = store.embeddings([c, b, a])
    assert store.encoded_clips == 3
    assert torch.equal(again[a], first[a]), "a kept embedding is the same numbers"
    direct = family.encode([family.clip_features(*clips.waveform(c))])[0]
    torch.testing.assert_close(again[c], direct, atol=1e-5, rtol=0)


def test_feature_store_moves_to_disk_beyond_its_budget_and_cleans_up(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    clips, family = ClipStore(), cases.family()
    keys = _keys(clips, 5)
    roomy = FeatureStore(family, clips).embeddings(keys)
    size = max(t.numel() * 4 for t in roomy.values())
    store = FeatureStore(family, clips, memory_mb=2 * size / 2**20)
    store.embeddings(keys)
    assert 0 < len(store._kept) <= 3 and len(store._on_disk) >= 2
    assert store._bytes <= 2 * size
    again = store.embeddings(keys)
    assert store.encoded_clips == 5, "nothing is encoded twice"
    for key in keys:
        torch.testing.assert_close(again[key], roomy[key], atol=1e-5, rtol=0)
    file = store._file
    assert os.fstat(file.fileno()).st_size == store._disk_bytes > 0
    assert not list(tmp_path.iterdir()), "it has no name, so that nothing can stay behind"
    del store, again
    gc.collect()
    assert sys.getrefcount(file) == 2


def test_a_policy_without_clips_says_what_is_missing():
    with pytest.raises(ValueError, match="without a ClipStore"):
        FeatureStore(cases.family(), None).embeddings(["abc"])
