"""``python -m dynamic_llava`` is the command line, for launchers that take a module."""

from dynamic_llava.cli import main

main()
