"""Before a run: memory and cost of a step on absent TPUs, checks of this machine.

plan.py compiles a training step ahead of time, plan_evals.py an evaluation; hlo.py and hlo_costs.py
analyze the program; report.py formats a plan; fit_search.py looks for a config that fits; chips.py
has the peak rates of chips; doctor.py checks packages, devices, data and network;
training_choice.py and machine_probe.py choose a batch and its micro-batches for this machine.
"""
