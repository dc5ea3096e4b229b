"""Properties that fuzz_test.py tries: functions of (draw, directory)."""
