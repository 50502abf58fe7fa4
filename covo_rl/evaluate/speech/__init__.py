"""Benchmarks of speech: what they ask, who judges and hears, how they count."""
