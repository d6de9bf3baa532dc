"""COMPILED ARITHMETIC of a block of dense floats: one pass over its elements, and no lock held.

PyTorch makes a pass over a tile for each operation, and takes the interpreter's lock between two,
for which workers wait. The C here has an element in the first cache from its first operation to its
last. The bits are those of `edit/steps.py`, which does all that is not done here, and everything
where nothing was compiled. `hatch_build.py` compiles; `edit/compiled.py` calls.
"""

from infold.kernel.library import description, wanted

__all__ = ["description", "wanted"]
