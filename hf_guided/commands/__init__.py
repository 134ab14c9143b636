"""`hf-guided …`, one file for each command: its flags, and a function that calls the library and prints.

A command `name` is a module `name.py` with `HELP`, `add_arguments(parser)` and `run(args)`; `cli.py` finds it here. It
imports what takes time inside `run`, and keeps no logic that a user of the library would want too.
"""
