"""Looks at shards before anything is trained on them.

`survey` reads every sample as training would; `filling` packs batches as a configuration would;
`report` puts the figures into a table and a JSON; `picture` draws one batch patch by patch.
``python -m navit_clip.tools.inspect --help``.
"""
