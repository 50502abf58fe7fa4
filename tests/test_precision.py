"""Which precision trains, what measures it, and what it costs: from options to the step."""

import copy
import math
import os
import signal
import subprocess
import sys
import tempfile

import numpy as np
import policy_cases as cases
import pytest
import torch
import train_cases
from accelerate import Accelerator
from torch._subclasses.fake_tensor import FakeTensorMode

from covo_rl.algo.normalizer import entropy_threshold
from covo_rl.audio import ClipStore
from covo_rl.config import ConfigError, RolloutConfig, parse_options
from covo_rl.engines import decoding, own
from covo_rl.engines.decoder import FusedDecoder, decoder_for
from covo_rl.engines.draws import Drawing, draw
from covo_rl.engines.health import self_check
from covo_rl.models.builtin import resolve_model
from covo_rl.policy import FeatureStore
from covo_rl.policy.trainable import adamw, training_dtype
from covo_rl.supervised import rows as stage_rows
from covo_rl.supervised.config import ColdStartConfig, Stage, load_config
from covo_rl.supervised.rows import TeacherError
from covo_rl.supervised.trainer import Collator, completion_loss, family_forward
from covo_rl.train.guard import TrainingStopped
from covo_rl.train.launch import allow_tf32, computes_in_16_bits, join
from covo_rl.train.loop import Trainer


def test_the_mismatch_is_logged_at_every_step_whatever_is_corrected(tmp_path):
    """finding 20: neither corrected nor logged by default."""
    for changes in ({}, {"num_iterations": 2}, {"sampler_correction": True}, {"steps_per_generation": 2}):
        folder = tmp_path / "-".join(changes or ["plain"])
        train_cases.run(train_cases.options(folder, max_steps=2, **changes))
        for line in train_cases.metrics(folder):
            assert 0 < line["sampling/sampling_logp_difference/mean"] <= line["sampling/sampling_logp_difference/max"]
            assert line["sampling/sampling_logp_difference/max"] < 1e-5, "float32"
            ratios = [line[f"sampling/importance_sampling_ratio/{which}"] for which in ("min", "mean", "max")]
            assert ratios == sorted(ratios) and ratios == pytest.approx([1, 1, 1], abs=1e-5)


def test_the_mismatch_of_a_step_without_anything_to_learn(tmp_path, monkeypatch):
    """All rollouts agree, so no group is scored for the loss; one still is for the measurement."""
    same = lambda prompts, completions, **columns: [1.0] * len(completions)  # noqa: E731
    same.__name__, same.isolation = "same", "thread"
    made, _ = train_cases.run(train_cases.options(tmp_path, max_steps=2, rewards={same: 1.0}))
    assert made.learner.applied == 0
    assert all(line["sampling/sampling_logp_difference/max"] < 1e-5 for line in train_cases.metrics(tmp_path))


def test_a_sampler_that_is_off_shows_in_the_metrics(tmp_path, monkeypatch):
    """As if the engine reported log-probs that are 0.25 nats too high."""
    original = own.sample

    def off(*args, **kwargs):
        from dataclasses import replace

        groups = original(*args, **kwargs)
        return [
            replace(g, rollouts=tuple(replace(r, logps=tuple(x + 0.25 for x in r.logps)) for r in g.rollouts))
            for g in groups
        ]

    monkeypatch.setattr(own, "sample", off)
    train_cases.run(train_cases.options(tmp_path, max_steps=1))
    (line,) = train_cases.metrics(tmp_path)
    assert line["sampling/sampling_logp_difference/mean"] == pytest.approx(0.25, abs=1e-4)
    assert line["sampling/importance_sampling_ratio/mean"] == pytest.approx(math.exp(-0.25), abs=1e-4)


def test_the_entropy_quantile_of_more_than_2_to_the_24_tokens():
    """finding 21: torch.quantile refuses them."""
    values = torch.arange(2**24 + 5, dtype=torch.float64).flip(0).float()
    threshold, tokens = entropy_threshold([values[None]], [torch.ones(1, len(values))], 0.25)
    assert threshold == pytest.approx(0.75 * (2**24 + 4), rel=1e-6)
    assert tokens == pytest.approx(0.25 * len(values), rel=1e-5)
    few = torch.rand(1, 1001, generator=torch.Generator().manual_seed(0))
    for share in (0.2, 0.5, 0.9):
        ours, _ = entropy_threshold([few], [torch.ones_like(few)], share)
        assert ours == pytest.approx(float(torch.quantile(few, 1 - share)), abs=1e-6)
    assert entropy_threshold([few], [torch.zeros_like(few)], 0.5) == (math.inf, 0.0)
    assert entropy_threshold([few[:, :1]], [torch.ones(1, 1)], 0.5) == (float(few[0, 0]), 1.0)


def test_noise_without_float64_draws_the_same_distribution():
    """finding 21: no Apple GPU has float64; in float32 the frequencies are those of the probabilities."""
    generator = torch.Generator().manual_seed(0)
    probs = torch.tensor([0.7, 0.2, 0.1 - 1e-4, 1e-4]).repeat(200_000, 1)
    noise = torch.rand(200_000, generator=generator, dtype=torch.float64)
    noise[0] = 1 - 2**-53  # rounds to 1 in float32
    tokens, _ = draw(probs.log(), noise.float(), Drawing())
    exact, _ = draw(probs.log(), noise, Drawing())
    assert float((tokens != exact).float().mean()) < 1e-5 and int(tokens[0]) == 3
    wide = torch.randn(64, 20_000, generator=generator)
    assert int(draw(wide, torch.rand(64, generator=generator), Drawing())[0].max()) < 20_000


def test_nothing_in_float64_reaches_a_device_that_has_none(monkeypatch):
    """finding 21: a whole sampling call, as on an Apple GPU."""
    from torch.utils._python_dispatch import TorchDispatchMode

    monkeypatch.setattr(decoding, "noise_dtype", lambda device: torch.float32)
    made = cases.policy()
    features = made.features(prompts := cases.prompts(made))

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dtype == torch.float64:
                assert func._schema.name in ("aten::rand", "aten::empty", "aten::uniform_", "aten::stack", "aten::cat",
                                             "aten::view", "aten::_unsafe_view", "aten::flatten"), func  # fmt: skip
            return out

    with Watch():
        own.sample(made, prompts, features, RolloutConfig(max_completion_length=4, num_generations=2), seed=0)


# -- which precision trains --------------------------------------------------------------------------------------


@pytest.fixture
def of_dtype(tmp_path):
    """A folder of a checkpoint with only a configuration: nothing else may be read."""

    def make(name, key="dtype"):
        (tmp_path / "config.json").write_text(f'{{"model_type": "covo_audio", "{key}": "{name}"}}')
        return str(tmp_path)

    return make


def test_float16_is_refused_for_training(tmp_path):
    """finding 21: before anything is read, with what to write instead; a float16 checkpoint trains as float32."""
    path = tmp_path / "run.yaml"
    path.write_text("dtype: float16\n")
    for words in (["--dtype", "float16"], ["--config", str(path)]):
        with pytest.raises(ConfigError, match=r"dtype.*float16.*choose.*float32.*bfloat16"):
            parse_options(words)
    with pytest.raises(ConfigError, match="dtype 'float16': choose one of auto, float32, bfloat16"):
        load_config(None, {"model": "builtin:tiny", "rows": 8, "dtype": "float16"})
    policy = cases.policy()
    policy.family.model.half()
    with pytest.raises(ConfigError, match=r"a float16 model cannot train.*bfloat16 or float32"):
        Trainer(train_cases.options(tmp_path), policy, policy.clips, train_cases.rows(), Accelerator(cpu=True))


def test_an_accelerator_in_float16_is_refused_too(tmp_path, monkeypatch):
    """Made in Python, on a GPU: there accelerate would scale the loss, and nothing here unscales a skipped step."""
    accelerator, policy = Accelerator(cpu=True), cases.policy()
    monkeypatch.setattr(type(accelerator), "mixed_precision", "fp16")
    with pytest.raises(ConfigError, match=r"mixed_precision 'fp16' of the Accelerator: use bf16 or no"):
        Trainer(train_cases.options(tmp_path), policy, policy.clips, train_cases.rows(), accelerator)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize(
    ("checkpoint", "full", "dtype"),
    [("bfloat16", True, "float32"), ("bfloat16", False, "auto"), ("float16", True, "float32"),
     ("float16", False, "float32"), ("float32", True, "auto")],
)  # fmt: skip
def test_whole_parts_train_in_float32_under_auto(of_dtype, checkpoint, full, dtype, key):
    """finding 24: at 3e-6 the updates of bfloat16 weights vanish."""
    loaded, notes = training_dtype("auto", of_dtype(checkpoint, key), full=full)
    assert loaded == dtype and bool(notes) == (dtype == "float32")
    assert not notes or checkpoint in notes[0]
    assert training_dtype("bfloat16", of_dtype(checkpoint), full=full)[0] == "bfloat16", "what is asked for is done"


def test_the_shipped_model_is_float16_and_trains_in_float32():
    assert training_dtype("auto", resolve_model("builtin:tiny"), full=False)[0] == "float32"


def test_gradients_that_stay_infinite_stop_the_run(tmp_path):
    made = train_cases.trainer(train_cases.options(tmp_path, max_steps=30))
    next(p for p in made.policy.parameters() if p.requires_grad).register_hook(lambda grad: grad * math.inf)
    with pytest.raises(TrainingStopped, match="3 optimiser updates in a row were not finite"):
        made.run()


def test_one_kernel_updates_parameters_on_cuda_and_elsewhere_nothing_changes():
    """Without a GPU: parameters that only claim to be there."""
    with FakeTensorMode():
        there = [torch.nn.Parameter(torch.empty(2, device="cuda")) for _ in range(2)]
        here = torch.nn.Parameter(torch.empty(2))
        assert adamw([{"params": there[:1]}, {"params": there[1:]}], lr=0.1).defaults["fused"] is True
        assert adamw([{"params": [*there, here]}], lr=0.1).defaults["fused"] is None
        assert adamw([here], lr=0.1).defaults["fused"] is None


def test_tf32_only_on_cuda_and_only_where_16_bits_compute(monkeypatch):
    """The setting is torch's own word for it; no warning of an old or a new way to say it."""
    settings = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", settings.append)
    for device in ("cpu", "cuda"):
        for allowed in (True, False):
            allow_tf32(torch.device(device), allowed, torch.nn.Linear(2, 2))
    assert settings == ["high", "highest"]
    accelerator, model = Accelerator(cpu=True), torch.nn.Linear(2, 2)
    assert not computes_in_16_bits(accelerator, model)
    assert computes_in_16_bits(accelerator, model.bfloat16())
    monkeypatch.setattr(type(accelerator), "mixed_precision", "bf16")
    assert computes_in_16_bits(accelerator, torch.nn.Linear(2, 2))


def test_sampling_in_tf32_is_not_exact(monkeypatch):
    """Seen on an H200: float32 weights under --mixed_precision bf16 failed the self-check, 5.4e-4 nats above 1e-4."""
    made = cases.policy()
    assert own.samples_exactly(made) and self_check(made, cases.prompts(made), cases.SMALL).tolerance == 1e-4
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert not own.samples_exactly(made) and self_check(made, cases.prompts(made), cases.SMALL).tolerance is None


@pytest.mark.parametrize("name", ["covo_audio", "qwen2_audio"])
def test_rotary_positions_are_never_rounded_to_tf32(monkeypatch, name):
    """On a GPU 10 bits make 2048 of position 2049; here the setting that its product sees is what there is to see."""
    made = cases.policy(name)
    rotary = made.family.decoder.rotary_emb
    kind, forward, seen = type(rotary), type(rotary).forward, []

    def watched(self, *args, **kwargs):
        seen.append(torch.get_float32_matmul_precision())
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(kind, "forward", watched)
    groups = cases.ragged_groups(made)

    def logps():
        with torch.no_grad():
            return made("logps", groups, made.features([group.prompt for group in groups])).logps_NC

    plain = logps()
    seen.clear()
    try:
        for _ in range(2):  # a second run in one process
            allow_tf32(torch.device("cuda"), True, made.family.model)
        assert torch.equal(logps(), plain)
        assert seen == ["highest"] and torch.get_float32_matmul_precision() == "high"
        fused = decoder_for(made, rows=4, longest=64)
        assert isinstance(fused, FusedDecoder), "decoding still knows what the module does"
        assert seen == ["highest"] * 2, "its table is exact too"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert type(rotary).__bases__[1] is kind and "inv_freq" in dict(copy.deepcopy(rotary).named_buffers())


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [("ACCELERATE_MIXED_PRECISION", "fp16", "mixed_precision 'fp16' .*in float16 gradients vanish; use bf16 or no"),
     ("ACCELERATE_MIXED_PRECISION", "BF16", "mixed_precision 'BF16' .*there are no and bf16"),
     ("ACCELERATE_MIXED_PRECISION", "fp8", "mixed_precision 'fp8' .*there are no and bf16"),
     ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "gradient_accumulation_steps 4 .*micro_batch_prompts")],
)  # fmt: skip
def test_what_the_launcher_asks_for_and_would_be_done_wrongly(monkeypatch, variable, value, words):
    """finding 21: accelerate would divide every loss by its accumulation steps."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    monkeypatch.setenv(variable, value)
    try:
        with pytest.raises(ConfigError, match=words):
            join()
    finally:
        AcceleratorState._reset_state(True)
        monkeypatch.delenv(variable)
        Accelerator(cpu=True)


# -- memory and loss of supervised stages ----------------------------------------------------------------------------


def _stage_rows(feature_memory_mb):
    config = ColdStartConfig(feature_memory_mb=feature_memory_mb)
    examples = [*train_cases.rows(), *train_cases.rows()]
    return stage_rows.prepare_rows(examples, cases.family(), config)


def test_features_of_rows_stay_within_their_budget():
    """finding 24: every row's mel was kept on every rank, 60 GB for 40,000 clips."""
    roomy, tight = _stage_rows(100), _stage_rows(0.01)
    for ours, theirs in zip(tight, roomy, strict=True):
        assert (ours.prompt_ids, ours.slots) == (theirs.prompt_ids, theirs.slots)
        for a, b in zip(ours.clips, theirs.clips, strict=True):
            assert a.slots == b.slots and all(torch.equal(a.tensors[name], b.tensors[name]) for name in a.tensors)
        assert ours.store._mel_bytes <= max(0.01 * 2**20, max(t.nbytes for c in ours.clips for t in c.tensors.values())
                                            if ours.clips else 0) * 1.2  # fmt: skip
    assert len(roomy[0].store._mel) > len(tight[0].store._mel) >= 1


def test_a_row_that_does_not_fit_the_model_is_named():
    """finding 25: training refuses it too, before the first step."""
    family, rows = cases.family(), _stage_rows(10)
    family.model.config.get_text_config().max_position_embeddings = 60
    with pytest.raises(TeacherError, match=r"row row0: \d+ positions of the prompt and up to \d+ of the completion"):
        Collator(family, rows, ["bell " * 50] * len(rows))


@pytest.mark.parametrize("autocast", [False, True])
def test_the_supervised_loss_takes_float32_logits(autocast):
    """finding 17: its gradient suffers from rounded logits just the same."""
    family, rows = cases.family(), _stage_rows(10)[:4]
    batch = Collator(family, rows, ["a bell", "a dog", "the dog barks", "x"])([{"row": i} for i in range(4)])
    dtype = torch.float32 if autocast else torch.bfloat16
    family.model.to(dtype)
    seen = []
    family.lm_head.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), family_forward(family) as model:
        completion_loss(model, batch).backward()
    hidden, logits = seen[0]
    assert logits.dtype == torch.float32 and "forward" not in vars(family.lm_head)
    expected = hidden.bfloat16().float() @ family.lm_head.weight.bfloat16().float().t()
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert torch.isfinite(family.lm_head.weight.grad).all() and family.lm_head.weight.grad.abs().sum() > 0


def test_options_of_a_stage_are_the_usual_ones():
    assert Stage().learning_rate == 1e-3 and ColdStartConfig().feature_memory_mb == 2048


# -- features on disk ------------------------------------------------------------------------------------------------


def test_features_on_disk_stay_within_their_budget_and_survive_a_full_disk(monkeypatch):
    """finding 24: the temporary folder grew without limit."""
    clips, family = ClipStore(), cases.family()
    keys = [clips.key(cases.clip(i, 0.5)) for i in range(6)]
    size = next(iter(FeatureStore(family, clips).embeddings(keys[:1]).values())).nbytes
    store = FeatureStore(family, clips, memory_mb=size / 2**20, disk_mb=2 * size / 2**20)
    first = store.embeddings(keys)
    assert len(store._on_disk) == 2 and store._disk_bytes == 2 * size
    again = store.embeddings(keys)
    assert store.encoded_clips > 6, "what was dropped is encoded again"
    assert all(torch.equal(first[key], again[key]) for key in keys)

    class Full:  # a raw file on a full disk takes a part, and says how much
        def seek(self, place):
            return place

        def write(self, data):
            return len(data) - 1

    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: Full())
    store = FeatureStore(family, clips, memory_mb=size / 2**20)
    with pytest.warns(UserWarning, match="no longer kept on disk.*No space left"):
        third = store.embeddings(keys)
    assert all(torch.equal(first[key], third[key]) for key in keys) and not store._on_disk
    assert np.isfinite(store._bytes)


def test_features_on_disk_vanish_with_a_killed_process(tmp_path):
    """finding 24: a temporary folder of gigabytes stayed behind each run that was killed."""
    code = (
        "import os, signal, policy_cases as cases\n"
        "from covo_rl.policy import FeatureStore\n"
        "store = FeatureStore(cases.family(), cases.ClipStore(), memory_mb=0)\n"
        "keys = [store.clips.key(cases.clip(i, 0.5)) for i in range(3)]\n"
        "store.embeddings(keys), store.embeddings(keys)\n"
        "assert store.encoded_clips == 3 and store._disk_bytes > 0\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not list(tmp_path.glob("covo_rl*")) and sum(f.stat().st_size for f in tmp_path.rglob("*")) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_features_come_back_from_disk_bit_by_bit(dtype):
    family, clips = cases.family(), ClipStore()
    family.model.to(dtype)
    store = FeatureStore(family, clips, memory_mb=0)
    keys = [clips.key(cases.clip(i, 0.3 + 0.2 * i)) for i in range(4)]
    first = {key: value.clone() for key, value in store.embeddings(keys).items()}
    again = store.embeddings(keys[::-1])
    assert store.encoded_clips == 4
    assert all(again[key].dtype == dtype and torch.equal(again[key], first[key]) for key in keys)
