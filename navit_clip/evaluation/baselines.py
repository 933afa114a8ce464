"""Models of open_clip as baselines, on the same images and captions.

A baseline gets what its authors gave it: open_clip's own evaluation transform, its own tokenizer
padded to its context, squares only. Weights come from a local file; nothing is downloaded.
"""

from __future__ import annotations

import difflib
import logging
import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from navit_clip.data.decode import EncodedImage
from navit_clip.errors import UserError
from navit_clip.evaluation.cache import tensors_digest
from navit_clip.evaluation.models import Model
from navit_clip.evaluation.settings import EvalSetting
from navit_clip.precision import Precision, autocast

_STRIDE = 32  # pixels per position of the last feature map of the convolutional models
_IMAGES = 64  # per forward pass; texts come in blocks already


def _size(
    transforms: Mapping[int, Callable[[Image.Image], Tensor]],
    image: EncodedImage,
    setting: EvalSetting,
) -> np.ndarray:
    """Float32 [3, S, S], normalised by open_clip's transform for the side S."""
    assert setting.side is not None
    pixels_HWK = image.pixels(image.height, image.width, reduced=False)
    # An array, not a tensor: tensors from worker processes take a file descriptor each.
    return transforms[setting.side](Image.fromarray(pixels_HWK)).numpy()


class OpenClipModel(Model):
    """A model of open_clip.

    Args:
        architecture: Its name there, such as ``ViT-B-32``.
        weights: A checkpoint that open_clip reads; None with `seed`.
        seed: Of random weights, for measuring; None with `weights`.
        device: Where it computes.
        sides: Squares beside its own; positions are interpolated to those that the model can take,
            see `check`.
        precision: Of forward passes.

    Raises:
        UserError: If there is no such model or its weights cannot be read.
    """

    def __init__(
        self,
        architecture: str,
        weights: Path | None,
        seed: int | None,
        device: torch.device,
        sides: Sequence[int] = (),
        precision: Precision = "fp32",
    ) -> None:
        random = f" (random weights, seed {seed})" if weights is None else ""
        self.name = f"open_clip:{architecture}{random}"
        self._device, self.precision = device, precision
        self._embed_dim = int(_config(architecture)["embed_dim"])
        if weights is None and seed is None:
            raise UserError(
                f"open_clip:{architecture} needs its weights: give --weights FILE for --model or "
                "--baseline-weights FILE for --baseline, or --random-weights SEED to measure only"
            )
        self._own: Any = _create(architecture, weights, seed, None).to(device)
        side = _own_side(self._own)
        self.own_setting = EvalSetting("square", side)
        self._models: dict[int, Any] = {side: self._own}
        patch = _patch_size(self._own)
        self._stride = patch or _STRIDE
        self._refused: dict[int, str] = {}
        for other in sorted(set(sides) - {side}):
            if patch and other % patch:
                self._refused[other] = f"no whole number of its patches of {patch} pixels"
                continue
            try:
                self._models[other] = _create(architecture, weights, seed, other).to(device)
            except UserError as error:
                self._refused[other] = str(error)
        from open_clip import get_tokenizer
        from open_clip.transform import PreprocessCfg, image_transform_v2

        self._tokenizer: Callable[[list[str]], Tensor] = get_tokenizer(architecture)
        transforms = {
            side: image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)
            for side, model in self._models.items()
        }
        self.sizer = partial(_size, transforms)

    def check(self, setting: EvalSetting) -> None:
        """Takes squares only."""
        if setting.side is None:
            option = "--native" if setting.kind == "native" else f"--max-tokens {setting.size}"
            raise UserError(f"{self.name} takes squares only: leave out {option}")
        if setting.side not in self._models:
            why = self._refused.get(setting.side, "not asked for when it was loaded")
            raise UserError(f"{self.name} cannot take --square {setting.side}: {why}")

    def length(self, sized: np.ndarray) -> int:
        """Patches, or positions of a convolutional model's last feature map."""
        return (sized.shape[-1] // self._stride) ** 2

    @torch.inference_mode()
    def embed_images(self, images: Sequence[np.ndarray]) -> Tensor:
        """In batches of squares, which need no padding."""
        parts = [torch.zeros(0, self._embed_dim)]
        for start in range(0, len(images), _IMAGES):
            batch = torch.from_numpy(np.stack(images[start : start + _IMAGES])).to(self._device)
            model = self._models[batch.shape[-1]]
            with autocast(self.precision, self._device):
                vectors = model.encode_image(batch, normalize=True)
            parts.append(vectors.float().cpu())
        return torch.cat(parts)

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Padded to the model's context."""
        if not texts:
            return torch.zeros(0, self._embed_dim)
        ids = self._tokenizer(list(texts)).to(self._device)
        with autocast(self.precision, self._device):
            vectors: Tensor = self._own.encode_text(ids, normalize=True)
        return vectors.float().cpu()

    @property
    def scale(self) -> float:
        """The learned scale."""
        return self._own.logit_scale.exp().item()

    def image_flops(self, tokens: int) -> int:
        """Counted in a forward pass of the image tower at the side with so many tokens."""
        return self._flops[tokens]

    @cached_property
    def _flops(self) -> dict[int, int]:
        counted = {}
        for side, model in self._models.items():
            image_1CHW = torch.zeros(1, 3, side, side, device=self._device)
            # With gradients and by plain products: the counter does not know the fused kernels
            # that inference takes.
            with (
                torch.enable_grad(),
                sdpa_kernel(SDPBackend.MATH),
                FlopCounterMode(display=False) as counter,
            ):
                model.visual(image_1CHW)
            counted[(side // self._stride) ** 2] = counter.get_total_flops()
        return counted

    @cached_property
    def fingerprint(self) -> str:
        """Of weights at all sides, the transforms, open_clip's version, precision and device."""
        from open_clip import __version__

        return tensors_digest(
            self._own.state_dict(),
            self.name,
            repr(sorted(self._own.visual.preprocess_cfg.items(), key=str)),
            __version__,
            self._device.type,
            self.precision,
        )


def _config(architecture: str) -> dict[str, Any]:
    from open_clip import get_model_config, list_models

    known = list_models()
    if architecture not in known:
        near = difflib.get_close_matches(architecture, known, 3)
        hint = f"did you mean {' or '.join(near)}?" if near else "see open_clip.list_models()"
        raise UserError(f"open_clip has no model {architecture!r}: {hint}")
    config = get_model_config(architecture)
    hub = {"hf_model_name", "hf_tokenizer_name"} & config["text_cfg"].keys()
    if hub:
        raise UserError(
            f"open_clip's {architecture} reads texts with "
            f"{config['text_cfg'][sorted(hub)[0]]} of the Hugging Face Hub, and nothing is "
            "downloaded here: choose a model with open_clip's own tokenizer"
        )
    return config


def _create(
    architecture: str, weights: Path | None, seed: int | None, side: int | None
) -> nn.Module:
    """A model for squares of a side, its own if None, in evaluation mode on the host."""
    from open_clip import create_model

    if weights is not None and not weights.is_file():
        raise UserError(f"no weights at {weights}: give a checkpoint that open_clip reads")
    path = None if weights is None else str(weights.resolve())
    # open_clip warns of random weights, which are asked for here.
    logging.disable(logging.WARNING)
    try:
        # Random weights have to be the same on all ranks, and the caller's draws his own.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed or 0)  # a GPU's stay as they are
            model = create_model(architecture, path, force_image_size=side, weights_only=True)
    # Whatever a damaged or foreign checkpoint makes torch and open_clip stumble over.
    except Exception as error:
        if weights is None:
            what = f"open_clip's {architecture} does not take side {side}"
        elif isinstance(error, (UnpicklingError, EOFError, IndexError)):
            # torch's message recommends to load it without checks.
            raise UserError(f"weights {weights} are no checkpoint of plain tensors") from error
        else:
            what = f"weights {weights} do not fit open_clip's {architecture}"
        raise UserError(f"{what}: {textwrap.shorten(str(error), 200)}") from error
    finally:
        logging.disable(logging.NOTSET)
    return model.eval()


def _own_side(model: Any) -> int:
    size = model.visual.preprocess_cfg["size"]
    height, width = (size, size) if isinstance(size, int) else size
    if height != width:
        raise UserError(f"the model wants {height}×{width} pixels: only squares are supported")
    return int(height)


def _patch_size(model: Any) -> int | None:
    """Of a vision transformer, open_clip's or timm's; None for the others."""
    visual = model.visual
    embed = getattr(getattr(visual, "trunk", None), "patch_embed", None)
    size = getattr(embed, "patch_size", None) or getattr(visual, "patch_size", None)
    return int(size if isinstance(size, int) else size[0]) if size else None
