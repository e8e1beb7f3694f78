"""pydantic models of what people write (configs) and stages hand on (manifests, results), with errors of this project's form.

An error is one line: file, path of the key, what was found, what was expected, how to fix it. The words of what was expected
stand beside the type: `Annotated[list[float], Expected("3 numbers", count=3)]`. Nothing is converted: 1 is no true, "3" no number.
Nothing that a robot runs imports this module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, TypeAdapter, ValidationError, model_validator
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from qat.core.errors import UserError

T = TypeVar("T")

# Of pydantic's kinds of errors whose words are not beside the type.
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
    """Stands for a required key that is not there, so that the words of what its value must be are found."""


ABSENT = _Absent()


class Expected:
    """Words for whatever does not fit the type that this is attached to, of `count` or from `least` to `most` items where it is a
    list, and `test`, which is true of what it takes."""

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
        except ValueError:  # pydantic's own is one
            fits = False
        if not fits or (self.test is not None and not self.test(value)):
            raise PydanticCustomError("expected", "{words}", {"words": self.words})
        return value


def whole(low: int, high: int) -> Expected:
    """A whole number from low to high."""
    return Expected(f"a whole number from {low:,} to {high:,}", core_schema.int_schema(strict=True, ge=low, le=high))


def number(words: str, low: float, high: float, above: float | None = None) -> Expected:
    """A number from low to high, and above `above`."""
    return Expected(words, core_schema.float_schema(strict=True, ge=low, le=high, gt=above, allow_inf_nan=False))


def only(*values: Any) -> Expected:
    """One of these sections or lists (of texts, numbers and flags, `Literal` says it)."""
    words = " or ".join("null" if value is None else repr(value) for value in values)
    return Expected(words, core_schema.any_schema(), test=lambda value: value in values)


def wrong(key: str | list[Any], expected: str) -> PydanticCustomError:
    """What a validator raises: the key, dotted or in a list, from its model on, and what was expected there."""
    keys = [int(part) if part.isdigit() else part for part in key.split(".")] if isinstance(key, str) and key else key
    return PydanticCustomError("wrong", "{words}", {"words": expected, "keys": keys or []})


class Section(BaseModel):
    """A section of keys and values. Keys that it has no field for are free, or, with `OTHERS`, null: the words say why. A required
    key that is null is missing."""

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
    """A section of a `type`, which has no other keys than its fields, and those of `FREE`, with blanks between, whose values
    change nothing. Null is a value, which most keys refuse."""

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
    """The same in dicts and lists, of which models are made."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def _locate(document: Any, keys: list[Any]) -> tuple[list[Any], Any]:
    """The keys that lead to a value, without the names of a union's members that pydantic puts between, and the value."""
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
            + ": others are not known here"
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
    """The document as a `model`.

    Args:
        document: mappings, lists, texts, numbers, flags and nulls.
        source: what to call it in an error. under: the path of the document in it.
        checks: called with the model; they raise what `wrong` makes.
        index: how a list's index is written in a path. longest: characters of what was found.

    Raises:
        UserError: the first thing in it that does not fit.
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
    told = "missing" if absent or found is ABSENT else f"found {shown}"
    expected = _words(kind, keys[-1] if keys else None, context, message)
    raise UserError(f"{source}: {where.lstrip('.') or 'the document'}: {told}, expected {expected}; {fix}") from None
