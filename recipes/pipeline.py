"""From random weights to a model that reasons: perception SFT -> chain-of-thought SFT -> GRPO, a command a stage.

    random weights -> name facts, answer -> reason, then answer -> be paid for both -> pipeline.json, a table
                      covo-rl sft           covo-rl sft            covo-rl train

All of it, half a CPU hour:         python recipes/pipeline.py        (make pipeline)
One stage, as it is printed:        covo-rl sft --config recipes/configs/pipeline_cot.yaml
To choose options by:               python recipes/pipeline.py --split validation --output runs/tried
Your own stages and questions:      python recipes/pipeline.py --configs FOLDER --eval-data rows.json

After each stage the same held-out questions are asked, greedily, sampled, and with other sound or none. The same
command goes on where an earlier one stopped. docs/supervised.md says what is left to which stage, and what it reached.
"""

import argparse
from pathlib import Path

from covo_rl.records.console import console
from covo_rl.resolve import find
from covo_rl.run.chain import Chain, links, table
from covo_rl.synth import builtin_questions
from covo_rl.train.shutdown import exit_after
from covo_rl.types import user_errors

STAGES = ("perception", "cot", "grpo")


def main(arguments: list[str] | None = None) -> Path:
    """Every stage that is not finished yet; returns the path of the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/pipeline"), help="folder of the whole chain")
    parser.add_argument(
        "--configs", type=Path, help="folder of pipeline_perception.yaml, pipeline_cot.yaml, pipeline_grpo.yaml"
    )
    parser.add_argument("--seed", type=int, help="of every stage; default: what their configurations say")
    parser.add_argument(
        "--split", choices=("test", "validation"), default="test", help="built-in questions to measure on"
    )
    parser.add_argument("--eval-data", type=Path, help="your own questions to measure on")
    parser.add_argument("--eval-audio-dir", type=Path, help="folder of their clips; default: that of --eval-data")
    parser.add_argument("--limit", type=int, help="measure on the first N of them")
    parser.add_argument("--overwrite", action="store_true", help="repeat every stage, finished or not")
    options = parser.parse_args(arguments)
    with user_errors("pipeline", code=1):
        configs = options.configs or find("recipes", "configs")
        data = options.eval_data or builtin_questions()[options.split]
        stages = links(options.output, {name: configs / f"pipeline_{name}.yaml" for name in STAGES}, options.seed)
        chain = Chain(
            options.output, stages, data, options.eval_audio_dir or data.parent, options.limit,
            stages[-1].settings["config"].get("max_completion_length", 1024), options.overwrite,
        )  # fmt: skip
        record = chain.run()
        console.print(table(record))
        console.print(f"{record['cpu_seconds'] / 60:.0f} CPU minutes, {record['wall_seconds'] / 60:.0f} by the clock")
        console.print(f"figures: {chain.path}", soft_wrap=True)
    return chain.path


if __name__ == "__main__":
    exit_after(main)
