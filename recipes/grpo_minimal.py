"""The whole loop from public pieces: GRPO on the built-in questions with the shipped 1.5 M parameter Covo-Audio.

    rows -> prompts -> groups of rollouts -> reward table -> advantages -> loss -> weights
    data    prompt     engines               rewards         algo          algo    train

    python recipes/grpo_minimal.py                        about a CPU minute: R_total rises from 2.3 to 3.3
    python recipes/grpo_minimal.py --data questions.json --audio-dir clips --model builtin:tiny

To read, and to start something of your own from. What recipes/grpo_mmau.py hangs on the same lines: checks before the
start, held-out evaluation, resume, several ranks, micro-batches, dynamic sampling, fault handling, a verified export.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from covo_rl.algo.advantage import advantages
from covo_rl.algo.loss import policy_loss
from covo_rl.algo.normalizer import Normalizer
from covo_rl.audio import ClipStore
from covo_rl.config import AdapterConfig, LossConfig, PromptConfig, RewardConfig, RolloutConfig
from covo_rl.data import load_examples
from covo_rl.engines.own import OwnEngine
from covo_rl.models import load_family
from covo_rl.models.builtin import resolve_model
from covo_rl.policy import Policy
from covo_rl.policy.trainable import make_trainable
from covo_rl.prompt import build_prompt
from covo_rl.rewards import score
from covo_rl.synth import builtin_questions
from covo_rl.train.sampler import PromptSampler

PROMPTS, GENERATIONS, COMPLETION = 16, 8, 48  # P, G, C
WARMUP = 3


def grpo(examples, name="builtin:tiny", *, steps=40, learning_rate=1e-3, seed=1):
    """Train a LoRA adapter; returns the PEFT model, and the mean R_total of every step."""
    prompt_config = PromptConfig(instruction="", choice_style="inline")  # the wording of the shipped checkpoint
    rollout = RolloutConfig(num_generations=GENERATIONS, max_completion_length=COMPLETION)
    loss_config, rewards = LossConfig(loss_type="grpo"), RewardConfig("accuracy,format,consistency,thinking")

    torch.manual_seed(seed)  # LoRA's first matrix; rollouts have generators of their own
    family = load_family(resolve_model(name), dtype="float32")
    trainable = make_trainable(family, AdapterConfig(lora_r=16, lora_alpha=32))
    clips = ClipStore()
    model = trainable.peft_model
    assert model is not None  # it is None without LoRA
    policy = Policy(family, model, clips=clips)
    parameters = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / (WARMUP + 1)))
    sampler, engine, history = PromptSampler(examples, seed), OwnEngine(policy), []

    for step in range(steps):
        prompts = [build_prompt(row, family, clips, prompt_config) for row in sampler.take(PROMPTS)]
        groups = engine.collect(engine.submit(prompts, rollout, seed=seed + step, generations=GENERATIONS))
        table = score(groups, rewards, trainer_state={"step": step})  # rewards_PGR, their sum rewards_PG
        step_advantages = advantages(table, loss_config)  # advantages_PG, and which groups have any variance

        groups_left = [p for p, has_variance in enumerate(step_advantages.informative_P) if has_variance]
        if groups_left:
            trained = [groups[p] for p in groups_left]
            lengths = [len(rollout.completion_ids) for group in groups for rollout in group.rollouts]
            policy.train()
            features = policy.features([group.prompt for group in trained])  # every clip is encoded once
            scored = policy("logps", trained, features)  # every prompt is computed once for its G rollouts
            loss, _ = policy_loss(
                scored.logps_NC,
                None,  # one update per batch: the policy that sampled is the policy that trains
                torch.from_numpy(step_advantages.advantages_PG[groups_left].ravel()).float(),
                scored.mask_NC,
                loss_config,
                normalizer=Normalizer.from_lengths(lengths),
                max_completion_length=COMPLETION,
            )
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        warmup.step()
        engine.sync(step + 1)  # from now on, sample with this policy

        history.append(float(np.nanmean(table.rewards_PG)))
        means = {name: round(float(np.nanmean(table.rewards_PGR[..., r])), 2) for r, name in enumerate(table.names)}
        print(f"step {step + 1:>3}/{steps}  R_total {history[-1]:.2f}  {means}  trained {len(groups_left)}/{PROMPTS}")
    return model, history


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="questions in any known field names; default: the built-in set")
    parser.add_argument("--audio-dir", help="folder that audio paths start from")
    parser.add_argument("--model", default="builtin:tiny", help="folder or hub name of the model")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", help="where to write the LoRA adapter")
    options = parser.parse_args()
    if options.output and Path(options.output).exists():
        parser.error(f"--output {options.output} exists: choose another folder")
    path = options.data or builtin_questions()["train"]
    examples = load_examples(str(path), options.audio_dir or str(Path(path).parent))
    model, history = grpo(examples, options.model, steps=options.steps, seed=options.seed)
    first, last = sum(history[:5]) / 5, sum(history[-5:]) / 5
    print(f"R_total, means of five steps: {first:.2f} -> {last:.2f}")
    if options.output:
        model.save_pretrained(options.output)


if __name__ == "__main__":
    main()
