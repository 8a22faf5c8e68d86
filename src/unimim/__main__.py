"""`python -m unimim` is the console script `unimim`."""

from unimim.cli import main

main()
