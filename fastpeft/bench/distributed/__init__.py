"""One training on one process and on several, and what its losses differ by: `python -m fastpeft.bench.distributed`."""
