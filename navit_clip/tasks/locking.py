"""Locked towers: parts of a model that keep the weights it was started from.

Locked parameters take no gradient and no optimiser state, and a tower that is locked up to a block
is not passed backward below it (LiT, arXiv 2111.07991, locks the image tower).
"""

from __future__ import annotations

from dataclasses import dataclass

from navit_clip.models.clip import CLIP, CLIPConfig


@dataclass(frozen=True)
class LockConfig:
    """Which towers keep their weights. Projections, scale and bias always learn.

    Attributes:
        image: Lock the image tower.
        text: Lock the text tower.
        image_unlocked_blocks: Of a locked image tower, so many of its last blocks learn, and with
            them its final norm and pooling; 0 locks all of it.
        text_unlocked_blocks: Likewise of a locked text tower.

    Raises:
        ValueError: If a number is negative, or given for a tower that is not locked.
    """

    image: bool = False
    text: bool = False
    image_unlocked_blocks: int = 0
    text_unlocked_blocks: int = 0

    def __post_init__(self) -> None:
        for tower in ("image", "text"):
            name = f"{tower}_unlocked_blocks"
            blocks = getattr(self, name)
            if blocks < 0:
                raise ValueError(f"{name} must not be negative, got {blocks}")
            if blocks and not getattr(self, tower):
                raise ValueError(f"{name}={blocks} needs {tower}: true")

    @property
    def unlocked_blocks(self) -> dict[str, int]:
        """How many of its last blocks learn, of each tower that is locked."""
        blocks = {"image": self.image_unlocked_blocks, "text": self.text_unlocked_blocks}
        return {tower: count for tower, count in blocks.items() if getattr(self, tower)}

    def check(self, model: CLIPConfig) -> None:
        """Compares with the depth of the towers.

        Raises:
            ValueError: If a tower has fewer blocks.
        """
        for tower, blocks in self.unlocked_blocks.items():
            depth = getattr(model, tower).encoder.depth
            if blocks > depth:
                raise ValueError(
                    f"lock.{tower}_unlocked_blocks={blocks} exceeds the {depth} blocks of "
                    f"model.{tower}.encoder"
                )

    def trained_fraction(self, model: CLIPConfig, tower: str) -> float | None:
        """Fraction of a locked tower's blocks that learn, None of a tower that is not locked."""
        blocks = self.unlocked_blocks.get(tower)
        return None if blocks is None else blocks / int(getattr(model, tower).encoder.depth)


def lock_towers(model: CLIP, config: LockConfig) -> None:
    """Takes the locked parameters out of the training, in place."""
    for name, blocks in config.unlocked_blocks.items():
        tower = getattr(model, name)
        tower.requires_grad_(False)
        if blocks:
            for module in (*tower.encoder.blocks[-blocks:], tower.encoder.norm, tower.pool):
                module.requires_grad_(True)
