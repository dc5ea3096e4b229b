"""Constants of ImageNet's test sets: their classes, and AlexNet's errors on ImageNet-C."""

import re
from collections.abc import Callable, Sequence

from dgpt_jax.data import class_names
from dgpt_jax.data.ingest import labels
from dgpt_jax.errors import UserError, counted

CLASSES = 1000


def _indices(text: str) -> tuple[int, ...]:
    """ "3 5-7" as (3, 5, 6, 7)."""
    indices = []
    for item in text.split():
        first, _, last = item.partition("-")
        indices += range(int(first), int(last or first) + 1)
    return tuple(indices)


# hendrycks/natural-adv-examples eval.py; they sum to 102178, as timm's imagenet_a_indices.txt does.
IMAGENET_A = _indices("""
    6 11 13 15 17 22 23 27 30 37 39 42 47 50 57 70 71 76 79 89 90 94 96 97 99 105 107 108 110 113
    124 125 130 132 143 144 150 151 207 234 235 254 277 283 287 291 295 298 301 306-311 313-315 317
    319 323 324 326 327 330 334-336 347 361 363 372 378 386 397 400-402 404 407 411 416 417 420 425
    428 430 437 438 445 456 457 461 462 470 472 483 486 488 492 496 514 516 528 530 539 542 543 549
    552 557 561 562 569 572 573 575 579 589 606 607 609 614 626 627 640-643 658 668 677 682 684 687
    701 704 719 736 746 749 752 758 763 765 768 773 774 776 779 780 786 792 797 802-804 813 815 820
    823 831 833 835 839 845 847 850 859 862 870 879 880 888 890 897 900 907 913 924 932-934 937 943
    945 947 951 954 956 957 959 971 972 980 981 984 986-988
""")
# hendrycks/imagenet-r eval.py; they sum to 86135, as timm's imagenet_r_indices.txt does.
IMAGENET_R = _indices("""
    1 2 4 6 8 9 11 13 22 23 26 29 31 39 47 63 71 76 79 84 90 94 96 97 99 100 105 107 113 122 125
    130 132 144 145 147 148 150 151 155 160-163 171 172 178 187 195 199 203 207 208 219 231 232 234
    235 242 245 247 250 251 254 259 260 263 265 267 269 276 277 281 288 289 291-293 296 299 301
    308-311 314 315 319 323 327 330 334 335 337 338 340 341 344 347 353 355 361 362 365-368 372 388
    390 393 397 401 407 413 414 425 428 430 435 437 441 447 448 457 462 463 469-472 476 483 487 515
    546 555 558 570 579 583 587 593 594 596 609 613 617 621 629 637 657 658 701 717 724 763 768 774
    776 779 780 787 805 812 815 820 824 833 847 852 866 875 883 889 895 907 928 931-934 936 937 943
    945 947-949 951 953 954 957 963 965 967 980 981 983 988
""")
# ImageNet-C's corruptions: AlexNet's error, mean over the five severities (google-research/augmix
# imagenet.py); their mean is .788993.
ALEXNET = {
    "gaussian_noise": 0.886428, "shot_noise": 0.894468, "impulse_noise": 0.922640,
    "defocus_blur": 0.819880, "glass_blur": 0.826268, "motion_blur": 0.785948,
    "zoom_blur": 0.798360, "snow": 0.866816, "frost": 0.826572, "fog": 0.819324,
    "brightness": 0.564592, "contrast": 0.853204, "elastic_transform": 0.646056,
    "pixelate": 0.717840, "jpeg_compression": 0.606500,
}  # fmt: skip
SEVERITIES = (1, 2, 3, 4, 5)


def check_order(names: Sequence[str], what: object, say: Callable[[str], None]):
    """Raises UserError if a head's classes are not ImageNet's in their order; prints a note if the
    names are neither wnids nor numbers, so that the order cannot be checked."""
    wnids = labels.imagenet("labels.txt")
    if not names or all(re.fullmatch(r"n\d{8}|\d+", name) for name in names):
        if (i := class_names.first_difference(names, wnids)) is not None:
            raise UserError(
                f"{what}: class {i} is {names[i]!r}, ImageNet's is {wnids[i]!r}: predictions would "
                f"be scored against the wrong classes"
            )
    else:
        say(f"{what}: class 0 is {names[0]!r}: assuming ImageNet's class order, unchecked")


def class_indices(names: Sequence[str], what: object) -> list[int]:
    """Index among the 1000 classes of each name: a wnid, by its rank among all, or a number ("10"
    is class 10, as in ImageNet-V2). Raises UserError on other names."""
    if all(re.fullmatch(r"\d{1,3}", name) for name in names):
        return [int(name) for name in names]
    rank = {wnid: i for i, wnid in enumerate(labels.imagenet("labels.txt"))}
    if unknown := [name for name in names if name not in rank]:
        raise UserError(
            f"{what} has {counted(len(unknown), 'class name')} beside ImageNet's wnids and numbers "
            f"below 1000, first {unknown[0]!r}"
        )
    return [rank[name] for name in names]
