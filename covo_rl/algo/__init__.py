"""From rewards to a loss: advantages, objectives and what they are divided by. Pure functions."""
