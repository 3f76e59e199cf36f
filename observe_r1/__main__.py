"""`python -m observe_r1`."""

from observe_r1.cli import main

main()
