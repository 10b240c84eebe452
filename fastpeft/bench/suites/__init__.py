"""Test suites of other libraries, over accelerated models: `python -m fastpeft.bench.suites --help`."""
