"""Where evaluation starts from a checkout; the evaluators are in `navit_clip.evaluation`."""
