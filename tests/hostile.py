"""Hostile values in place of each value of a file or a configuration, generated from what stands there."""

import copy
import math
from collections.abc import Iterator
from typing import Any

VALUES: tuple[Any, ...] = (None, True, -1, 0, 1.5, 10**18, math.nan, math.inf, "", "x", [], ["x"], {}, {"x": 1})


def keys_of(tree: Any) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value in a tree of dictionaries and lists, those that hold others included."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (key,)
        yield from ((key, *rest) for rest in keys_of(value))


def replaced(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    """Return a copy of a tree with another value at one path."""
    made = copy.deepcopy(tree)
    node = made
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return made


def variants(tree: Any) -> Iterator[tuple[str, Any]]:
    """Yield a name and a copy of a tree for each path and hostile value, and without each key of a dictionary."""
    for path in keys_of(tree):
        where = ".".join(map(str, path))
        for value in VALUES:
            yield f"{where}={value!r}", replaced(tree, path, value)
        if isinstance(path[-1], str):
            made = replaced(tree, path, None)
            node = made
            for key in path[:-1]:
                node = node[key]
            del node[path[-1]]
            yield f"without {where}", made
