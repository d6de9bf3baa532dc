"""COMPILED: a block of dense floats in one pass, with no lock held, and the coding of residuals.

PyTorch makes a pass over a tile for each operation, and takes the interpreter's lock between two,
for which workers wait. The C here has an element in the first cache from its first operation to its
last. The bits are those of `edit/steps.py`, which does all that is not done here, and everything
where nothing was compiled; `residual.c` codes as `edit/residual.py`. `hatch_build.py` compiles;
`edit/compiled.py` and `edit/residual.py` call.
"""

from infold.kernel.library import description, wanted

__all__ = ["description", "wanted"]
