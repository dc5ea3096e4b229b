"""Properties checked by fuzz_test.py: functions of (draw, directory)."""
