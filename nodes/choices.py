"""Values of combo inputs. Imports nothing, because ComfyUI reads the nodes' inputs when it starts."""

BACKENDS = ("auto", "triton", "pytorch")
LORA_MODES = ("side branch", "requantize")
BITS = ("4", "8", "16")
ACTIVATION_BITS = ("default", *BITS)
#: Folder of models/ that checkpoints are read from and written to.
FOLDER = "diffusion_models"
