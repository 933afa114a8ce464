"""Real pairs for the benchmarks of training: photos at sampled sizes, and their captions as ids.

By default COCO's and Flickr8k's beside the checkout in ../shared/data, sides ~ U(64, 256), never
enlarged. Everything that a loader does (decode, resize, cut, tokenise) happens here, before the
clock runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.sizes import CONTEXT, PATCH
from navit_clip.data.builders.base import Origin
from navit_clip.data.builders.pairs import Pair, PairBuilder
from navit_clip.data.config import DataConfig
from navit_clip.data.decode import EncodedImage, find_image
from navit_clip.data.drop import DropConfig
from navit_clip.data.patterns import expand_shards
from navit_clip.data.raw_sample import RawSample
from navit_clip.data.shards import ShardError, read_shard
from navit_clip.data.sizing import ResolutionConfig
from navit_clip.errors import SkipSampleError, UserError
from navit_clip.tokenizers.clip_bpe import OpenClipTokenizer

MIN_SIDE, MAX_SIDE = 64, 256
MAX_TOKENS = (MAX_SIDE // PATCH) ** 2
FOLDERS = ("coco-train", "flickr8k-train")
REAL_DATA = Path(__file__).parents[2] / "shared" / "data"
COCO = str(REAL_DATA / "coco-train")  # where whole shards are read


@dataclass(frozen=True)
class RealPair:
    """One photo and caption: as this project's loader makes them, and the files themselves."""

    pair: Pair
    sample: RawSample

    def pixels(self, height: int, width: int) -> Tensor:
        """float32 [3, height, width] normalised pixels, squashed to this size."""
        pixels = EncodedImage(find_image(self.sample.members)).pixels(height, width)
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 127.5 - 1


def read_samples(patterns: Sequence[str] = ()) -> list[RawSample]:
    """The samples of real shards; without patterns those beside the checkout.

    Raises:
        UserError: If there are none, or a shard is damaged.
    """
    patterns = patterns or default_shards()
    if not patterns:
        raise UserError(f"no photos under {REAL_DATA}: give --shards")
    return list(samples_of(patterns))


def default_shards() -> list[str]:
    """The folders of photos beside the checkout, those that are there."""
    return [str(path) for path in map(REAL_DATA.joinpath, FOLDERS) if path.is_dir()]


def samples_of(patterns: Sequence[str]) -> Iterator[RawSample]:
    """The samples of shards, one by one.

    Raises:
        UserError: If there are no shards, or one is damaged: what is measured must be whole.
    """
    for shard in expand_shards(patterns):
        try:
            yield from read_shard(shard)
        except ShardError as error:
            raise UserError(f"cannot read a shard: {error}") from error


def draw_batches(
    samples: Sequence[RawSample], pairs: int, batches: int, drop: float = 0.0
) -> Iterator[list[RealPair]]:
    """Batches that are together a fair sample of all photos, the same ones at every call.

    Every photo gets its size; of all of them in the order of their lengths every k-th is taken, so
    that a few hundred pairs have the mean cost of thousands.

    Args:
        samples: From `read_samples`.
        pairs: Pairs of each batch.
        batches: How many batches.
        drop: Mean of the Beta token drop; 0 keeps all patches.

    Raises:
        UserError: If too few samples have a photo and a caption.
    """
    sides = ResolutionConfig(min_side=MIN_SIDE, max_side=MAX_SIDE, max_tokens=MAX_TOKENS)
    dropped = DropConfig(kind="beta", rate=drop) if drop else DropConfig()
    build = pair_builder(DataConfig(resolution=sides, drop=dropped))
    drawn = []
    for sample in samples:
        with suppress(SkipSampleError):
            drawn.append(RealPair(build(sample, Origin(0, 0, 0, 0)), sample))
    if len(drawn) < pairs * batches:
        raise UserError(f"{len(drawn)} photos with captions cannot make {batches} × {pairs} pairs")
    drawn.sort(key=lambda real: real.pair.lengths[0])
    taken = [drawn[i] for i in np.linspace(0, len(drawn) - 1, pairs * batches).round().astype(int)]
    order = np.random.default_rng(0).permutation(pairs)
    for number in range(batches):
        batch = taken[number::batches]
        yield [batch[i] for i in order]


def pair_builder(config: DataConfig) -> PairBuilder:
    """Builds pairs as configured, of patches and open_clip's tokens."""
    tokenizer = OpenClipTokenizer()
    return PairBuilder(
        config.resolution, config.drop, PATCH, 64, 0, {"txt": 1.0}, tokenizer, CONTEXT
    )
