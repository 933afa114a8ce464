"""A small masked image model, flags of a run, and the loss one image at a time, in loops."""

import torch
from classify_cases import classify_flags
from hierarchical_cases import tower_config
from packed_examples import randomise

from navit_clip.models.hierarchical_tower import HierarchicalEncoder
from navit_clip.models.image_tower import ImageTowerConfig
from navit_clip.models.masked_image import MaskedImage, MaskedImageConfig
from navit_clip.models.position import PositionConfig
from navit_clip.models.transformer import EncoderConfig
from navit_clip.packed.images import pack_images
from navit_clip.packed.segments import Segments

PATCH = 2


TOWERS = {
    "mean": ImageTowerConfig(PATCH, EncoderConfig(16, 2, 2), PositionConfig(table_side=9), "mean"),
    "cls": ImageTowerConfig(
        PATCH, EncoderConfig(16, 2, 2), PositionConfig(table_side=9), "cls", registers=2
    ),
    # Units of two by two patches of a pixel.
    "hierarchical": tower_config((2, 2), 3, heads=2, patch=PATCH // 2),
}


def build(tower="mean", decoder=True):
    torch.manual_seed(0)
    config = MaskedImageConfig(TOWERS[tower], EncoderConfig(12, 1, 3) if decoder else None)
    model = MaskedImage(config).double()
    randomise(model, 1)
    return model


def decoded(model, image, kept, whole):
    """One image's tokens, of which the tower computes the visible ones (MAE)."""
    seen = model.to_decoder(model.image.tokens(pack_images([image.kept(kept)])).x_TC)
    tokens, rows = [], iter(seen)
    for index in range(len(image.patches)):
        tokens.append(next(rows) if index in kept else model.mask_token)
    x_TC = torch.stack(tokens)
    x_TC = x_TC + model.position(whole.coords, whole.grids[whole.segments.ids])
    return model.decoder(x_TC, whole.segments)


def computed_whole(model, image, kept, whole):
    """One image's tokens, all of which the tower computes (SimMIM)."""
    tower, tokens = model.image, []
    if isinstance(tower.encoder, HierarchicalEncoder):
        for index, unit in enumerate(whole.patches):
            cells = tower.embed(tower.config.hierarchy.cut(unit[None]))
            tokens.extend(cells if index in kept else [model.mask_token] * len(cells))
        return tower.encoder(torch.stack(tokens), whole)
    positions = tower.position(whole.coords, whole.grids[whole.segments.ids])
    for index, embedded in enumerate(tower.embed(whole.patches)):
        tokens.append((embedded if index in kept else model.mask_token) + positions[index])
    prefix = tower._prefix()
    x_TC = torch.stack([*prefix, *tokens])
    return tower.encoder(x_TC, Segments.from_lengths([len(x_TC)]))[len(prefix) :]


def masked_flags(data, run_dir, steps=4, **changes):
    """Flags of ``navit-clip train`` for a run of a second, on labelled shards or others."""
    options = {
        "task__kind": "masked_image",
        "task__model__decoder__width": 16,
        "task__model__decoder__depth": 1,
        "task__model__decoder__heads": 2,
        "data__drop__kind": "fixed",
        "data__drop__rate": 0.6,
        "data__budget__tokens": '{"image": 40, "decoder": 80}',
    }
    return classify_flags(data, run_dir, steps, **options | changes)


def one_by_one(model, images, visible):
    """The sum over images of the mean error over hidden patches, in loops."""
    total = torch.zeros((), dtype=torch.float64)
    for image, kept in zip(images, visible, strict=True):
        whole = pack_images([image])
        decode = computed_whole if model.decoder is None else decoded
        predicted = model.to_pixels(decode(model, image, kept, whole))
        errors = []
        for index in set(range(len(image.patches))) - set(kept.tolist()):
            pixels = torch.tensor(image.patches[index] / 255.0)
            spread = (pixels - pixels.mean()).square().sum() / (len(pixels) - 1)
            target = (pixels - pixels.mean()) / (spread + 1e-6).sqrt()
            errors.append((predicted[index] - target).square().mean())
        total = total + sum(errors) / len(errors)
    return total
