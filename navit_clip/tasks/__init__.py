"""What a run trains: a model, its samples and its loss, behind one interface.

`base` is the interface that the trainer, the reader and the evaluation ask; `registry` finds a task
by its ``kind``; every other module is one task, or a part that several share.
"""
