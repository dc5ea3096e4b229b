"""Mesh, shardings, multi-process start-up and shutdown, preemption.

sharding.py builds the mesh and is the only file that names its axes; param_rules.py maps parameter
paths to shardings; multihost.py joins and ends the processes of a run.
"""
