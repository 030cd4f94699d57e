"""`python -m diffsparse`: the command line."""

from diffsparse.cli import main

main()
