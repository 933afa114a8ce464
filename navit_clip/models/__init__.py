"""Packed sequences in, vectors or tokens out; no module here reads files."""
