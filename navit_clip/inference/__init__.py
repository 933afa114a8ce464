"""Embedding images and captions with a trained model."""
