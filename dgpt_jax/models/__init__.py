"""Flax modules of encoder, D-iGPT, teachers, classifier and probes, with losses and FLOPs.

Inputs are images and targets; outputs are features, logits and losses. Start with vit.py (the
encoder) and digpt.py (the decoders). Flax is imported in this package only.
"""
