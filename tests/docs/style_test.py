"""Names in the source: no bare participles, no `picture` for what is an image."""

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.support.paths import ROOT

PARTICIPLES = frozenset(("found", "told", "made", "kept", "given", "wanted", "seen", "begun"))
# Identifiers that contain `picture`: none. Figures for people are called figures.
PICTURES: frozenset[str] = frozenset()


def definitions(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yields (name, line) of every name that a module binds: variables, arguments, attributes,
    functions, classes, aliases."""
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                yield name, line
            case ast.arg(arg=name) | ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                yield name, line
            case ast.ExceptHandler(name=str(name)) | ast.alias(asname=str(name)):
                yield name, line
            case ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
                yield name, line


def bad_names(source: str) -> list[tuple[str, int]]:
    return [
        (name, line)
        for name, line in definitions(ast.parse(source))
        if name.strip("_") in PARTICIPLES or ("picture" in name.lower() and name not in PICTURES)
    ]


def test_names_are_nouns():
    paths = [p for top in ("dgpt_jax", "tools") for p in sorted((ROOT / top).rglob("*.py"))]
    assert len(paths) > 100
    bad = [
        f"{_relative(p)}:{line} {name}" for p in paths for name, line in bad_names(p.read_text())
    ]
    bad += [f"{_relative(p)} (file name)" for p in paths if "picture" in p.name]
    assert not bad, f"{len(bad)} names to replace by nouns:\n" + "\n".join(bad)


def _relative(path: Path) -> Path:
    return path.relative_to(ROOT)


def test_every_kind_of_name_is_checked():
    source = """
found = 1
x.told = 2
for made in range(3): pass
def kept(given, *wanted, seen=0, **begun): pass
class Pictures:
    picture_size: int = 0
import numpy as found
with open(p) as told: pass
(made, (kept, y)) = z
w = [given for given in z]
"""
    assert len(bad_names(source)) == 15
    assert not bad_names("found_rows = rows\nx.told\nf(made=1)\n")
