"""Video and image files: what is in them, and their pictures at times. Without PyTorch."""
