"""One signature: our rewards run unchanged in TRL's GRPOTrainer, TRL's own run here."""

import importlib.util

import pytest

from covo_rl.config import RewardConfig
from covo_rl.rewards import load_reward, score
from covo_rl.rewards.columns import example_from_row, group_from_completions
from covo_rl.types import Group, Rollout

NAMES = ("accuracy", "format", "consistency", "thinking")
ROW = {"question": "What rings?", "choices": ["bell", "knock"], "answer": "bell", "facts": {"source": "bell"},
       "fact_lexicon": {"source": ["bell", "knock"]}}  # fmt: skip
GOOD = "<think>I hear it ring with a long decay, so it is a bell.</think><answer>bell</answer>"


def with_ids(group: Group, *lengths: int) -> Group:
    rollouts = [
        Rollout(tuple(range(n)), (0.0,) * n, r.text, "stop") for n, r in zip(lengths, group.rollouts, strict=True)
    ]
    return Group(group.prompt, tuple(rollouts))


def test_trl_rewards_run_here():
    texts = ["<think>\nIt rings.\n</think>\nbell", "bell"]
    group = with_ids(group_from_completions(example_from_row(ROW), texts), 8, 100)
    overlong = "trl.rewards:get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20)"
    repeat = "trl.rewards:get_repetition_penalty_reward(ngram_size=2, max_penalty=-1.0)"
    table = score([group], RewardConfig(), rewards=["trl.rewards:think_format_reward", overlong, repeat])
    assert table.missing == {}
    assert table.rewards_PGR[0, :, :2].tolist() == [[1.0, 0.0], [0.0, -1.0]]


def test_ours_take_conversational_completions():
    completions = [[{"role": "assistant", "content": GOOD}], [{"role": "assistant", "content": "bell"}]]
    columns = {name: [value] * 2 for name, value in ROW.items()}
    for name in NAMES:
        assert load_reward(name)(prompts=["p"] * 2, completions=completions, **columns) == [1.0, 0.0]


@pytest.mark.parametrize("conversational", [False, True])
def test_ours_run_in_grpo_trainer(tmp_path, monkeypatch, conversational):
    if importlib.util.find_spec("trl") is None:
        pytest.fail("trl is a dependency")
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer

    words = [
        "<pad>",
        "<eos>",
        *GOOD.replace(">", "> ").replace("<", " <").replace(",", " ,").replace(".", " .").split(),
    ]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    shape = LlamaConfig(vocab_size=len(vocabulary), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                        num_attention_heads=1, max_position_embeddings=64)  # fmt: skip
    prompt = [{"role": "user", "content": "bell"}] if conversational else "bell"
    options = GRPOConfig(str(tmp_path), max_steps=1, per_device_train_batch_size=2, num_generations=2, report_to=[],
                         max_completion_length=6, use_cpu=True, save_strategy="no", disable_tqdm=True)  # fmt: skip
    trainer = GRPOTrainer(LlamaForCausalLM(shape), [load_reward(name) for name in NAMES], options,
                          Dataset.from_list([{"prompt": prompt, **ROW}] * 2), processing_class=tokenizer)  # fmt: skip
    trainer.train()
    logged = next(log for log in trainer.state.log_history if "rewards/accuracy/mean" in log)
    assert [logged[f"rewards/{name}/mean"] for name in NAMES] == [0.0] * 4
    rewards = trainer._calculate_rewards(
        [{"prompt": prompt, **ROW}] * 2, [prompt] * 2,
        [[{"role": "assistant", "content": GOOD}]] * 2 if conversational else [GOOD] * 2, [[1], [1]],
    )  # fmt: skip
    assert rewards.tolist() == [[1.0] * 4] * 2
