"""Makes webdataset shards of image files and their captions, before anything is trained.

`caption_files`, `tables` and `class_folders` read what the user has into one list of `rows`;
`write` packs ranges of it into tars, in parallel; `manifest` records each whole shard, which makes
a run resumable and its result verifiable. ``python -m navit_clip.tools.make_shards --help``.
"""
