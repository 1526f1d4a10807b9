"""A small suite in the layouts of the seven benchmarks, made from a seed: see ``suite.py``."""
