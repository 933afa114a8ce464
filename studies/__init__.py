"""Studies: variants of a recipe trained alike, compared at equal compute, with intervals.

``python -m studies run NAME`` reads `NAME.yaml`: arms, seeds, data and a budget in training FLOPs.
In the order of the flow: `study` reads it, `budget` turns the budget into steps of each arm,
`runs` trains and evaluates what is missing, `scores` evaluates one run, `compare` resamples what
all of them found, and `report` writes it down. Everything that a report says is made from the
``result.json`` of the runs.
"""
