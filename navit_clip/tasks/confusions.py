"""Where a contrastive batch is hard: margins of its logits, and the pairs that are confused most.

For people to look at; computed of a few hundred pairs of one rank, far fewer than the loss sees.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from navit_clip.data.builders.pairs import PairInputs
from navit_clip.packed.images import ImagePatches
from navit_clip.tasks.draw_batch import draw_on_grid
from navit_clip.tasks.media import Example, Examples, Histogram, Media, webp
from navit_clip.tokenizers.base import Tokenizer

_PAIRS = 256  # compared with each other
_HARDEST = 8
_BLANK = 128  # grey of dropped patches
_MOST_SIDE = 224


def margins(logits_EE: Tensor, same_EE: Tensor) -> tuple[Tensor, Tensor]:
    """How far each image's own caption is above the best other one.

    Args:
        logits_EE: Of images and captions.
        same_EE: Bool, captions that are the same as the image's own, which are no others.

    Returns:
        [E] margins, negative where another caption is nearer, infinite where there is no other; and
        int64 [E] the best other captions.
    """
    others = logits_EE.masked_fill(same_EE, -torch.inf)
    best, index = others.max(1)
    return logits_EE.diagonal() - best, index


def hard_pairs(
    inputs: PairInputs, outputs: tuple[Tensor, Tensor, Tensor], tokenizer: Tokenizer | None
) -> Mapping[str, Media]:
    """The margins of a batch and its hardest pairs; outputs are [≥ E, D] twice, and the scale."""
    count = min(inputs.images.segments.num_examples, _PAIRS)
    image_ED, text_ED, scale = outputs
    logits_EE = (scale * image_ED[:count].float() @ text_ED[:count].float().T).cpu()
    ids = [inputs.texts.caption(i) for i in range(count)]
    captions = [tokenizer.decode(own) if tokenizer else "" for own in ids]
    code_E = torch.from_numpy(np.unique(list(map(str, ids)), return_inverse=True)[1])
    margin_E, other_E = margins(logits_EE, code_E[:, None] == code_E)
    hardest = margin_E.argsort()[:_HARDEST].tolist()
    rows = tuple(
        Example(
            _picture(inputs.images.image(i)),
            {
                "margin": f"{margin_E[i]:.2f}",
                "own caption": captions[i],
                "best other": captions[int(other_E[i])],
            },
        )
        for i in hardest
        if torch.isfinite(margin_E[i])
    )
    finite_E = margin_E[margin_E.isfinite()]
    return {
        **({"logit_margin": Histogram(finite_E.numpy())} if len(finite_E) else {}),
        **({"confusions": Examples(rows)} if rows else {}),
    }


def _picture(image: ImagePatches) -> bytes:
    picture = draw_on_grid(image, _BLANK)
    if max(picture.size) < _MOST_SIDE // 2:  # of a demo, too small to see
        picture = picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.NEAREST)
    return webp(picture, _MOST_SIDE)
