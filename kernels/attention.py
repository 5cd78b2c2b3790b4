"""The ops between the projections of queries, keys and values and that of the attention's result."""

import math
from collections.abc import Sequence

from torch import Tensor

from . import checks, replay

#: The scale with which `attend` takes weights as powers of two of q kᵀ.
POWERS_OF_TWO = math.log(2)

SCHEMA = "(Tensor query, Tensor key, Tensor value, Tensor? bias=None, float? scale=None) -> Tensor"
ROPE_SCHEMA = (
    "(Tensor[] queries, Tensor[] keys, Tensor[] values, Tensor[] query_weights, Tensor[] key_weights, Tensor cos,"
    " Tensor sin, float eps, float query_scale=1.0) -> (Tensor, Tensor, Tensor)"
)


def qk_norm_rope(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    query_weights: Sequence[Tensor],
    key_weights: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    eps: float,
    query_scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys [B, S, H, D]: RMS norm of each head, then rotary position embedding; values as they are.

    queries, keys, values: parts [B, S_i, H, D] (text, then image), put side by side along S = Σ S_i; bf16, fp16 or
    fp32, any strides; without `values` the third result is empty, too. query_weights, key_weights: [D] for each part.
    cos, sin [S, D] fp32, for pairs of neighbouring columns: y_2j = x_2j cos_2j − x_2j+1 sin_2j, y_2j+1 =
    x_2j+1 cos_2j+1 + x_2j sin_2j+1. D a power of two. The norm's result is rounded to the inputs' dtype before it is
    turned. Queries are multiplied by query_scale before their last rounding. Not differentiable.
    Raises ValueError naming the argument and the rule it breaks.
    """
    return replay.op("qk_norm_rope", 1, (queries, keys, values, query_weights, key_weights, cos, sin, eps, query_scale))


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, scale: float | None = None) -> Tensor:
    """softmax(scale · q kᵀ + bias) v for each head; [B, S, H, D] contiguous, in the dtype of q.

    query [B, S, H, D]; key, value [B, T, H, D], T at least 1; bias [B, T], of no image -inf throughout; all in bf16,
    fp16 or fp32, any strides. scale: 1 / √D unless given. PyTorch's `scaled_dot_product_attention` computes it, but on
    Hopper for heads of 72 or 80 columns in 16 bit, for which it has no kernel as narrow as they are, and of 128 in
    bf16 without a bias where the scale is POWERS_OF_TWO (ln 2): with `powers_scale` in the queries (`qk_norm_rope`),
    weights are powers of two of q kᵀ, and values must be below 2³⁷. In these kernels biases below -1e30 are equal, and
    a key or a value that is not finite can make results of the head before its own, or of the image before, not finite,
    too. Not differentiable.
    Raises ValueError naming the argument and the rule it breaks.
    """
    return replay.op("attend", 1, (query, key, value, bias, scale))


def powers_scale(columns: int) -> float:
    """log₂ e / √D: queries that hold it make softmax(q kᵀ / √D) that of `attend` with POWERS_OF_TWO."""
    return 1 / (POWERS_OF_TWO * math.sqrt(columns))


def run_attend(query, key, value, bias=None, scale=None):
    return replay.call(checks.attend, "attend", 1, (query, key, value, bias, scale))


def fake_attend(query, key, value, bias=None, scale=None):
    checks.attend(query, key, value, bias, scale)
    return query.new_empty(query.shape)


def run_rope(queries, keys, values, query_weights, key_weights, cos, sin, eps, query_scale=1.0):
    args = queries, keys, values, query_weights, key_weights, cos, sin, eps, query_scale
    return replay.call(checks.qk_norm_rope, "qk_norm_rope", 1, args)


def fake_rope(queries, keys, values, query_weights, key_weights, cos, sin, eps, query_scale=1.0):
    checks.qk_norm_rope(queries, keys, values, query_weights, key_weights, cos, sin, eps, query_scale)
    batch, _, heads, d = queries[0].shape
    shape = (batch, sum(q.shape[1] for q in queries), heads, d)
    return queries[0].new_empty(shape), queries[0].new_empty(shape), queries[0].new_empty(shape if values else 0)
