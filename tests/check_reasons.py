"""Every exception to a rule says why, where it stands: part of ``make lint``.

Asked for are a code and a reason in each ``noqa`` and ``type: ignore`` comment, and a comment on the line of, before
or after each ``except`` (or ``suppress``) that takes every error.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

NOQA = re.compile(r"#\s*(?:ruff:\s*|flake8:\s*)?noqa\b(?P<codes>:\s*[A-Z]+[0-9]+(?:\s*,\s*[A-Z]+[0-9]+)*)?(?P<rest>.*)")
IGNORE = re.compile(r"#\s*type:\s*ignore\b(?P<codes>\[[^\]]+\])?(?P<rest>.*)")
REASON = re.compile(r"[^\W\d_]+\W+[^\W\d_]+")  # two words at least
BROAD = {"Exception", "BaseException"}


def problems(source: str) -> Iterator[tuple[int, str]]:
    """Line and complaint for each exception in ``source`` that does not say why."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string for token in tokens if token.type == tokenize.COMMENT}
    for line, comment in comments.items():
        for kind, pattern in (("noqa", NOQA), ("type: ignore", IGNORE)):
            found = pattern.search(comment)
            if found and not found["codes"]:
                yield line, f"`{kind}` names no code"
            elif found and not REASON.search(_own_words(found["rest"])):
                yield line, f"`{kind}` gives no reason"
    for line in _broad_handlers(ast.parse(source)):
        nearby = (_own_words(comments.get(near, "")) for near in (line - 1, line, line + 1))
        if not any(map(REASON.search, nearby)):
            yield line, "takes every error and does not say why"


def _own_words(comment: str) -> str:
    """A comment without the directives in it."""
    return IGNORE.sub(r"\g<rest>", NOQA.sub(r"\g<rest>", comment))


def _broad_handlers(tree: ast.AST) -> Iterator[int]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            broad = node.type is None or bool(_names(node.type) & BROAD)
        elif isinstance(node, ast.Call) and "suppress" in _names(node.func):
            broad = any(_names(argument) & BROAD for argument in node.args)
        else:
            continue
        if broad:
            yield node.lineno


def _names(node: ast.AST) -> set[str]:
    """The names in an expression, the last part of dotted ones."""
    parts = node.elts if isinstance(node, ast.Tuple) else [node]
    return {part.id for part in parts if isinstance(part, ast.Name)} | {
        part.attr for part in parts if isinstance(part, ast.Attribute)
    }


def main(folders: list[str]) -> int:
    """Print what lacks a reason below ``folders``, and return how much."""
    files = sorted(path for folder in folders for path in Path(folder).rglob("*.py"))
    found = [f"{path}:{line}: {text}" for path in files for line, text in problems(path.read_text(encoding="utf-8"))]
    print("\n".join(found) or f"{len(files)} files: every exception has its reason")
    return len(found)


if __name__ == "__main__":
    sys.exit(bool(main(sys.argv[1:])))
