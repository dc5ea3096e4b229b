"""Training: tasks, the train step, the loop, checkpoints, and replay of bad steps.

train.py opens a task (tasks/) and a state, loop.py runs the steps. train_step.py, optimizer.py and
mixup.py run on the device.
"""
