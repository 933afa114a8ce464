"""The kernels of attention pooling against softmax and sum of each segment."""

from __future__ import annotations

import random

import pool_attention_cases as cases
import pytest
import torch
from interpreter import run_kernels
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from navit_clip.models import pooling
from navit_clip.models.transformer import EncoderConfig
from navit_clip.packed.segments import Segments

pytest.importorskip("triton", reason="Triton is not installed")


@pytest.mark.parametrize("width", [32, 64, 80, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_values_and_gradients(dtype, width):
    run_kernels(cases.check, (1, 0, 63, 64, 65, 7), dtype=dtype, width=width)


@pytest.mark.parametrize("seed", range(2))
def test_random_lengths(seed):
    lengths = random.Random(seed).choices(range(1, 300), k=4)
    run_kernels(cases.check, lengths, seed=seed, dtype=torch.float32)


def test_no_segments():
    run_kernels(cases.check_no_segments)


def test_map_pooling_computes_the_same():
    run_kernels(cases.check_map_pooling)


def test_map_pooling_on_cuda_never_reads_from_the_device(monkeypatch):
    # Half precision alone takes the kernels, and tensors without content have no autocast.
    monkeypatch.setattr(pooling, "takes_kernels", lambda kv: kv.is_cuda)
    with FakeTensorMode(), torch.device("cuda"):
        segments = Segments.from_lengths([3, 3, 140], padding=4, device="cuda")
        module = pooling.MapPooling(EncoderConfig(width=128, heads=2))
        module.pack_attention()
        with FlopCounterMode(display=False) as counter:
            y_EC = module(torch.randn(150, 128), segments)
    assert y_EC.is_cuda
    assert counter.get_flop_counts()["Global"][torch.ops.navit_clip.attend_pool] == 4 * 146 * 128
