"""What the monitor looks for: one table of rules, each with its numbers and the sentence that it says.

`steps` is how many steps a rule looks at, the other numbers are the limits of its sign (records/signs.py). The sentence
says what is seen, what it usually means, and what to do, with the figures of the sign and the options of the run.
docs/troubleshooting.md has a section of each rule's name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf

from covo_rl.records import signs
from covo_rl.records.signs import Sign

PAGE = "docs/troubleshooting.md"


@dataclass(frozen=True)
class MonitorRule:
    """`columns` are those of metrics.jsonl that the sign reads; `*` stands for each reward component or phase."""

    name: str
    columns: str
    numbers: Mapping[str, float]
    sign: Sign
    text: str


RULES: Sequence[MonitorRule] = (
    MonitorRule(
        "format_never_rises",
        "reward_format",
        {"steps": 10, "low": 0.3, "rise": 0.1},
        signs.format_flat,
        "R_format is {now:.2f} after {count} steps and began at {start:.2f}: the policy {reading}. A model that does "
        "not write them cannot be rewarded for them: start from one that was taught by `covo-rl sft`, say the form in "
        "--instruction, or raise --max_completion_length ({max_completion_length}) where replies are cut. If it wrote "
        "them before, go back to an earlier checkpoint and lower --learning_rate ({learning_rate}).",
    ),
    MonitorRule(
        "all_groups_right",
        "zero_variance_groups reward_accuracy",
        {"steps": 5, "share": 0.9},
        signs.groups_alike(0.9, inf),
        "{alike:.0%} of the groups have no variance and accuracy is {accuracy:.0%}: these questions are solved and "
        "teach nothing more. Stop here, train on harder rows, or skip solved ones with --dynamic_sampling (now "
        "{dynamic_sampling}).",
    ),
    MonitorRule(
        "all_groups_wrong",
        "zero_variance_groups reward_accuracy",
        {"steps": 5, "share": 0.9},
        signs.groups_alike(-inf, 0.1),
        "{alike:.0%} of the groups have no variance and accuracy is {accuracy:.0%}: hardly a rollout is right, so "
        "there is nothing to prefer. Check key and choices with `covo-rl data check`, train on easier rows first, "
        "raise --num_generations ({num_generations}) or --temperature ({temperature}), or begin with `covo-rl sft`.",
    ),
    MonitorRule(
        "deviation_nil",
        "zero_variance_groups reward_accuracy",
        {"steps": 5, "share": 0.9},
        signs.groups_alike(0.1, 0.9),
        "In {alike:.0%} of the groups all rollouts have the same R_total, so almost nothing is learnt from. Either "
        "rollouts of a prompt are the same text (raise --temperature, now {temperature}, and --num_generations, now "
        "{num_generations}), or the rewards do not tell them apart (`covo-rl rewards check`).",
    ),
    MonitorRule(
        "kl_runs_away",
        "kl",
        {"steps": 5, "limit": 1.0, "floor": 0.3, "times": 5.0},
        signs.runs_away("kl"),
        "KL to the starting model is {now:.2f} a token and was {start:.3f} at first: the policy leaves what it knew, "
        "and its language may go. Read some rollouts; lower --learning_rate ({learning_rate}) or raise --beta "
        "({beta}).",
    ),
    MonitorRule(
        "engine_mismatch",
        "sampling/sampling_logp_difference/mean",
        {"steps": 5, "limit": 0.1, "floor": 0.03, "times": 5.0},
        signs.runs_away("sampling/sampling_logp_difference/mean"),
        "Log-probs of sampling and of scoring differ by {now:.3f} nats a token ({start:.3f} at first): the policy that "
        "learns is no longer the one that speaks. Set --sampler_correction (now {sampler_correction}), use --dtype "
        "float32 where it fits, and check that an outside engine loads the adapter of each step.",
    ),
    MonitorRule(
        "rollouts_off_policy",
        "engine/kl_k3 engine/ess",
        {"steps": 5, "kl": 0.01, "ess": 0.8},
        signs.off_policy,
        "The rollouts are not those of the policy that learns: the engine's KL from it is {now:.3f} nats a token, and "
        "they are worth {share:.0%} of their number. One step ahead (--rollout_ahead {rollout_ahead}): set it to 0, or "
        "lower --learning_rate ({learning_rate}). On vLLM (--use_vllm {use_vllm}): see that servers were started as "
        "covo-rl rollout-server says, and that --top_p ({top_p}), --top_k ({top_k}) and --min_p ({min_p}) leave "
        "nothing out. Otherwise the engine has other weights than the policy: look at engine/probe_abs.",
    ),
    MonitorRule(
        "entropy_collapses",
        "sampling/entropy reward_accuracy",
        {"steps": 5, "low": 0.03, "share": 0.25, "solved": 0.8},
        signs.entropy_low,
        "The entropy of sampling fell to {now:.3f} nats a token from {start:.3f}, and {known}: the policy says one "
        "thing and tries nothing else. Go back to an earlier checkpoint with --resume, then lower --learning_rate "
        "({learning_rate}), raise --epsilon_high (now {epsilon_high}; 0.28 is usual) or --entropy_coef (now "
        "{entropy_coef}).",
    ),
    MonitorRule(
        "completions_hit_the_limit",
        "truncated",
        {"steps": 5, "limit": 0.3},
        signs.above("truncated"),
        "{now:.0%} of the completions are cut at --max_completion_length {max_completion_length}, most of them before "
        "an answer. Raise it, teach brevity with --overlong_buffer (now {overlong_buffer}), or leave cut ones out of "
        "the loss with --mask_truncated_completions.",
    ),
    MonitorRule(
        "thinking_shrinks",
        "thinking_words",
        {"steps": 5, "share": 0.25, "least": 4.0},
        signs.shrinks("thinking_words"),
        "Reasoning shrank to {now:.1f} words from {start:.1f}: the policy found that the answer pays without it. Add "
        "consistency and thinking to --rewards, or weigh them more; look whether a reward favours short replies.",
    ),
    MonitorRule(
        "component_farmed",
        "reward_accuracy reward_*",
        {"steps": 10, "rise": 0.1, "fall": 0.1, "errors": 3.0},
        signs.farmed,
        "R_{name} rose from {before:.2f} to {after:.2f} while accuracy fell from {then:.0%} to {now:.0%}: the policy "
        "earns {name} without being right. Read rollouts with a high {name} and a wrong answer; lower its weight in "
        "--rewards, or let it count only for right answers with --reward_gate accuracy.",
    ),
    MonitorRule(
        "stops_listening",
        "listen_real listen_silent listen_rows",
        {"steps": 3, "gap": 0.05, "share": 0.3, "least": 0.1, "rows": 16},
        signs.stops_listening,
        "With silence instead of the clip accuracy is {silent:.0%}, with the clip {real:.0%} (the clip brought "
        "{start:.0%} at first): most answers come from the text, not from the sound. Look for questions whose answer "
        "the text or the key's place gives away (`covo-rl data check`), and compare with the model before training "
        "(`covo-rl eval --listen`).",
    ),
    MonitorRule(
        "component_missing",
        "none_* none_total",
        {"steps": 5, "limit": 0.5, "lost": 0.25, "never": 0.99},
        signs.missing,
        "{now:.0%} of the rollouts have no score of {component}: {effect}. Try it on a file with `covo-rl rewards "
        "score`; give it the columns that it needs, or take it out of --rewards.",
    ),
    MonitorRule(
        "judge_fails",
        "failed_*",
        {"steps": 5, "limit": 0.05},
        signs.ungraded("failed"),
        "{now:.0%} of the scores of {component} failed (an error or no answer in time), and those rollouts are not "
        "learnt from. If it asks a judge (--judge, now {judge}), see that this answers; raise --reward_timeout "
        "({reward_timeout}), or try the reward with `covo-rl rewards try`.",
    ),
    MonitorRule(
        "majority_collapses",
        "majority_unanimous reward_accuracy majority_right",
        {"steps": 5, "share": 0.9, "fall": 0.05, "errors": 3.0},
        signs.unanimous,
        "In {agreement:.0%} of the groups all rollouts give one answer, and {known}: `majority` pays agreement, and "
        "the policy may agree with itself whatever it hears. Stop at the best checkpoint (--keep_best with "
        "--eval_every), use more rows, or add a reward that looks at the sound.",
    ),
    MonitorRule(
        "updates_skipped",
        "skipped_steps",
        {"steps": 20},
        signs.updates_skipped,
        "{new:.0f} optimiser update(s) were not finite and were skipped; RUN/debug says in which rows. One is no harm; "
        "several mean that --learning_rate ({learning_rate}) is too high or --max_grad_norm ({max_grad_norm}) is off.",
    ),
    MonitorRule(
        "wrong_outranks_right",
        "rewards/wrong_outranks_right",
        {"steps": 10, "limit": 0.2},
        signs.above("rewards/wrong_outranks_right"),
        "In {now:.0%} of the pairs of a right and a wrong answer to one prompt the wrong one has the higher R_total: "
        "the other components outvote accuracy. Raise its weight (--rewards accuracy=2,...) or set --reward_gate "
        "accuracy (now {reward_gate}).",
    ),
    MonitorRule(
        "gradient_always_clipped",
        "grad_norm",
        {"steps": 20},
        signs.always_clipped,
        "The gradient norm was above --max_grad_norm {max_grad_norm} in each of the last {steps} steps (at least "
        "{least:.2g}): noisy updates count as much as clear ones. AdamW makes this mostly harmless; where the "
        "curves are rough raise --max_grad_norm, or put more prompts into a step (--prompts_per_step "
        "{prompts_per_step}), which makes the gradient less noisy.",
    ),
    MonitorRule(
        "learning_rate_zero",
        "learning_rate",
        {"steps": 3},
        signs.rate_zero,
        "The learning rate is 0 in the last {steps} steps: nothing changes any more. The schedule (--lr_scheduler_type "
        "{lr_scheduler_type}) has ended; a longer run needs a larger --max_steps ({max_steps}) from its start.",
    ),
    MonitorRule(
        "gradient_nil",
        "grad_norm zero_variance_groups",
        {"steps": 5},
        signs.gradient_nil,
        "The gradient is exactly 0 although only {alike:.0%} of the groups are without variance: the adapter does not "
        "change. Look in the table of trainable parameters at the start whether --lora_target_modules or --train_parts "
        "name what the loss depends on.",
    ),
    MonitorRule(
        "one_phase_dominates",
        "seconds/step seconds/*",
        {"steps": 10, "least": 2.0, "reward": 0.4, "prompt": 0.3, "encode": 0.5, "sample": 0.9, "records": 0.1},
        signs.phase_waits,
        "{share:.0%} of a step's {step:.1f} s go into the phase {component} ({seconds:.1f} s){part}. For reward: a "
        "faster or nearer --judge, a smaller --reward_timeout; for prompt: audio on a local disk, as wav or flac; for "
        "encode: a larger --feature_memory_mb; for sample: a smaller --max_completion_length or larger --decode_rows; "
        "for records: a slow disk, tracker or callback.",
    ),
)
