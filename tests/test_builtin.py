"""Models by the name `builtin:NAME`: shipped ones, and tiny random ones that are made on first use."""

import threading

import pytest
import torch

from covo_rl import GRPO
from covo_rl.config import parse_options
from covo_rl.data.files import append_lines, fill_folder, json_line
from covo_rl.export import ExportError
from covo_rl.export.verify import NOOP
from covo_rl.models import builtin, load_family
from covo_rl.models.builtin import TINY_MODELS, builtin_names, is_random, resolve_model
from covo_rl.models.tiny import tiny_tokenizer
from covo_rl.records.folder import Run
from covo_rl.resolve import OutsideFolderError
from covo_rl.run.defaults import with_defaults
from covo_rl.run.python.keywords import read_keywords
from covo_rl.run.result import noop_explained
from covo_rl.train.ranks import Ranks


def test_a_name_is_a_shipped_folder_a_tiny_model_or_what_it_was():
    assert resolve_model("org/model") == "org/model"
    assert resolve_model("builtin:tiny").endswith("checkpoints/tiny")
    assert builtin_names()[:2] == ["tiny", "tiny_zero"] and len(builtin_names()) == 2 + len(TINY_MODELS)
    assert is_random("builtin:tiny_voxtral") and not any(map(is_random, ("builtin:tiny", "tiny_voxtral", None)))


def test_a_name_that_is_not_there_names_the_nearest_and_all():
    with pytest.raises(FileNotFoundError, match=r"did you mean 'tiny_voxtral'\? there are tiny, tiny_zero, tiny_"):
        resolve_model("builtin:tiny_voxtrl")
    with pytest.raises(OutsideFolderError, match="must be a name inside"):
        resolve_model("builtin:../tiny")


def test_a_tiny_model_is_made_once_in_the_cache_for_these_versions(tmp_path, monkeypatch):
    monkeypatch.setenv("COVO_RL_CACHE", str(tmp_path))
    folder = resolve_model("builtin:tiny_qwen2_audio")
    made = (tmp_path / "models").iterdir().__next__()
    assert folder == str(made / "tiny_qwen2_audio") and "transformers-5" in made.name
    weights = made / "tiny_qwen2_audio" / "model.safetensors"
    written = weights.stat().st_mtime_ns
    family = load_family(resolve_model("builtin:tiny_qwen2_audio"))
    assert weights.stat().st_mtime_ns == written and family.embed_tokens.weight.dtype == torch.float32
    monkeypatch.setattr(builtin, "version", lambda package: "9.9")
    other = resolve_model("builtin:tiny_qwen2_audio")
    assert "transformers-9.9" in other and other != folder
    assert (made.parent / other / "model.safetensors").read_bytes() == weights.read_bytes()  # a seed makes it


def test_a_second_rank_that_is_the_quickest_writes_all_of_it(tmp_path, monkeypatch):
    """transformers 5.23 saves on rank 0 alone: two ranks were left with a folder without weights."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    monkeypatch.setenv("COVO_RL_CACHE", str(tmp_path))
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        load_family(resolve_model("builtin:tiny_glmasr"))
    finally:
        dist.destroy_process_group()


def test_processes_that_start_at_once_fill_one_folder(tmp_path):
    both, folder = threading.Barrier(2), tmp_path / "models" / "tiny"

    def fill(name):
        def write(partial):
            (partial / "first").write_text(name)
            both.wait(timeout=10)  # the other one has begun too, and sees no folder
            (partial / "last").write_text(name)

        assert fill_folder(folder, write) == folder

    threads = [threading.Thread(target=fill, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (folder / "first").read_text() == (folder / "last").read_text()
    assert list(folder.parent.iterdir()) == [folder] and folder.stat().st_mode & 0o777 == 0o755


def test_a_folder_that_could_not_be_filled_is_not_there(tmp_path):
    def write(partial):
        (partial / "half").write_text("x")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fill_folder(tmp_path / "tiny", write)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "taken").write_text("a file")  # where a folder should be
    with pytest.raises(NotADirectoryError):
        fill_folder(tmp_path / "taken", lambda partial: None)


def test_a_tokenizer_has_the_audio_tokens_of_a_family_and_a_template():
    tokenizer = tiny_tokenizer(audio_tokens=("<a>", "[AUDIO]"))
    chat = [{"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": "What?"}]}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\n<a>[AUDIO]What?<|im_end|>\n<|im_start|>assistant\n"
    assert len(tokenizer("<a>[AUDIO]")["input_ids"]) == 2 and len(tokenizer) <= 512
    own = tiny_tokenizer(audio_tokens=("<a>",), template="{{ messages[0]['role'] }}")
    assert own.apply_chat_template(chat, tokenize=False) == "user"


def test_the_demo_of_a_random_model_has_a_configuration_and_a_folder_of_its_own():
    options = parse_options(with_defaults(["--model", "builtin:tiny_gemma4", "--max-steps", "3"]))
    assert options.train.output == "runs/tiny_gemma4" and options.train.max_steps == 3 and options.data.limit == 64
    assert options.model.model == "builtin:tiny_gemma4" and not options.reward.check_rewards
    named = read_keywords(None, {"model": "builtin:tiny_gemma4", "max_steps": 3})[0]
    assert named == options
    assert parse_options(with_defaults(["--model", "builtin:tiny_gemma4", "--output", "x"])).train.output == "x"
    assert parse_options(with_defaults(["--model", "builtin:tiny"])).train.output == "runs/tiny"


@pytest.mark.parametrize("gradient", [0.0, 0.5])
def test_a_run_in_which_nothing_could_be_learned_says_so(tmp_path, gradient):
    run, options = Run(tmp_path), parse_options(["--num_generations", "4"])
    step = {"zero_variance_groups": 1.0, "truncated": 0.75, "reward_accuracy": 0.0, "reward_total": 0.5}
    rows = [{"step": 1, "grad_norm": 0.0, **step}, {"step": 2, "grad_norm": gradient, **step}]
    append_lines(run.metrics_path, map(json_line, rows))
    with pytest.raises(ExportError) as error, noop_explained(run, options, Ranks(0, 1)):
        raise ExportError(f"{NOOP}\nmore")
    said = str(error.value)
    if gradient:  # something was learned, and is not in the export
        assert said == f"{NOOP}\nmore"
    else:
        assert "nothing was learned: in all 2 steps the 4 rollouts of every question got the same reward" in said
        assert "reward_accuracy 0, reward_total 0.5" in said and "75% of the completions were cut" in said
        assert "no-op" not in said and str(tmp_path / "rollouts") in said
    with pytest.raises(ExportError, match=r"^the disk is full$"), noop_explained(run, options, Ranks(0, 1)):
        raise ExportError("the disk is full")


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY_MODELS)
def test_the_demo_of_every_family_learns_from_its_noise_and_exports(name, tmp_path):
    run = GRPO(f"builtin:tiny_{name}", max_steps=3, output=tmp_path / "run", evaluate=False).train()
    steps = Run(tmp_path / "run").metrics()
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert all(step["grad_norm"] > 0 and step["zero_variance_groups"] < 1 for step in steps)
    assert (run.adapter / "adapter_model.safetensors").is_file()  # compared with the policy in a fresh process
