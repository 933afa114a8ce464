"""Triton kernels of the hot operations, and the functions that launch them on plain tensors.

Below `models` and `losses`, which register them with autograd and choose when to use them. Each
computes what a slow, obvious reference in tests/kernels computes.
"""
