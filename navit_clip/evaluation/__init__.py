"""The harnesses: ``python -m eval zeroshot | retrieval | summary``, alone or under torchrun.

Data comes as encoded images with labels or captions (`datasets`, opened by `labelled` and
`captioned`). `models` and `baselines` are what is judged, each at several `settings`; `encode` and
`texts` embed on all ranks, with a `cache`; `zeroshot` and `retrieval` judge the embeddings;
`report`, `gallery` and `summary` show the result to a person. `harness` is all of it from Python.
"""
