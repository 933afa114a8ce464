"""Makes webdataset shards of image files and their captions, before anything is trained.

`navit_clip.data.annotations` and `class_folders` read what the user has into rows; `write_shard`
packs ranges of them into tars, in parallel; `shard_manifest` records each whole shard, which makes
a run resumable and its result verifiable. ``navit-clip data make_shards --help``.
"""
