"""PyTorch, imported while the garbage collector rests, which finds nothing among 250,000 objects that last.

They are set aside for good, so that it does not look at them later or at the end either. Where somebody else has imported
PyTorch before, as a host has, nothing happens, since what there is may be garbage.
"""

import gc
import sys

if "torch" not in sys.modules:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        import torch  # noqa: F401

        gc.freeze()
    finally:
        if was_enabled:
            gc.enable()
