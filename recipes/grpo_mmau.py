"""GRPO with chain-of-thought on audio multiple-choice questions in the MMAU schema.

    rows -> prompt + audio -> G rollouts -> R_accuracy + R_format + R_consistency + R_thinking
         -> advantages in the group -> clipped loss -> LoRA adapter -> table before / after

Smoke test, about three CPU minutes (a tiny Covo-Audio and rendered clips, both shipped):

    accelerate launch recipes/grpo_mmau.py

Your own rows (MMAU, AVQA, AudioMCQ or our field names), the same way:

    accelerate launch recipes/grpo_mmau.py --data questions.json --audio-dir clips/ --output runs/mine

Your own model, with the settings of configs/own_model.yaml (a folder's prompt.yaml says its wording):

    accelerate launch recipes/grpo_mmau.py --model PATH --data questions.json --audio-dir clips/

Covo-Audio 7B on four GPUs:

    accelerate launch --config_file recipes/accelerate/ddp.yaml recipes/grpo_mmau.py \
        --config recipes/configs/covo_audio_7b_lora.yaml

Caveat: most of what the smoke test gains is recovery of what the tiny model could do before a deliberately
weak cold start; `--config recipes/configs/tiny_zero.yaml` is the variant in which GRPO alone teaches the
step from evidence to answer.
"""

import sys
from dataclasses import asdict
from pathlib import Path

from covo_rl.config import ConfigError, flag_value, parse_options, taught_prompt
from covo_rl.resolve import BUILTIN
from covo_rl.train.shutdown import exit_after

CONFIGS = Path(__file__).parent / "configs"


def main(words: list[str]) -> None:
    """Parse, run, and end with one clear message where the user has to act."""
    try:
        options = parse_options(with_defaults(words))
    except ConfigError as error:
        sys.exit(f"grpo_mmau: {error}")
    from covo_rl.run.session import USER_ERRORS, Session  # after parsing, so that --help and typos answer at once

    try:
        run(Session(options))
    except USER_ERRORS as error:
        sys.exit(f"grpo_mmau: {error}")


def with_defaults(words: list[str]) -> list[str]:
    """The words, with the demo's configuration for a shipped model and that of a real one for any other.

    A model folder that says in prompt.yaml which wording it was taught keeps it; flags win.
    """
    if flag_value(words, "config") is not None:
        return words
    model = flag_value(words, "model")
    demo = model is None or model.startswith(BUILTIN)
    config = "tiny_zero.yaml" if model == f"{BUILTIN}tiny_zero" else "tiny.yaml" if demo else "own_model.yaml"
    if model is None and flag_value(words, "data") is not None:
        print(
            "grpo_mmau: no --model, so this trains the demo's tiny model, which knows rendered sounds only", flush=True
        )
    return ["--config", str(CONFIGS / config), *taught_wording(model or ""), *words]


def taught_wording(model: str) -> list[str]:
    """The options of MODEL/prompt.yaml as flags; none where there is no such file."""
    path = Path(model) / "prompt.yaml"
    wording = asdict(taught_prompt(path)) if model and path.is_file() else {}
    return [word for name, value in wording.items() if value is not None for word in (f"--{name}", value)]


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
