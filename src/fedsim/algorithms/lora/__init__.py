"""Rules for LoRA's factors, one paper a file: they differ in what is averaged, kept or written into the backbone.

Begin with `fed_it.py`, the plain mean; `factors.py` has what the others share.
"""
