"""The kernels and the trainer on a GPU: correctness, sanitizers, whole models, benchmarks. See docs/kernels.md.

`cases.py`, `suite.py` and `model_cases.py` are tables and know no torch; a family (`families/`) makes inputs of an operator, runs
it, and has its float64 reference; everything else is loops over tables.
"""
