"""Reading, writing and converting parameters between layouts; `load_encoder`, `load_digpt`.

api.py loads a work directory or a weights file as an encoder with its settings; export.py writes
it in another layout. A layout is a table of array names (mapping.py) in layouts/, registered in
registry.py; parity.py runs an export in its own framework.
"""
