"""ComfyUI nodes: `extension` holds the list; it and what it imports need ComfyUI."""
