"""Configs of a training run: devices, processes, checkpoints, evaluations."""

from dataclasses import dataclass

from dgpt_jax.config.ranges import COUNT, NATURAL, Range
from dgpt_jax.config.schema import field

DEVICES = Range(least=1, also=(-1,))


@dataclass(frozen=True)
class MeshConfig:
    """Section `mesh`."""

    data: int = field(-1, "devices for data parallelism; -1: all that remain", DEVICES)
    fsdp: int = field(1, "devices that shard parameters and the batch", DEVICES)
    tensor: int = field(1, "devices that shard attention heads and MLP widths", DEVICES)


@dataclass(frozen=True)
class HostsConfig:
    """Section `hosts`."""

    coordinator: str = field(
        "", "HOST:PORT of process 0; empty: a single process, or as JAX detects on a cluster"
    )
    num_processes: int | None = field(None, "number of processes that must take part", COUNT)
    process_id: int | None = field(
        None, "index of this process, from 0; together with coordinator", NATURAL
    )
    timeout: int = field(120, "seconds to wait for all processes to connect", COUNT)


@dataclass(frozen=True)
class CheckpointConfig:
    """Section `checkpoint`."""

    every: str = field("5 epochs", "interval between checkpoints; a duration")
    keep: int = field(2, "number of latest checkpoints to keep", COUNT)
    keep_every: str = field("", "keep checkpoints at multiples of this duration; empty: none")
    best: str = field(
        "",
        "evaluation metric (heldout/visible, knn/cls, val/top1, …) whose best checkpoint is kept "
        "too; empty: none",
    )


@dataclass(frozen=True)
class EvalsConfig:
    """Section `evals`."""

    every: str = field(
        "25 epochs", "interval between evaluations, with one more at the end; a duration"
    )
    heldout: str = field(
        "",
        "held-out data of the kind of data.path: logs their loss, with task=classify accuracy",
        path=True,
    )
    heldout_split: str = field("test", "split of heldout if it is an image dataset")
    knn: str = field("", "labeled TFDS image dataset for kNN accuracy; empty: none", path=True)
    knn_train: str = field("train", "split of the neighbors; slices allowed")
    knn_test: str = field("test", "split that is classified; slices allowed")
    knn_resize: int = field(
        256, "shorter side in pixels before the center crop of image_size", COUNT
    )
    label_free: int = field(
        0,
        "held-out images whose features' effective rank and view agreement are logged, without "
        "labels; 0: none",
        NATURAL,
    )
    batch_size: int = field(256, "examples per step", COUNT)
    threads: int | None = field(
        None, "reader threads per process; default: number of cores + 4, at most 32", COUNT
    )
    max_examples: int | None = field(
        None, "use only the first examples of each dataset, this many; default: all", COUNT
    )
    figures: int = field(
        8,
        "examples to draw in TensorBoard: crops at the start of the command, with task=pretrain "
        "predictions on heldout at every evaluation; 0: none",
        NATURAL,
    )
