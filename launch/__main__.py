"""`python -m launch` is `tessera`: what torchrun starts."""

import sys

from launch.cli import main

sys.exit(main())
