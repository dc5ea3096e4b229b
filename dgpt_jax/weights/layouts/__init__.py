"""One weight layout per module: its table of array names and its settings.

registry.py lists the layouts of encoders, teacher_loading.py those of teachers.
"""
