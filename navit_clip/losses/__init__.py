"""Losses over packed outputs."""
