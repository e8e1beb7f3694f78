"""BEVFusion's config tree: files that inherit every default.yaml above them, and values written as `${…}`.

torchpack (`torchpack.utils.config`, the extra [bevfusion]) does the inheritance, as in BEVFusion's tools. Values equal those of
BEVFusion's `recursive_eval`: a string that is `${…}` from end to end is a Python expression over the config's keys. Here
the expression is parsed, never executed: names, dotted keys, indices and slices, lists, numbers, strings, and + - * / // %.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qat.core.errors import UserError

LONGEST = 1000  # characters of an expression; real ones have some dozens
MOST_STEPS = 100_000  # values visited; thirty expressions that each use the next one twice would take 2³⁰
NUMERIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
UNDERSTOOD = "keys of this config, indices and slices, lists, numbers, strings, + - * / // %"


def defaults_above(path: Path) -> list[Path]:
    """Every default.yaml (or .yml, like `path`) in the file's folder and those above it, topmost first, without `path`."""
    path = path.resolve()
    found = [folder / f"default{path.suffix}" for folder in reversed(path.parents)]
    return [file for file in found if file != path and file.is_file()]


def inherit(path: Path) -> dict[str, Any]:
    """The file merged over every default above it, as in BEVFusion's tools.

    Raises:
        UserError: torchpack is not installed.
    """
    try:
        from torchpack.utils.config import Config
    except ImportError as error:
        raise UserError(
            f"{path}: part of a config tree (it inherits {defaults_above(path)[-1]}), which torchpack reads: found "
            f"{error}; run pip install 'bevqat[bevfusion]', or give the run's dumped configs.yaml"
        ) from None
    tree = Config()
    tree.load(str(path.resolve()), recursive=True)
    merged: dict[str, Any] = tree.dict()
    return merged


def is_expression(value: object) -> bool:
    """Whether the value is a string that is `${…}` from end to end."""
    return isinstance(value, str) and value.startswith("${") and value.endswith("}")


def has_expressions(value: object) -> bool:
    """Whether any string in a config is an expression."""
    if isinstance(value, Mapping):
        return any(has_expressions(item) for item in value.values())
    if isinstance(value, list):
        return any(has_expressions(item) for item in value)
    return is_expression(value)


def resolve(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Returns the config with every expression replaced by its value.

    Raises:
        UserError: an expression is not supported, names a key that does not exist, or refers to itself.
    """
    resolver = _Resolver(config, source)
    return {key: resolver.resolved(value, str(key)) for key, value in config.items()}


class _Resolver:
    """Evaluates expressions over one config; `active` lists the expressions being evaluated, to detect cycles."""

    def __init__(self, config: Mapping[str, Any], source: str) -> None:
        self.config, self.source = config, source
        self.active: list[str] = []
        self.steps = 0

    def fail(self, path: str, text: str, why: str) -> UserError:
        return UserError(f"{self.source}: {path}: found {text!r}, expected {UNDERSTOOD}: {why}")

    def resolved(self, value: Any, path: str) -> Any:
        """The value with every expression inside it evaluated."""
        self.steps += 1
        if self.steps > MOST_STEPS:
            raise self.fail(path, str(value)[:40], f"evaluating it takes more than {MOST_STEPS:,} steps")
        if isinstance(value, Mapping):
            return {key: self.resolved(item, f"{path}.{key}") for key, item in value.items()}
        if isinstance(value, list):
            return [self.resolved(item, f"{path}.{i}") for i, item in enumerate(value)]
        if not is_expression(value):
            return value
        text: str = value
        if text in self.active:
            circle = " → ".join([*self.active[self.active.index(text) :], text])
            raise self.fail(path, text, f"it refers to itself, {circle}")
        if len(text) > LONGEST:
            raise self.fail(path, text[:40] + "…", f"at most {LONGEST} characters")
        self.active.append(text)
        try:
            tree = ast.parse(text[2:-1].strip(), mode="eval")
            return self.resolved(self.evaluate(tree.body, path, text), path)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise self.fail(path, text, f"not an expression ({getattr(error, 'msg', None) or error})") from None
        except (KeyError, IndexError, TypeError, ZeroDivisionError, OverflowError) as error:
            raise self.fail(path, text, f"{type(error).__name__}: {error}") from None
        finally:
            self.active.pop()

    def evaluate(self, node: ast.expr, path: str, text: str) -> Any:
        """The value of a part of an expression."""
        match node:
            case ast.Constant(value=bool() | int() | float() | str() | None):
                return node.value
            case ast.List() | ast.Tuple():
                return [self.evaluate(item, path, text) for item in node.elts]
            case ast.Name():
                return self.get(self.config, node.id, path, text)
            case ast.Attribute():
                return self.get(self.evaluate(node.value, path, text), node.attr, path, text)
            case ast.Subscript():
                return self.index(self.evaluate(node.value, path, text), node.slice, path, text)
            case ast.UnaryOp(op=ast.USub() | ast.UAdd()):
                number = self.evaluate(node.operand, path, text)
                self.need_numbers(path, text, number)
                return -number if isinstance(node.op, ast.USub) else number
            case ast.BinOp() if type(node.op) in NUMERIC:
                left, right = self.evaluate(node.left, path, text), self.evaluate(node.right, path, text)
                joins = isinstance(node.op, ast.Add) and type(left) is type(right) and isinstance(left, str | list)
                if not joins:
                    self.need_numbers(path, text, left, right)
                return NUMERIC[type(node.op)](left, right)
        raise self.fail(path, text, f"{ast.unparse(node)} is not supported")

    def need_numbers(self, path: str, text: str, *values: Any) -> None:
        """Arithmetic accepts only numbers: a string times a number could fill the memory."""
        for value in values:
            if not isinstance(value, int | float):
                raise self.fail(path, text, f"{value!r} is not a number")

    def get(self, mapping: Any, key: str, path: str, text: str) -> Any:
        """A key's value, evaluated if it is an expression."""
        if not isinstance(mapping, Mapping) or key not in mapping:
            raise self.fail(path, text, f"there is no key {key!r}")
        value = mapping[key]
        return self.resolved(value, path) if is_expression(value) else value

    def index(self, value: Any, index: ast.expr, path: str, text: str) -> Any:
        """value[index] or value[a:b:c]."""
        if isinstance(index, ast.Slice):
            bounds = (index.lower, index.upper, index.step)
            a, b, c = (None if bound is None else self.evaluate(bound, path, text) for bound in bounds)
            return value[a:b:c]
        item = value[self.evaluate(index, path, text)]
        return self.resolved(item, path) if is_expression(item) else item
