"""Generators of committed files: `make generate` runs them all, and tests compare what they write."""
