"""User commands, one module each with `main()`; tools/NAME.py calls it.

Each imports early_signals first, parses its flags (cli.py) and calls the packages.
"""
