"""DiRotQ: 4-bit (W4A4) diffusion transformers for diffusers and ComfyUI."""

__version__ = "0.1.0"
