"""Ratios against a peer or a physical limit, measured in one run: `python -m benchmarks [group]`."""
