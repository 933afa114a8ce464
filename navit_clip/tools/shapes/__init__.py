"""The generated data set `shapes`: pictures of coloured, textured shapes with captions.

It makes training and both evaluations runnable without any download: ``navit-clip data shapes
--output data/shapes`` writes training shards, a class-folder set for zero-shot classification and
a COCO-format set for retrieval. In the order of the flow: `scene` says what is in a picture and
where, `wording` puts it into words, `render` draws and encodes it, `write_shapes` makes the splits
and their files. Nothing here imports torch.
"""
