"""`python -m prift` is `prift`."""

from prift_cli import main

main()
