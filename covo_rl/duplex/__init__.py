"""Full duplex: a model that listens while it speaks."""
