"""A recipe becomes jobs: plan, preflight, submission, and the entry of each task."""
