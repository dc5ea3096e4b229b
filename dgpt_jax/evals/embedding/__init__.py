"""Embedding: features of an encoder for every image of a source, in files or a feature store.

run.py plans shards, resumes and finishes. image_sources.py opens what users have; feature_batches
computes batches. feature_outputs.py has the protocol of an output: feature_arrays (npy,
safetensors) and feature_files (parquet, store). feature_store.py has the metadata and reads a
store; journal.py records complete shards.
"""
