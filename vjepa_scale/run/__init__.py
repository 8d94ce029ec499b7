"""What a run writes down: events, metrics, failures. Without PyTorch: launchers and monitors read it."""
