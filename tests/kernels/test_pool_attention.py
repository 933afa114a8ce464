"""The kernels of attention pooling against softmax and sum of each segment."""

from __future__ import annotations

import random

import pool_attention_cases as cases
import pytest
import torch
from interpreter import run_kernels

pytest.importorskip("triton", reason="Triton is not installed")


@pytest.mark.parametrize("width", [32, 64, 80, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_values_and_gradients(dtype, width):
    run_kernels(cases.check, (1, 0, 63, 64, 65, 7), dtype=dtype, width=width)


@pytest.mark.parametrize("seed", range(3))
def test_random_lengths(seed):
    lengths = random.Random(seed).choices(range(1, 300), k=4)
    run_kernels(cases.check, lengths, seed=seed, dtype=torch.float32)


def test_no_segments():
    run_kernels(cases.check_no_segments)
