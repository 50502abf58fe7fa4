"""The benchmark compares like with like, and the planner's estimates hold against what a pass really does."""

import json

import policy_cases as cases
import pytest
import torch
import yaml
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

from covo_rl.audio import ClipStore
from covo_rl.bench.case import workload_of
from covo_rl.bench.sizes import MODEL_SIZES, Cell, Sizes, encoder_flops, flops
from covo_rl.config import AdapterConfig, Options
from covo_rl.models.covo_audio.family import CovoAudio
from covo_rl.models.tiny import tiny_covo_audio, tiny_tokenizer
from covo_rl.policy import Policy
from covo_rl.policy.trainable import make_trainable
from covo_rl.run.doctor import activation_bytes, audio_positions, layer_values, plan, render_plan, shape_of
from covo_rl.run.sizes import Shape
from covo_rl.run.speed import DECODE_FACTOR, Speed, decode_bytes, measure_speed
from covo_rl.run.vllm_memory import vllm_memory

SMALL = Sizes(decoder_layers=2, decoder_width=64, decoder_heads=2, encoder_layers=1, encoder_width=64, vocabulary=512)


def test_flops_by_hand():
    """T=10, C=2, G=3, one clip; D=64, 2 layers, V=512, all linear layers 2 * 2 * 64^2 * 12 = 196,608 per position."""
    cell = Cell(188, 3, 2, clips=1)
    stock, ours = (flops(cell, SMALL, 10, stock=stock) for stock in (True, False))
    prompt = 10 * 196_608 + 4 * 2 * 64 * 55  # 55 = 1 + 2 + ... + 10 pairs of query and key
    assert ours["prefill"] == prompt and stock["prefill"] == 3 * prompt
    completion = 3 * (2 * 196_608 + 4 * 2 * 64 * (2 * 10 + 3))
    assert stock["decode"] == ours["decode"] == completion + 3 * 2 * 2 * 64 * 512
    assert ours["old"] == ours["decode"], "old log-probs from the sampling step's prompt keys"
    assert stock["encode"] == 3 * ours["encode"] == 3 * encoder_flops(cell, SMALL)
    audio = encoder_flops(cell, SMALL)
    assert stock["old"] == 3 * (audio + prompt) + completion + 3 * 2 * 2 * 64 * 512


def test_published_cells_have_the_expected_ceiling():
    """More rollouts and longer prompts raise the ceiling, longer completions lower it."""

    def ceiling(p, g, c):
        cell, sizes = Cell(p, g, c), Sizes()
        stock, ours = (sum(flops(cell, sizes, p + 26, stock=stock).values()) for stock in (True, False))
        return stock / ours

    assert 4 < ceiling(188, 16, 64) < 8
    assert ceiling(750, 16, 64) > ceiling(750, 8, 64) > ceiling(750, 8, 256)


def test_stock_with_a_chunked_head_is_stock():
    from covo_rl.bench.variants import Stock, StockChunked

    case = workload_of(Cell(188, 2, 3), SMALL, torch.device("cpu"))
    ours, theirs = (kind(case).old(case.groups()) for kind in (StockChunked, Stock))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("variant", ["stock", "ours"])
def test_case_has_the_shape_it_says(variant):
    case = workload_of(Cell(188, 2, 3), SMALL, torch.device("cpu"))
    from covo_rl.bench.variants import Ours, Stock

    made = {"stock": Stock, "ours": Ours}[variant](case)
    groups = made.sample(3, seed=0)
    assert [len(g.rollouts) for g in groups] == [2, 2]
    assert {len(r.completion_ids) for g in groups for r in g.rollouts} == {3}
    assert case.prompts[0].slots == (188,)
    if variant == "ours":
        assert case.policy.store.encoded_clips == 2


def test_bench_writes_what_others_read(tmp_path, monkeypatch):
    from covo_rl.bench import cli

    monkeypatch.setattr(Sizes, "__init__", _small_sizes)
    path = tmp_path / "bench.json"
    words = f"grpo --json {path} --cells 188,2,3 --repeats 1 --clips 1 --trl --no-memory --device cpu"
    done = CliRunner().invoke(cli.app, words.split())
    assert done.exit_code == 0, done.output
    (row,) = json.loads(path.read_text())
    names = "P G C mode stock_cpu_s ours_cpu_s ratio flop_ratio ratio_by_phase peak_mb_stock peak_mb_ours"
    assert set(names.split()) <= set(row)
    assert (row["P"], row["G"], row["C"]) == (188, 2, 3)
    assert set(row["ratio_by_phase"]) == {"encode", "prefill", "decode", "old", "loss"}
    assert row["max_abs_logp_diff"] < 1e-5 and row["max_rel_grad_diff"] < 1e-4
    assert row["trl_ratio"] == pytest.approx(row["trl_cpu_s"] / row["ours_like_trl_cpu_s"])
    assert "of at most" in done.output and "TRL's trainer" in done.output


def _small_sizes(self, vocabulary=512, **_):
    for name, value in {**SMALL.__dict__, "vocabulary": vocabulary}.items():
        object.__setattr__(self, name, value)


def test_cells_are_checked():
    from covo_rl.bench import cli

    assert "a cell is P,G,C" in CliRunner().invoke(cli.app, ["grpo", "--cells", "188,16"]).output
    with pytest.raises(ValueError, match="94, 188, 375, 750"):
        Cell(200, 8, 64)


class _Logits(TorchDispatchMode):
    """The most rows of logits, tensors (..., V), that any operation returns."""

    rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            # (..., D, V) is the head's weight, transposed
            if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (4099,) and tensor.shape[-2:-1] != (64,):
                self.rows = max(self.rows, tensor.numel() // 4099)
        return out


def test_stock_holds_all_logits_and_ours_a_chunk(monkeypatch):
    """8 rollouts of 16 ids: stock makes 8 x 17 rows of logits, ours 32 at a time."""
    from covo_rl.bench.variants import Ours, Stock
    from covo_rl.policy import head

    monkeypatch.setattr(head, "CHUNK_ELEMENTS", 32 * 4099)
    sizes = Sizes(**{**SMALL.__dict__, "vocabulary": 4099})
    case = workload_of(Cell(188, 8, 16, clips=1), sizes, torch.device("cpu"))
    ours = Ours(case)
    ours.encode()
    rows = []
    for variant in (Stock(case), ours):
        with _Logits() as seen:
            variant.loss(case.groups(), torch.zeros(8, 16), torch.ones(8))
        rows.append(seen.rows)
    assert rows[0] == 8 * 17
    assert rows[1] == 32


def run_options(**changes):
    """Options of a run with these changed, one prompt to a micro-batch and in bfloat16 unless told otherwise."""
    options = Options()
    for name, value in {"micro_batch_prompts": 1, "dtype": "bfloat16", **changes}.items():
        setattr(next(room for room in vars(options).values() if hasattr(room, name)), name, value)
    return options


@pytest.mark.slow
def test_peak_memory_of_the_loss_pass_is_at_most_a_fifth_of_stock():
    """V = 152,064, one clip, 16 rollouts of 64 ids, each variant in a process of its own."""
    from covo_rl.bench.grpo import peak_memory

    cell, sizes = Cell(188, 16, 64, clips=1), Sizes(vocabulary=152_064)
    stock, ours = (peak_memory(cell, sizes, torch.device("cpu"), name) for name in ("stock", "ours"))
    assert ours < stock / 5
    case = workload_of(cell, sizes, torch.device("cpu"))
    words = {"prompts_per_step": 1, "num_generations": 16, "max_completion_length": 64, "dtype": "float32"}
    model_config, length = case.policy.family.model.config, len(case.prompts[0].input_ids)
    planned = plan(model_config, run_options(**words), prompt_positions=length)
    assert 0.75 < sum(planned.loss.values()) / 2**20 / ours < 1.3


def _saved_values(made):
    """Values of the weights' dtype per position that a pass saves."""
    groups = [cases.group(p, (60,) * 4) for p in cases.prompts(made, seconds=((0.6,), (0.9,)))]
    features = made.features([g.prompt for g in groups])
    made.train()
    parameters = {p.untyped_storage().data_ptr() for p in made.parameters()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        scored = made("logps", groups, features)
    assert scored.logps_NC.requires_grad
    positions = sum(len(g.prompt.input_ids) + 4 * 59 for g in groups)
    return sum(size for size, _ in saved.values()) / positions / made.family.embed_tokens.weight.itemsize


@pytest.mark.parametrize(("name", "lora"), [("covo_audio", True), ("covo_audio", False), ("qwen2_audio", True)])
def test_planned_activations_are_those_a_pass_saves(name, lora):
    made = cases.policy(name, lora=lora)
    planned = activation_bytes(shape_of(made.family.model.config), 1, 1)
    assert 0.8 < _saved_values(made) / planned < 1.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recompute", [None, "mlp", "layer"])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_values_that_a_layer_keeps_for_the_backward(lora, recompute, dtype):
    """Of two models the one with two layers more keeps so much more; LoRA of rank 1."""
    saved = []
    for layers in (1, 3):
        sizes = {"encoder_width": 32, "encoder_layers": 1, "encoder_heads": 2, "mel_bins": 16, "adapter_hidden": 32}
        made, processor = tiny_covo_audio(
            tiny_tokenizer(cases.TEXTS, 300), decoder_width=64, decoder_layers=layers, segment_seconds=1.0, **sizes
        )
        family = CovoAudio(made.to(dtype), processor)
        modes = make_trainable(family, AdapterConfig(lora=lora, lora_r=1))
        how = {"gradient_checkpointing": bool(recompute), "recompute": recompute or "mlp"}
        saved.append(_saved_values(Policy(family, modes.peft_model, clips=ClipStore(), **how)))
    layer = (saved[1] - saved[0]) / 2
    assert 0.8 < layer / layer_values(shape_of(made.config), recompute) < 1.1


def test_the_published_shape_fits_on_paper():
    """G 8, C 1,024: one 30 s clip's prompt and its rollouts, bf16 LoRA, weights of 16 GiB; 30 GiB are the aim."""
    from covo_rl.models.covo_audio import CovoAudioConfig

    shape = shape_of(CovoAudioConfig())
    assert (shape.layers, shape.width, shape.mlp_width, shape.kv_width) == (28, 3584, 18944, 512)
    kept, mlp, layer = (activation_bytes(shape, 8400, 2, recompute=r) / 2**30 for r in (None, "mlp", "layer"))
    assert (kept, mlp, layer) == pytest.approx((49.4, 11.7, 3.3), abs=0.1)


def test_parameters_of_the_published_model_are_counted_without_storage():
    """8.4 B in all; LoRA of rank 8 on seven layers of 28: 8 * 28 * 90,112."""
    from covo_rl.models.covo_audio import CovoAudioConfig

    config = CovoAudioConfig()
    lora = {"prompts_per_step": 16, "num_generations": 8, "max_completion_length": 512, "lora_r": 8}
    speed = Speed(flops=4e14, bandwidth=2e12)
    whole = run_options(**lora, gradient_checkpointing=True, recompute="layer")
    made = plan(config, whole, prompt_positions=288, speed=speed)
    assert shape_of(config).total == pytest.approx(8.4e9, rel=0.01)
    assert made.trainable == 8 * 28 * 90_112
    assert audio_positions(config, 30.0) == 188
    assert made.positions == {"prompts": 16 * 288, "completions": 65_536, "micro-batch": 288 + 8 * 512}
    without = plan(config, run_options(**lora), prompt_positions=288)
    assert without.loss["activations"] > 10 * made.loss["activations"]
    full = plan(config, run_options(**lora, lora=False, beta=0.1), prompt_positions=288)
    assert full.peak > 5 * made.peak / 2 and full.memory["reference copy"] > 14e9


def test_a_decode_step_reads_weights_and_keys():
    """28 layers of 233,046,016 parameters and a head of 602,309,120, in 2 bytes; 512 values a key."""
    from covo_rl.models.covo_audio import CovoAudioConfig

    shape = shape_of(CovoAudioConfig())
    read = decode_bytes(shape, prompt_positions=4 * 214, rows=32, completion=256, size=2)
    weights = 2 * (28 * 233_046_016 + 3584 * 168_055)
    assert read == weights + 2 * 2 * 28 * 512 * (4 * 214 + 32 * 128)
    assert shape.linear_parameters == MODEL_SIZES["7b"].linear_parameters
    assert weights == pytest.approx(14.26e9, rel=1e-3)


def test_planned_seconds_are_below_those_of_a_gpu():
    """The measured step of docs/performance.md: H200, four 30 s clips, G 8, C 256, LoRA of rank 8."""
    from covo_rl.models.covo_audio import CovoAudioConfig

    words = {"prompts_per_step": 4, "num_generations": 8, "max_completion_length": 256, "lora_r": 8, "beta": 0.04}
    speed, config = Speed(flops=790e12, bandwidth=4.3e12), CovoAudioConfig()
    made = plan(config, run_options(**words), prompt_positions=214, speed=speed)
    measured = {"encode": 0.09, "decode": 1.90, "reference": 0.30, "loss": 0.86}
    assert all(0 < made.seconds[phase] < seconds for phase, seconds in measured.items()), made.seconds
    floor = 256 * decode_bytes(shape_of(config), prompt_positions=4 * 214, rows=32, completion=256, size=2) / 4.3e12
    assert made.seconds["decode"] == pytest.approx(DECODE_FACTOR * floor)
    assert made.seconds["decode"] == pytest.approx(1.74, abs=0.01)
    few = plan(config, run_options(**words, decode_rows=8), prompt_positions=214, speed=speed)
    assert 3.8 < few.seconds["decode"] / made.seconds["decode"] < 4, "four turns of 8 rows read the weights four times"
    for name in ("completion keys", "logits and probabilities"):
        assert few.sampling[name] == made.sampling[name] / 4, "and hold what 8 rows need"
    assert "lower bound: products at 790 TFLOP/s in bfloat16, copies at 4,300 GB/s" in render_plan(made)


def test_planned_memory_of_vllm_by_hand():
    """28 layers with keys and values of 512 in two bytes: 57,344 bytes a position; 7.6e9 parameters: 15.2 GB."""
    shape = Shape({"llm": 7_600_000_000}, layers=28, width=3584, mlp_width=18_944, kv_width=512, vocabulary=151_936,
                  linear_parameters=6_500_000_000)  # fmt: skip
    words = {"prompts_per_step": 64, "num_generations": 8, "max_completion_length": 1024, "use_vllm": True}

    def planned(gpu_bytes=None, **more):
        made = vllm_memory(shape, run_options(**words, **more), prompt_positions=300, size=2, gpu_bytes=gpu_bytes)
        return made[0], " ".join(made[1])

    keys = (64 * 300 + 512 * 1024) * 57_344
    assert planned()[0] == {"vLLM: weights": 15.2e9, "vLLM: keys": keys}
    held, notes = planned(80e9, vllm_gpu_memory_utilization=0.3)
    assert held == {"vLLM: 0.3 of the GPU": 24e9} and "sleeps" in notes and "(15.2 GB)" in notes
    assert "writes 18 of 64 groups at once" in notes, "8.8 GB are 153,460 positions, a group has 8,492"
    assert "at once" not in planned(200e9, vllm_gpu_memory_utilization=0.3)[1], "all 64 take 31 GB"
    assert "weights and one group take 0.20" in planned(80e9, vllm_gpu_memory_utilization=0.15)[1]
    assert "sleeps" not in planned(80e9, vllm_enable_sleep_mode=False)[1]
    held, notes = planned(vllm_mode="server", rollout_ahead=1)
    assert not held and "15.2 GB of weights" in notes and "one step ahead" in notes


def test_an_engine_that_never_sleeps_stays_in_the_memory_of_the_update():
    config = cases.family().model.config
    sleeping, awake = (
        plan(config, run_options(use_vllm=True, vllm_enable_sleep_mode=sleeps), prompt_positions=30, gpu_bytes=1e9)
        for sleeps in (True, False)
    )
    assert sleeping.sampling == {"vLLM: 0.3 of the GPU": 3e8} and not awake.sampling
    assert awake.memory == {**sleeping.memory, **sleeping.sampling}


def test_speed_is_measured_in_the_dtype_of_the_run(tmp_path, monkeypatch):
    from covo_rl.run import doctor

    asked = []
    monkeypatch.setattr(doctor, "measure_speed", lambda device, dtype: asked.append(dtype) or Speed(1e12, 1e11))
    made = cases.family()
    made.model.save_pretrained(tmp_path / "model")
    for dtype in ("bfloat16", "auto"):
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump({"model": str(tmp_path / "model"), "dtype": dtype}))
        assert CliRunner().invoke(doctor.app, ["--config", str(path), "--seconds", "1"]).exit_code == 0
    assert asked == ["bfloat16", "float32"]
    for dtype in asked:
        speed = measure_speed("cpu", dtype)
        assert speed.flops > 1e8 and speed.bandwidth > 1e7


def test_doctor_reads_a_run_configuration(tmp_path):
    from covo_rl.run.doctor import app

    made = cases.family()
    made.model.save_pretrained(tmp_path / "model")
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"model": str(tmp_path / "model"), "prompts_per_step": 8, "num_generations": 4}))
    done = CliRunner().invoke(app, ["--config", str(path), "--seconds", "1", "--device", "cpu"])
    assert done.exit_code == 0, done.output
    assert "peak, with 10 %" in done.output and "seconds per step" in done.output
    path.write_text("modle: x\n")
    assert "did you mean model" in CliRunner().invoke(app, ["--config", str(path)]).output
