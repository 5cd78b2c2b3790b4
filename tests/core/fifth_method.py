"""A made-up method, to show what one takes: a transform, a weight format and a row.

Columns change signs at random and are turned around; weights are rounded to −4..3 per 64 columns, activations
symmetrically to 4 or 8 bits.
"""

from dirotq.dirotq_core.codebooks import WeightFormat
from dirotq.dirotq_core.methods import Method
from dirotq.dirotq_core.transforms import Transform, random_signs


def prepare(s):
    return {"signs": random_signs(s.features, s.seed)}


def apply(x, t):
    """v = x D, last column first. W goes the same way: D² = 1."""
    return (x * t["signs"].to(x.device, x.dtype)).flip(1), x.new_zeros(len(x), 0)


METHOD = Method(
    transform=Transform(
        prepare, apply, apply,
        shapes=lambda k, r: {"signs": (k,)}, low_features=lambda k, r: k, kernel=False, subspace=False,
    ),
    weight_format=WeightFormat("int3_g64", (0, 1, 2, 3, -4, -3, -2, -1), 1.6, grouped=True),
    activations={4: "sym_g64", 8: "sym_g64_8"},
    rounding="gptq",
    rank=0,
    source="made up",
)  # fmt: skip
