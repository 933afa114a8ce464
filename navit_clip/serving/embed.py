"""What a server computes: vectors of packed inputs, and probabilities of labels from them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from navit_clip.classifier import NaViTClassifier
from navit_clip.inference.embed import feature_vectors, ids_vectors, image_vectors
from navit_clip.load import AnyModel
from navit_clip.model import NaViTCLIP
from navit_clip.packed.images import ImagePatches
from navit_clip.precision import autocast, choose_precision
from navit_clip.serving.batcher import Embed, Item


def embedder(model: AnyModel) -> Embed:
    """What turns sized images and ids of texts into vectors of one space, in order.

    Unit vectors of a model that reads texts; what its head reads of another.
    """
    precision = choose_precision(model.precision, model.device)

    def embed(items: Sequence[Item]) -> Tensor:
        images = [item for item in items if isinstance(item, ImagePatches)]
        with autocast(precision, model.device):
            if not isinstance(model, NaViTCLIP):
                return feature_vectors(model.image, images)
            texts = [item for item in items if isinstance(item, list)]
            image_ED, text_ED = image_vectors(model, images), ids_vectors(model, texts)
        is_text = torch.tensor([isinstance(item, list) for item in items])
        vectors = torch.empty(len(items), model.config.embed_dim)
        vectors[~is_text], vectors[is_text] = image_ED, text_ED
        return vectors

    return embed


@torch.no_grad()
def probabilities(model: AnyModel, vectors: Tensor, images: int, labels: int) -> Tensor:
    """Of each label for each image, float32 [images, labels].

    Args:
        model: That the vectors are from.
        vectors: Of the images, then of the prompts of each label.
        images: How many.
        labels: How many; a classifier has its own.
    """
    if isinstance(model, NaViTClassifier):
        return model.probabilities(vectors.to(model.device)).cpu()
    assert isinstance(model, NaViTCLIP)
    labels_CD = F.normalize(vectors[images:].unflatten(0, (labels, -1)).mean(1), dim=-1)
    scale = model.log_scale.detach().float().exp().cpu()
    return (scale * vectors[:images] @ labels_CD.T).softmax(-1)
