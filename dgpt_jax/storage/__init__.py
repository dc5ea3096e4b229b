"""Files on local disks and gs://: TFDS datasets, ArrayRecord shards, checkpoints, outputs.

Remote shards are downloaded to a bounded cache; remote outputs are written locally and uploaded.
Start with tfds_dataset.py (datasets) and array_record_shards.py (atomic, verified shards).
"""
