"""The command line. It reads options, calls one function of the rooms below, and prints.

Begin with `main.py`. Importing it needs no JAX, so that `--help` is immediate.
"""
