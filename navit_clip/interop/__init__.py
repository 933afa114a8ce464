"""Models in and out of files: this project's own format, and released checkpoints."""
