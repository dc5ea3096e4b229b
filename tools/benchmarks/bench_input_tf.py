"""The work of bench_input.py in tf.data, run by an interpreter that has TensorFlow.

    PYTHON tools/benchmarks/bench_input_tf.py DIR store|live

DIR holds numbered .jpg files and optional .tokens, which are packed into a TFRecord first. Prints
lines of the stage, images per second, and images per second of CPU time.
"""

import argparse
import os
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import tensorflow as tf

SIZE = 224


def pack(directory: Path) -> str:
    """Packs all images and their tokens into one TFRecord. Returns its path."""
    path = str(directory / "examples.tfrecord")
    with tf.io.TFRecordWriter(path) as writer:
        for jpeg in sorted(directory.glob("*.jpg")):
            tokens = jpeg.with_suffix(".tokens")
            values = [jpeg.read_bytes(), tokens.read_bytes() if tokens.exists() else b""]
            feature = {
                name: tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))
                for name, value in zip(("image", "tokens"), values, strict=True)
            }
            example = tf.train.Example(features=tf.train.Features(feature=feature))
            writer.write(example.SerializeToString())
    return path


def parse(record: tf.Tensor) -> dict[str, tf.Tensor]:
    spec = tf.io.FixedLenFeature((), tf.string)
    return tf.io.parse_single_example(record, {"image": spec, "tokens": spec})


def read_store(record: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    example = parse(record)
    image = tf.io.decode_jpeg(example["image"], channels=3)
    return tf.ensure_shape(image, (SIZE, SIZE, 3)), tf.io.decode_raw(example["tokens"], tf.int8)


def draw_view(record: tf.Tensor) -> tuple[tf.Tensor]:
    """Random resized crop and flip; decodes only the crop, resizes by antialiased bicubic."""
    jpeg = parse(record)["image"]
    shape = tf.io.extract_jpeg_shape(jpeg)
    begin, size, _ = tf.image.sample_distorted_bounding_box(
        shape, tf.zeros((0, 0, 4)), aspect_ratio_range=(3 / 4, 4 / 3), area_range=(0.2, 1.0),
        use_image_if_no_bounding_boxes=True,
    )  # fmt: skip
    box = tf.stack([begin[0], begin[1], size[0], size[1]])
    crop = tf.image.decode_and_crop_jpeg(jpeg, box, channels=3)
    image = tf.image.resize(crop, (SIZE, SIZE), "bicubic", antialias=True)
    image = tf.image.random_flip_left_right(image)
    return (tf.cast(tf.clip_by_value(image, 0, 255), tf.uint8),)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("kind", choices=("store", "live"))
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--batch_size", type=int, default=64)
    args = parser.parse_args()
    path = pack(args.directory)
    transform = read_store if args.kind == "store" else draw_view
    for threads in (1, 2, 8):
        options = tf.data.Options()
        options.threading.private_threadpool_size = threads
        data = tf.data.TFRecordDataset(path).repeat().shuffle(1024)
        data = (
            data.map(transform, num_parallel_calls=threads).batch(args.batch_size, True).prefetch(2)
        )
        stream = iter(data.with_options(options))
        next(stream)
        images, start, cpu_start = 0, time.perf_counter(), time.process_time()
        while time.perf_counter() - start < args.seconds:
            next(stream)
            images += args.batch_size
        rate = images / (time.perf_counter() - start)
        core = images / (time.process_time() - cpu_start)
        print(f"tf.data, {threads} threads {rate} {core}", flush=True)


if __name__ == "__main__":
    main()
