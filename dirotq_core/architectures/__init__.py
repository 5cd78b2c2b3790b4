"""Recipes: which linears of a transformer are quantized, and which of them read the same tensor."""

from torch import nn

from .flux import FLUX
from .pixart import PIXART
from .recipe import BlockRecipe, Recipe

__all__ = ["SUPPORTED", "BlockRecipe", "Recipe", "recipe_for"]

#: Transformer class of diffusers → recipe.
SUPPORTED: dict[str, Recipe] = {"FluxTransformer2DModel": FLUX, "PixArtTransformer2DModel": PIXART}


def recipe_for(model: nn.Module | type) -> Recipe:
    """The recipe for `model`, or for a model class, by the name of its class or of a base class.

    ValueError names the supported ones.
    """
    given = model if isinstance(model, type) else type(model)
    for cls in given.__mro__:
        if cls.__name__ in SUPPORTED:
            return SUPPORTED[cls.__name__]
    raise ValueError(
        f"{given.__name__} has no DiRotQ recipe; supported: {', '.join(sorted(SUPPORTED))}. "
        "Text encoders and VAEs are not quantized by dirotq."
    )
