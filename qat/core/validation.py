"""pydantic models for configs, manifests and results, with this project's one-line errors.

An error is one line: file, path of the key, what was found, what was expected, how to fix it. The type carries the words for
what was expected: `Annotated[list[float], Expected("3 numbers", count=3)]`. Values are not converted: 1 is not true, and "3" is
not a number. Code that runs on a robot does not import this module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, TypeAdapter, ValidationError, model_validator
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from qat.core.errors import UserError

T = TypeVar("T")

# What was expected, for kinds of pydantic errors whose type has no `Expected`.
WORDS = {
    "model_type": "a section of keys and values",
    "model_attributes_type": "a section of keys and values",
    "dict_type": "a section of keys and values",
    "list_type": "a list",
    "bool_type": "true or false",
    "none_required": "null",
    "union_tag_not_found": "the name of a type",
}


class _Absent:
    """Placeholder for a missing required key, so that the error can say what its value must be."""


ABSENT = _Absent()


class Expected:
    """Says in an error what a type expects. A list must have `count` items, or from `least` to `most`; `test` must return True
    for a value."""

    def __init__(
        self,
        words: str,
        schema: CoreSchema | None = None,
        *,
        count: int | None = None,
        least: int = 0,
        most: int = 1_000,
        test: Callable[[Any], bool] | None = None,
    ) -> None:
        self.words, self.schema, self.test = words, schema, test
        self.least, self.most = (least, most) if count is None else (count, count)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_wrap_validator_function(self._check, self.schema or handler(source))

    def _check(self, value: Any, handler: Callable[[Any], Any]) -> Any:
        try:
            value = handler(value)
            fits = not isinstance(value, list) or self.least <= len(value) <= self.most
        except ValueError:  # pydantic's ValidationError is a ValueError
            fits = False
        if not fits or (self.test is not None and not self.test(value)):
            raise PydanticCustomError("expected", "{words}", {"words": self.words})
        return value


def whole(low: int, high: int) -> Expected:
    """A whole number from low to high."""
    return Expected(f"a whole number from {low:,} to {high:,}", core_schema.int_schema(strict=True, ge=low, le=high))


def number(words: str, low: float, high: float, above: float | None = None) -> Expected:
    """A number from low to high, greater than `above`."""
    return Expected(words, core_schema.float_schema(strict=True, ge=low, le=high, gt=above, allow_inf_nan=False))


def only(*values: Any) -> Expected:
    """One of these sections or lists. (For texts, numbers and flags use `Literal`.)"""
    words = " or ".join("null" if value is None else repr(value) for value in values)
    return Expected(words, core_schema.any_schema(), test=lambda value: value in values)


def wrong(key: str | list[Any], expected: str) -> PydanticCustomError:
    """The error that a validator raises. key: path from the validator's model, dotted or a list."""
    keys = [int(part) if part.isdigit() else part for part in key.split(".")] if isinstance(key, str) and key else key
    return PydanticCustomError("wrong", "{words}", {"words": expected, "keys": keys or []})


class Section(BaseModel):
    """A section of keys and values. Keys without a field may have any value; with `OTHERS`, which says why, they must be null.
    A required key that is null counts as missing."""

    model_config = ConfigDict(strict=True, protected_namespaces=())
    OTHERS: ClassVar[str] = ""

    @model_validator(mode="before")
    @classmethod
    def _keys(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        fields = {field.alias or name: field for name, field in cls.model_fields.items()}
        for key in value:
            if key not in fields:
                cls._unknown(key, value)
        absent = [key for key, field in fields.items() if field.is_required() and cls._is_absent(key, value)]
        return {**value, **dict.fromkeys(absent, ABSENT)}

    @classmethod
    def _unknown(cls, key: Any, value: Mapping[Any, Any]) -> None:
        if cls.OTHERS and value[key] is not None:
            raise wrong([key], f"null: {cls.OTHERS}")

    @classmethod
    def _is_absent(cls, key: str, value: Mapping[Any, Any]) -> bool:
        return value.get(key) is None


class Options(Section):
    """A section with a `type` that accepts only the keys of its fields, and those of `FREE` (separated by blanks), which have
    no effect. Null is a value, which most keys refuse."""

    FREE: ClassVar[str] = ""

    @classmethod
    def _unknown(cls, key: Any, value: Mapping[Any, Any]) -> None:
        kinds = get_args(cls.model_fields["type"].annotation) if "type" in cls.model_fields else (None,)
        if key not in cls.FREE.split() and value.get("type") in (None, *kinds):
            known = ", ".join(sorted({*cls.model_fields, *cls.FREE.split()} - {"type"})) or "none"
            raise wrong([key], f"no such option: {kinds[0] or cls.__name__} has {known}")

    @classmethod
    def _is_absent(cls, key: str, value: Mapping[Any, Any]) -> bool:
        return key not in value


def plain(value: Any) -> Any:
    """Converts mappings to dicts and sequences to lists, as pydantic's strict mode requires."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def _locate(document: Any, keys: list[Any]) -> tuple[list[Any], Any]:
    """The path of keys to a value, and the value. Drops the names of union members that pydantic adds to the path."""
    path, at = [], document
    for n, key in enumerate(keys):
        there = key in at if isinstance(at, dict) else isinstance(at, list) and isinstance(key, int) and key < len(at)
        if there:
            at = at[key]
        elif isinstance(at, dict) and at.get("type") == key and n < len(keys) - 1:
            continue
        else:
            at = ABSENT
        path.append(key)
    return path, at


def _words(kind: str, key: Any, context: Mapping[str, Any], message: str) -> str:
    if kind == "union_tag_invalid" or (kind == "literal_error" and key == "type"):
        return (
            f"one of {context.get('expected_tags') or context['expected']}".replace("'", "")
            + ": other types are not supported"
        )
    if kind == "literal_error":
        return str(context["expected"]).replace("None", "null")
    if kind in ("too_short", "too_long"):
        return (
            f"{context['min_length']} or more items"
            if kind == "too_short"
            else f"at most {context['max_length']} items"
        )
    return str(context["words"]) if "words" in context else WORDS.get(kind, message)


def validated(
    model: type[T] | Any,
    document: Any,
    source: str,
    *checks: Callable[[T], None],
    under: str = "",
    index: str = ".{}",
    fix: str = "fix it there",
    longest: int = 120,
) -> T:
    """Returns the document as a `model`.

    Args:
        document: mappings, lists, texts, numbers, flags and nulls.
        source: the document's name in errors. under: the document's path within the source.
        checks: called with the model; they raise what `wrong` returns.
        index: format of a list's index in a path. longest: number of characters shown of the value found.

    Raises:
        UserError: for the first value that does not fit.
    """
    document = plain(document)
    try:
        typed: T = TypeAdapter(model).validate_python(document)
        for check in checks:
            check(typed)
        return typed
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        kind, keys, context = first["type"], list(first["loc"]), first.get("ctx", {})
        message, absent = first["msg"], first["input"] is ABSENT
    except PydanticCustomError as error:
        kind, keys, context, message, absent = error.type, [], error.context or {}, error.message(), False
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        keys.append(str(context["discriminator"]).strip("'"))
    keys += context.get("keys", [])
    path, found = _locate(document, keys)
    where = under + "".join(index.format(key) if isinstance(key, int) else f".{key}" for key in path)
    shown = repr(found) if found is not None else "null"
    shown = shown if len(shown) <= longest else shown[: longest - 1] + "…"
    problem = "missing" if absent or found is ABSENT else f"found {shown}"
    expected = _words(kind, keys[-1] if keys else None, context, message)
    raise UserError(f"{source}: {where.lstrip('.') or 'the document'}: {problem}, expected {expected}; {fix}") from None
