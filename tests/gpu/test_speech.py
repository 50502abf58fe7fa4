"""Speech on a device: codes, waves, streams and the trainings of both are the CPU's."""

import itertools

import pytest
import torch
from token2wav_cases import CODES, FOLDER, REFERENCE, VOICE, decoder, largest

from covo_rl.models.builtin import resolve_model
from covo_rl.models.covo_audio.token2wav import Token2Wav
from covo_rl.speech.clips import digit_rows
from covo_rl.speech.decoder_training import read_decoder_training
from covo_rl.speech.latents import voice_of
from covo_rl.speech.tokenizer import SpeechTokenizer
from covo_rl.speech.tokenizer_trainer import TokenizerTrainer
from covo_rl.speech.train_decoder import DecoderTrainer, codes_of_rows
from covo_rl.speech.train_tokenizer import start_tokenizer
from covo_rl.speech.training import TokenizerTraining

SHIPPED = "builtin:speech_tokenizer", "builtin:speech_decoder"
pytestmark = pytest.mark.usefixtures("whole_float32")


def shipped(device):
    tokenizer = SpeechTokenizer.from_pretrained(SHIPPED[0], device=device)
    return tokenizer, Token2Wav.from_pretrained(resolve_model(SHIPPED[1]), device=device)


def test_the_decoder_gives_the_reference_arrays(device):
    model = Token2Wav.from_pretrained(FOLDER, device=device)
    voice = {name: value.to(device) for name, value in VOICE.items()}
    noise = REFERENCE["noise"]
    exact = decoder().solve(CODES, **VOICE, noise=noise)
    assert largest(model.solve(CODES.to(device), **voice, noise=noise.to(device)).cpu(), exact) < 1e-5
    assert largest(model.solve(CODES, **VOICE, noise=noise).cpu(), exact) < 1e-5, "inputs of the CPU go along"
    waves = (made.synthesise(CODES, **VOICE, noise=noise).cpu() for made in (model, decoder()))
    assert largest(*waves) < 1e-4
    narrow = Token2Wav.from_pretrained(FOLDER, dtype=torch.bfloat16, device=device)
    error = (narrow.solve(CODES, **VOICE, noise=noise).cpu() - exact).norm() / exact.norm()
    assert error < 0.02


def test_rows_of_unequal_length_and_streams_are_what_they_are_alone(device):
    model = Token2Wav.from_pretrained(FOLDER, device=device)
    rows = [CODES[0].tolist(), CODES[0, :7].tolist()]
    waves = model.synthesise(rows, **VOICE)
    for wave, row in zip(waves, rows, strict=True):
        alone = model.synthesise([row], **VOICE)[0]
        assert largest(wave[:, : alone.shape[1]], alone) < 1e-4
        pieces = list(model.stream(iter(row), **VOICE, blocks=(len(row),)))
        assert pieces[0].device.type == device.type
        assert largest(torch.cat(pieces, dim=-1)[0], alone) < 1e-4


def test_codes_and_voices_are_those_of_the_cpu(device):
    rows = digit_rows("test", 4)
    waves = [row.wave() for row in rows]
    (near, speaks), (far, says) = shipped(device), shipped("cpu")
    codes, expected = near.encode(waves), far.encode(waves)
    same = [float((a == b).float().mean()) for a, b in zip(codes, expected, strict=True)]
    assert min(same) > 0.98, "a code in fifty may lie between two"
    assert near.transcribe(expected[0]) == far.transcribe(expected[0]) == rows[0].text
    ours, theirs = (
        made.synthesise(expected[0][None], **voice_of(waves[1], tokenizer, made)).cpu()
        for tokenizer, made in ((near, speaks), (far, says))
    )
    # harmonics are of one phase at the beginning and drift by rounding: spectra are compared, not samples
    levels = [wave[0, 0].unfold(0, 960, 240).square().mean(-1) for wave in (ours, theirs)]
    assert (levels[0] - levels[1]).norm() < 0.02 * levels[1].norm()
    pieces = list(speaks.stream(expected[0].tolist(), **voice_of(waves[1], near, speaks)))
    assert torch.cat(pieces, dim=-1).shape == ours.shape


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_updates_of_both_trainings_are_those_of_the_cpu(device, dtype, tmp_path, monkeypatch):
    """Losses of three updates, from one beginning; in bfloat16 within its rounding."""
    rows, tolerance = digit_rows("train", 8), 2e-3 if dtype == "float32" else 0.05
    tokenizer = SpeechTokenizer.from_pretrained(SHIPPED[0])
    codes = codes_of_rows(rows, tokenizer)

    def train_on(place):
        for module in ("tokenizer_trainer", "train_decoder"):
            monkeypatch.setattr(f"covo_rl.speech.{module}.device_of", lambda: torch.device(place))

    config = TokenizerTraining(str(tmp_path / "t"), clips=8, batch_size=4, steps=9, init_vectors=1, dtype=dtype,
                               restart_below=0)  # fmt: skip
    train_on("cpu")
    begun = TokenizerTrainer(config, start_tokenizer(config, rows), rows)
    begun.begin()  # k-means draws on the device
    begun.save_state()

    def of_tokenizer():
        trainer = TokenizerTrainer(config, start_tokenizer(config, rows), rows)
        trainer.load_state()
        return [trainer.update(batches) for batches in itertools.islice(trainer._updates(), 3)]

    def of_decoder():
        config = read_decoder_training(None, {"output": str(tmp_path / "d"), "vocoder_steps": 4, "flow_steps": 4,
                                              "flow_frames": 256, "sequence_frames": 96, "vocoder_batch": 2,
                                              "vocoder_frames": 32, "dtype": dtype})  # fmt: skip
        trainer = DecoderTrainer(config, rows, codes, tokenizer)
        trainer.field.eval()  # dropout draws on the device
        figures = []
        for step, batch in enumerate(itertools.islice(trainer._batches(), 6)):
            torch.manual_seed(step)
            update = trainer.update_flow if step >= 4 else trainer.update_vocoder
            figures.append(update(*(part.to(trainer.device) for part in batch)))
        return figures

    figures = []
    for place in (device, torch.device("cpu")):
        train_on(place)
        figures.append([*of_tokenizer(), *of_decoder()])
    for mine, exact in zip(*figures, strict=True):
        assert mine.keys() == exact.keys()
        for name, value in mine.items():
            assert value.device.type == device.type or name == "verdict"
            assert float(value) == pytest.approx(float(exact[name]), rel=tolerance, abs=tolerance), name
