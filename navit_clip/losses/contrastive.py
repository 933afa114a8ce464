"""Contrastive losses over all pairs of all ranks, computed tile by tile.

The last step of a forward pass: the towers' pooled features of this rank's pairs go in, a scalar
comes out that is the same on every rank. Text blocks travel from rank to rank (`_ring`, or with
many ranks `_gather`); a rank multiplies its own images with each block in tiles of at most
`chunk_size` × `chunk_size` logits (`_tiles`). The forward pass keeps, besides the features, two
numbers per pair (softmax: the log-sum-exp of the pair's row and column); the backward pass
recomputes the tiles. This is the chunked loss of NaViT (arXiv 2307.06304) in an exact form.

Gradients: a feature's gradient is that of the global loss. `logit_scale` and `logit_bias` get
this rank's share, so that their full gradient is the SUM over the ranks. Both facts together mean
that parameters' gradients must be summed over ranks; under DDP, which averages them, multiply the
loss by the world size before `backward`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from navit_clip.kernels import contrastive as kernels
from navit_clip.losses import _tiles as tiles
from navit_clip.losses._gather import Exchange, Gather, choose_exchange
from navit_clip.losses._members import DTYPES, Members
from navit_clip.losses._ring import Ring


def softmax_contrastive_loss(
    image_features_ED: Tensor,
    text_features_ED: Tensor,
    logit_scale: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    chunk_size: int | None = None,
    counts: Sequence[int] | None = None,
    exchange: Exchange = "auto",
) -> Tensor:
    """Symmetric InfoNCE loss over the pairs of all ranks (CLIP, arXiv 2103.00020).

    With logits s_ij = logit_scale · image_i · text_j over all N pairs, the loss is
    1/(2N) · Σ_i (logsumexp_j s_ij + logsumexp_j s_ji - 2 s_ii).

    A collective call: every rank of the group makes it, and every rank runs the backward pass or
    none does. A rank without pairs passes features of shape [0, D].

    Args:
        image_features_ED: Image features of this rank's pairs, [E, D]; E may differ between ranks
            and be 0. float16, bfloat16, float32 or float64, the same on all ranks. Sums are in
            float32 at least, and so are products, but for bfloat16 on CUDA, and float32 there under
            autocast to bfloat16, to which it is rounded: the tensor cores multiply it, with the
            backward pass's weights rounded to it, and sum up in float32.
        text_features_ED: Text features of the same pairs in the same order, [E, D].
        logit_scale: One element, multiplies the similarities (already exponentiated).
        group: Ranks whose pairs make up the batch; None is the default group, or this process
            alone if `torch.distributed` is not initialised.
        chunk_size: Side of the largest tile of logits that exists at any time; None takes 4096 on
            CUDA, 8192 for bfloat16, and on the CPU 1024 to 4096, more for more pairs.
        counts: Pairs of each rank of the group, where the caller knows them. The ranks then need
            not ask each other, and features of one width and dtype are the caller's promise. One
            count without a group: the loss is over this process's own pairs, no collective call.
        exchange: ``ring`` passes texts from rank to rank, at any number of pairs in the memory of
            two ranks' features. ``gather`` collects some of all ranks' texts at once, in rounds:
            fewer and larger steps. ``auto`` gathers with more than 16 ranks and on average fewer
            than 4,096 pairs on each. The same on all ranks.

    Returns:
        Scalar, the same on every rank; float64 for float64 features, else float32. For the
        gradients' scaling see the module docstring.

    Raises:
        ValueError: Shapes, dtypes, devices or counts that do not fit, chunk_size < 1, no pair on
            any rank, or a caller outside `group`.
    """
    scalars = {"logit_scale": logit_scale}
    features = image_features_ED, text_features_ED
    return _apply(_SoftmaxLoss, *features, scalars, chunk_size, group, counts, exchange)


def sigmoid_contrastive_loss(
    image_features_ED: Tensor,
    text_features_ED: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    chunk_size: int | None = None,
    counts: Sequence[int] | None = None,
    exchange: Exchange = "auto",
) -> Tensor:
    """Pairwise sigmoid loss over the pairs of all ranks (SigLIP, arXiv 2303.15343).

    With logits l_ij = logit_scale · image_i · text_j + logit_bias over all N pairs, the loss is
    1/N · Σ_ij softplus(-z_ij · l_ij), where z_ij is +1 for i = j and -1 otherwise. `logit_bias` has
    one element; all else is as for `softmax_contrastive_loss`.
    """
    scalars = {"logit_scale": logit_scale, "logit_bias": logit_bias}
    features = image_features_ED, text_features_ED
    return _apply(_SigmoidLoss, *features, scalars, chunk_size, group, counts, exchange)


def _apply(
    function: type[torch.autograd.Function],
    image_ED: Tensor,
    text_ED: Tensor,
    scalars: dict[str, Tensor],
    chunk_size: int | None,
    group: dist.ProcessGroup | None,
    counts: Sequence[int] | None,
    exchange: Exchange,
) -> Tensor:
    """The loss, once all that it takes is checked and the features have one dtype."""
    if image_ED.ndim != 2 or image_ED.shape != text_ED.shape:
        raise ValueError(
            "image_features_ED and text_features_ED must both be [pairs, width], got "
            f"{list(image_ED.shape)} and {list(text_ED.shape)}"
        )
    if image_ED.device != text_ED.device:
        raise ValueError(
            "image_features_ED and text_features_ED must be on one device, got "
            f"{image_ED.device} and {text_ED.device}"
        )
    if image_ED.dtype not in DTYPES or text_ED.dtype not in DTYPES:
        raise ValueError(
            "image_features_ED and text_features_ED must be floating point of 16, 32 or 64 "
            f"bits, got {image_ED.dtype} and {text_ED.dtype}"
        )
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    for name, value in scalars.items():
        if value.numel() != 1:
            raise ValueError(f"{name} must have one element, got shape {list(value.shape)}")
    dtype = tiles.autocast_dtype(
        image_ED.device, torch.promote_types(image_ED.dtype, text_ED.dtype)
    )
    features = image_ED.to(dtype).contiguous(), text_ED.to(dtype).contiguous()
    if chunk_size is None:
        kernels = function is _SoftmaxLoss and tiles.has_kernels(features[0])
        chunk_size = tiles.default_chunk_size(features[0], kernels=kernels)
    members = Members.join(features[1].detach(), group, counts)
    if members.total == 0:
        raise ValueError("a contrastive loss needs at least one pair, got none on any rank")
    device, logits = image_ED.device, tiles.logit_dtype(features[0])
    zero_d = (value.reshape(()).to(device, logits) for value in scalars.values())
    with _full_precision(image_ED):
        loss: Tensor = function.apply(
            *features, *zero_d, choose_exchange(exchange, members), chunk_size
        )
    return loss


def _full_precision(tensor: Tensor) -> torch.autocast:
    """Autocast would turn the tiles' float32 products into half precision."""
    return torch.autocast(tensor.device.type, enabled=False)


def _feature_gradients(
    tiler: tiles.Tiler,
    exchange: Ring | Gather,
    blocks: tuple[Tensor, ...],
    weigh: Callable[..., Tensor],
    factor: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of image and text features and of the scale, from those of each tile's logits.

    Args:
        tiler: Of this rank's images.
        exchange: Brings texts of all ranks.
        blocks: This rank's texts, and vectors that `weigh` takes, one number per text.
        weigh: (tile, vectors of the visited block, padded) to ∂(N·loss)/∂logits, perhaps padded.
        factor: What the gradients are multiplied by.
    """
    image_ED, scale = tiler.image_ED, tiler.scale
    # Sums over the texts of several visits are kept for all images; over those of one, for a strip.
    once = len(exchange.members.counts) == 1
    image_gradient_ED = torch.zeros_like(image_ED, dtype=None if once else scale.dtype)
    scale_gradient = factor.new_zeros(())

    def finish(rows: slice, sum_RD: Tensor) -> None:
        """Turns Σ_j w_ij text_j into the gradient of these images."""
        # ∂loss/∂scale = Σ_ij w_ij image_i·text_j, here without the logits and for any scale.
        scale_gradient.add_((image_ED[rows] * sum_RD).sum())
        sum_RD *= factor * scale
        if sum_RD.dtype != image_gradient_ED.dtype:
            image_gradient_ED[rows] = sum_RD

    def visit(is_own: bool, visited: tuple[Tensor, ...]) -> Tensor:
        text_MD, *vectors = visited
        vectors = [tiler.padded(vector) for vector in vectors]
        text_gradient_MD = torch.zeros_like(text_MD, dtype=scale.dtype)
        for rows in tiler.slices(len(image_ED)):
            sum_RD = image_gradient_ED[rows]
            if sum_RD.dtype != scale.dtype:
                sum_RD = torch.zeros_like(sum_RD, dtype=scale.dtype)
            for tile in tiler.strip(rows, text_MD, is_own):
                weights = weigh(tile, *vectors)[: len(tile.image), : len(tile.text)]
                tiles.accumulate(sum_RD, weights, tile.text)
                tiles.accumulate(text_gradient_MD[tile.columns], weights.T, tile.image)
            if once:
                finish(rows, sum_RD)
        return text_gradient_MD

    with _full_precision(image_ED):
        text_gradient_ED = exchange.circulate(blocks, visit, merge="add")
    if not once:
        for rows in tiler.slices(len(image_ED)):
            finish(rows, image_gradient_ED[rows])
    text_gradient_ED *= factor * scale
    return (
        tiles.rounded(image_gradient_ED, image_ED.dtype),
        tiles.rounded(text_gradient_ED, image_ED.dtype),
        scale_gradient * factor,
    )


class _SoftmaxLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        image_ED: Tensor,
        text_ED: Tensor,
        scale: Tensor,
        exchange: Ring | Gather,
        chunk_size: int,
    ) -> Tensor:
        tiler = _SoftmaxLoss.tiler(image_ED, scale, exchange, chunk_size)
        row_lse = tiler.vector(len(image_ED), -torch.inf)
        matching_E = scale.new_empty(len(image_ED))

        def visit(is_own: bool, blocks: tuple[Tensor, ...]) -> Tensor:
            (text_MD,) = blocks
            column_lse = tiler.vector(len(text_MD), -torch.inf)
            if tiler.kernels:
                matching = matching_E if is_own else None
                kernels.softmax_statistics(image_ED, text_MD, scale, row_lse, column_lse, matching)
                return column_lse
            for rows in tiler.slices(len(image_ED)):
                for tile in tiler.strip(rows, text_MD, is_own):
                    raw = tiler.multiply(tile)
                    if tile.has_matches:
                        matching_E[rows] = raw.matching(len(tile.image))
                    row_lse[rows], column_lse[tile.columns] = tiler.run(
                        tiles.softmax_statistics, raw, row_lse[rows], column_lse[tile.columns]
                    )
            return column_lse[: len(text_MD)]

        column_lse_E = exchange.circulate((text_ED,), visit, merge="logaddexp")
        row_lse_E = row_lse[: len(image_ED)]
        ctx.save_for_backward(image_ED, text_ED, scale, row_lse_E, column_lse_E)
        ctx.exchange, ctx.chunk_size = exchange, chunk_size
        # Subtracted pair by pair: the sums of each term alone are large where the loss is small.
        terms_E = (row_lse_E - matching_E) + (column_lse_E - matching_E)
        members = exchange.members
        return members.sum(terms_E.sum()) / (2 * members.total)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_gradient: Tensor) -> tuple[Tensor | None, ...]:
        image_ED, text_ED, scale, row_lse_E, column_lse_E = ctx.saved_tensors
        tiler = _SoftmaxLoss.tiler(image_ED, scale, ctx.exchange, ctx.chunk_size)
        row_lse = tiler.padded(row_lse_E)

        def weigh(tile: tiles.Tile, column_lse: Tensor) -> Tensor:
            lses = row_lse[tile.rows], column_lse[tile.columns]
            if tiler.kernels:
                weights = tiler.weights_buffer(tile)
                kernels.softmax_weights(
                    tile.image, tile.text, scale, *lses, tile.has_matches, weights
                )
                return weights
            raw = tiler.multiply(tile)
            return tiler.run(tiles.softmax_weights, raw, *lses, tile.has_matches, tile.image.dtype)

        factor = loss_gradient / (2 * ctx.exchange.members.total)
        gradients = _feature_gradients(tiler, ctx.exchange, (text_ED, column_lse_E), weigh, factor)
        return (*gradients, None, None)

    @staticmethod
    def tiler(
        image_ED: Tensor, scale: Tensor, exchange: Ring | Gather, chunk_size: int
    ) -> tiles.Tiler:
        kernels = tiles.has_kernels(image_ED)
        return tiles.Tiler(image_ED, scale, exchange.largest, chunk_size, kernels=kernels)


class _SigmoidLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        image_ED: Tensor,
        text_ED: Tensor,
        scale: Tensor,
        bias: Tensor,
        exchange: Ring | Gather,
        chunk_size: int,
    ) -> Tensor:
        tiler = tiles.Tiler(image_ED, scale, exchange.largest, chunk_size)

        def visit(is_own: bool, blocks: tuple[Tensor, ...]) -> Tensor:
            (text_MD,) = blocks
            column_loss = tiler.vector(len(text_MD), 0.0)
            for rows in tiler.slices(len(image_ED)):
                for tile in tiler.strip(rows, text_MD, is_own):
                    column_loss[tile.columns] += tiler.run(
                        tiles.sigmoid_losses, tiler.multiply(tile), bias, tile.has_matches
                    )
            return column_loss[: len(text_MD)]

        column_loss_E = exchange.circulate((text_ED,), visit, merge="add")
        ctx.save_for_backward(image_ED, text_ED, scale, bias)
        ctx.exchange, ctx.chunk_size = exchange, chunk_size
        members = exchange.members
        return members.sum(column_loss_E.sum()) / members.total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_gradient: Tensor) -> tuple[Tensor | None, ...]:
        image_ED, text_ED, scale, bias = ctx.saved_tensors
        tiler = tiles.Tiler(image_ED, scale, ctx.exchange.largest, ctx.chunk_size)
        bias_gradient = torch.zeros_like(bias)

        def weigh(tile: tiles.Tile) -> Tensor:
            weights, column_sums = tiler.run(
                tiles.sigmoid_weights,
                tiler.multiply(tile),
                bias,
                tile.has_matches,
                tile.image.dtype,
            )
            bias_gradient.add_(column_sums[: len(tile.text)].sum())
            return weights

        factor = loss_gradient / ctx.exchange.members.total
        gradients = _feature_gradients(tiler, ctx.exchange, (text_ED,), weigh, factor)
        return (*gradients, bias_gradient * factor, None, None)
