"""What accuracy, consistency and thinking are made of: deterministic readers of answers and reasoning."""
