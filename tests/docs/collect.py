"""Prints which tests pytest selects, as JSON: `python -m tests.docs.collect FILE…`.

Standard input holds a list of lists of pytest's arguments.
"""

import contextlib
import json
import os
import sys
from pathlib import Path

import pytest


class Names:
    """A plugin that keeps the names of selected functions and of files skipped as a whole."""

    def __init__(self):
        self.functions: set[str] = set()
        self.skipped: set[str] = set()

    def pytest_collection_finish(self, session):
        for item in session.items:
            if item.get_closest_marker("skip") is None:
                self.functions.add(f"{item.path.stem}::{item.originalname}")

    def pytest_collectreport(self, report):
        if report.skipped:
            self.skipped.add(Path(report.nodeid).stem)


def main():
    functions, skipped = [], set()
    for words in json.load(sys.stdin):
        names = Names()
        arguments = ["--collect-only", "-qq", "-p", "no:cacheprovider", *words, *sys.argv[1:]]
        with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink):
            code = pytest.main(arguments, plugins=[names])
        if code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            sys.exit(f"error: pytest {' '.join(arguments)} ended with {code}")
        functions.append(sorted(names.functions))
        skipped |= names.skipped
    print(json.dumps({"functions": functions, "skipped": sorted(skipped)}))


if __name__ == "__main__":
    main()
