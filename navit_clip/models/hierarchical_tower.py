"""The encoder of a hierarchical image tower: stages of attention within windows, ever coarser ones.

Swin (Liu et al., arXiv 2103.14030) on packed images. `ImageTower` cuts each patch of its stream,
here called a unit, into smaller ones and embeds those; each stage but the first merges four tokens
into one, until a unit is one token again. So a unit is seen as a whole or not at all, and images of
any grid, or with units missing, need no padding and no mask.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn

from navit_clip.models.interpolate import exact_dtype
from navit_clip.models.linear import Linear
from navit_clip.models.rope import RotaryConfig, RotarySpeeds
from navit_clip.models.transformer import Block, Encoder, EncoderConfig, LayerNorm
from navit_clip.models.window_attention import TurnedWindows, WindowAttention
from navit_clip.packed.images import PackedImages, Planner
from navit_clip.packed.segments import Segments
from navit_clip.packed.windows import plan_windows


@dataclass(frozen=True)
class HierarchyConfig:
    """Stages of an image tower.

    The tower's `patch_size` is the side of a unit, `encoder.depth` the sum of all depths, and
    `encoder.width` and `encoder.heads` are those of the last stage, each stage having half those of
    the next.

    Attributes:
        depths: Blocks of each stage, such as Swin-T's (2, 2, 6, 2); empty for a plain encoder.
        window: Side of a window of attention, in tokens of the stage; every second block has its
            windows shifted by half of that.

    Raises:
        ValueError: If a stage has no block, or `window` is below 1.
    """

    depths: tuple[int, ...] = ()
    window: int = 7

    def __post_init__(self) -> None:
        if min(self.depths, default=1) < 1:
            raise ValueError(f"depths must be at least 1, got {self.depths}")
        if self.window < 1:
            raise ValueError(f"window must be at least 1, got {self.window}")

    @property
    def merges(self) -> int:
        """How often tokens are merged, which makes a unit of 4 to that power of them."""
        return max(0, len(self.depths) - 1)

    def check(self, patch_size: int, encoder: EncoderConfig) -> None:
        """Compares with the unit and with the last stage.

        Raises:
            ValueError: If they do not fit; names the fields.
        """
        if not self.depths:
            return
        if sum(self.depths) != encoder.depth:
            raise ValueError(
                f"hierarchy.depths must add up to encoder.depth={encoder.depth}, got {self.depths}"
            )
        halvings = 1 << self.merges
        for name, size in (
            ("patch_size", patch_size),
            ("encoder.width", encoder.width),
            ("encoder.heads", encoder.heads),
        ):
            if size % halvings:
                raise ValueError(
                    f"{name} must be a multiple of {halvings} for {len(self.depths)} stages, "
                    f"got {size}"
                )

    def stages(self, encoder: EncoderConfig) -> list[EncoderConfig]:
        """The configuration of each stage, by that of the last."""
        return [
            replace(
                encoder,
                width=encoder.width >> self.merges - stage,
                heads=encoder.heads >> self.merges - stage,
                depth=depth,
            )
            for stage, depth in enumerate(self.depths)
        ]

    def planner(self, encoder: EncoderConfig, *, grouped: bool = False) -> Planner:
        """What sorts the tokens of images into windows, see `plan_windows`."""
        widths = tuple(stage.width for stage in self.stages(encoder))
        return partial(plan_windows, window=self.window, widths=widths, grouped=grouped)

    def cut(self, units_UK: Tensor) -> Tensor:
        """Units [U, P·P·3], row by row with channels last, as the patches of the first stage.

        Returns:
            [4^merges · U, p·p·3], a unit's patches in the order in which `Windows` has its cells.
        """
        if not self.merges:
            return units_UK
        patch = math.isqrt(units_UK.shape[1] // 3) >> self.merges
        halves = [2] * self.merges
        # Each axis as halves of halves: the cells of each half of columns, then of each of rows.
        patches = units_UK.view(-1, *halves, patch, *halves, patch, 3)
        rows, columns = 1, self.merges + 2
        cells = [axis + half for half in range(self.merges) for axis in (columns, rows)]
        order = [0, *cells, rows + self.merges, columns + self.merges, patches.ndim - 1]
        return patches.permute(order).reshape(-1, 3 * patch**2)


class PatchMerging(nn.Module):
    """Four neighbours in a row of the stream to one token of twice the width."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.norm = LayerNorm(2 * config.width, config)
        self.linear = Linear(2 * config.width, config.width, bias=False)

    def forward(self, x_TC: Tensor) -> Tensor:
        """[4T, C / 2] to [T, C]."""
        return self.linear(self.norm(x_TC.reshape(len(x_TC) // 4, -1))).to(x_TC.dtype)


class WindowBlock(Block):
    """A block of attention within windows.

    Args:
        config: Of the stage.
        window: Side of a window.
        merging: Whether it is the first of a stage that merges the tokens of the one before.
        biased: Whether its attention has a bias, see `WindowAttention`.
    """

    def __init__(
        self, config: EncoderConfig, window: int, *, merging: bool, biased: bool = True
    ) -> None:
        super().__init__(config, WindowAttention(config, window, biased=biased))
        self.merge = PatchMerging(config) if merging else nn.Identity()

    def forward(  # type: ignore[override]
        self,
        x_TC: Tensor,
        segments: Segments,
        turned: TurnedWindows,
        scale_T2: Tensor | None = None,
    ) -> Tensor:
        """[T, C] to [T, C], or [4T, C / 2] to that."""
        x_TC = self.merge(x_TC)
        return super().forward(x_TC, segments, turned, scale_T2)  # type: ignore[arg-type]

    def _mark_dynamic(  # type: ignore[override]
        self, x_TC: Tensor, segments: Segments, turned: TurnedWindows, scale_T2: Tensor | None
    ) -> None:
        super()._mark_dynamic(x_TC, segments, None, scale_T2)
        windows = turned.windows
        varying = [windows.order, windows.places, windows.cells, windows.ids, windows.layout]
        varying += [] if turned.rotary is None else [turned.rotary.positions_TA]
        for tensor in varying:
            if tensor is not None:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)


class HierarchicalEncoder(Encoder):
    """Stages of blocks over the cells of packed units.

    Args:
        config: Of the last stage.
        hierarchy: The stages.
        rotary: Of a kind other than none, queries and keys turn by position within the window, and
            attention has no bias.
    """

    in_windows = True

    def __init__(
        self,
        config: EncoderConfig,
        hierarchy: HierarchyConfig,
        rotary: RotaryConfig = RotaryConfig(),  # noqa: B008  frozen
    ) -> None:
        stages = hierarchy.stages(config)
        biased = rotary.kind == "none"
        blocks = [
            WindowBlock(stage, hierarchy.window, merging=number > 0 and index == 0, biased=biased)
            for number, stage in enumerate(stages)
            for index in range(stage.depth)
        ]
        super().__init__(config, blocks)
        self.hierarchy = hierarchy
        self.rotary: nn.ModuleList | None = None
        if not biased:
            self.rotary = nn.ModuleList(RotarySpeeds(rotary, stage, axes=2) for stage in stages)
        if config.pre_norm:
            self.pre_norm = LayerNorm(stages[0].width, config)

    def forward(self, x_TC: Tensor, images: PackedImages) -> Tensor:  # type: ignore[override]
        """Encodes packed units.

        Args:
            x_TC: [T, C] the embedded patches that `HierarchyConfig.cut` made of all units.
            images: The units.

        Returns:
            [U, C] a token for each, normalised by default.
        """
        scales, scales_NU2 = None, self._draw_scales(images.segments)
        if scales_NU2 is not None:
            cells = [
                4 ** (self.hierarchy.merges - stage)
                for stage, depth in enumerate(self.hierarchy.depths)
                for _ in range(depth)
            ]
            scales = map(Tensor.repeat_interleave, scales_NU2, cells, repeat(0))
        windows: Any = self._windows(images, exact_dtype(x_TC.dtype))
        return self.norm(self._run_blocks(self._enter(x_TC), images.segments, windows, scales))

    def _windows(self, images: PackedImages, dtype: torch.dtype) -> list[TurnedWindows]:
        """Those of each block, turned in this precision."""
        plan: Any = images.plan
        if plan is None:
            planner = self.hierarchy.planner(self.config)
            plan = planner(images).to(images.coords.device)
        found: list[TurnedWindows] = []
        for number, depth in enumerate(self.hierarchy.depths):
            both, turns = plan.windows[2 * number : 2 * number + 2], None
            if self.rotary is not None:
                # How two tokens lie to each other is the same within a window as in the image.
                places = [windows.coords(self.hierarchy.window).to(dtype) for windows in both]
                turns = [self.rotary[number](places_S2) for places_S2 in places]
            for index in range(depth):
                shifted = index % 2
                rotary = None if turns is None else turns[shifted][index]
                found.append(TurnedWindows(both[shifted], rotary))
        return found
