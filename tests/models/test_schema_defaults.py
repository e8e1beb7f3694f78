"""The defaults that the config's schema shows are those that the networks have."""

import inspect

import pytest

from qat.families.bevfusion import schema
from qat.families.bevfusion.detector import NETWORKS
from qat.families.bevfusion.networks.centerhead import SeparateHead
from qat.families.bevfusion.networks.swin import SwinTransformer

BUILT = {**NETWORKS, "SwinTransformer": SwinTransformer, "SeparateHead": SeparateHead}


@pytest.mark.parametrize("name", sorted(BUILT))
def test_a_networks_defaults_are_the_schemas(name):
    fields = getattr(schema, name).model_fields
    parameters = inspect.signature(BUILT[name].__init__).parameters
    plain = 0
    for key, parameter in parameters.items():
        if key not in fields:
            continue
        required = parameter.default is inspect.Parameter.empty
        assert fields[key].is_required() == required, key
        if not required and not isinstance(parameter.default, dict) and not key.endswith(("_cfg", "separate_head")):
            default = fields[key].default
            assert (tuple(default) if isinstance(default, list) else default) == parameter.default, key
            plain += 1
    assert plain or name in ("GeneralizedResNet", "SECOND")
