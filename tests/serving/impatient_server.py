"""The server, waiting for heads of requests only HEAD_S seconds: python -m tests.serving.impatient_server ..."""

import os
import sys

from laser_jax.serving import patience
from laser_jax.serving.server import main

if __name__ == "__main__":
    patience.HEAD_S = float(os.environ["HEAD_S"])
    sys.exit(main())
