"""Run directories for reading: one HTML file of one run, or of several side by side.

`read` takes what is there of a directory, `charts` draws its curves, and `html` puts the page
together in the style of `navit_clip.evaluation.report`.
"""
