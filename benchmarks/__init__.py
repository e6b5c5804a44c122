"""How long a request takes, and what memory, through `bridge` and through its peers: see README.md beside this file.

`python -m benchmarks` measures in memory, `python -m benchmarks end_to_end` through real servers.
"""
