"""User commands, one module each with `main()`, which `dgpt NAME` and tools/MODULE.py call.

Their names are in invocation.py. Each imports early_signals first, parses its flags (cli.py) and
calls the packages.
"""
