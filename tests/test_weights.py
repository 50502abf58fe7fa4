"""What a checkpoint, an adapter or a prompt must hold before anything runs."""

import json

import policy_cases as cases
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from covo_rl.config import AdapterConfig, PromptConfig
from covo_rl.evaluate.lengths import length_problems
from covo_rl.models import ModelError, load_family
from covo_rl.models.weights import WeightsError, load_whole
from covo_rl.policy.trainable import make_trainable
from covo_rl.prompt import build_prompt, position_limit
from covo_rl.types import Example


@pytest.fixture(params=["covo_audio", "qwen2_audio"])
def checkpoint(request, tmp_path):
    """(folder, write(change)): `change` gets the tensors by name before they are written."""
    family = cases.family(request.param)
    family.model.save_pretrained(tmp_path)
    family.processor.save_pretrained(tmp_path)
    whole = load_file(tmp_path / "model.safetensors")

    def write(change):
        change(tensors := dict(whole))
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})

    return tmp_path, write


def _head(tensors):
    return next(name for name in tensors if name.endswith("lm_head.weight"))


def test_missing_and_misshapen_tensors_are_named(checkpoint):
    """finding 25: the head was random, and everything ended with 0."""
    folder, write = checkpoint
    write(lambda tensors: tensors.pop(_head(tensors)))
    with pytest.raises(WeightsError, match=r"missing in the checkpoint.*1 \(.*lm_head\.weight\)"):
        load_family(str(folder))
    write(lambda tensors: tensors.update({_head(tensors): torch.zeros(3, 5)}))
    with pytest.raises(WeightsError, match=r"of another shape.*lm_head\.weight \(\(3, 5\) in the file"):
        load_family(str(folder))
    write(lambda tensors: [tensors.update({f"old.{name}": tensors.pop(name)}) for name in list(tensors)])
    with pytest.raises(WeightsError, match=r"random: \d\d \(.*, \.\.\.\)"):
        load_family(str(folder))
    write(lambda tensors: tensors.update({"token2wav.weight": torch.zeros(2)}))
    load_family(str(folder))  # parts that the model class does not hold are carried along by exports


def test_a_tied_head_may_be_absent(tmp_path):
    config = transformers.Qwen2Config(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=20, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    assert not any("lm_head" in name for name in load_file(tmp_path / "model.safetensors"))
    model = load_whole(transformers.Qwen2ForCausalLM, str(tmp_path))
    assert model.lm_head.weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_named(checkpoint, value):
    """finding 25: NaN in a base answered "!!!!" with exit code 0."""
    folder, write = checkpoint

    def spoil(tensors):
        tensors[_head(tensors)] = tensors[_head(tensors)].clone()
        tensors[_head(tensors)][-1, -1] = value

    write(spoil)
    with pytest.raises(WeightsError, match=r"NaN or infinite numbers in 1 \(.*lm_head\.weight \(float32\)\)"):
        load_family(str(folder))


def test_weights_too_large_for_float16(checkpoint):
    """1e5 is a number in float32 and bfloat16, and infinite in float16; 3e38 twice has an infinite sum only."""
    folder, write = checkpoint
    write(lambda tensors: tensors.update({_head(tensors): torch.full_like(tensors[_head(tensors)], 3e38)}))
    load_family(str(folder), dtype="bfloat16")
    with pytest.raises(WeightsError, match="float16 ends at 65,504"):
        load_family(str(folder), dtype="float16")


@pytest.mark.parametrize("content", ["cut", b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", None])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_an_incomplete_download(checkpoint, name, content):
    folder, _ = checkpoint
    path = folder / name
    if name == "pytorch_model.bin":
        torch.save(load_file(folder / "model.safetensors"), path)
        (folder / "model.safetensors").unlink()
        load_family(str(folder))
    if content is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-100] if content == "cut" else content)
    with pytest.raises((WeightsError, ModelError), match=r"Is the download complete|is every file of it whole"):
        load_family(str(folder))


def test_shards_and_their_index(tmp_path):
    """finding 25: an index that is no mapping, or names a shard that is not there."""
    family = cases.family()
    family.model.save_pretrained(tmp_path, max_shard_size="30KB")
    family.processor.save_pretrained(tmp_path)
    load_family(str(tmp_path))
    index = tmp_path / "model.safetensors.index.json"
    text, shard = index.read_text(), sorted(tmp_path.glob("model-*"))[1]
    for content in ("[]", text[:-40]):
        index.write_text(content)
        with pytest.raises((WeightsError, ModelError), match=r"complete|whole"):
            load_family(str(tmp_path))
    index.write_text(text)
    shard.rename(tmp_path / "elsewhere")
    with pytest.raises(WeightsError, match=rf"{shard.name}.*Is the download complete"):
        load_family(str(tmp_path))


@pytest.mark.parametrize("name", ["bf16", "int8", "float8_e4m3fn", "nn"])
def test_a_dtype_that_there_is_not(checkpoint, name):
    folder, _ = checkpoint
    with pytest.raises(ModelError, match=f"dtype '{name}'; there are float32, bfloat16"):
        load_family(str(folder), dtype=name)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": name}))
    with pytest.raises(ModelError, match=f"config.json says dtype '{name}'"):
        load_family(str(folder), dtype="float32")


def test_an_adapter_with_nan_is_refused(tmp_path):
    """finding 25: base or adapter."""
    trainable = make_trainable(cases.family(), AdapterConfig(lora_r=2))
    trainable.peft_model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "lora_A" in name)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises((WeightsError, ValueError), match="NaN"):
        make_trainable(cases.family(), AdapterConfig(adapter=str(tmp_path)))


def test_prompts_beyond_the_positions_of_the_model():
    """finding 25: row, length and limit; "dry run: fine" before."""
    made = cases.policy()
    text = made.family.model.config.get_text_config()
    rows = [Example("short", (cases.clip(0, 0.5),), "What do you hear?", ("bell", "dog"), "bell"),
            Example("long", (cases.clip(1, 0.5),), "word " * 400, ("bell", "dog"), "bell"),
            Example("loud", (cases.clip(2, 30.0),), "What do you hear?", ("bell", "dog"), "bell")]  # fmt: skip

    def prompt(row):
        return build_prompt(row, made.family, made.clips, PromptConfig())

    lengths = {row.id: len(prompt(row).input_ids) for row in rows}
    for limit in (60, 150, 300, 10_000):
        text.max_position_embeddings = limit
        problems = length_problems(rows, made.family, made.clips, prompt, 8)
        over = [name for name, length in lengths.items() if length + 8 > limit]
        assert [problem.split(":")[0] for problem in problems] == [f"row {name}" for name in over]
        for name, problem in zip(over, problems, strict=True):
            assert f"{lengths[name]} positions of the prompt and up to 8 of the completion" in problem
            assert f"the model takes {limit} (max_position_embeddings)" in problem
    assert len({tuple(lengths[n] + 8 > limit for n in lengths) for limit in (60, 150, 300)}) > 1


@pytest.mark.parametrize("option", ["instruction", "system_prompt"])
def test_a_long_instruction_counts(option):
    """finding 25: rows whose question is short were cleared without a look at what stands around it."""
    made = cases.policy()
    made.family.model.config.get_text_config().max_position_embeddings = 3000
    options = PromptConfig(**{option: "word " * 1000})
    rows = [Example(name, (cases.clip(0, 0.5),), "What?", ("bell", "dog"), "bell") for name in "ab"]
    problems = length_problems(
        rows, made.family, made.clips, lambda r: build_prompt(r, made.family, made.clips, options), 8
    )
    assert [problem.split(":")[0] for problem in problems] == ["row a", "row b"]


def test_stretched_rotary_positions_count():
    config = cases.family().model.config
    text = config.get_text_config()
    text.max_position_embeddings = 100
    assert position_limit(config) == 100
    text.rope_parameters = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100}
    assert position_limit(config) == 400
    text.rope_parameters = {"rope_type": "longrope", "factor": None, "original_max_position_embeddings": 50}
    assert position_limit(config) == 50, "beyond them all its angles change, of rows beside it too"
