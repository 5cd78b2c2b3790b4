"""The linears that `linear.py` times beside this package's own: torchao's, bitsandbytes' and the published DiRotQ."""

from collections.abc import Callable

import step_models
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dirotq.dirotq_core.build import solved_modules
from dirotq.dirotq_core.config import DiRotQConfig
from dirotq.dirotq_core.input_site import SiteMemo
from dirotq.dirotq_core.layout import SitePlan

Run = Callable[[Tensor], Tensor]


def _held(weight: Tensor, bias: Tensor) -> nn.Module:
    """A model of one linear, called "linear", with these tensors."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta", dtype=weight.dtype)
    linear.weight, linear.bias = nn.Parameter(weight, False), nn.Parameter(bias, False)
    return nn.ModuleDict({"linear": linear})


@torch.compile(fullgraph=True, dynamic=False)  # one fixed size at a time, as in `step.py`
def _compiled_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight, bias)


def _torchao(quantize: Callable[[nn.Module, set[str]], nn.Module]) -> Callable[[Tensor, Tensor], Run]:
    def make(weight: Tensor, bias: Tensor) -> Run:
        linear = quantize(_held(weight, bias), {"linear"})["linear"]
        return lambda x: _compiled_linear(x, linear.weight, linear.bias)

    return make


def _nf4(weight: Tensor, bias: Tensor) -> Run:
    return step_models.nf4_linear(_held(weight, bias)["linear"])


def _paper(weight: Tensor, bias: Tensor) -> Run:
    config = DiRotQConfig(method="paper", rounding="nearest").resolved(calibrated=True)
    model, k = _held(weight, bias), weight.shape[1]
    plan = SitePlan(("linear",), k, (weight.shape[0],), config.site_rank(k), True, config.method, seed=0)
    solved = step_models.random_site(plan, [weight])
    return solved_modules(model, plan, solved, config, SiteMemo())["linear"]


#: name: what makes a runnable linear of a bf16 weight [N, K] and bias [N].
PEERS: dict[str, Callable[[Tensor, Tensor], Run]] = {
    "torchao fp8": _torchao(step_models.torchao_fp8),
    "torchao int8": _torchao(step_models.torchao_int8),
    "NF4": _nf4,
    "paper": _paper,
}
