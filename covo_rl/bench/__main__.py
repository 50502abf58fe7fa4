"""`python -m covo_rl.bench grpo ...`"""

from covo_rl.bench.cli import app

if __name__ == "__main__":  # the memory runs are processes that import this
    app()
