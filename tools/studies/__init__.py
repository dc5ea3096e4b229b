"""Ablations and the quickstart on small real images; run with `python -m tools.studies.NAME`."""
