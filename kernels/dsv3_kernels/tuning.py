"""The command that writes the tables of tiles: `python -m dsv3_kernels.tuning`, all of it in `tiles.tuning`."""

import sys

from dsv3_kernels.tiles.tuning import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
