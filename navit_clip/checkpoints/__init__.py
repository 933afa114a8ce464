"""Checkpoints of a run: written by the trainer, read by it and by the evaluation."""
