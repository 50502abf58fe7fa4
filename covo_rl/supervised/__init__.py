"""Before reinforcement learning: teach a policy to hear and to write `<think>..</think><answer>..</answer>`.

    rows -> (tagging: encoder learns the facts) -> (sft: perception) -> (sft: a weak teacher) -> checkpoint

The stages, their teachers and the seed come from a YAML; recipes/sft_cot.py is the command. A model starts from a
path (any family) or, with `tiny:`, from scratch.
"""

from covo_rl.supervised.config import ColdStartConfig, Stage, load_config

__all__ = ["ColdStartConfig", "Stage", "load_config"]
