"""Makes checked shards from arbitrary, possibly damaged files: tools/make_shards.py."""
