"""Evaluation: official and strict scores, with and without the audio, and everything needed to repeat them.

evaluate(policy, examples, ...) -> Evaluation       in-process, as the trainer calls it
covo-rl eval --set mmau-test-mini ...               the same engine from the command line
"""

from covo_rl.evaluate.answer import Answerer, Evaluation, PolicyAnswerer, evaluate

__all__ = ["Answerer", "Evaluation", "PolicyAnswerer", "evaluate"]
