"""`python -m covo_rl.bench grpo ...`"""

from covo_rl.bench.cli import app

app()
