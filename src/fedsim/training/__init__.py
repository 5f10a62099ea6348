"""How a client trains: minibatch steps, optimizers by name, augmentation, cached features, length buckets.

Begin with `local.py`, from which most algorithms differ by one penalty. Where and when it runs is the engine's part.
"""
