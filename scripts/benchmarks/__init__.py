"""The suites of scripts/benchmark.py. Each returns its figures, every single one of them."""
