"""Results for reading: one HTML file, and a picture of accuracy against cost.

`samples` picks images and captions and reads their pixels (`pictures`); `curve` and `svg` draw an
`navit_clip.evaluation.results.EvalResult`; `html` puts the page together from `page.html` and
`style.css`.
"""
