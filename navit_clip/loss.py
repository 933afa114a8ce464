"""Contrastive losses over all pairs of all ranks, computed tile by tile.

The last step of a forward pass: the towers' pooled features of this rank's pairs go in, a scalar
comes out that is the same on every rank. Text blocks travel around the ring of ranks (ring.py); a
rank multiplies its own images with each block in tiles of at most `chunk_size` × `chunk_size`
logits. The forward pass keeps, besides the features, two numbers per pair (softmax: the
log-sum-exp of the pair's row and column); the backward pass recomputes the tiles. This is the
chunked loss of NaViT (arXiv 2307.06304) in an exact form.

Gradients: a feature's gradient is that of the global loss. `logit_scale` and `logit_bias` get
this rank's share, so that their full gradient is the SUM over the ranks. Both facts together mean
that parameters' gradients must be summed over ranks; under DDP, which averages them, multiply the
loss by the world size before `backward`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from navit_clip.ring import DTYPES, Ring


def softmax_contrastive_loss(
    image_features_ED: Tensor,
    text_features_ED: Tensor,
    logit_scale: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    chunk_size: int = 1024,
) -> Tensor:
    """Symmetric InfoNCE loss over the pairs of all ranks (CLIP, arXiv 2103.00020).

    With logits s_ij = logit_scale · image_i · text_j over all N pairs, the loss is
    1/(2N) · Σ_i (logsumexp_j s_ij + logsumexp_j s_ji - 2 s_ii).

    A collective call: every rank of the group makes it, and every rank runs the backward pass or
    none does. A rank without pairs passes features of shape [0, D].

    Args:
        image_features_ED: Image features of this rank's pairs, [E, D]; E may differ between ranks
            and be 0. float16, bfloat16, float32 or float64, the same on all ranks; the half
            precisions are multiplied and accumulated in float32.
        text_features_ED: Text features of the same pairs in the same order, [E, D].
        logit_scale: One element, multiplies the similarities (already exponentiated).
        group: Ranks whose pairs make up the batch; None is the default group, or this process
            alone if `torch.distributed` is not initialised.
        chunk_size: Side of the largest tile of logits that exists at any time.

    Returns:
        Scalar, the same on every rank; float64 for float64 features, else float32. For the
        gradients' scaling see the module docstring.

    Raises:
        ValueError: Shapes, dtypes or devices that do not fit, chunk_size < 1, no pair on any
            rank, or a caller outside `group`.
    """
    pairs = _Pairs.of(image_features_ED, text_features_ED, chunk_size, group)
    with _full_precision(image_features_ED):
        return _SoftmaxLoss.apply(
            *pairs.features, pairs.scalar(logit_scale, "logit_scale"), pairs.ring, chunk_size
        )


def sigmoid_contrastive_loss(
    image_features_ED: Tensor,
    text_features_ED: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    chunk_size: int = 1024,
) -> Tensor:
    """Pairwise sigmoid loss over the pairs of all ranks (SigLIP, arXiv 2303.15343).

    With logits l_ij = logit_scale · image_i · text_j + logit_bias over all N pairs, the loss is
    1/N · Σ_ij softplus(-z_ij · l_ij), where z_ij is +1 for i = j and -1 otherwise.

    Args:
        image_features_ED: As for `softmax_contrastive_loss`.
        text_features_ED: As for `softmax_contrastive_loss`.
        logit_scale: One element, multiplies the similarities (already exponentiated).
        logit_bias: One element, added to the scaled similarities.
        group: As for `softmax_contrastive_loss`.
        chunk_size: As for `softmax_contrastive_loss`.

    Returns:
        As for `softmax_contrastive_loss`.

    Raises:
        ValueError: As for `softmax_contrastive_loss`.
    """
    pairs = _Pairs.of(image_features_ED, text_features_ED, chunk_size, group)
    with _full_precision(image_features_ED):
        return _SigmoidLoss.apply(
            *pairs.features,
            pairs.scalar(logit_scale, "logit_scale"),
            pairs.scalar(logit_bias, "logit_bias"),
            pairs.ring,
            chunk_size,
        )


class _Pairs(NamedTuple):
    """Checked features of this rank's pairs in one dtype, and the ring they belong to."""

    features: tuple[Tensor, Tensor]
    ring: Ring

    @classmethod
    def of(
        cls, image_ED: Tensor, text_ED: Tensor, chunk_size: int, group: dist.ProcessGroup | None
    ) -> _Pairs:
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
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
        dtype = torch.promote_types(image_ED.dtype, text_ED.dtype)
        features = (image_ED.to(dtype).contiguous(), text_ED.to(dtype).contiguous())
        ring = Ring.join(features[1].detach(), group)
        if ring.total == 0:
            raise ValueError("a contrastive loss needs at least one pair, got none on any rank")
        return cls(features, ring)

    def scalar(self, value: Tensor, name: str) -> Tensor:
        """`value` as a 0-d tensor beside the features, in the precision of the logits."""
        if value.numel() != 1:
            raise ValueError(f"{name} must have one element, got shape {list(value.shape)}")
        return value.reshape(()).to(self.features[0].device, _logit_dtype(self.features[0]))


def _logit_dtype(features: Tensor) -> torch.dtype:
    return torch.promote_types(features.dtype, torch.float32)


def _full_precision(tensor: Tensor) -> torch.autocast:
    """Autocast would turn the tiles' float32 products into half precision."""
    return torch.autocast(tensor.device.type, enabled=False)


class _Tile(NamedTuple):
    """Logits of a run of image rows and a run of the visiting block's text rows."""

    rows: slice
    columns: slice
    image: Tensor  # [rows, D], already multiplied by the scale
    text: Tensor  # [columns, D]
    logits: Tensor  # [rows, columns]; the caller may overwrite it
    scratch: Tensor  # [rows, columns], undefined content
    diagonal: Tensor | None  # view of the logits of matching pairs, where the tile has them


class _Tiler:
    """Cuts images × text block into tiles, all in the same two buffers of chunk² numbers."""

    def __init__(self, image_ED: Tensor, scale: Tensor, ring: Ring, chunk_size: int) -> None:
        self.image_ED = image_ED
        self.scale = scale
        self.chunk_size = chunk_size
        area = min(chunk_size, len(image_ED)) * min(chunk_size, max(ring.counts))
        self._buffers = image_ED.new_empty((2, area), dtype=_logit_dtype(image_ED))

    def runs(self, length: int) -> Iterator[slice]:
        for start in range(0, length, self.chunk_size):
            yield slice(start, min(start + self.chunk_size, length))

    def tiles(self, text_MD: Tensor, own: bool) -> Iterator[_Tile]:
        """Yields every tile of this rank's images and `text_MD`, each valid until the next."""
        dtype = self._buffers.dtype
        for rows in self.runs(len(self.image_ED)):
            image = self.image_ED[rows].to(dtype) * self.scale
            for columns in self.runs(len(text_MD)):
                text = text_MD[columns].to(dtype)
                shape = (len(image), len(text))
                # Cut from a flat buffer, the tile stays contiguous at ragged edges too.
                logits, scratch = (b[: shape[0] * shape[1]].view(shape) for b in self._buffers)
                torch.mm(image, text.T, out=logits)
                diagonal = logits.diagonal() if own and rows == columns else None
                yield _Tile(rows, columns, image, text, logits, scratch, diagonal)


class _Gradients:
    """Gradients of image and text features and of the scale, from ∂(N·loss)/∂logits per tile."""

    def __init__(self, tiler: _Tiler) -> None:
        self._tiler = tiler
        # Σ_j w_ij text_j: the image gradient but for the scale.
        self._image_ED = torch.zeros_like(tiler.image_ED, dtype=tiler.scale.dtype)

    def add(self, tile: _Tile, weights: Tensor, text_gradient_MD: Tensor) -> None:
        self._image_ED[tile.rows].addmm_(weights, tile.text)
        text_gradient_MD[tile.columns].addmm_(weights.T, tile.image)

    def finish(self, text_gradient_ED: Tensor, factor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scales by `factor` and returns the gradients of image, text and scale."""
        image_ED = self._tiler.image_ED
        scale_gradient = factor.new_zeros(())
        for rows in self._tiler.runs(len(image_ED)):
            # ∂loss/∂scale = Σ_ij w_ij image_i·text_j, here without the logits and for any scale.
            scale_gradient += (image_ED[rows] * self._image_ED[rows]).sum()
        self._image_ED *= factor * self._tiler.scale
        text_gradient_ED *= factor
        return (
            self._image_ED.to(image_ED.dtype),
            text_gradient_ED.to(image_ED.dtype),
            scale_gradient * factor,
        )


def _add_log_sum_exp(total: Tensor, logits: Tensor, dim: int, scratch: Tensor) -> None:
    """Sets total to log(exp(total) + Σ exp(logits) over dim); overwrites scratch.

    Shifted by the maximum of each row or column. One shift for both would save an exponential per
    logit, but underflows: with a scale of 100 the maxima lie up to 200 apart, exp(-104) is 0.
    """
    peak = logits.amax(dim, keepdim=True)
    torch.sub(logits, peak, out=scratch).exp_()
    partial = scratch.sum(dim).log_().add_(peak.squeeze(dim))
    torch.logaddexp(total, partial, out=total)


class _SoftmaxLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, image_ED: Tensor, text_ED: Tensor, scale: Tensor, ring: Ring, chunk_size: int
    ) -> Tensor:
        tiler = _Tiler(image_ED, scale, ring, chunk_size)
        row_lse_E = scale.new_full((len(image_ED),), -torch.inf)
        matching_E = torch.empty_like(row_lse_E)

        def visit(own: bool, blocks: tuple[Tensor, ...]) -> Tensor:
            (text_MD,) = blocks
            column_lse_M = scale.new_full((len(text_MD),), -torch.inf)
            for tile in tiler.tiles(text_MD, own):
                if tile.diagonal is not None:
                    matching_E[tile.rows] = tile.diagonal
                _add_log_sum_exp(row_lse_E[tile.rows], tile.logits, 1, tile.scratch)
                _add_log_sum_exp(column_lse_M[tile.columns], tile.logits, 0, tile.scratch)
            return column_lse_M

        column_lse_E = ring.circulate((text_ED,), visit, merge=torch.logaddexp)
        ctx.save_for_backward(image_ED, text_ED, scale, row_lse_E, column_lse_E)
        ctx.ring, ctx.chunk_size = ring, chunk_size
        # Subtracted pair by pair: the sums of each term alone are large where the loss is small.
        terms_E = (row_lse_E - matching_E) + (column_lse_E - matching_E)
        return ring.sum(terms_E.sum()) / (2 * ring.total)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_gradient: Tensor) -> tuple[Tensor | None, ...]:
        image_ED, text_ED, scale, row_lse_E, column_lse_E = ctx.saved_tensors
        with _full_precision(image_ED):
            tiler = _Tiler(image_ED, scale, ctx.ring, ctx.chunk_size)
            gradients = _Gradients(tiler)

            def visit(own: bool, blocks: tuple[Tensor, ...]) -> Tensor:
                text_MD, column_lse_M = blocks
                text_gradient_MD = torch.zeros_like(text_MD, dtype=scale.dtype)
                for tile in tiler.tiles(text_MD, own):
                    weights = tile.logits
                    torch.sub(weights, row_lse_E[tile.rows, None], out=tile.scratch).exp_()
                    weights.sub_(column_lse_M[tile.columns]).exp_().add_(tile.scratch)
                    if tile.diagonal is not None:
                        tile.diagonal.sub_(2)
                    gradients.add(tile, weights, text_gradient_MD)
                return text_gradient_MD

            text_gradient_ED = ctx.ring.circulate((text_ED, column_lse_E), visit, merge=Tensor.add_)
            factor = loss_gradient / (2 * ctx.ring.total)
            return (*gradients.finish(text_gradient_ED, factor), None, None)


class _SigmoidLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        image_ED: Tensor,
        text_ED: Tensor,
        scale: Tensor,
        bias: Tensor,
        ring: Ring,
        chunk_size: int,
    ) -> Tensor:
        tiler = _Tiler(image_ED, scale, ring, chunk_size)
        zero = torch.zeros_like(scale)

        def visit(own: bool, blocks: tuple[Tensor, ...]) -> Tensor:
            (text_MD,) = blocks
            column_loss_M = scale.new_zeros(len(text_MD))
            for tile in tiler.tiles(text_MD, own):
                logits = tile.logits.add_(bias)
                if tile.diagonal is not None:
                    tile.diagonal.neg_()
                torch.logaddexp(logits, zero, out=logits)  # softplus without its cut-off at 20
                column_loss_M[tile.columns] += logits.sum(0)
            return column_loss_M

        column_loss_E = ring.circulate((text_ED,), visit, merge=Tensor.add_)
        ctx.save_for_backward(image_ED, text_ED, scale, bias)
        ctx.ring, ctx.chunk_size = ring, chunk_size
        return ring.sum(column_loss_E.sum()) / ring.total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_gradient: Tensor) -> tuple[Tensor | None, ...]:
        image_ED, text_ED, scale, bias = ctx.saved_tensors
        with _full_precision(image_ED):
            tiler = _Tiler(image_ED, scale, ctx.ring, ctx.chunk_size)
            gradients = _Gradients(tiler)
            bias_gradient = torch.zeros_like(bias)

            def visit(own: bool, blocks: tuple[Tensor, ...]) -> Tensor:
                (text_MD,) = blocks
                text_gradient_MD = torch.zeros_like(text_MD, dtype=scale.dtype)
                for tile in tiler.tiles(text_MD, own):
                    weights = tile.logits.add_(bias)
                    # sigmoid(l) - 1 = -sigmoid(-l), the right side without cancellation.
                    if tile.diagonal is not None:
                        tile.diagonal.neg_()
                    weights.sigmoid_()
                    if tile.diagonal is not None:
                        tile.diagonal.neg_()
                    bias_gradient.add_(weights.sum())
                    gradients.add(tile, weights, text_gradient_MD)
                return text_gradient_MD

            text_gradient_ED = ctx.ring.circulate((text_ED,), visit, merge=Tensor.add_)
            factor = loss_gradient / ctx.ring.total
            image, text, scale_gradient = gradients.finish(text_gradient_ED, factor)
            return image, text, scale_gradient, bias_gradient * factor, None, None
