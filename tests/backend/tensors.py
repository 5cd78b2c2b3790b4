"""Comparing tensors and state dicts."""

import torch


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


def state_of(model):
    return {n: t.clone() for n, t in model.state_dict().items()}


def same(state, other):
    return state.keys() == other.keys() and all(torch.equal(t, other[n]) for n, t in state.items())
