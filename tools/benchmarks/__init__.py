"""Benchmarks of training step, input and token builder: `python -m tools.benchmarks.NAME`."""
