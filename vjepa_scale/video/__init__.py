"""Video and image files: inspects them, and decodes their pictures at given times. Without PyTorch."""
