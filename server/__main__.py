"""`python -m tandem.server` is the `tandem` command."""

from .cli import main

main()
