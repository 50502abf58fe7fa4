"""The loop and what keeps it right: learner, ranks, checkpoints, guard."""
