"""An exported model behind HTTP: ``navit-clip serve``."""
