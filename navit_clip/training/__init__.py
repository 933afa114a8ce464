"""The trainer: ``python -m train --config configs/demo.yaml``, alone or under torchrun.

`config` describes a run; `trainer` runs it, step by step (`step`), with its learning rate
(`schedule`), how the ranks share the model (`parallel`), micro-batches (`gradcache`), the averaged
weights (`ema`), bad numbers (`nonfinite`), its checkpoints (`checkpoint`), hung ranks (`stall`) and
what it reports (`metrics`).
"""
