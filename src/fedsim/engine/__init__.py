"""What runs clients: plans, lanes, compiled programs, several devices and processes. It knows no model and no algorithm.

Begin with `cohort.py`, the one channel of an algorithm to its clients; then `plan.py` (who runs where), `programs.py`
(what is compiled) and `lanes.py` (what holds the devices). What a client does in a step is in `training/`.
"""
