"""Checkpoints: save, verify, find, load, retain; and consolidation into files that other tools load."""
