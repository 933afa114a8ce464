"""Side-by-side measurements, one command each: ``python -m benchmarks.NAME --output out.json``.

Every figure is a ratio or share measured in one run; absolute times belong to the machine.
"""
