"""Channel means and standard deviations of images in [0, 1], RGB."""

# ImageNet training images: defaults of students and of weights that specify none.
from dgpt_jax.config.data import IMAGENET_MEAN, IMAGENET_STD

__all__ = ["CLIP_MEAN", "CLIP_STD", "IMAGENET_MEAN", "IMAGENET_STD"]

# OpenAI's CLIP, and most models of OpenCLIP.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
