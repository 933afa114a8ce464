"""Where training starts from a checkout; the trainer itself is `navit_clip.training`."""
