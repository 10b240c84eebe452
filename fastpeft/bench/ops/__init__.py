"""Benchmarks of single ops beside their peers: `case.py` is the contract, each other module the cases of one op."""
