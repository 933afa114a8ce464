"""From open_clip's training commands to ours."""
