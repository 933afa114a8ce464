"""Packed sequences in, vectors out; knows no files."""
