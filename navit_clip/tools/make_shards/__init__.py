"""Makes webdataset shards of image files and their captions, before anything is trained.

The command reads what the user has into rows (`navit_clip.data.annotations`); `write_shard` packs
ranges of them into tars, in parallel; `shard_manifest` records each whole shard, which makes a run
resumable and its result verifiable. ``navit-clip data make_shards --help``.
"""
