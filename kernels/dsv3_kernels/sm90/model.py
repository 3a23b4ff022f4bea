"""What a tile costs on sm_90a, found beside the kernel's other parts; the model itself is part of `dsv3_kernels.tiles`.

Nothing in this folder imports it: a kernel is given its tile.
"""

from dsv3_kernels.tiles.model import Problem, best_tile, candidates, seconds

__all__ = ["Problem", "best_tile", "candidates", "seconds"]
