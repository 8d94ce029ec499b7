"""From files of every kind of brokenness to shards that can be trusted, written once: tools/make_shards.py."""
