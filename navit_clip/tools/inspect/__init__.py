"""Inspects shards before anything is trained on them.

`statistics` reads every sample as training would; `packing_efficiency` packs batches as a
configuration would; `describe` puts both into a table and a JSON.
``navit-clip data inspect --help``.
"""
