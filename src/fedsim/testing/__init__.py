"""The contract as tests, for the project's own algorithms and for users' (`fedsim check my.py:fed_mine`).

Begin with `contract.py`; `tasks.py` has the tiny tasks on which every algorithm is tried, `toys.py` their data and rounds.
"""
