"""`python -m diffsparse_eval.gpu`."""

from diffsparse_eval.gpu.account import main

main()
