"""navit-clip: CLIP at native resolution and aspect ratio, packed without padding.

Data flows one way: `navit_clip.data` turns shards into sized, dropped, tokenised pairs;
`navit_clip.packed` lays many pairs end to end in one token stream per tower; `navit_clip.models`
encodes the streams; `navit_clip.losses.contrastive` compares all pairs of all ranks. Shards know
nothing of models, towers nothing of shards, the loss nothing of towers. `navit_clip.model` puts
files, Hub, tokenizer and preprocessing around a trained model.

Names of tensors carry their dimensions as a suffix where it helps (``q_THD``):

======  =========================================================================
letter  meaning
======  =========================================================================
T       tokens of one packed stream, all examples one after another
S       tokens of a second stream (keys and values), or places of a table
E       examples (segments) of one packed stream
H, D    attention heads and the width of one head; D alone: embedding width
C       model width
L       classes
N       pairs over all ranks
P       side of a patch in pixels
U       units of a hierarchical tower
2       row and column
======  =========================================================================

Words of our own:

==============  =================================================================
word            meaning
==============  =================================================================
segment         the tokens of one example on a packed stream; attention never leaves it
stream          tokens of many examples end to end, without a batch dimension and without
                a mask; a task may have several, such as ``image`` and ``text``
token budget    most tokens of one stream in one batch
token limit     most patches of one image; a larger one is scaled down
bucket          samples that may share a batch; each has its own packer
leftover        samples that were read and are in no batch yet, when a run is stopped
unit            a patch of the stream of a hierarchical tower, which divides it further
reader          one data worker's way through its part of the shards
==============  =================================================================

``from navit_clip import NaViTCLIP`` is all that using a model takes, or ``NaViTClassifier``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from navit_clip.classifier import NaViTClassifier
    from navit_clip.masked_image import NaViTMaskedImage
    from navit_clip.model import NaViTCLIP

__all__ = ["NaViTCLIP", "NaViTClassifier", "NaViTMaskedImage"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Only when asked for: data tools and their workers need no towers, which take a second.
    if name == "NaViTCLIP":
        from navit_clip.model import NaViTCLIP

        return NaViTCLIP
    if name == "NaViTClassifier":
        from navit_clip.classifier import NaViTClassifier

        return NaViTClassifier
    if name == "NaViTMaskedImage":
        from navit_clip.masked_image import NaViTMaskedImage

        return NaViTMaskedImage
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
