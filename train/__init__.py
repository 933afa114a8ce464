"""The trainer: ``python -m train --config configs/demo.yaml``, alone or under torchrun.

`config` describes a run; `trainer` runs it, step by step (`step`), with its learning rate
(`schedule`), its ranks (`ranks`), its checkpoints (`checkpoint`) and what it reports (`metrics`).
"""
