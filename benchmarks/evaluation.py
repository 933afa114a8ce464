"""Evaluating zero-shot: this project's packed towers against open_clip's squares and 77 slots.

Towers of the same widths, depths and patch, with random weights, on the same photos and ImageNet's
own prompts. Each side prepares its images as it does in an evaluation: this one through
`navit_clip.evaluation.embed` (Pillow's full decode, bicubic to the grid of at most so many tokens),
open_clip through its own `image_transform` (Pillow, 224 px squares: 196 tokens); prompts go through
`navit_clip.evaluation.texts` here and open_clip's `build_zero_shot_classifier` there. Everything
happens in this process, decoding included, in turns, on one thread by default, which other work on
the machine disturbs least.

Figures are seconds of the same work, so a share of the prompts and photos is enough: by default
what takes a few minutes on two cores.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from open_clip import (
    IMAGENET_CLASSNAMES,
    SIMPLE_IMAGENET_TEMPLATES,
    SimpleTokenizer,
    build_zero_shot_classifier,
    image_transform,
)
from PIL import Image
from torch import Tensor, nn

from benchmarks.measure import alternate, output_argument, report
from benchmarks.pairs import CONTEXT, PATCH, REAL_DATA, SQUARE, samples_of
from benchmarks.peers import WIDTHS, OpenClip, Ours
from navit_clip.data.decode import IMAGE_EXTENSIONS, EncodedImage, find_image
from navit_clip.distributed import Ranks
from navit_clip.errors import UserError, one_line_errors
from navit_clip.evaluation.datasets import EvalDataset, Item
from navit_clip.evaluation.embed import Embedded, embed_dataset
from navit_clip.evaluation.models import PackedModel
from navit_clip.evaluation.settings import EvalSetting
from navit_clip.evaluation.texts import share_texts
from navit_clip.evaluation.zeroshot import class_vectors
from navit_clip.inference.preprocess import Preprocess
from navit_clip.model import NaViTCLIP
from navit_clip.tokenizers.clip_bpe import OpenClipTokenizer

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
            yield Item((0, index), str(index), data)


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


class PackedSide:
    """This project's evaluation."""

    def __init__(self, model: nn.Module) -> None:
        assert isinstance(model, Ours)
        packed = NaViTCLIP(model.clip.config, OpenClipTokenizer(), Preprocess(TOKENS[0]))
        packed.load_state_dict(model.clip.state_dict())
        self.model = PackedModel(packed.to(model.clip.device).eval(), "packed")

    def images(self, photos: EvalDataset, tokens: int) -> Embedded:
        """Decodes, sizes and embeds."""
        (data,) = embed_dataset(
            [(self.model, [EvalSetting("capped", tokens)])], photos, ALONE, workers=0
        )
        return data

    def classes(self, names: Sequence[str]) -> Tensor:
        """Class vectors [C, D] of all prompts."""
        prompts = [template(name) for name in names for template in SIMPLE_IMAGENET_TEMPLATES]
        told = share_texts(self.model, prompts, ALONE, None)
        return class_vectors(told, names, SIMPLE_IMAGENET_TEMPLATES)


class SquareSide:
    """open_clip's evaluation."""

    def __init__(self, model: nn.Module) -> None:
        assert isinstance(model, OpenClip)
        self.model = model.clip.eval()
        self.transform = image_transform(SQUARE, is_train=False)
        self.tokenizer = SimpleTokenizer(context_length=CONTEXT)

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
        return build_zero_shot_classifier(
            self.model, self.tokenizer, names, SIMPLE_IMAGENET_TEMPLATES
        )


def measure_prompts(
    ours: PackedSide, peer: SquareSide, names: Sequence[str], rounds: int
) -> dict[str, Any]:
    """Class vectors of the classes' prompts."""
    seconds = alternate(
        {"packed": lambda: ours.classes(names), "open_clip": lambda: peer.classes(names)}, rounds
    )
    encode = ours.model.tokenizer.encode
    prompts = [template(name) for name in names for template in SIMPLE_IMAGENET_TEMPLATES]
    tokens = sum(len(encode(prompt, CONTEXT)) for prompt in prompts)
    return {
        "ratio_prompts": seconds["open_clip"] / seconds["packed"],
        "prompts": len(prompts),
        "mean_prompt_tokens": tokens / len(prompts),
        "prompts_seconds": seconds,
    }


def measure_images(
    ours: PackedSide, peer: SquareSide, photos: Photos, rounds: int
) -> dict[str, Any]:
    """Image vectors, and how long preparing the images takes without any tower."""
    embedded = {tokens: ours.images(photos, tokens) for tokens in TOKENS}
    for data in embedded.values():
        assert len(data.names) == len(photos.images), "both sides must do the same work"
    seconds = alternate(
        {
            "open_clip": lambda: peer.images(photos),
            **{f"packed_{t}": lambda t=t: ours.images(photos, t) for t in TOKENS},  # type: ignore[misc]
        },
        rounds,
    )
    return {
        **{f"ratio_images_{t}": seconds["open_clip"] / seconds[f"packed_{t}"] for t in TOKENS},
        "images": len(photos.images),
        "mean_image_tokens": {
            str(t): sum(data.lengths[EvalSetting("capped", t)]) / len(data.names)
            for t, data in embedded.items()
        },
        "images_seconds": seconds,
        "preparation_seconds": alternate(
            {
                "open_clip": lambda: peer.prepare(photos.images),
                **{f"packed_{t}": lambda t=t: _size_all(ours, photos, t) for t in TOKENS},  # type: ignore[misc]
            },
            rounds,
        ),
    }


def _size_all(ours: PackedSide, photos: Photos, tokens: int) -> None:
    for data in photos.images:
        ours.model.size(EncodedImage(data), EvalSetting("capped", tokens))


def _arguments() -> argparse.Namespace:
    parser = output_argument(__doc__)
    parser.add_argument("--data", type=Path, default=REAL_DATA, help=f"folder of {', '.join(SETS)}")
    parser.add_argument("--images", type=int, default=48, help="photos, evenly from all")
    parser.add_argument("--classes", type=int, default=40, help="ImageNet's classes, of 1,000")
    parser.add_argument("--rounds", type=int, default=3, help="measured passes of each")
    parser.add_argument("--threads", type=int, default=1, help="of torch, for both sides")
    return parser.parse_args()


def main() -> None:
    """The command line."""
    args = _arguments()
    with one_line_errors("benchmarks.evaluation"):
        for name in ("images", "classes", "rounds", "threads"):
            if getattr(args, name) < 1:
                raise UserError(f"--{name} must be at least 1, got {getattr(args, name)}")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    ours, peer = PackedSide(Ours(WIDTHS["S/16"])), SquareSide(OpenClip(WIDTHS["S/16"]))
    step = max(1, len(IMAGENET_CLASSNAMES) // args.classes)
    result = measure_prompts(ours, peer, IMAGENET_CLASSNAMES[::step][: args.classes], args.rounds)
    try:
        photos = Photos(find_photos(args.data, args.images))
        result |= measure_images(ours, peer, photos, args.rounds)
    except UserError as error:
        print(f"benchmarks.evaluation: images skipped: {error}", file=sys.stderr)
    report(
        {
            **{key: value for key, value in sorted(result.items()) if key.startswith("ratio")},
            **result,
            "towers": "S/16",
            "patch": PATCH,
            "square": SQUARE,
            "rounds": args.rounds,
        },
        args.output,
    )


if __name__ == "__main__":
    main()
