"""Stored bytes to batches: decoding, crops, augmentation, sampling, loading.

Reads a TFDS directory; the loader yields dicts of arrays that are a function of (seed, step). Start
with dataset.py (one example) and loader.py (batches); token_store.py defines the format of stored
teacher tokens.
"""
