"""Values of combo inputs. Imports nothing, because ComfyUI reads the nodes' inputs when it starts."""

BACKENDS = ("auto", "triton", "pytorch")
LORA_MODES = ("side branch", "requantize")
ACTIVATION_BITS = ("default", "4", "8", "16")
#: Folder of models/ that checkpoints are read from and written to.
FOLDER = "diffusion_models"
