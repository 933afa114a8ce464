"""From a raw sample to an example that is ready to be packed."""
