"""`python -m unmask`, for launchers such as torchrun."""

from unmask.cli import main

main()
