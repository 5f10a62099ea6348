"""Many runs: the cells of a sweep, what they share, who runs them, and what they say together.

Begin with `cells.py`: a `Sweep` is a base config and its axes, and its cells are all their combinations. `folder.py` knows
where a cell lies and how it stands, from its own folder alone; `cell.py` runs one; `sweep.py` runs them all. Nothing here
knows how a round works: a cell is a run like any other.
"""
