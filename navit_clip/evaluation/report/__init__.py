"""Results for reading: one HTML file, and a picture of accuracy against cost.

`samples` picks images and captions and reads their pixels (`pictures`), `charts` draws an
`navit_clip.evaluation.results.EvalResult`, and `html` puts the page together from `page.html` and
`style.css`.
"""
