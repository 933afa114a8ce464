"""Evaluating zero-shot: this project's packed towers against open_clip's squares and 77 slots.

Towers of the same widths, depths and patch, with random weights, on the same photos and ImageNet's
own prompts. Each side prepares its images as it does in an evaluation: this one through
`navit_clip.evaluation.embed` (Pillow's full decode, bicubic to the grid of at most so many tokens),
open_clip through its own `image_transform` (Pillow, 224 px squares: 196 tokens); prompts go through
the same module here and open_clip's `build_zero_shot_classifier` there. Everything happens in this
process, decoding included, in turn, on one thread by default, which other work on the machine
disturbs least.

Results are seconds of the same work, so a part of the prompts and photos is enough: by default
what takes a few minutes on two cores. Without photos only the prompts are measured.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip import IMAGENET_CLASSNAMES, SIMPLE_IMAGENET_TEMPLATES
from PIL import Image
from torch import Tensor

from benchmarks.command import command
from benchmarks.measure import alternate
from benchmarks.pairs import REAL_DATA, samples_of
from benchmarks.sizes import CONTEXT, PATCH, SQUARE, WIDTHS
from navit_clip.commands import number
from navit_clip.data.decode import IMAGE_EXTENSIONS, EncodedImage, find_image
from navit_clip.distributed import Ranks
from navit_clip.errors import UserError
from navit_clip.evaluation.datasets import EvalDataset, Item
from navit_clip.evaluation.embed import Embedded, embed_dataset, embed_texts
from navit_clip.evaluation.models import PackedModel
from navit_clip.evaluation.settings import EvalSetting
from navit_clip.evaluation.zeroshot import class_prompts, class_vectors
from navit_clip.inference.preprocess import Preprocess
from navit_clip.model import NaViTCLIP
from navit_clip.tokenizers.clip_bpe import OpenClipTokenizer

SIZE = "S/16"
SETS = ("coco-val", "coco-test", "imagenet-sample", "caltech-sample", "flickr8k-dev")
TOKENS = (196, 98)  # what the square has, and half of it
BATCH = 64  # images of open_clip's; ours come in blocks of as many
ALONE = Ranks(0, 1, torch.device("cpu"))


class Photos(EvalDataset):
    """Encoded images in memory."""

    def __init__(self, images: Sequence[bytes]) -> None:
        self.images = images

    def read(self, part: int, parts: int) -> Iterator[Item]:
        """All of them; there is one part."""
        for index, data in enumerate(self.images):
            yield Item(index, str(index), data)


def find_photos(root: Path, most: int) -> list[bytes]:
    """At most so many photos, evenly from the sets there.

    Raises:
        UserError: If there is none.
    """
    files = sorted(
        path
        for name in SETS
        for path in (root / name).rglob("*")
        if path.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS
    )
    shards = [str(shard) for name in SETS for shard in sorted((root / name).glob("*.tar"))]
    found = [path.read_bytes() for path in files]
    found += [find_image(sample.members) for sample in samples_of(shards)] if shards else []
    if not found:
        raise UserError(f"no photos in {', '.join(SETS)} under {root}: give --data DIR")
    step = max(1.0, len(found) / most)
    return [found[int(i * step)] for i in range(min(most, len(found)))]


class Packed:
    """This project's evaluation."""

    def __init__(self) -> None:
        model = NaViTCLIP(WIDTHS[SIZE].config(), OpenClipTokenizer(), Preprocess(TOKENS[0]))
        self.model = PackedModel(model.eval(), "packed")

    def prepare(self, photos: Photos, tokens: int) -> None:
        """Decodes and sizes."""
        for data in photos.images:
            self.model.sizer(EncodedImage(data), EvalSetting("capped", tokens))

    def images(self, photos: EvalDataset, tokens: int) -> Embedded:
        """Decodes, sizes and embeds."""
        models = [(self.model, [EvalSetting("capped", tokens)])]
        (data,) = embed_dataset(models, photos, ALONE, workers=0)
        return data

    def classes(self, names: Sequence[str]) -> Tensor:
        """Class vectors [C, D] of all prompts."""
        prompts = class_prompts(names, SIMPLE_IMAGENET_TEMPLATES)
        return class_vectors(embed_texts(self.model, prompts, ALONE, None), len(names))


class Squares:
    """open_clip's evaluation."""

    def __init__(self) -> None:
        self.model = open_clip.CLIP(**WIDTHS[SIZE].open_clip_config()).eval()
        self.transform = open_clip.image_transform(SQUARE, is_train=False)
        self.tokenizer = open_clip.SimpleTokenizer(context_length=CONTEXT)

    def prepare(self, images: Sequence[bytes]) -> Tensor:
        """Squares [E, 3, 224, 224]."""
        return torch.stack([self.transform(Image.open(io.BytesIO(data))) for data in images])

    @torch.no_grad()
    def images(self, photos: Photos) -> Tensor:
        """Decodes, crops and embeds; [E, D]."""
        starts = range(0, len(photos.images), BATCH)
        squares = (self.prepare(photos.images[i : i + BATCH]) for i in starts)
        return torch.cat([self.model.encode_image(batch, normalize=True) for batch in squares])

    def classes(self, names: Sequence[str]) -> Tensor:
        """Class vectors [D, C] of all prompts."""
        return open_clip.build_zero_shot_classifier(
            self.model, self.tokenizer, names, SIMPLE_IMAGENET_TEMPLATES
        )


def measure_prompts(
    ours: Packed, peer: Squares, names: Sequence[str], rounds: int
) -> dict[str, Any]:
    """Class vectors of the classes' prompts."""
    variants = {"packed": partial(ours.classes, names), "open_clip": partial(peer.classes, names)}
    seconds = alternate(variants, rounds)
    prompts = [template(name) for name in names for template in SIMPLE_IMAGENET_TEMPLATES]
    lengths = [len(ours.model.tokenizer.encode(prompt, CONTEXT)) for prompt in prompts]
    return {
        "ratio_prompts": seconds["open_clip"] / seconds["packed"],
        "prompts": len(prompts),
        "mean_prompt_tokens": sum(lengths) / len(prompts),
        "prompts_seconds": seconds,
    }


def measure_images(ours: Packed, peer: Squares, photos: Photos, rounds: int) -> dict[str, Any]:
    """Image vectors, and how long preparing the images takes without any tower."""
    mean_tokens = {}
    for tokens in TOKENS:
        data = ours.images(photos, tokens)
        assert len(data.names) == len(photos.images), "both sides must do the same work"
        lengths = data.lengths[EvalSetting("capped", tokens)]
        mean_tokens[str(tokens)] = sum(lengths) / len(lengths)
    embedding: dict[str, Callable[[], object]] = {"open_clip": partial(peer.images, photos)}
    preparing: dict[str, Callable[[], object]] = {"open_clip": partial(peer.prepare, photos.images)}
    for tokens in TOKENS:
        embedding[f"packed_{tokens}"] = partial(ours.images, photos, tokens)
        preparing[f"packed_{tokens}"] = partial(ours.prepare, photos, tokens)
    seconds = alternate(embedding, rounds)
    return {
        **{f"ratio_images_{t}": seconds["open_clip"] / seconds[f"packed_{t}"] for t in TOKENS},
        "images": len(photos.images),
        "mean_image_tokens": mean_tokens,
        "images_seconds": seconds,
        "preparation_seconds": alternate(preparing, rounds),
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Prompts, and photos where there are any."""
    try:
        photos = Photos(find_photos(args.data, args.images))
    except UserError as error:
        photos = None
        print(f"benchmarks.evaluation: images skipped: {error}", file=sys.stderr)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    ours, peer = Packed(), Squares()
    step = max(1, len(IMAGENET_CLASSNAMES) // args.classes)
    result = measure_prompts(ours, peer, IMAGENET_CLASSNAMES[::step][: args.classes], args.rounds)
    if photos is not None:
        result |= measure_images(ours, peer, photos, args.rounds)
    return {**result, "towers": SIZE, "patch": PATCH, "square": SQUARE}


main = command(
    __doc__,
    measure,
    "rounds",
    data={"type": Path, "default": REAL_DATA, "help": f"folder of {', '.join(SETS)}"},
    images={"type": number(1), "default": 48, "help": "photos, evenly from all"},
    classes={"type": number(1), "default": 40, "help": "ImageNet's classes, of 1,000"},
    threads={"type": number(1), "default": 1, "help": "of torch, for both sides"},
)


if __name__ == "__main__":
    main()
