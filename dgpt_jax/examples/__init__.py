"""Small image sets made from Python packages, a small teacher, and the parts of the quickstart."""
