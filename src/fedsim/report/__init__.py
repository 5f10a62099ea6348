"""What people look at: the summary of a run, closing tables, comparisons, pictures, the live display.

Begin with `tables.py`. Nothing here changes a result, or computes one: it reads what `record/` holds.
"""
