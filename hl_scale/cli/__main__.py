"""`python -m hl_scale.cli`."""

from hl_scale.cli import main

main()
