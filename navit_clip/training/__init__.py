"""The trainer: ``navit-clip train --config FILE``, alone or under torchrun.

`config` describes a run; `trainer` runs it, step by step (`step`), with its learning rate
(`schedule`), how the ranks share the model (`parallel`), micro-batches of coupled examples
(`gradcache`), averaged weights (`ema`), non-finite numbers (`nonfinite`), hung ranks (`watchdog`),
evaluations (`evaluation`, `best`) and what it reports (`metrics`, `mfu`). What is trained is a task
(`navit_clip.tasks`), of which it knows the interface alone.
"""
