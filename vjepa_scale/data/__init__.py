"""From shards to batches: manifests, the order of the data, augmentation, loading.

The path of a clip, one file each: shards/ (written once) -> manifest (where each byte is) -> order (which record)
-> clips (which window) -> video/decode (pictures) -> augment (crop) -> batch -> loader (rank).
"""
