"""navit-clip: CLIP at native resolution and aspect ratio, packed without padding.

Data flows one way: `navit_clip.data` turns shards into sized, dropped, tokenised pairs;
`navit_clip.packing` lays many pairs end to end in one token stream per tower; the image and
text towers encode the streams; `navit_clip.loss` compares all pairs of all ranks. Shards know
nothing of models, towers nothing of shards, the loss nothing of towers.

Names of tensors carry their dimensions as a suffix where it helps (``q_THD``):

======  =========================================================================
letter  meaning
======  =========================================================================
T       tokens of one packed stream, all examples one after another
E       examples (segments) of one packed stream
H, D    attention heads and the width of one head; D alone: embedding width
C       model width
N       pairs over all ranks
P       side of a patch in pixels
======  =========================================================================
"""

__version__ = "0.1.0"
