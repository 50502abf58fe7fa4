"""What training speech out takes is counted on tensors without storage, and is what a real pass keeps and computes."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from covo_rl.models.covo_audio.token2wav import Token2Wav, Token2WavConfig
from covo_rl.run.doctor import app
from covo_rl.run.speech_memory import counted_pass, decoder_plan, tokenizer_plan
from covo_rl.run.speed import Speed
from covo_rl.speech.decoder_training import DecoderTraining
from covo_rl.speech.training import TokenizerTraining


def test_a_pass_keeps_its_inputs_and_multiplies_three_times():
    """Linear 3 -> 5 on 7 rows: x (84 bytes) is kept; y = Wx and two gradients are 2 x 3 x 5 x 7 operations each."""
    with torch.device("meta"):
        linear = nn.Linear(3, 5)
        x = torch.empty(7, 3, requires_grad=True)
    kept, work = counted_pass(linear, lambda: linear(x).sum())
    assert kept == 84.0 and [flops for flops, _ in work if flops] == [210, 210, 210]
    assert work[0] == (210, 4 * (3 * 5 + 5 + 7 * 3 + 7 * 5)), "the product and its bias: weights, x and y, once each"
    assert work[1] == (0, 4 * (7 * 5 + 1)), "the sum, and no view of anything"


def real_pass(module, loss):
    """Bytes of the distinct tensors that a real pass keeps, and its operations."""
    kept = {}
    weights = {value.data_ptr() for value in module.parameters()}

    def keep(value):
        kept.setdefault(value.untyped_storage().data_ptr(), value)
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value), FlopCounterMode(display=False) as counter:
        loss().backward()
    return sum(v.untyped_storage().nbytes() for k, v in kept.items() if k not in weights), counter.get_total_flops()


def test_a_pass_without_storage_counts_what_a_real_one_does():
    torch.manual_seed(0)
    config = Token2WavConfig.tiny("mel", "bigvgan")
    real = Token2Wav(config).wavegan
    with torch.device("meta"):
        empty = Token2Wav(config).wavegan
    kept, work = counted_pass(empty, lambda: empty(torch.empty(1, 64, 8, device="meta")).sum())
    really_kept, really_computed = real_pass(real, lambda: real(torch.randn(1, 64, 8)).sum())
    assert sum(flops for flops, _ in work) == really_computed
    assert kept == pytest.approx(really_kept, rel=0.05)


def test_plans_have_the_published_sizes():
    """Activations grow with the clips; the flow has 252,732,480 parameters for the published space and speaker."""
    options = TokenizerTraining(shape="published", pieces=5000, batch_size=1, gradient_accumulation_steps=2)
    one, two = (tokenizer_plan(options, seconds) for seconds in (0.2, 0.4))
    assert one.positions == {"codes": 10} and two.positions == {"codes": 20}
    assert 310e6 < one.trainable < 340e6  # WavLM-large without its convolutions, which stay, and the new parts
    assert two.loss["activations"] - one.loss["activations"] > 30e6  # more than 3 MB a code; some do not grow
    decoder = decoder_plan(DecoderTraining(shape="published", latent="mel", vocoder="griffin_lim", vocoder_steps=0))
    speaker = 1024 * (1024 - 64)  # our speaker vectors have 64 numbers
    assert decoder.trainable == 252_732_480 - speaker
    # halves of the flow's copy in 16 bits; the vocoder trains, and is timed, in float32
    narrow = decoder_plan(
        DecoderTraining(dtype="bfloat16"), {"bfloat16": Speed(2e12, 1e20), "float32": Speed(1e12, 1e20)}.__getitem__
    )
    wide = decoder_plan(DecoderTraining(), {"float32": Speed(1e12, 1e20)}.__getitem__)
    flow = sum(p.numel() for p in Token2Wav(Token2WavConfig.tiny()).token2latent.parameters())
    assert narrow.memory["weights"] - wide.memory["weights"] == 2 * flow
    assert narrow.notes[0] == wide.notes[0] and "1 TFLOP/s of products in float32" in wide.notes[0]
    assert "2 TFLOP/s of products in bfloat16" in narrow.notes[1]
    assert decoder.memory["optimiser (AdamW)"] == 2 * decoder.memory["gradients"] == 8.0 * decoder.trainable


@pytest.mark.parametrize(("kind", "notes"), [("tokenizer", ["tokenizer"]), ("decoder", ["vocoder", "flow"])])
def test_doctor_tells_of_speech(kind, notes, tmp_path):
    path = tmp_path / "speech.yaml"
    path.write_text("seed: 1\n")
    command = ["--config", str(path), "--speech", kind, "--seconds", "1", "--device", "cpu"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "trainable parameters" in result.output and "activations" in result.output
    for name in notes:
        assert f"updates of the {name} take" in result.output
    path.write_text("sed: 1\n")
    result = CliRunner().invoke(app, command)
    assert result.exit_code != 0
