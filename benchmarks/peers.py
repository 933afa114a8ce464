"""The projects whose towers `benchmarks.step` and `benchmarks.towers` put side by side.

Each takes the same pairs and makes of them what its towers want, before the clock runs; then it
gives their two embeddings. Widths, depths and patches are equal; everything else is as each
project has it: this one's tower has query-key norm, attention pooling and no biases in QKV and
norms, open_clip's a class token, timm's attention pooling.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from benchmarks.pairs import RealPair
from benchmarks.sizes import CONTEXT, HEAD_WIDTH, PATCH, SQUARE, Widths
from navit_clip.data.builders.pairs import PairInputs
from navit_clip.errors import UserError
from navit_clip.losses.contrastive import softmax_contrastive_loss
from navit_clip.models.clip import CLIP
from navit_clip.packed.images import ImagePatches, pack_images
from navit_clip.packed.texts import pack_texts

BUCKETS = 4  # of the padded images: images of one length side by side waste least
ROW_TOKENS = 1024  # of vit-pytorch's rows


class Towers(nn.Module):
    """One project's towers."""

    scale: Tensor  # the logarithm of the factor on similarities

    @property
    def loss(self) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """The project's own, of unit vectors of both sides and a factor; open_clip's by default."""
        import open_clip

        loss: Callable[[Tensor, Tensor, Tensor], Tensor] = open_clip.ClipLoss()
        return loss

    @abstractmethod
    def prepare(self, pairs: Sequence[RealPair], device: torch.device) -> Any:
        """What a data loader would hand over, on the device."""

    @abstractmethod
    def embed_images(self, batch: Any) -> Tensor:
        """[E, D], in the order that `prepare` chose; not normalised."""

    @abstractmethod
    def embed_texts(self, batch: Any) -> Tensor:
        """[E, D], in the same order; not normalised."""

    def compile_blocks(self) -> None:
        """Compiles what the project itself offers to compile."""
        raise UserError(f"{type(self).__name__} offers no compilation block by block")

    def forward(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Unit vectors of both sides."""
        image_ED, text_ED = self.embed_images(batch), self.embed_texts(batch)
        return F.normalize(image_ED.float(), dim=-1), F.normalize(text_ED.float(), dim=-1)


class Ours(Towers):
    """This project's packed towers."""

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        self.clip = CLIP(widths.config())
        self.scale = self.clip.log_scale

    @property
    def loss(self) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """Tile by tile."""
        return softmax_contrastive_loss

    def prepare(self, pairs: Sequence[RealPair], device: torch.device) -> PairInputs:
        """Two packed streams without padding."""
        images = pack_images([real.pair.image for real in pairs])
        return PairInputs(images, pack_texts([real.pair.token_ids for real in pairs])).to(device)

    def compile_blocks(self) -> None:
        """Each block of both towers."""
        for tower in (self.clip.image, self.clip.text):
            tower.encoder.compile_blocks()

    def embed_images(self, batch: PairInputs) -> Tensor:
        """Through the packed image tower."""
        return self.clip.image_projection(self.clip.image(batch.images))

    def embed_texts(self, batch: PairInputs) -> Tensor:
        """Through the packed text tower."""
        return self.clip.text_projection(self.clip.text(batch.texts))


# Images as the project takes them, and int64 [E, 77] token ids, zeros after the end.
Slots = tuple[Any, Tensor]


class _OpenClipText(Towers):
    """Towers of which captions go through open_clip's text tower, padded to 77 slots."""

    def __init__(self, widths: Widths) -> None:
        import open_clip

        super().__init__()
        self.clip = open_clip.CLIP(**widths.open_clip_config())
        self.scale = self.clip.logit_scale

    def embed_texts(self, batch: Slots) -> Tensor:
        """All 77 slots."""
        return self.clip.encode_text(batch[1])


class OpenClip(_OpenClipText):
    """open_clip's CLIP: 224×224 squares and 77 slots."""

    def prepare(self, pairs: Sequence[RealPair], device: torch.device) -> Slots:
        """Images [E, 3, 224, 224]."""
        squares = torch.stack([real.pixels(SQUARE, SQUARE) for real in pairs])
        return squares.to(device), _text_slots(pairs).to(device)

    def embed_images(self, batch: Slots) -> Tensor:
        """196 patches and a class token each."""
        return self.clip.encode_image(batch[0])


class TimmNaFlex(_OpenClipText):
    """timm's NaFlexViT on the patches that ours gets, padded by buckets of like length."""

    def __init__(self, widths: Widths) -> None:
        super().__init__(widths)
        del self.clip.visual  # only its text tower is used
        config = NaFlexVitCfg(
            patch_size=PATCH,
            embed_dim=widths.image,
            depth=widths.image_depth,
            num_heads=widths.image // HEAD_WIDTH,
            global_pool="map",
        )
        self.tower = NaFlexVit(config, num_classes=widths.embed)

    def prepare(self, pairs: Sequence[RealPair], device: torch.device) -> Slots:
        """Buckets of as many images, each padded to its longest."""
        by_length = sorted(pairs, key=lambda real: real.pair.lengths[0])
        size = -(-len(by_length) // BUCKETS)
        buckets = [by_length[i : i + size] for i in range(0, len(by_length), size)]
        images = [padded([real.pair.image for real in bucket], device) for bucket in buckets]
        return images, _text_slots(by_length).to(device)

    def embed_images(self, batch: Slots) -> Tensor:
        """Bucket after bucket."""
        return torch.cat([self.tower(bucket) for bucket in batch[0]])


class VitPytorch(_OpenClipText):
    """vit-pytorch's NaViT: rows of many images, one dense mask over all pairs of tokens of a row.

    Its nested-tensor variant is left out: it gives no gradient to its patch embedding, positions
    and pooling query.
    """

    def __init__(self, widths: Widths) -> None:
        # Optional, see `benchmarks.needs`.
        from vit_pytorch.na_vit import NaViT

        super().__init__(widths)
        del self.clip.visual
        self.tower = NaViT(
            image_size=64 * PATCH,
            patch_size=PATCH,
            num_classes=widths.embed,
            dim=widths.image,
            depth=widths.image_depth,
            heads=widths.image // HEAD_WIDTH,
            mlp_dim=4 * widths.image,
        )

    def prepare(self, pairs: Sequence[RealPair], device: torch.device) -> Slots:
        """Rows of at most 1,024 tokens, filled first-fit from the longest down."""
        rows: list[list[RealPair]] = []
        for real in sorted(pairs, key=lambda real: -real.pair.lengths[0]):
            for row in rows:
                if sum(other.pair.lengths[0] for other in (*row, real)) <= ROW_TOKENS:
                    row.append(real)
                    break
            else:
                rows.append([real])
        images = [[_native(real).to(device) for real in row] for row in rows]
        return images, _text_slots([real for row in rows for real in row]).to(device)

    def embed_images(self, batch: Slots) -> Tensor:
        """Row after row."""
        return self.tower(batch[0])


def _open_clip_main(widths: Widths) -> Towers:
    from benchmarks.open_clip_main import OpenClipMain

    return OpenClipMain(widths)


PROJECTS: dict[str, Callable[[Widths], Towers]] = {
    "navit_clip": Ours,
    "open_clip": OpenClip,
    "open_clip_main": _open_clip_main,
    "timm_naflex": TimmNaFlex,
    "vit_pytorch": VitPytorch,
}


def _text_slots(pairs: Sequence[RealPair]) -> Tensor:
    captions = [real.pair.token_ids for real in pairs]
    return torch.tensor([ids + [0] * (CONTEXT - len(ids)) for ids in captions])


def padded(images: Sequence[ImagePatches], device: torch.device) -> dict[str, Tensor]:
    """Images as timm's NaFlexViT takes them, all as long as the longest."""
    fields = {
        "patches": [torch.tensor(image.patches) / 127.5 - 1 for image in images],
        "patch_coord": [torch.tensor(image.coords, dtype=torch.int64) for image in images],
        "patch_valid": [torch.ones(len(image.patches), dtype=torch.bool) for image in images],
    }
    return {name: pad_sequence(f, batch_first=True).to(device) for name, f in fields.items()}


def _native(real: RealPair) -> Tensor:
    """float32 [3, rows·P, columns·P] pixels of which this project's patches are cut."""
    rows, columns = real.pair.image.grid
    return real.pixels(rows * PATCH, columns * PATCH).contiguous()
