"""The placement rules, in the order in which they run. A rule is one file; adding one touches no other."""

from qat.lean.rules import weighted_layers  # isort: skip
from qat.lean.rules import residual_add  # isort: skip
from qat.lean.rules import pass_through  # isort: skip
from qat.lean.rules import concat  # isort: skip
from qat.lean.rules import attention  # isort: skip
from qat.lean.rules import layer_norm  # isort: skip
from qat.lean.rules import integer_chain  # isort: skip

__all__ = ["attention", "concat", "integer_chain", "layer_norm", "pass_through", "residual_add", "weighted_layers"]
