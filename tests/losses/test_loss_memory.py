"""What the loss of bfloat16 features allocates on CUDA, where kernels take the logits' place."""

import weakref

import pytest
import torch
from contrastive_reference import random_features
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from navit_clip.kernels import contrastive as kernels
from navit_clip.losses import _tiles as tiles
from navit_clip.losses.contrastive import softmax_contrastive_loss


class Memory(TorchDispatchMode):
    """The most bytes that tensors made under it held at one time, in excess of some others."""

    def __init__(self, *given):
        super().__init__()
        self.peak = 0
        self._held = {x.untyped_storage()._cdata: 0 for x in given}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._held:
                    self._held[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self._held.pop, storage._cdata)
        self.peak = max(self.peak, sum(self._held.values()))
        return result


@pytest.fixture
def without_device(monkeypatch):
    """The path of CUDA less what its kernels and products compute, which need no other memory."""
    monkeypatch.setattr(tiles, "has_kernels", lambda features: True)
    monkeypatch.setattr(tiles, "operand_dtype", lambda features: torch.bfloat16)
    monkeypatch.setattr(tiles, "accumulate", lambda total, a, b: None)
    monkeypatch.setattr(kernels, "softmax_statistics", lambda *args: None)
    monkeypatch.setattr(kernels, "softmax_weights", lambda *args: None)


def predicted(pairs, width, side):
    """Bytes of the backward pass on one GPU, as docs/scaling.md has them.

    The gradient of the images in bfloat16, that of the texts in float32, which becomes bfloat16 in
    its place, weights of one tile, sums of one strip in float32 and as much to reduce them, and
    two log-sum-exps per pair.
    """
    return 6 * pairs * width + 2 * side**2 + 8 * side * width + 8 * pairs


@pytest.mark.parametrize(("pairs", "width", "side"), [(16384, 256, 1024), (32768, 128, 2048)])
def test_extra_memory_on_one_gpu(pairs, width, side, without_device):
    image, text = random_features(pairs, width, seed=0, dtype=torch.bfloat16)
    scale = torch.tensor(10.0, requires_grad=True)
    image.requires_grad_()
    text.requires_grad_()
    with Memory(image, text, scale) as memory:
        loss = softmax_contrastive_loss(image, text, scale, chunk_size=side)
        gradients = torch.autograd.grad(loss, (image, text, scale))
    assert [x.dtype for x in gradients[:2]] == [torch.bfloat16] * 2
    assert memory.peak == pytest.approx(predicted(pairs, width, side), rel=0.02)


def test_a_quarter_of_a_million_pairs_take_less_than_a_gigabyte():
    features = torch.empty(262_144, 512, dtype=torch.bfloat16, device="meta")
    side = tiles.default_chunk_size(features, kernels=True)
    assert predicted(262_144, 512, side) < 1e9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (5, 2**20 + 1), (9, 2**20)])
def test_rounding_in_place(shape, dtype):
    total = torch.randn(shape)
    expected = total.to(dtype)
    rounded = tiles.rounded(total, dtype)
    assert torch.equal(rounded, expected)
    assert rounded.is_contiguous()
    assert rounded.data_ptr() == total.data_ptr()


@pytest.mark.parametrize("pairs", [1, 20, 64, 70])
@pytest.mark.parametrize("texts", [1, 64, 70, 700])
def test_tiles_of_few_images_are_wide_and_no_larger_than_square_ones(pairs, texts):
    image, text = (torch.zeros(n, 8, dtype=torch.bfloat16) for n in (pairs, texts))
    tiler = tiles.Tiler(image, torch.tensor(1.0), texts, 64, kernels=True)
    seen = torch.zeros(pairs, texts, dtype=torch.int64)
    matches = torch.zeros(pairs, texts, dtype=torch.int64)
    for rows in tiler.slices(pairs):
        for tile in tiler.strip(rows, text, is_own=True):
            seen[tile.rows, tile.columns] += 1
            if tile.has_matches:
                matches[tile.rows, tile.columns].diagonal()[:] += 1
            buffer = tiler.weights_buffer(tile)
            assert buffer.shape == (len(tile.image), len(tile.text))
            assert buffer.stride(0) % kernels.ALIGNMENT == 0
            held = buffer.untyped_storage().nbytes() // buffer.itemsize
            assert held <= 64 * (64 + kernels.ALIGNMENT)
    assert (seen == 1).all()
    assert torch.equal(matches, torch.eye(pairs, texts, dtype=torch.int64))
