"""The harnesses: ``python -m eval zeroshot | retrieval | summary``, alone or under torchrun.

`sources` yields encoded images with labels or captions; `encode` embeds them at several token
budgets in one pass over the data; `zeroshot` and `retrieval` judge the embeddings; `gallery` and
`summary` show the result to a person.
"""
