"""NaViTCLIP, the model as users know it: images and sentences in, vectors out.

The towers are `navit_clip.models.clip.CLIP`'s, which the trainer trains; here stands what a user
needs around them. Images of any form are checked and sized by `navit_clip.inference.images`;
packing and forward passes are `navit_clip.inference.embed`'s, which the evaluation uses too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from navit_clip.data.in_memory import ImageInput
from navit_clip.errors import UserError
from navit_clip.export.card import LIBRARY, TAGS, TASK
from navit_clip.export.description import Description
from navit_clip.export.hub import PretrainedModel
from navit_clip.inference.cascade import classify_twice
from navit_clip.inference.embed import image_vectors, text_vectors
from navit_clip.inference.images import size_images
from navit_clip.inference.preprocess import Preprocess
from navit_clip.models.clip import CLIP, CLIPConfig
from navit_clip.tokenizers.base import Tokenizer

if TYPE_CHECKING:
    from typing_extensions import Self

PLAIN_TEMPLATE = "a photo of a {}."

_PROMPTS = 4096  # whose vectors are held at once


class NaViTCLIP(CLIP, PretrainedModel, library_name=LIBRARY, pipeline_tag=TASK, tags=list(TAGS)):
    """A CLIP with its tokenizer and preprocessing; see `PretrainedModel`.

    Args:
        config: The architecture.
        tokenizer: For texts; None for a model that will get none.
        preprocess: How the model wants its images; None likewise.
    """

    kind = "clip"
    needed = ("tokenizer", "preprocess")

    def __init__(
        self,
        config: CLIPConfig,
        tokenizer: Tokenizer | None = None,
        preprocess: Preprocess | None = None,
    ) -> None:
        super().__init__(config)
        self.tokenizer = tokenizer
        self.preprocess = preprocess

    @classmethod
    def from_description(cls, description: Description, tokenizer: Tokenizer | None) -> Self:
        """A model with random weights."""
        assert isinstance(description.model, CLIPConfig)
        return cls(description.model, tokenizer, description.preprocess)

    @classmethod
    def from_name(
        cls, name: str, tokenizer: Tokenizer | None = None, preprocess: Preprocess | None = None
    ) -> Self:
        """A new model of a named architecture with random weights, to be trained.

        Args:
            name: ``navit_b16`` and the like, or ``open_clip:ViT-B-32``; see
                `navit_clip.architectures.architecture`, whose result is a configuration to change.
            tokenizer: For texts.
            preprocess: How the model will want its images.

        Raises:
            UserError: If there is no such name; the message lists them.
        """
        from navit_clip.architectures import architecture

        return cls(architecture(name), tokenizer, preprocess)

    @classmethod
    def from_open_clip(cls, name: str, pretrained: str | Path | None = None) -> Self:
        """A released open_clip model as packed towers, with its tokenizer and preprocessing.

        At the model's own square size the embeddings are open_clip's; other sizes and aspect
        ratios interpolate its positions.

        Args:
            name: open_clip's name of a ViT of CLIP's family or of a SigLIP, such as ``ViT-B-32``.
            pretrained: One of open_clip's tags, whose weights it downloads; a local checkpoint,
                beside which a SigLIP's ``tokenizer.json`` should lie; or None for weights as
                open_clip initialises them.

        Returns:
            The model in evaluation mode, float32, on the host. Without a tag, a SigLIP whose
            tokenizer is not on this machine has None as `tokenizer`.

        Raises:
            UserError: If the model is not supported (the message lists those that are), or the
                weights cannot be had, read, or belong to another model.
        """
        from navit_clip.interop.open_clip import load

        return load(name, pretrained, cls).eval()

    def to_open_clip(self) -> dict[str, Tensor]:
        """The parameters under open_clip's names, which its model of the same architecture loads.

        Raises:
            UserError: If open_clip has no such model; the message names the switch.
        """
        from navit_clip.interop.open_clip import state_for_open_clip

        return state_for_open_clip(self)

    def save_transformers(self, directory: str | Path) -> None:
        """Writes a folder that transformers' `AutoModel` and `AutoProcessor` load.

        At the model's own square size transformers' embeddings are these; a model of NaFlex gives
        the same at all sizes. `from_pretrained` reads the folder too.

        Args:
            directory: Made if need be.

        Raises:
            UserError: If transformers has no such model, the message names the switch; or the disk
                does not take it.
        """
        from navit_clip.interop.transformers import save

        save(Path(directory), self, self.tokenizer, self.preprocess)

    def encode_image(
        self,
        images: Iterable[ImageInput],
        max_tokens: int | None = None,
        normalize: bool = True,
        patch_size: int | None = None,
    ) -> Tensor:
        """Embeds images of any size, each at its own aspect ratio and never enlarged.

        Args:
            images: Pillow images of any mode; uint8 arrays [H, W, 3]; tensors [3, H, W], uint8 or
                float in [0, 1]; bytes of encoded files; or paths. Grey and opacity are
                understood. An iterator is consumed a few hundred at a time.
            max_tokens: Most patches of one image; None for the model's own limit.
            normalize: Unit vectors, whose products are cosines; else the projections as they are.
            patch_size: Side of a patch in pixels, to which the model's kernel is resized; the
                model's own limit of patches then covers the same area. None for its own size.

        Returns:
            float32 [E, D] on the host, in the order of `images`.

        Raises:
            ValueError: If something is no image or cannot be read, names its index; or if the
                model's positions cannot be had at this `patch_size`.
            UserError: If the model has no limit of its own and none is given.
        """
        sized = size_images(
            images, self.config.image, self.preprocess, max_tokens, self.max_pixels, patch_size
        )
        with self._autocast():
            return image_vectors(self, sized, normalize=normalize)

    def encode_text(self, texts: Iterable[str], normalize: bool = True) -> Tensor:
        """Embeds texts, cut at the model's context.

        Args:
            texts: Captions.
            normalize: Unit vectors, whose products are cosines; else the projections as they are.

        Returns:
            float32 [E, D] on the host, in the order of `texts`.

        Raises:
            ValueError: If something is no string; names its index.
            UserError: If the model has no tokenizer.
        """
        if self.tokenizer is None:
            raise UserError(
                "this model has no tokenizer: load it with NaViTCLIP.from_pretrained, or set "
                "model.tokenizer"
            )
        strings = _checked_strings(texts, "texts")
        with self._autocast():
            return text_vectors(self, self.tokenizer, strings, normalize=normalize)

    def similarity(
        self, images: Iterable[ImageInput], texts: Iterable[str], max_tokens: int | None = None
    ) -> Tensor:
        """Cosine similarity of every image with every text, not scaled.

        Arguments as of `encode_image` and `encode_text`.

        Returns:
            float32 [E, T] in [-1, 1], images by texts.
        """
        return self.encode_image(images, max_tokens) @ self.encode_text(texts).T

    def classify(
        self,
        images: Iterable[ImageInput],
        labels: Sequence[str],
        templates: Sequence[str] | None = None,
        max_tokens: int | None = None,
        *,
        cascade: tuple[int, int] | None = None,
        share: float = 0.3,
    ) -> Tensor:
        """Zero-shot classification: which of the labels an image shows.

        Each label is the mean of its prompts' unit vectors, normalised again, as CLIP has it. The
        probabilities are a softmax over the labels at the model's scale; a model of the sigmoid
        loss is read the same way, where its bias cancels.

        Args:
            images: As in `encode_image`.
            labels: What to choose from.
            templates: Prompts with ``{}`` in the label's place; None for ``a photo of a {}.``.
            max_tokens: As in `encode_image`.
            cascade: Instead of `max_tokens`: a limit for all images and a larger one for those that
                the model is then least sure of, such as (64, 256).
            share: Of `cascade`: the share of the images that is classified again, rounded up.

        Returns:
            float32 [E, labels]; rows sum to 1.

        Raises:
            ValueError: If there is no label or template, a template without ``{}``, or limits or
                share of a cascade are out of range.
        """
        labels = list(_checked_strings(labels, "labels"))
        if templates is None:
            templates = [PLAIN_TEMPLATE]
        templates = list(_checked_strings(templates, "templates"))
        for name, given in (("labels", labels), ("templates", templates)):
            if not given:
                raise ValueError(f"{name} is empty: nothing to choose from")
        for index, template in enumerate(templates):
            if "{}" not in template:
                raise ValueError(f"templates[{index}] has no {{}} for the label: {template!r}")
        size = max(1, _PROMPTS // len(templates))
        vectors = []
        for start in range(0, len(labels), size):
            group = labels[start : start + size]
            prompts = [template.replace("{}", label) for label in group for template in templates]
            prompts_LTD = self.encode_text(prompts).unflatten(0, (len(group), -1))
            vectors.append(F.normalize(prompts_LTD.mean(1), dim=-1))
        labels_CD = torch.cat(vectors)
        scale = self.log_scale.detach().float().exp().cpu()

        def classify(images: Iterable[ImageInput], max_tokens: int | None) -> Tensor:
            return (scale * self.encode_image(images, max_tokens) @ labels_CD.T).softmax(-1)

        if cascade is not None:
            return classify_twice(classify, images, cascade, share)
        return classify(images, max_tokens)


def _checked_strings(texts: Iterable[Any], name: str) -> Iterator[str]:
    """The same, each checked when its turn comes."""
    if isinstance(texts, str | bytes):
        raise ValueError(
            f"{name} must be a list of strings, got one {type(texts).__name__}: give [text]"
        )
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"{name}[{index}]: {type(text).__name__} is no string")
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise ValueError(f"{name}[{index}]: half a character (a lone surrogate): {text[:40]!r}")
        yield text
