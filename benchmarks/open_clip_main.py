"""open_clip's main branch (not released), for ``benchmarks.step --open-clip-main SRC``.

Its preset of NaFlex images and captions of any length (``moderntext-naflex_ViT-B-16``: timm's
NaFlexViT and a bidirectional text tower, both with SwiGLU and attention pooling) at the widths of
the comparison, and the preparation of its training loader: every image of a batch is cropped at
random (to 90 to 100% of its area, the default) and resized to one length, captions are padded to
the batch's longest.

In processes of its own, whose import path begins with SRC: a released open_clip may be installed.
"""

from __future__ import annotations

import io
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.command import commit_of
from benchmarks.pairs import RealPair
from benchmarks.peers import Towers
from benchmarks.sizes import CONTEXT, HEAD_WIDTH, PATCH, VOCABULARY, WIDTHS, Widths
from navit_clip.data.decode import find_image
from navit_clip.errors import UserError

PRESET = "moderntext-naflex_ViT-B-16"


def need_open_clip_main(source: str) -> str:
    """The version of this folder's open_clip; in a process that has not imported one yet.

    Raises:
        UserError: If it is none that trains NaFlex towers.
    """
    sys.path.insert(0, source)
    try:
        import open_clip
        from open_clip_train.naflex_data import require_naflex

        require_naflex()
        if not Path(open_clip.__file__).is_relative_to(Path(source).resolve()):
            raise ImportError(f"open_clip comes from {open_clip.__file__}")
        OpenClipMain(WIDTHS["XS/16"])
    except (ImportError, RuntimeError, TypeError) as error:
        raise UserError(
            f"--open-clip-main {source} is not the src of open_clip's main branch ({error}): git "
            "clone https://github.com/mlfoundations/open_clip, then --open-clip-main open_clip/src"
        ) from error
    return f"{open_clip.__version__} at {commit_of(Path(source))}"


class OpenClipMain(Towers):
    """Padded towers on images of one length a batch."""

    def __init__(self, widths: Widths) -> None:
        import open_clip

        super().__init__()
        preset = open_clip.get_model_config(PRESET)
        sizes = {
            "embed_dim": widths.image,
            "depth": widths.image_depth,
            "num_heads": widths.image // HEAD_WIDTH,
        }
        preset["vision_cfg"]["timm_model_kwargs"] |= sizes
        # The tokens of this project's side, and one more for padding.
        preset["text_cfg"] |= {
            "context_length": CONTEXT,
            "vocab_size": VOCABULARY + 1,
            "pad_id": VOCABULARY,
            "bos_id": VOCABULARY - 2,
            "eos_id": VOCABULARY - 1,
            "width": widths.text,
            "heads": widths.text // HEAD_WIDTH,
            "layers": widths.text_depth,
        }
        preset["embed_dim"] = widths.embed
        self.clip = open_clip.CustomTextCLIP(**preset)
        self.scale = self.clip.logit_scale

    def prepare(self, pairs: Sequence[RealPair], device: torch.device) -> dict[str, Any]:
        """Images that fill as many tokens as this project's have on average, or somewhat fewer."""
        from open_clip.transform import AugmentationCfg, image_transform
        from open_clip_train.naflex_data import NaFlexBatchScheduler
        from PIL import Image

        augmentation = AugmentationCfg(naflex=True, use_timm=True)
        length = round(sum(real.pair.lengths[0] for real in pairs) / len(pairs))
        scheduler = NaFlexBatchScheduler(
            train_num_samples=len(pairs),
            seq_lens=[length],
            patch_size=PATCH,
            transform_factory=image_transform(PATCH, is_train=True, aug_cfg=augmentation),
            decode_fn=lambda raw: Image.open(io.BytesIO(raw)).convert("RGB"),
            pad_id=VOCABULARY,
        )
        random.seed(0)  # of the crops
        samples = [
            {"image": find_image(real.sample.members), "text": torch.tensor(real.pair.token_ids)}
            for real in pairs
        ]
        batch = scheduler.collate_batch(samples, length, patch_idx=0)
        patches = {k: v.to(device) for k, v in batch["image"].items() if isinstance(v, Tensor)}
        return {"image": patches, "text": batch["text"].to(device)}

    def embed_images(self, batch: dict[str, Any]) -> Tensor:
        """All slots, under a mask."""
        return self.clip.encode_image(batch["image"])

    def embed_texts(self, batch: dict[str, Any]) -> Tensor:
        """As many slots as the longest caption has tokens."""
        return self.clip.encode_text(batch["text"])
