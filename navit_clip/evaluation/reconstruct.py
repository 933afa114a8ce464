"""How well a masked image model predicts the hidden patches of images, and a picture of it.

Which patches of an image are hidden depends on its pixels alone, so that evaluations compare,
during training too.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from navit_clip.data.decode import EncodedImage
from navit_clip.data.drop import hide_patches
from navit_clip.data.seeding import generator
from navit_clip.errors import SkipSampleError, UserError
from navit_clip.evaluation.cache import bytes_digest, tensors_digest
from navit_clip.evaluation.datasets import EvalDataset, open_images
from navit_clip.evaluation.embed import Embedded
from navit_clip.evaluation.evaluator import EmbeddingEvaluator, EvalSpec, make_row
from navit_clip.evaluation.models import Model, PackedMaskedImage, Sizer
from navit_clip.evaluation.report.pictures import read_images
from navit_clip.evaluation.report.samples import ReportSamples
from navit_clip.evaluation.results import Metric, Row
from navit_clip.evaluation.settings import EvalSetting
from navit_clip.files import write_output
from navit_clip.inference.embed import embed_streams
from navit_clip.losses.masked_pixels import patch_errors
from navit_clip.models.flops import LengthSums, decoder_flops, image_flops
from navit_clip.packed.images import ImagePatches
from navit_clip.packed.masked import pack_masked

_SAMPLES, _COLUMNS = 8, 2  # of the picture
_BOX, _GAP = 200, 8  # pixels: longest side of an image in it, and what is between them


@dataclass(frozen=True, kw_only=True)
class ReconstructSpec(EvalSpec):
    """Prediction of hidden patches.

    Attributes:
        data: A folder, with all images below it, or shards.
        rate: Fraction of an image's patches that are hidden, at least one and not all.
    """

    data: str
    rate: float = 0.75

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.rate < 1:
            raise ValueError(f"rate must lie in [0, 1), got {self.rate}")

    @property
    def data_name(self) -> str:
        """The images."""
        return self.data


class _Predictor(PackedMaskedImage):
    """A masked image model that makes of an image no features but two errors, see `_embed`."""

    def __init__(self, model: PackedMaskedImage, rate: float) -> None:
        super().__init__(model.model, model.name, model.precision, model.around)
        self.sizer = partial(_size, self.sizer)
        self._rate = rate

    def visible(self, image: ImagePatches) -> np.ndarray:
        """Which patches of an image are not hidden."""
        rng = generator("reconstruct", bytes_digest(image.patches.tobytes()).hex())
        return hide_patches(len(image.patches), self._rate, rng)

    def _embed(self, images: Sequence[ImagePatches]) -> Tensor:
        """float32 [E, 2]: squared errors of the predictions, and of a grey as each patch's mean."""

        def errors(batch: Sequence[ImagePatches]) -> Tensor:
            inputs = pack_masked(batch, [self.visible(image) for image in batch]).to(self._device)
            segments, patches = inputs.whole.segments, inputs.whole.patches
            pixels_TK = self.model(inputs).pixels_TK
            both = [patch_errors(pixels, patches) for pixels in (pixels_TK, pixels_TK.new_zeros(1))]
            error_T2 = torch.stack(both, 1) * inputs.weights[:, None]
            sums = error_T2.new_zeros(len(segments.lengths), 2).index_add(0, segments.ids, error_T2)
            return sums[inputs.whole.order]

        return embed_streams(2, images, lambda image: len(image.patches), errors)

    def image_flops(self, tokens: int) -> int:
        """By `navit_clip.models.flops`: the patches that the tower sees, and all to predict."""
        config, seen = self.model.config, tokens
        if config.decoder is not None:
            seen = len(hide_patches(tokens, self._rate, np.random.default_rng(0)))
        sums = LengthSums.of([seen]), LengthSums.of([tokens])
        return image_flops(self._image, 0, seen) + decoder_flops(config, *sums)

    @cached_property
    def fingerprint(self) -> str:
        """Of the decoder too, and of how much is hidden."""
        return tensors_digest(
            self.model.state_dict(),
            repr(self.model.config),
            repr(self.preprocess),
            self._device.type,
            self.precision,
            f"hidden {self._rate}",
        )


def _size(sizer: Sizer, image: EncodedImage, setting: EvalSetting) -> Any:
    sized = sizer(image, setting)
    if len(sized.patches) < 2:
        raise SkipSampleError("one_patch", "the image has a single patch, none to predict")
    return sized


class Reconstruct(EmbeddingEvaluator[ReconstructSpec]):
    """Predicts hidden patches."""

    kind = "reconstruct"
    title = "Reconstruction"
    description = "hidden patches of images as a masked image model predicts them"
    gallery = "sample images, masked, predicted and whole"
    draws_in_training = True
    Spec = ReconstructSpec
    METRICS: ClassVar = {
        # Fraction of the hidden patches' variance.
        "explained": Metric("explained", is_headline=True),
        "loss": Metric("loss", lower_is_better=True, is_fraction=False),
    }
    counted = "patches"

    def accept(self, model: Model) -> None:
        """Models with a decoder, at the size of patches that it predicts."""
        if not isinstance(model, PackedMaskedImage):
            raise UserError(f"{model.name} predicts no pixels: give a masked image model")
        if model.patch_size != model.model.config.image.patch_size:
            raise UserError(
                f"--patch-size: {model.name} predicts patches of its own size: leave it out"
            )

    def open(self) -> EvalDataset:
        """Opens the images."""
        return open_images(self.spec.data)

    def adapted(self, model: Model) -> _Predictor:
        """The same model, of errors in place of features."""
        assert isinstance(model, PackedMaskedImage)
        return _Predictor(model, self.spec.rate)

    def count(self, data: Embedded) -> int:
        """Of all images at the model's own setting."""
        return sum(data.lengths[self.model.own_setting])

    def score(self, model: Model, data: Embedded, texts_TD: Tensor) -> Iterator[Row]:
        """Means over images at every setting."""
        for setting, errors_E2 in data.embeddings.items():
            yield make_row(model, data, setting, partial(_metrics, errors_E2.double()))

    def samples(self) -> ReportSamples:
        """The picture."""
        return ReportSamples(drawing=self._draw())

    def draw_gallery(self, path: Path) -> None:
        """Writes the picture."""
        write_output(path, self._draw())

    def _draw(self) -> bytes:
        """A PNG of evenly spaced images of the data, each masked, predicted and whole."""
        assert isinstance(self.model, _Predictor)
        names, setting = self.data.names, self.model.own_setting
        chosen = np.linspace(0, len(names) - 1, min(_SAMPLES, len(names))).round().astype(int)
        encoded = read_images(self.dataset, {names[i] for i in chosen})
        # Of a cached evaluation an image may be gone.
        found = [encoded[names[i]] for i in chosen if names[i] in encoded]
        cell = 3 * (_BOX + _GAP) + _GAP
        rows = -(-len(found) // _COLUMNS)
        size = _COLUMNS * cell + _GAP, rows * (_BOX + _GAP) + _GAP
        canvas = Image.new("RGB", size, "white")
        for place, data in enumerate(found):
            image = self.model.sizer(EncodedImage(data, self.spec.max_pixels), setting)
            whole, masked, predicted = self.model.model.predict_hidden(
                image, self.model.visible(image)
            )
            left, top = place % _COLUMNS * cell + _GAP, place // _COLUMNS * (_BOX + _GAP) + _GAP
            for column, pixels in enumerate((masked, predicted, whole)):
                canvas.paste(_shrunk(pixels), (left + column * (_BOX + _GAP), top))
        file = io.BytesIO()
        canvas.save(file, format="PNG")
        return file.getvalue()


def _metrics(errors_E2: Tensor, index: Tensor) -> dict[str, float]:
    error, grey = errors_E2[index].mean(0).tolist()
    return {"explained": 1 - error / grey if grey else float("nan"), "loss": error}


def _shrunk(pixels: np.ndarray) -> Image.Image:
    """An image with its longest side that of the box; enlarged it shows its pixels."""
    image = Image.fromarray(pixels)
    scale = _BOX / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    how = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    return image.resize((width, height), how)
