"""results.json: the report's input from compare, and the checks before a page is made from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qat.core.files import read_json

SCHEMA = 1
Results = dict[str, Any]

EXACT_DB = 200  # the value that compare and sensitivity write for equal tensors


def check_results(results: Any, source: str = "results") -> Results:
    """Returns `results` if a report can be made from it.

    Args:
        results: a parsed results.json.
        source: its name in errors.

    Raises:
        UserError: another schema, or a missing or invalid value, named by its path.
    """
    from qat.core.validation import validated  # imported here: `bevqat benchmark` draws on machines without pydantic
    from qat.report import models

    validated(
        models.Results, results, source, models.check_rows, index="[{}]", fix="write it again with compare", longest=60
    )
    return results


def check_sensitivity(section: Any, source: str, fix: str) -> dict[str, Any]:
    """Returns a checked entry `sensitivity` of results.json.

    Args:
        source: the file it comes from. fix: how to fix an error.

    Raises:
        UserError: a missing or impossible value, named by its path.
    """
    from qat.core.validation import validated
    from qat.report import models

    validated(models.Sensitivity, section, source, index="[{}]", fix=fix, longest=60)
    return dict(section)


def load_results(results: Mapping[str, Any] | str | Path) -> Results:
    """Checked results, from a results.json or from its content.

    Raises:
        UserError: the file cannot be read, is not JSON, or fails `check_results`.
    """
    if isinstance(results, Mapping):
        return check_results(dict(results))
    return check_results(read_json(results), str(results))
