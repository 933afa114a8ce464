"""Command lines around the data; not needed to train."""
