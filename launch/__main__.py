"""`python -m launch` is `tessera`: what torchrun starts."""

import sys

from launch.cli import main

if __name__ == "__main__":
    sys.exit(main())
