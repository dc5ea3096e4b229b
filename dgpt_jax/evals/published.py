"""Numbers that others have published, in percent, for report.py to put beside ours.

Sources: "paper" is arXiv 2312.02147; "timm" its results/*.csv; else the method's own paper or its
repository's README. None: not published, or no number that could be checked.
"""

SIZES = ("S", "B", "L", "H")

# Fine-tuned top-1 on ImageNet-1K at 224 pixels: (method, images of pretraining), by size; source.
FINETUNED = (
    ("DeiT", "IN-1K, labels", (79.9, 81.2, None, None), "paper; S from memory"),
    ("MAE 1600", "IN-1K", (80.6, 83.6, 85.9, 86.9), "own README; S by TinyMIM"),
    ("BEiT 800", "IN-1K", (None, 83.2, 85.2, None), "paper"),
    ("iBOT", "IN-1K", (82.3, "83.8–84.0", 84.8, None), "own README"),
    ("TinyMIM", "IN-1K", (83.0, 85.0, None, None), "own README"),
    ("BEiTv2 300", "IN-1K + CLIP", (None, 85.0, 86.6, None), "own README"),
    ("BEiTv2 1600", "IN-1K + CLIP", (None, 85.5, 87.3, None), "own README"),
    ("MILAN 400", "IN-1K + CLIP", (None, 85.4, 86.8, None), "own abstract; L by paper"),
    ("MaskDistill 300", "IN-1K + CLIP", (None, "85.0–85.3", None, 88.3), "own abstract"),
    ("EVA", "IN-1K + CLIP", (None, 85.5, None, None), "paper"),
    ("EVA-01-L/14 at 196", "IN-21K + CLIP", (None, None, 88.6, None), "own README"),
    ("CLIP fine-tuned (OpenAI)", "WIT 400M", (None, 85.3, 87.9, None), "timm"),
    ("OpenCLIP-H fine-tuned: the teacher", "LAION-2B", (None, None, None, 87.6), "timm"),
    ("D-iGPT", "IN-1K + OpenCLIP-H", (None, 86.2, 87.8, None), "paper"),
    ("D-iGPT", "IN-21K + OpenCLIP-H", (None, None, 89.5, 90.0), "paper; resolution not stated"),
)

# Fine-tuned on ImageNet-1K; C is an error. The paper's table 2, whose C is in all likelihood the
# plain mean error: MAE's own mCE, normalised, is 51.7 (B) and 41.8 (L).
ROBUSTNESS_COLUMNS = ("IN", "V2", "ReaL", "A", "R", "C", "Sketch", "Hard")
ROBUSTNESS = (
    ("DeiT-B", (81.2, 70.6, 86.7, 27.9, 45.4, 36.8, 32.3, 23.8), "paper"),
    ("MAE-B", (83.6, 72.9, 88.1, 33.6, 50.0, 37.8, 36.4, 25.5), "paper"),
    ("BEiT-B", (83.2, 71.8, 87.9, 32.8, 49.6, 38.7, 35.1, 25.1), "paper"),
    ("iBOT-B", (84.0, 73.0, 88.2, 33.0, 51.2, 36.9, 38.7, 26.3), "paper"),
    ("TinyMIM-B", (85.0, 75.3, 88.7, 43.0, 54.6, 32.7, 41.0, 29.2), "paper"),
    ("BEiTv2-B", (85.5, 76.2, 89.2, 54.0, 61.7, 30.9, 45.9, 30.2), "paper"),
    ("D-iGPT-B", (86.2, 76.4, 89.6, 56.3, 64.3, 29.9, 48.5, 31.1), "paper"),
    ("MAE-L", (85.9, 76.5, 89.4, 56.3, 61.0, 31.1, 45.6, 32.4), "paper"),
    ("BEiT-L", (85.2, 75.1, 88.8, 55.4, 59.8, 32.0, 43.8, 31.2), "paper"),
    ("iBOT-L", (84.8, 74.4, 87.9, 53.9, 57.1, 34.1, 42.6, 30.8), "paper"),
    ("BEiTv2-L", (87.3, 78.3, 90.0, 68.6, 70.3, 25.4, 53.7, 36.5), "paper"),
    ("D-iGPT-L", (87.8, 79.6, 90.4, 73.0, 80.5, 24.7, 60.3, 37.6), "paper"),
    ("BEiTv2-B", (85.6, 76.5, 89.3, 53.6, 61.5, None, 46.0, None), "timm"),
    ("BEiTv2-L", (87.4, 78.6, 90.1, 67.6, 70.4, None, 54.2, None), "timm"),
    ("CLIP-B/16 fine-tuned", (85.28, 76.1, 89.2, 47.5, 65.9, None, 51.0, None), "timm"),
    ("CLIP-L/14 fine-tuned", (87.86, 79.7, 90.3, 71.8, 82.4, None, 62.6, None), "timm"),
    ("OpenCLIP-H/14 fine-tuned", (87.6, 79.5, 90.2, 65.7, 83.3, None, 67.4, None), "timm"),
)

# Frozen features on ImageNet-1K: kNN (k = 20, T = 0.07), linear, attentive probe.
FROZEN_COLUMNS = ("kNN", "linear", "attentive")
FROZEN = (
    ("MAE-B", (None, 68.0, 74.2), "own README; attentive: CAE's probe"),
    ("MAE-L", (None, 75.8, 78.8), "own README; attentive: CAE's probe"),
    ("MAE-H", (49.4, 76.6, 80.9), "DINOv2's and AIM's tables"),
    ("SAIM-B 800", (None, 62.5, None), "own README"),
    ("CAE-B 1600", (None, 70.3, 77.2), "own README"),
    ("MaskDistill-B", (75.6, 76.3, None), "third-party reproduction"),
    ("iBOT-S", (74.5, 77.0, None), "own README"),
    ("iBOT-B", (77.1, 79.5, None), "own README"),
    ("iBOT-L", (None, None, 83.5), "AIM's table"),
    ("DINOv2-S, LVD-142M", (79.0, 81.1, None), "own paper"),
    ("DINOv2-B, LVD-142M", (82.1, 84.5, None), "own paper"),
    ("DINOv2-L, LVD-142M", (83.5, 86.3, None), "own paper"),
    ("DINOv2-L/16, IN-1K", (81.6, 82.9, None), "own README"),
    ("DINOv3-L/16, IN-1K", (82.0, 83.5, None), "own README"),
    ("AIM-0.6B", (None, None, 78.5), "own paper"),
    ("AIMv2-L at 224", (None, None, 86.6), "own paper"),
    ("OpenCLIP-H: the teacher", (81.7, 84.4, None), "DINOv2's table"),
    ("D-iGPT-H, IN-21K", (None, 85.9, None), "paper"),
)
