"""Metrics of a run: averaged on devices, logged as JSONL, sent to trackers, shown as progress.

metrics.py writes the log; metrics_log.py reads it, also if truncated; run_diff.py compares two;
trackers.py has TensorBoard and W&B; progress.py is the progress bar. run_summary.py tells a run's
status and key numbers from its work directory; html.py makes pages of one file.
"""
