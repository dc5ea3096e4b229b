"""Foreign weight layouts, one a file: tables of names, read and written by `layout`."""
