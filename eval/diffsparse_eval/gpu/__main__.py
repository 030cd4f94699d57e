"""`python -m diffsparse_eval.gpu`."""

import sys

try:
    import torch  # noqa: F401
except ImportError as error:
    print(f"error: this wants torch, built for CUDA, in {sys.executable}: {error}", file=sys.stderr)
    sys.exit(2)

from diffsparse_eval.gpu.account import main

main()
