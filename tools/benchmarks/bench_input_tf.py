"""tf.data doing the work of tools/bench_input.py, for an interpreter that has TensorFlow.

    PYTHON tools/bench_input_tf.py DIR store|live

DIR holds numbered .jpg files, and .tokens beside them, which are packed into a TFRecord first. Each
line that it prints is what was measured, images a second, and images a second of processor time.
"""

import argparse
import os
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import tensorflow as tf

SIZE = 224


def pack(directory: Path) -> str:
    """All pictures, and their tokens, in one TFRecord."""
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


def parsed(record):
    spec = tf.io.FixedLenFeature((), tf.string)
    return tf.io.parse_single_example(record, {"image": spec, "tokens": spec})


def stored(record):
    example = parsed(record)
    image = tf.io.decode_jpeg(example["image"], channels=3)
    return tf.ensure_shape(image, (SIZE, SIZE, 3)), tf.io.decode_raw(example["tokens"], tf.int8)


def live(record):
    """A random resized crop, decoded in its box alone, antialiased bicubic, mirrored."""
    jpeg = parsed(record)["image"]
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
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("directory", type=Path)
    made.add_argument("kind", choices=("store", "live"))
    made.add_argument("--seconds", type=float, default=3.0)
    made.add_argument("--batch_size", type=int, default=64)
    args = made.parse_args()
    path = pack(args.directory)
    work = stored if args.kind == "store" else live
    for threads in (1, 2, 8):
        options = tf.data.Options()
        options.threading.private_threadpool_size = threads
        data = tf.data.TFRecordDataset(path).repeat().shuffle(1024)
        data = data.map(work, num_parallel_calls=threads).batch(args.batch_size, True).prefetch(2)
        stream = iter(data.with_options(options))
        next(stream)
        done, began, used = 0, time.perf_counter(), time.process_time()
        while time.perf_counter() - began < args.seconds:
            next(stream)
            done += args.batch_size
        rate, core = done / (time.perf_counter() - began), done / (time.process_time() - used)
        print(f"tf.data, {threads} threads {rate} {core}", flush=True)


if __name__ == "__main__":
    main()
