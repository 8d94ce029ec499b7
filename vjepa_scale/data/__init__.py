"""From shards to batches: manifests, the order of the data, augmentation, loading.

The path of a clip, one file each: shards/ (written once) -> manifest (what is where) -> order (which record)
-> clips (which window) -> video/decode (pictures) -> augment (crop) -> batch -> loader (rank).
"""
