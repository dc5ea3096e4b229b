"""Attention and LayerNorm kernels for TPUs and GPUs, their selection, and their check against XLA.

models/attention.py and models/transformer.py call them.
"""
