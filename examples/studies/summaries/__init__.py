"""The parts of `summarize.py`, in reading order.

`docstrings` finds pairs of a body and a summary line, `tokens` encodes them, `decoder` is the model, `decoding` writes
with it, `pretraining` makes the base, `tuning` trains one run, `scores` rates it, `questions` makes the comparisons,
`tables`, `findings` and `plots` show them.
"""
