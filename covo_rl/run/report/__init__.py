"""The report of a run, `covo-rl report RUN`: `payload.py` gathers what it holds, `page.py` writes the HTML file."""
