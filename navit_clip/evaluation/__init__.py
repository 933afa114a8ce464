"""Evaluation: ``navit-clip eval zeroshot | retrieval | summary``, alone or under torchrun.

Data comes as encoded images with labels or captions (`datasets`, opened by `labelled` and
`captioned`). `models` and `baselines` are what is evaluated, each at several `settings`; `embed`
embeds on all ranks, with a `cache`; an evaluator (`evaluator`, listed in `registry`) scores the
embeddings; `summary`, `report` and `gallery` show its `results` to a person.
"""
