"""Import of image collections (folders, archives, parquet, WebDataset) as TFDS image datasets.

discovery.py finds images, splits and classes. types.py has the protocol of a source, of which there
is one module per form: image_index, zip_index, webdataset_index, parquet_index, tfrecord_index.
user_images.py decodes any format; importer.py writes the shards, and resumes an interrupted import.
"""
