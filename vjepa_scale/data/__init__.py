"""From raw videos to batches: shards and manifests, the order of the data, decoding, augmentation, loading.

The path of a clip, one file each: ingest/ (shards, written once) -> manifest (what is where) -> order (which record)
-> clips (which window) -> decode (pictures) -> augment (crop) -> batch -> loader (rank).
"""
