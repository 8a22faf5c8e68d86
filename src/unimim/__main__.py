"""`python -m unimim` is the console script `unimim`."""

from unimim.cli.main import main

main()
