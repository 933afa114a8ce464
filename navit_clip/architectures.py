"""Architectures by name: the usual sizes of this model, and open_clip's.

`NaViTCLIP.from_name` and ``task.model.name`` lead here; a name stands for a configuration and
brings no weights.
"""

from __future__ import annotations

import re
from difflib import get_close_matches

from navit_clip.errors import UserError
from navit_clip.models.clip import CLIPConfig
from navit_clip.models.hierarchical_tower import HierarchyConfig
from navit_clip.models.image_tower import ImageTowerConfig
from navit_clip.models.position import PositionConfig
from navit_clip.models.text_tower import TextTowerConfig
from navit_clip.models.transformer import EncoderConfig

OPEN_CLIP = "open_clip:"
# Width, depth, heads of both towers, as ViT's are called: Ti and S of DeiT (arXiv:2012.12877,
# Table 1), B, L and H of ViT (arXiv:2010.11929, Table 1).
_SIZES = {
    "ti": (192, 12, 3),
    "s": (384, 12, 6),
    "b": (768, 12, 12),
    "l": (1024, 24, 16),
    "h": (1280, 32, 16),
}
_PATCHES = (14, 16, 32)
# Width and heads of the last stage, depths of all, as Swin's sizes are called (arXiv:2103.14030,
# Section 3.3), after one that a CPU can train; and the size of the text tower beside it.
_SWINS = {
    "p": (256, 8, (2, 2, 2, 2), "ti"),
    "t": (768, 24, (2, 2, 6, 2), "s"),
    "s": (768, 24, (2, 2, 18, 2), "s"),
    "b": (1024, 32, (2, 2, 18, 2), "b"),
    "l": (1536, 48, (2, 2, 18, 2), "l"),
}
NAMES = (
    *(f"navit_{size}{patch}" for size in _SIZES for patch in _PATCHES),
    *(f"swin_{size}" for size in _SWINS),
)


def architecture(name: str) -> CLIPConfig:
    """The configuration that a name stands for.

    Args:
        name: ``navit_b16`` and the like: both towers of the size named, the image tower with
            patches of so many pixels. ``swin_t`` (p, t, s, b, l): a hierarchical image tower with
            windows of 7. Or ``open_clip:NAME``, such as ``open_clip:ViT-B-32``.

    Raises:
        UserError: If there is no such name.
    """
    if name.startswith(OPEN_CLIP):
        from navit_clip.interop.open_clip import config_of

        return config_of(name.removeprefix(OPEN_CLIP))
    if name not in NAMES:
        close = get_close_matches(name, NAMES, 1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UserError(
            f"no architecture is called {name}: {hint}There are {', '.join(NAMES)}, and "
            f"{OPEN_CLIP}NAME"
        )
    if name.startswith("swin_"):
        return _swin(*_SWINS[name.removeprefix("swin_")])
    size, patch = re.fullmatch(r"navit_([a-z]+)(\d+)", name).groups()  # type: ignore[union-attr]
    width, depth, heads = _SIZES[size]
    encoder = EncoderConfig(width, depth, heads)
    return CLIPConfig(
        width, ImageTowerConfig(int(patch), encoder), TextTowerConfig(encoder=encoder)
    )


def _swin(width: int, heads: int, depths: tuple[int, ...], text: str) -> CLIPConfig:
    encoder = EncoderConfig(
        width,
        sum(depths),
        heads,
        qk_norm=False,
        qkv_bias=True,
        norm_bias=True,
        pre_norm=True,
        norm_eps=1e-5,
    )
    image = ImageTowerConfig(
        32, encoder, PositionConfig("none"), "mean", hierarchy=HierarchyConfig(depths)
    )
    text_encoder = EncoderConfig(*_SIZES[text])
    return CLIPConfig(text_encoder.width, image, TextTowerConfig(encoder=text_encoder))
