"""Evaluation of frozen or fine-tuned weights, with tables and figures of the results.

features.py extracts features into feature_bank.py's banks, which knn.py, probe.py and fewshot.py
read. test_sets.py and robustness.py cover ImageNet's test sets; results.py maintains results.json.
"""
