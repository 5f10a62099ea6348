"""The contract as tests, for the project's own algorithms and for users' (`fedsim check my.py:fed_mine`).

Begin with `contract.py`; `toys.py` has the tiny task on which every algorithm is tried.
"""
