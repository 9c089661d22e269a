"""The oracle: every op and the whole model in float64 NumPy, written from the formulas.

`mxmoe.reference.ops` has the functions of `mxmoe.ops` under the same names and signatures, so that either
can stand in for the other. Nothing here is fast, and nothing here shares code with the kernels.
"""

from mxmoe.reference import model, ops

__all__ = ["model", "ops"]
