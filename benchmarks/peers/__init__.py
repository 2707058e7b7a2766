"""The engine beside what people write instead: `python -m benchmarks peers`.

Each peer is a short module that is run in a process of its own, on the same files, members and threads;
`contest.py` runs them, `gate.py` checks their rows.
"""
