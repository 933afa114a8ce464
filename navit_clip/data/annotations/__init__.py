"""Captions and labels as people have them: JSON, tables, label files, class folders."""
