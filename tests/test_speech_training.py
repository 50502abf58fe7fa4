"""Training a tokenizer: padding is not counted, a resume computes what the run would have, ranks are one, it learns."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import WavLMConfig, WavLMModel

from covo_rl.data.read import DataError
from covo_rl.resolve import ConfigError
from covo_rl.speech.clips import TrainingClips, collate, digit_rows
from covo_rl.speech.measures import measure_tokenizer
from covo_rl.speech.pieces import Pieces
from covo_rl.speech.quantiser import Quantiser
from covo_rl.speech.tokenizer import SpeechTokenizer
from covo_rl.speech.tokenizer_trainer import TokenizerTrainer
from covo_rl.speech.train_tokenizer import start_tokenizer, train_tokenizer
from covo_rl.speech.training import STATE, DivergedError, TokenizerTraining, read_training
from covo_rl.synth.speech import write_speech

pytest.importorskip("vector_quantize_pytorch")
FEW = {"clips": 8, "batch_size": 3, "steps": 4, "init_vectors": 1, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def rows():
    return digit_rows("train", 8)


def units(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def quantiser(**options):
    torch.manual_seed(0)
    made = Quantiser(4, 8, **{"decay": 0.9, "restart_below": 0.0, **options}).train()
    made.begin(units(40, 8))
    return made


def test_a_code_is_the_average_of_the_vectors_that_chose_it():
    made, vectors = quantiser(), units(1, 30, 8, seed=1)
    sums, counts = made.vq._codebook.embed_avg[0].clone(), made.vq._codebook.cluster_size[0].clone()
    nearest = (vectors[0] @ made.codebook.T).argmax(-1)
    for k in range(4):  # the slow reference
        sums[k] = 0.9 * sums[k] + 0.1 * vectors[0, nearest == k].sum(0)
        counts[k] = 0.9 * counts[k] + 0.1 * float((nearest == k).sum())
    quantised, codes = made(vectors, torch.ones(1, 30, dtype=torch.bool))
    assert torch.equal(codes[0], nearest)
    torch.testing.assert_close(made.codebook, F.normalize(sums, dim=-1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(quantised.norm(dim=-1), torch.ones(1, 30))
    torch.testing.assert_close(made.vq._codebook.cluster_size[0], counts)


def test_padding_is_not_counted():
    vectors, mask = units(2, 10, 8, seed=1), torch.arange(10) < torch.tensor([[10], [4]])
    short, padded = quantiser(restart_below=0.5), quantiser(restart_below=0.5)
    torch.manual_seed(1)
    short(torch.cat([vectors[0], vectors[1, :4]])[None], torch.ones(1, 14, dtype=torch.bool))
    torch.manual_seed(1)
    _, codes = padded(vectors, mask)
    torch.testing.assert_close(short.codebook, padded.codebook)
    assert ((codes >= 0) & (codes < 4))[mask].all()


def test_an_unused_code_becomes_a_vector_of_the_batch():
    made, far = quantiser(restart_below=0.5), units(1, 1, 8, seed=5).expand(1, 50, 8)
    for _ in range(60):  # 0.9^60 of 10 uses is below 0.5
        made(far, torch.ones(1, 50, dtype=torch.bool))
    assert ((made.codebook @ far[0, 0]) > 0.999).all()


def test_gradients_pass_the_quantiser():
    made, vectors = quantiser(), units(1, 6, 8, seed=2).requires_grad_()
    made(vectors, torch.ones(1, 6, dtype=torch.bool))[0].sum().backward()
    assert (vectors.grad.norm(dim=-1) > 0).all()


def test_clips_are_on_one_grid(rows):
    clips = TrainingClips(rows, Pieces.learn([row.text for row in rows]), "mel")
    batch = collate([clips[i, j] for i, j in clips.draw(0, 3, 0)])
    lengths = batch.lengths_B.tolist()
    assert batch.mel_BZE.shape == (3, 4 * max(lengths), 64) and batch.f0_BZ.shape == batch.mask_BZ.shape
    assert all(len(wave) == 960 * n + 544 for wave, n in zip(batch.inputs, lengths, strict=True))
    for i, j in clips.draw(7, 8, 0):
        assert rows[i].speaker == rows[j].speaker and (i != j or clips.others[i] == [i])


def test_every_epoch_draws_every_row_once(rows):
    clips = TrainingClips(rows, Pieces.learn([row.text for row in rows]), "mel")
    drawn = [row for step in range(4) for row, _ in clips.draw(step, 4, seed=3)]
    assert sorted(drawn[:8]) == sorted(drawn[8:]) == list(range(8)) and drawn[:8] != drawn[8:]
    assert clips.draw(1, 4, 3) == clips.draw(1, 4, 3) != clips.draw(1, 4, 4)


def test_memory_for_clips_is_bounded(rows):
    pieces = Pieces.learn([row.text for row in rows])
    clips = TrainingClips(rows, pieces, "mel", cache_mb=0.5)
    for i in range(8):
        clips.clip(i)
    assert 0 < len(clips.clips) < 8 and clips.room >= 0


def trainer_of(config, rows):
    return TokenizerTrainer(config, start_tokenizer(config, rows), rows)


def weights_of(trainer):
    return {**trainer.tokenizer.state_dict(), "codes": trainer.quantiser.codebook}


def test_a_resumed_training_is_the_same(tmp_path, rows):
    whole = trainer_of(TokenizerTraining(output=str(tmp_path / "a"), save_steps=2, **FEW), rows)
    whole.folder.mkdir()
    # what a run that was stopped after two updates leaves
    whole.begin()
    for batches in whole._updates():
        whole.update(batches)
        if whole.step == 2:
            whole.save_state()
    (whole.folder / "metrics.jsonl").write_text('{"step": 1}\n{"step": 3}\n')  # of after the state was saved
    again = trainer_of(dataclasses.replace(whole.config, resume=True), rows)
    again.train()
    assert again.step == 4
    steps = [json.loads(line)["step"] for line in (whole.folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 4]
    for name, value in weights_of(whole).items():
        assert torch.equal(value, weights_of(again)[name]), name
    with pytest.raises(ConfigError, match=r"learning_rate 0\.001 there, 0\.1 now"):
        trainer_of(dataclasses.replace(again.config, learning_rate=0.1), rows).load_state()
    (tmp_path / "a" / STATE).write_bytes(b"cut")
    with pytest.raises(ConfigError, match="no state of a training"):
        again.load_state()


def test_micro_batches_are_one_update(tmp_path, rows):
    """Gradients of 3 + 3 clips are those of 6, but for the quantiser, which moves between them and jumps from code to
    code: vectors pass it as they are."""
    gradients = []
    for size, passes in ((6, 1), (3, 2)):
        options = {**FEW, "batch_size": size, "gradient_accumulation_steps": passes}
        trainer = trainer_of(TokenizerTraining(output=str(tmp_path), **options), rows)
        trainer.begin()
        trainer.quantiser.forward = lambda vectors, mask: (vectors, mask.long() - 1)
        trainer.optimizer.step, trainer.optimizer.zero_grad = (lambda: None), (lambda **_: None)
        trainer.config.max_grad_norm = 1e9
        trainer.update(next(trainer._updates()))
        gradients.append({name: p.grad for name, p in trainer.tokenizer.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 50
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=2e-4, rtol=2e-2, msg=name)


def test_the_command_from_rows(tmp_path):
    rows = write_speech(tmp_path / "digits", count=8)
    options = {**FEW, "steps": 1, "data": str(rows), "eval_data": str(rows), "output": str(tmp_path / "out")}
    folder = train_tokenizer(read_training(None, options))
    figures = json.loads((folder / "figures.json").read_text())
    assert figures.keys() == {"wer", "code_use", "pitch_semitones", "voicing"} and 0 < figures["code_use"] <= 1
    [line] = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    assert line["step"] == 1 and line["ctc"] > 0
    with pytest.raises(ConfigError, match="choose another --output"):
        train_tokenizer(read_training(None, options))


def test_what_is_wrong_with_recordings_is_said_before_training(tmp_path):
    path = write_speech(tmp_path, count=5)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[1]["audio"] = "rows.jsonl"
    rows[2]["words"][-1][2] = 99
    rows[3] |= {"codes": [1, 2, 3], "words": None}
    path.write_text("\n".join(map(json.dumps, rows)))
    old = tmp_path / "out"
    old.mkdir()
    for name in ("metrics.jsonl", "config.json"):
        (old / name).write_text("{}")
    options = {**FEW, "data": str(path), "output": str(old), "overwrite": True}
    with pytest.raises(DataError) as caught:
        train_tokenizer(read_training(None, options))
    assert [problem.row_id for problem in caught.value.problems] == [row["id"] for row in rows[1:4]]
    assert "3 codes, its audio has" in caught.value.problems[2].what
    assert (old / "config.json").exists() and (old / "metrics.jsonl").exists()  # replaced only by a training


def test_held_out_words_that_were_never_trained_are_errors(tmp_path, rows):
    trainer = trainer_of(TokenizerTraining(output=str(tmp_path), **FEW), rows)
    strange = [dataclasses.replace(rows[0], text="eleven, Twelve"), dataclasses.replace(rows[1], text="...")]
    assert measure_tokenizer(trainer.tokenizer.eval(), strange)["wer"] >= 1


def test_a_loss_that_is_no_number_ends_it(tmp_path, rows):
    trainer = trainer_of(TokenizerTraining(output=str(tmp_path), **FEW), rows)
    with pytest.raises(DivergedError, match="not finite after step 0"):
        trainer._log({"ctc": torch.tensor(float("nan"))}, None)


def test_too_few_codes_for_k_means(tmp_path, rows):
    trainer = trainer_of(TokenizerTraining(output=str(tmp_path), **{**FEW, "init_vectors": 50}), rows)
    with pytest.raises(ConfigError, match="k-means of 256 codes wants 12800"):
        trainer.begin()


def test_options_are_checked_together():
    with pytest.raises(ConfigError) as error:
        read_training(None, {"step": 3, "steps": 0, "shape": "huge", "wavlm": "x", "dtype": "int8"})
    for part in ("did you mean steps", "steps 0", "shape 'huge'", "dtype 'int8'", "wavlm needs shape: published"):
        assert part in str(error.value)
    for name in ("tiny", "published"):
        assert read_training(Path("recipes/configs") / f"tokenizer_{name}.yaml").shape == name


RANKS = """
import sys, torch
from covo_rl.speech.clips import digit_rows
from covo_rl.speech.tokenizer import SpeechTokenizer
from covo_rl.speech.tokenizer_trainer import TokenizerTrainer
from covo_rl.speech.train_tokenizer import start_tokenizer
from covo_rl.speech.training import TokenizerTraining
from covo_rl.train.launch import process_state
from covo_rl.train.ranks import Ranks
process_state()
ranks = Ranks.current()
config = TokenizerTraining(output=sys.argv[1], clips=8, batch_size=4 // ranks.world, steps=2, init_vectors=1,
                           restart_below=0, learning_rate=1e-3)
torch.set_num_threads(1)
rows = digit_rows("train", 8)
trainer = TokenizerTrainer(config, start_tokenizer(config, rows), rows, ranks)
generator = torch.Generator().manual_seed(0)
codes = torch.nn.functional.normalize(torch.randn(256, 16, generator=generator), dim=-1)
book = trainer.quantiser.vq._codebook
book.embed.copy_(codes[None]); book.embed_avg.copy_(codes[None]); book.initted.fill_(True)
for batches in trainer._updates():
    trainer.update(batches)
if ranks.main:
    torch.save({**trainer.tokenizer.state_dict(), "codes": trainer.quantiser.codebook.clone()}, sys.argv[1])
"""


@pytest.mark.slow
def test_two_ranks_train_what_one_does(tmp_path):
    (tmp_path / "ranks.py").write_text(RANKS)
    for count in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
        subprocess.run([*command, tmp_path / "ranks.py", tmp_path / f"{count}.pt"], check=True)
    one, two = (torch.load(tmp_path / f"{count}.pt", weights_only=True) for count in (1, 2))
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.slow
def test_it_learns_to_tell_digits(tmp_path):
    options = {"output": str(tmp_path), "clips": 500, "steps": 400}
    folder = train_tokenizer(read_training(None, options))
    figures = json.loads((folder / "figures.json").read_text())
    assert figures["wer"] < 0.2 and figures["code_use"] > 0.6


def test_it_starts_from_a_checkpoint_of_wavlm(tmp_path, rows):
    layers = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
              "conv_dim": [8] * 7, "feat_extract_norm": "layer", "num_conv_pos_embedding_groups": 2}  # fmt: skip
    wavlm = WavLMModel(WavLMConfig(**layers))
    wavlm.save_pretrained(tmp_path)
    config = TokenizerTraining(shape="published", wavlm=str(tmp_path), pieces=30, output=str(tmp_path / "out"))
    trainer = trainer_of(config, rows)
    for name, weight in wavlm.state_dict().items():
        assert torch.equal(weight, trainer.tokenizer.wavlm.state_dict()[name]), name
    rates = {id(p): group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert rates[id(trainer.tokenizer.wavlm.encoder.layer_norm.weight)] < rates[id(trainer.tokenizer.merge.weight)]
    assert not any(id(p) in rates for p in trainer.tokenizer.wavlm.feature_extractor.parameters())
    trainer.tokenizer.save_pretrained(tmp_path / "out")
    again = SpeechTokenizer.from_pretrained(tmp_path / "out")
    assert again.config == trainer.tokenizer.config and again.config.wavlm_config().num_hidden_layers == 2
