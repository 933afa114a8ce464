"""Side-by-side measurements, one command each: ``python -m benchmarks.NAME --output out.json``.

Every result is a ratio or fraction measured in one run; absolute times belong to the machine.
"""
