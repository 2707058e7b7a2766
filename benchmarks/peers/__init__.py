"""Compare the engine with other tools: `python -m benchmarks peers`.

Each peer is a short module that runs in a separate process, on the same files, members and threads;
`contest.py` runs them, `gate.py` checks their rows.
"""
