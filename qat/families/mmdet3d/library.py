"""mmdet3d and what it stands on, imported where nothing is compiled.

`load()` before anything of mmcv.ops, mmdet or mmdet3d: it declares torchvision's operators, puts ours in the place of
`mmcv._ext` where that was not compiled, and registers mmdet3d's models.
"""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import warnings

from qat.core.errors import UserError

PACKAGES = {"mmengine": "0.10.7", "mmcv": "2.1.0", "mmdet": "3.2.0", "mmdet3d": "1.4.0"}  # tried together
INSTALL = "pip install -c constraints.txt '.[mmdet3d]', then pip install --no-deps mmdet3d==1.4.0"


def versions() -> dict[str, str | None]:
    """What is installed of `PACKAGES`: name → version, None where it is not there. mmcv-lite counts as mmcv."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        found[name] = None
        for package in (name, f"{name}-lite"):
            try:
                found[name] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                continue
            break
    return found


@functools.cache
def load() -> None:
    """Makes mmdet3d's models, transforms and data sets ready to be built.

    Raises:
        UserError: a package is missing, or of a release that mmdet3d refuses.
    """
    missing = [name for name, version in versions().items() if version is None]
    if missing:
        raise UserError(f"mmdet3d: found no {', '.join(missing)}, expected all of {', '.join(PACKAGES)}; {INSTALL}")
    import qat.lean._torchvision  # noqa: F401  # torchvision imports beside a CPU build of torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from qat.families.mmdet3d import ops

        ops.install()
        try:
            import mmdet3d.datasets.transforms
            import mmdet3d.models  # noqa: F401

            from qat.families.mmdet3d import awml

            awml.register()
        except (AssertionError, ImportError) as error:
            raise UserError(f"mmdet3d: {error}; expected the releases that go together; {INSTALL}") from error
        from mmengine.registry import init_default_scope

        init_default_scope("mmdet3d")
    logging.getLogger("mmengine").setLevel(logging.ERROR)
