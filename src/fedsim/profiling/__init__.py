"""Where the time goes: `fedsim profile`, settings side by side, and one round taken apart.

Begin with `profile.py`. Benchmarks that compare with other projects are outside the package, in `benchmarks/`.
"""
