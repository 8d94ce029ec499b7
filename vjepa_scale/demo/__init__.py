"""The demo: renders synthetic worlds, and measures a finished chain of stages."""
