"""`covo-rl watch`: a run as it goes on."""
