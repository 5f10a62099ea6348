"""How good a model is: scores on rows of the data set, on all devices, and the formulas behind them.

Begin with `metrics.py`. Clients' own tests are in `simulation/personal.py`.
"""
