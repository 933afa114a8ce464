"""Locked towers: parts of a model that keep the weights it was started from.

Locked parameters take no gradient and no optimiser state, and a tower that is locked up to a block
is not passed backward below it (LiT, arXiv 2111.07991, locks the image tower).
"""

from __future__ import annotations

from dataclasses import dataclass

from navit_clip.models.clip import CLIP, CLIPConfig

TOWERS = ("image", "text")


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
        for tower in TOWERS:
            blocks = self.unlocked_blocks(tower)
            if blocks < 0:
                raise ValueError(
                    f"task.lock.{tower}_unlocked_blocks must not be negative, got {blocks}"
                )
            if blocks and not self.locks(tower):
                raise ValueError(
                    f"task.lock.{tower}_unlocked_blocks={blocks} needs task.lock.{tower}: true"
                )

    def locks(self, tower: str) -> bool:
        """Whether a tower, ``image`` or ``text``, is locked."""
        return bool(getattr(self, tower))

    def unlocked_blocks(self, tower: str) -> int:
        """How many of a locked tower's last blocks learn."""
        return int(getattr(self, f"{tower}_unlocked_blocks"))

    def check(self, model: CLIPConfig) -> None:
        """Compares with the depth of the towers.

        Raises:
            ValueError: If a tower has fewer blocks.
        """
        for tower in TOWERS:
            depth = getattr(model, tower).encoder.depth
            if self.unlocked_blocks(tower) > depth:
                raise ValueError(
                    f"task.lock.{tower}_unlocked_blocks={self.unlocked_blocks(tower)} exceeds the "
                    f"{depth} blocks of task.model.{tower}.encoder"
                )

    def trained_fraction(self, model: CLIPConfig, tower: str) -> float | None:
        """Fraction of a locked tower's blocks that learn, None of a tower that is not locked."""
        if not self.locks(tower):
            return None
        return self.unlocked_blocks(tower) / int(getattr(model, tower).encoder.depth)


def lock_towers(model: CLIP, config: LockConfig) -> None:
    """Takes the locked parameters out of the training, in place."""
    for name, tower in ((name, getattr(model, name)) for name in TOWERS if config.locks(name)):
        tower.requires_grad_(False)
        if count := config.unlocked_blocks(name):
            for module in (*tower.encoder.blocks[-count:], tower.encoder.norm, tower.pool):
                module.requires_grad_(True)
