"""A file a family of operators. Each operator is a function `NAME(fields, random)` that gives a `Problem`; `PROBLEMS` finds it.

`fields` is a case's dictionary (`cases.BASES` has all keys), `random` draws the inputs.
"""
