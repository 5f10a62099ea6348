"""One run, top to bottom: options become values, rounds follow one another, a finished run answers.

Begin with `simulate.py`, the loop; `build.py` makes what it needs. Comparisons and tables of several runs are in `cli/job.py`.
"""
