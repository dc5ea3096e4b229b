"""User commands, one module each with `main()`, which tools/NAME.py calls.

Each imports early_signals first, parses its flags (cli.py) and calls the packages.
"""
