"""Import of image collections (folders, lists, tars) as TFDS image datasets.

discovery.py finds images, splits and classes; user_images.py decodes any format; importer.py writes
the shards, and resumes an interrupted import.
"""
