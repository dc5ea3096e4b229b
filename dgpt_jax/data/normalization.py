"""Channel means and standard deviations of images in [0, 1], RGB."""

# ImageNet training images: input of students, and of exported models.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# OpenAI's CLIP, and most models of OpenCLIP.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
