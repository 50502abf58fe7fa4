"""GRPO with chain-of-thought on audio multiple-choice questions in the MMAU schema.

    rows -> prompt + audio -> G rollouts -> R_accuracy + R_format + R_consistency + R_thinking
         -> advantages in the group -> clipped loss -> LoRA adapter -> table before / after

Smoke test, about three CPU minutes (a tiny Covo-Audio and rendered clips, both shipped):

    accelerate launch recipes/grpo_mmau.py

Your own rows (MMAU, AVQA, AudioMCQ or our field names), the same way:

    accelerate launch recipes/grpo_mmau.py --data questions.json --audio-dir clips/ --output runs/mine

Covo-Audio 7B on four GPUs:

    accelerate launch --config_file recipes/accelerate/ddp.yaml recipes/grpo_mmau.py \
        --config recipes/configs/covo_audio_7b_lora.yaml

Caveat: most of what the smoke test gains is recovery of what the tiny model could do before a deliberately
weak cold start; `--config recipes/configs/tiny_zero.yaml` is the variant in which GRPO alone teaches the
step from evidence to answer.
"""

import sys
from pathlib import Path

from covo_rl.config import ConfigError, parse_options
from covo_rl.train.shutdown import exit_after

DEFAULT = Path(__file__).parent / "configs" / "tiny.yaml"


def main(words: list[str]) -> None:
    """Parse, run, and end with one clear message where the user has to act."""
    if "--config" not in words:
        words = ["--config", str(DEFAULT), *words]
    try:
        options = parse_options(words)
    except ConfigError as error:
        sys.exit(f"grpo_mmau: {error}")
    from covo_rl.run.session import USER_ERRORS, Session  # after parsing, so that --help and typos answer at once

    try:
        run(Session(options))
    except USER_ERRORS as error:
        sys.exit(f"grpo_mmau: {error}")


def run(session) -> None:
    """Check, evaluate, train, export, evaluate again."""
    session.show()
    if session.options.train.dry_run:
        session.show_budget()
        return
    before = session.before() if session.held_out else None
    trainer = session.train()
    exported = session.export()
    evaluations = None
    if before is not None:
        evaluations = {"before": before, "after": session.evaluate()} | {
            audio: session.evaluate(audio=audio, modes=["sampled"]) for audio in ("silent", "swapped")
        }
    session.finish(exported, trainer.step, evaluations)


if __name__ == "__main__":
    exit_after(lambda: main(sys.argv[1:]))
