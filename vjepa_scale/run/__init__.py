"""The records of a run: events, metrics, failures. Does not import PyTorch: launchers and monitors read them."""
