"""The kernels of attention in short segments against a dense, masked attention."""

from __future__ import annotations

import random

import pytest
import short_attention_cases as cases
import torch
from interpreter import run_kernels

pytest.importorskip("triton", reason="Triton is not installed")


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("width", [32, 64, 80, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_values_and_gradients(dtype, width, causal, norm):
    # On a device each class of each variant is compiled, in float32 for up to a minute.
    lengths = (1, 5, 16, 19) if dtype == torch.float32 else (1, 14, 17, 40)
    run_kernels(cases.check, lengths, dtype=dtype, width=width, causal=causal, norm=norm)


def test_shortest_of_each_class_causal():
    run_kernels(cases.check, (1, 17, 33, 65, 129), causal=True)


def test_longest_of_each_class():
    run_kernels(cases.check, (16, 32, 64, 128, 256))


def test_wide_heads_in_each_class():
    run_kernels(cases.check, (16, 32, 64, 129), width=128)


@pytest.mark.parametrize("seed", range(2))
def test_random_lengths(seed):
    lengths = sorted(random.Random(seed).choices(range(130), k=5))  # empty ones included
    run_kernels(cases.check, lengths, causal=seed == 1, seed=seed)


def test_half_precision():
    run_kernels(cases.check, (3, 16, 40, 70), dtype=torch.float16)


def test_rows_of_no_class_stay_as_they_are():
    run_kernels(cases.check_rows_of_no_class_stay)


def test_neighbours_do_not_change_a_single_bit():
    run_kernels(cases.check_neighbours_change_no_bit)


def test_two_runs_are_the_same_bit_by_bit():
    run_kernels(cases.check_two_runs_are_the_same_bits)


def test_a_stream_without_tokens():
    run_kernels(cases.check_nothing_at_all)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="takes 13 GB of a CUDA device")
def test_a_stream_of_more_elements_than_32_bits_count():
    run_kernels(cases.check_a_stream_beyond_32_bits)
