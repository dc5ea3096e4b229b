"""Ablations on small images; run with `python -m tools.studies.NAME`."""
