"""On-policy distillation: the chunked loss equals a dense one, teachers that do not fit are refused, KL falls."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import policy_cases as cases
import pretrain_cases
import pytest
import torch
from accelerate import Accelerator
from transformers import Qwen2Config, Qwen2ForCausalLM

from covo_rl.config import ConfigError
from covo_rl.data.read import DataError
from covo_rl.models.tiny import tiny_tokenizer
from covo_rl.policy.head import NEVER
from covo_rl.supervised.pretrain.config import read_pretrain
from covo_rl.supervised.pretrain.distill import Distiller, DistillOptions, text_only
from covo_rl.supervised.pretrain.distill_loss import chunked_kl, dense_kl, joined_logps, top_logps
from covo_rl.supervised.pretrain.distill_options import distill_options
from covo_rl.supervised.pretrain.distill_teacher import DistillError, Teacher, shared_ids
from covo_rl.supervised.pretrain.trainer import PretrainTrainer

CODES = 40
WORDS = ("bell", "dog", "tone", "rings", "twice", "low", "barks", "before", "hear", "What")


def student(seed: int = 0, **sizes):
    return cases.family(seed=seed, sizes={"audio_codes": CODES, **sizes})


def language_model(tokenizer, folder, *, rows: int | None = None, seed: int = 1, positions: int = 4096) -> str:
    """A folder with a random Qwen2 over this tokenizer; `rows` of its head, beyond the tokenizer padding."""
    config = Qwen2Config(
        vocab_size=rows or len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=positions, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def prompts(count: int) -> list[dict]:
    return [{"id": f"p{i}", "prompt": f"{WORDS[i % 10]} {WORDS[i // 10 % 10]} {WORDS[(i * 7 + 3) % 10]}?"}
            for i in range(count)]  # fmt: skip


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    return language_model(student().tokenizer, tmp_path_factory.mktemp("teacher"), rows=320)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write(tmp_path_factory.mktemp("rows") / "prompts.jsonl", prompts(40))


@pytest.fixture
def options(teacher, data) -> DistillOptions:
    return DistillOptions(
        teacher=teacher, data=data, top_k=20, prompts_per_update=4, max_new_tokens=6, batch_size=3,
        teacher_dtype="float32",
    )  # fmt: skip


def gradients(family) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in family.model.named_parameters() if p.grad is not None}
    family.model.zero_grad(set_to_none=True)
    return found


def widest(found, wanted) -> float:
    assert found.keys() == wanted.keys()
    return max(float((found[name] - wanted[name]).abs().max()) for name in found)


# -- the loss ----------------------------------------------------------------------------------------------------


def some_logits(seed: int = 0, m: int = 13, d: int = 8, v: int = 50, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    hidden_MD = torch.randn(m, d, generator=generator).to(dtype).requires_grad_()
    head = torch.nn.Linear(d, v, bias=False, dtype=dtype)
    with torch.no_grad():
        head.weight.copy_(torch.randn(v, d, generator=generator))
    return hidden_MD, head, 3 * torch.randn(m, v + 6, generator=generator)


def restricted(head, shared):
    """The head as text_only makes it: what is not shared has no share."""
    others = torch.tensor(sorted({*range(head.out_features)} - {*shared}))
    made = lambda hidden: head(hidden).float().index_fill(-1, others, NEVER)  # noqa: E731
    return SimpleNamespace(modules=head.modules, call=made)


class Head:
    def __init__(self, head, shared):
        self.inner = restricted(head, shared)

    def __call__(self, hidden):
        return self.inner.call(hidden)

    def modules(self):
        return self.inner.modules()


@pytest.mark.parametrize("outside", ["rest", "renormalise"])
@pytest.mark.parametrize("k", [1, 20, 45])
def test_the_chunked_loss_and_its_gradients_are_those_of_the_dense_one(outside, k):
    shared = [i for i in range(48) if i not in (3, 17, 40)]  # 45 ids; the teacher has 56 rows
    hidden_MD, head, teacher_MV = some_logits()
    weights_M = torch.linspace(-1, 2, len(hidden_MD))
    dense_M = dense_kl(hidden_MD @ head.weight.t(), teacher_MV, shared, k, outside=outside)
    wanted = torch.autograd.grad((dense_M * weights_M).sum(), (hidden_MD, head.weight))
    top = top_logps(teacher_MV, torch.tensor(shared), k, outside=outside, chunk=5)
    kl_M = chunked_kl(hidden_MD, Head(head, shared), top, chunk=4)
    found = torch.autograd.grad((kl_M * weights_M).sum(), (hidden_MD, head.weight))
    assert float((kl_M - dense_M).detach().abs().max()) < 1e-6 * float(dense_M.detach().max())
    for one, other in zip(found, wanted, strict=True):
        assert float((one - other).abs().max()) < 1e-6 * float(other.abs().max())
    unshared = sorted({*range(50)} - {*shared})
    assert not found[1][unshared].any()


def test_a_k_of_the_whole_vocabulary_is_the_full_divergence():
    hidden_MD, head, teacher_MV = some_logits()
    teacher_MV = teacher_MV[:, :50]
    full_M = torch.nn.functional.kl_div(
        head(hidden_MD).log_softmax(-1), teacher_MV.log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    values = {
        k: chunked_kl(hidden_MD, head, top_logps(teacher_MV, torch.arange(50), k)) for k in (1, 5, 20, 49, 50, 99)
    }
    assert float((values[50] - full_M).detach().abs().max()) < 1e-5
    assert torch.equal(values[99], values[50])
    for small, large in zip(list(values)[:4], list(values)[1:5], strict=True):  # merging outcomes never adds to a KL
        assert bool((values[small] <= values[large] + 1e-5).all())


def test_a_student_that_equals_its_teacher_has_nothing_to_learn():
    hidden_MD, head, _ = some_logits()
    top = top_logps(head(hidden_MD).detach(), torch.arange(50), 20)
    kl_M = chunked_kl(hidden_MD, head, top)
    slopes = torch.autograd.grad(kl_M.sum(), (hidden_MD, head.weight))
    assert float(kl_M.detach().abs().max()) < 1e-6
    assert all(float(slope.abs().max()) < 1e-5 for slope in slopes)
    squeezed = top_logps(head(hidden_MD).detach(), torch.arange(50), 20, outside="renormalise")
    # here the loss is what the tail weighs, and the only way down is to have none
    assert torch.allclose(chunked_kl(hidden_MD, head, squeezed), -top.mass_M.log(), atol=1e-5)


def test_16_bits_stay_near_the_same_numbers_in_float64():
    hidden_MD, head, teacher_MV = some_logits(dtype=torch.bfloat16)
    top = top_logps(teacher_MV.bfloat16(), torch.arange(50), 20)
    kl_M = chunked_kl(hidden_MD, head, top)
    found = torch.autograd.grad(kl_M.sum(), (hidden_MD, head.weight))
    twin, weight = hidden_MD.detach().double().requires_grad_(), head.weight.detach().double().requires_grad_()
    exact_M = dense_kl(twin @ weight.t(), teacher_MV.bfloat16().double(), range(50), 20)
    wanted = torch.autograd.grad(exact_M.sum(), (twin, weight))
    assert float((kl_M - exact_M).abs().max()) < 1e-5  # float32 logits of the same operands
    for one, other in zip(found, wanted, strict=True):  # one rounding to 8 bits, and a weight's sum over chunks
        assert float((one.double() - other).abs().max()) < 2**-7 * float(other.abs().max())


def test_parts_join_to_what_one_call_gives():
    _, _, teacher_MV = some_logits()
    whole = top_logps(teacher_MV, torch.arange(50), 7)
    parts = joined_logps([top_logps(part, torch.arange(50), 7) for part in teacher_MV.split(4)])
    assert torch.equal(whole.ids_MK, parts.ids_MK) and torch.equal(whole.rest_M, parts.rest_M)
    total_M = whole.logps_MK.exp().sum(-1) + whole.rest_M.exp()
    assert torch.allclose(total_M, torch.ones(13), atol=1e-6)


# -- the teacher -------------------------------------------------------------------------------------------------


def test_a_teacher_scores_the_ids_as_its_own_forward(teacher):
    made, plain = Teacher(teacher), Qwen2ForCausalLM.from_pretrained(teacher).eval()
    ids = list(range(10, 30))
    with torch.no_grad():
        wanted_TV = plain(torch.tensor([ids])).logits[0]
    assert torch.allclose(made.logits(ids, 4), wanted_TV[-5:-1], atol=1e-5)
    assert made.rows == 320 and made.limit == 4096


@pytest.mark.slow
def test_a_family_of_this_project_can_teach(tmp_path, data):
    family = student()
    family.model.save_pretrained(tmp_path)
    family.processor.save_pretrained(tmp_path)
    options = DistillOptions(teacher=str(tmp_path), data=data, max_new_tokens=5, prompts_per_update=3)
    distiller = Distiller(options, family)
    metrics = distiller.backward(0)
    assert metrics["distill_tokens"] >= 3
    assert abs(metrics["distill_kl"]) < 1e-6  # it is the student itself
    assert max(float(slope.abs().max()) for slope in gradients(family).values()) < 1e-6


def test_only_text_that_both_have_is_shared(teacher):
    family = student()
    shared = shared_ids(family, Teacher(teacher))
    placeholder = family.audio_token_id
    assert shared == [i for i in range(len(family.tokenizer)) if i != placeholder]  # no code, no padding row
    replies = text_only(family, shared)
    assert set(replies.unsampled_ids) == {placeholder, *family.code_ids}
    assert family.unsampled_ids == () and replies.model is family.model


def test_an_id_that_is_another_added_token_there_is_not_shared(tmp_path):
    family = student()
    others = tiny_tokenizer(cases.TEXTS, 300, audio_tokens=("<tool>", "</tool>", "<file>"))
    shared = shared_ids(family, Teacher(language_model(others, tmp_path)))
    marks = family.tokenizer.convert_tokens_to_ids(["<|begofcAUDIO|>", "<|cAUDIO|>", "<|endofcAUDIO|>"])
    assert set(range(len(family.tokenizer))) - {*shared} == {*marks}


def test_a_teacher_with_another_vocabulary_is_refused(tmp_path):
    other = tiny_tokenizer(("completely different words here and there, zebra zebra",), 290)
    made = Teacher(language_model(other, tmp_path))
    with pytest.raises(DistillError, match=r"tokens have other ids .* tokens are the student's alone"):
        shared_ids(student(), made)


def test_what_is_no_model_is_refused(tmp_path, options):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    for folder in (str(tmp_path), str(tmp_path / "nowhere")):
        with pytest.raises((OSError, ValueError), match=str(tmp_path)):
            Distiller(replace(options, teacher=folder), student())


# -- options and rows --------------------------------------------------------------------------------------------


def test_impossible_options_are_named_together(options):
    with pytest.raises(ConfigError) as caught:
        Distiller(replace(options, teacher="", top_k=0, weight=-1.0, temperature=0.0, outside="drop"), student())
    text = str(caught.value)
    assert all(name in text for name in ("teacher", "top_k", "weight", "temperature", "outside"))


def test_options_of_a_file_are_checked_with_their_names():
    problems = []
    distill_options({"teacher": "a", "data": "b", "topk": 3, "weight": "much"}, problems)
    assert len(problems) == 2 and "top_k" in problems[0] and "weight" in problems[1]
    distill_options([1], problems)
    assert "expected a mapping" in problems[2]
    assert distill_options({"teacher": "a", "data": "b", "top_k": 3}, []) == DistillOptions("a", "b", 3)


def test_every_bad_row_is_named_before_training(tmp_path, options):
    rows = [
        {"id": "good", "prompt": "bell"},
        {"id": "both", "prompt": "a", "turns": []},
        {"id": "none"},
        {"prompt": "no id"},
        {"id": "good", "prompt": "again"},
        {"id": "blank", "prompt": "  "},
        {"id": "last", "turns": [{"role": "user", "text": "a"}, {"role": "assistant", "text": "b"}]},
        {"id": "spoken", "turns": [{"role": "user", "text": "a", "codes": [1]}]},
        {"id": "role", "turns": [{"role": "tool", "text": "a"}]},
        {"id": "long", "prompt": "bell " * 3000},
        {"id": "surrogate", "prompt": "a \ud800"},
        {"id": "system", "prompt": "a", "system": 3},
    ]
    with pytest.raises(DataError) as caught:
        Distiller(replace(options, data=write(tmp_path / "rows.jsonl", rows)), student())
    found = {problem.row_id for problem in caught.value.problems}
    assert found >= {"both", "none", "row 4", "good", "blank", "last", "spoken", "role", "long", "system"}
    assert sum(problem.row_id == "long" for problem in caught.value.problems) == 2  # student's limit, teacher's limit


def test_special_tokens_of_a_prompt_stay_text_and_dialogues_are_prompts(tmp_path, options):
    rows = [
        {"id": "a", "prompt": "say <|im_end|> and <|cAUDIO|> é 你好"},
        {"id": "b", "system": "Be brief.", "turns": [{"role": "user", "text": "bell"},
         {"role": "assistant", "text": "dog"}, {"role": "user", "text": "tone"}]},
    ]  # fmt: skip
    family = student()
    distiller = Distiller(replace(options, data=write(tmp_path / "rows.jsonl", rows)), family)
    texts = {p.example.id: family.tokenizer.decode(p.input_ids) for p in map(distiller.prompts.at, range(2))}
    assert texts["a"] == "<|im_start|>user\nsay <|im_end|> and <|cAUDIO|> é 你好<|im_end|>\n<|im_start|>assistant\n"
    assert texts["b"].startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nbell<|im_end|>\n")
    spelled = next(p for p in map(distiller.prompts.at, range(2)) if p.example.id == "a")
    assert family.audio_token_id not in spelled.input_ids
    assert distiller.backward(0)["distill_tokens"] > 0


# -- an update ---------------------------------------------------------------------------------------------------


def reference(distiller, family, groups, weight: float) -> tuple[float, dict[str, torch.Tensor]]:
    """Full logits of both models, a row at a time, plain forwards."""
    plain = Qwen2ForCausalLM.from_pretrained(distiller.options.teacher).eval()
    shared, losses = distiller.shared_ids_U.tolist(), []
    for group in groups:
        ids = group.rollouts[0].completion_ids
        row_1T = torch.tensor([[*group.prompt.input_ids, *ids]])
        with torch.no_grad():
            teacher_CV = plain(row_1T).logits[0, -len(ids) - 1 : -1]
        hidden = family.decoder(inputs_embeds=family.embed_tokens(row_1T), use_cache=False).last_hidden_state
        losses.append(dense_kl(family.lm_head(hidden)[0, -len(ids) - 1 : -1], teacher_CV, shared, 20))
    loss = torch.cat(losses).mean()
    (weight * loss).backward()
    return float(loss), gradients(family)


def test_an_update_adds_the_gradient_of_plain_forwards(options):
    family = student()
    family.model.train()
    attention = family.decoder.config._attn_implementation
    distiller = Distiller(replace(options, weight=0.5), family, seed=3)
    groups = distiller.replies([distiller.prompts.at(i) for i in range(4)], seed=0)
    wanted_kl, wanted = reference(distiller, family, groups, 0.5)
    earlier = torch.randn_like(family.lm_head.weight)
    family.lm_head.weight.grad = earlier.clone()
    metrics = distiller.backward(0)
    found = gradients(family)
    found["llm.lm_head.weight"] = found["llm.lm_head.weight"] - earlier
    assert metrics["distill_kl"] == pytest.approx(wanted_kl, abs=1e-5)
    assert widest(found, wanted) < 1e-5
    assert not found["llm.lm_head.weight"][list(family.code_ids)].any()  # whether to speak is not its matter
    assert family.model.training and family.decoder.config._attn_implementation == attention
    assert family.unsampled_ids == ()


def test_the_trainer_of_packed_rows_distils_in_its_updates(options):
    family = student()
    given = {"model": "m", "tasks": {"asr": {}}, "steps": 4, "length": 192}
    distiller = Distiller(options, family, Accelerator(cpu=True))
    trainer = PretrainTrainer(read_pretrain(None, given), family, None, Accelerator(cpu=True), distiller)  # type: ignore[arg-type]
    batch = pretrain_cases.packed(family, [pretrain_cases.mixed(family)])
    lines = [trainer.update([batch]) for _ in range(2)]
    assert lines[1]["loss"] < lines[0]["loss"] and all(line["distill_tokens"] >= 4 for line in lines)
    assert distiller.drawn == 8 and not trainer.changed_parts()


def test_replies_hold_no_codes_and_are_those_of_the_student(options):
    family = student()
    with torch.no_grad():  # a student that would write nothing else
        family.lm_head.weight[list(family.code_ids)] *= 30
    distiller = Distiller(options, family)
    groups = distiller.replies([distiller.prompts.at(i) for i in range(8)])
    ids = {i for ids in cases.ids_of(groups) for i in ids}
    assert ids and not ids & {*family.code_ids, family.audio_token_id}


@pytest.mark.slow
def test_other_updates_and_weight_0_change_nothing(options):
    family = student()
    distiller = Distiller(replace(options, every=3), family)
    assert [bool(distiller.backward(step)) for step in range(4)] == [True, False, False, True]
    assert distiller.drawn == 8
    gradients(family)
    off = Distiller(replace(options, weight=0.0), family)
    assert off.backward(0) == {} and off.drawn == 0 and not gradients(family)


@pytest.mark.slow
def test_a_resumed_run_makes_the_same_gradients(options):
    family = student()
    whole = Distiller(options, family, seed=5)
    states, slopes = [], []
    for step in range(3):
        states.append(json.loads(json.dumps(whole.state_dict())))
        whole.backward(step)
        slopes.append(gradients(family))
    again = Distiller(options, family, seed=5)
    again.load_state_dict(states[2])
    again.backward(2)
    assert widest(gradients(family), slopes[2]) == 0.0
    assert widest(slopes[1], slopes[2]) > 1e-4
    with pytest.raises(DistillError, match="prompts are others"):
        Distiller(options, family, seed=6).load_state_dict(states[2])
    for drawn in (None, -1, 2.5):
        with pytest.raises(DistillError, match="prompts were drawn"):
            again.load_state_dict({**states[2], "drawn": drawn})


def test_every_epoch_has_every_row_once_in_another_order(options):
    distiller = Distiller(options, student(), seed=1)
    epochs = [[distiller.prompts.at(40 * epoch + i).example.id for i in range(40)] for epoch in range(2)]
    assert sorted(epochs[0]) == sorted(f"p{i}" for i in range(40))
    assert {name.removesuffix(" (epoch 2)") for name in epochs[1]} == {*epochs[0]}
    assert epochs[0] != [name.removesuffix(" (epoch 2)") for name in epochs[1]]


class FakeRanks(SimpleNamespace):
    """One of two ranks whose other one says what is written down for it."""

    def gathered(self, value):
        return [value]

    def together(self, action, error):
        return action()


@pytest.mark.slow
def test_ranks_share_the_prompts_of_an_update_without_overlap(options, monkeypatch):
    names, made = [], student()
    for rank in range(3):
        distiller = Distiller(options, made, ranks=FakeRanks(rank=rank, world=3))
        monkeypatch.setattr(distiller, "_added_over_ranks", torch.no_grad)  # no process group here
        monkeypatch.setattr(distiller, "_passes", lambda *args, **kwargs: 0.0)
        drawn = []
        monkeypatch.setattr(distiller, "replies", lambda p, seed, r=distiller.replies, d=drawn: d.extend(p) or r(p))
        for step in range(2):
            distiller.backward(step)
        names.append([prompt.example.id for prompt in drawn])
    alone = Distiller(options, made)
    wanted = [alone.prompts.at(place).example.id for place in range(8)]
    assert [len(part) for part in names] == [4, 2, 2]
    assert sorted([*names[0], *names[1], *names[2]]) == sorted(wanted)


def test_a_teacher_that_gives_no_numbers_stops_the_run(options):
    distiller = Distiller(options, student())
    with torch.no_grad():
        distiller.teacher.model.model.norm.weight[3] = math.nan
    with pytest.raises(DistillError, match=r"reply to row p\d+ are not finite"):
        distiller.backward(0)


def test_a_stage_that_trains_the_adapter_alone_cannot_distil(options):
    family = student()
    for name, parameter in family.model.named_parameters():
        parameter.requires_grad_(name.startswith("audio_adapter."))
    with pytest.raises(DistillError, match="leave distill out of this stage"):
        Distiller(options, family).follow(cases.Policy(family))


def test_sharded_weights_need_the_policy_that_is_sharded(options, monkeypatch):
    distiller = Distiller(options, student())
    monkeypatch.setattr("covo_rl.policy.policy.is_sharded", lambda module: True)
    with pytest.raises(DistillError, match=r"call follow\(policy\)"):
        distiller.backward(0)


@pytest.mark.slow
def test_distillation_lowers_the_divergence_on_prompts_it_has_not_seen(options, tmp_path):
    kl = {}
    for weight in (1.0, 0.0):
        family = student()
        distiller = Distiller(replace(options, weight=weight, prompts_per_update=8, max_new_tokens=8), family)
        held_out = [distiller.prompts.at(i) for i in range(32, 40)]
        before = distiller.measure(held_out)
        optimizer = torch.optim.AdamW(family.model.parameters(), lr=3e-3, weight_decay=0.0)
        for step in range(4):  # 32 prompts: none of those held out
            distiller.backward(step)
            optimizer.step()
            optimizer.zero_grad()
        kl[weight] = before, distiller.measure(held_out)
    assert kl[1.0][1] < 0.8 * kl[1.0][0]
    assert kl[0.0][1] == pytest.approx(kl[0.0][0])


@pytest.mark.slow
def test_two_ranks_under_ddp_and_fsdp2_make_the_gradients_of_one_process(teacher, data):
    worker = Path(__file__).with_name("distill_ranks_worker.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(worker)]
    done = subprocess.run(
        [*command, teacher, data], capture_output=True, text=True, env=environment, timeout=240, check=False
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert done.returncode == 0 and lines, done.stderr[-4000:]
    results = json.loads(lines[0].removeprefix("RESULT "))
    assert len(results) == 4  # three prompts for two ranks, and one: a rank without any
    for case, found in results.items():
        assert found["gradients"] < 1e-5 and found["metrics"] < 1e-4, (case, found)
