"""The fenced code blocks of the documentation, and what stands for each name that they use."""

from __future__ import annotations

import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from dirotq.dirotq_core.demo.embedded import MODELS, prompts

from ..core import nunchaku_files

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
#: A part of a block that cannot run here → why. The rest of the block's page runs without it.
CANNOT_RUN = {
    "_offload(": "offloading wants an accelerator",
    "enable_parallelism(": "needs several processes; tests/backend starts two",
    "compile_repeated_blocks(": "compiles for a minute; tests/backend compiles one block",
    "from_single_file(": "diffusers converts only FLUX.1's own width; tests/backend brings a converter",
    "dirotq demo": "draws for minutes; tests/demo runs it",
    "dirotq evaluate": "draws for minutes; tests/evaluate runs it",
    "git clone": "needs a network and ComfyUI",
    "pip install": "would change the environment",
    "torchrun": "starts four processes; tests/engine runs two",
    "-m pytest": "is what runs this",
    "benchmarks/quality.py": "takes an hour on a GPU",
}


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(ROOT).as_posix()}:{self.line}"

    @property
    def obstacle(self) -> str | None:
        """Why it cannot run here."""
        return next((why for part, why in CANNOT_RUN.items() if part in self.text), None)


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [Block(page, text[: m.start(2)].count("\n") + 1, m[1], m[2]) for m in found]


def commands_of(block: Block) -> list[list[str]]:
    """The words of every command of a shell block, without variables set in front of it."""
    commands = []
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            command = [w for i, w in enumerate(words[:end]) if i or not re.match(r"[A-Z_]+=", w)]
            commands.append([w for w in command if w])
            words = words[end + 1 :]
    return [c for c in commands if c]


def furnish(folder: Path, quantized: Path) -> None:
    """What the pages take for granted, made of small models: folders, a LoRA, prompts, a checkpoint of Nunchaku's."""
    (folder / "my-flux-finetune").symlink_to(MODELS["flux-tiny"].folder)
    (folder / "my-pixart").symlink_to(MODELS["pixart-sigma-tiny"].folder)
    for name in ("flux-dev-dirotq", "my-flux-dirotq"):
        shutil.copytree(quantized, folder / name)
    (folder / "prompts.txt").write_text("\n".join(captions()) + "\n", encoding="utf-8")
    (folder / "ComfyUI" / "models" / "diffusion_models").mkdir(parents=True)
    width = 192  # of the small FLUX.1
    lora = {
        f"transformer.single_transformer_blocks.0.attn.to_q.lora_{ab}.weight": 0.1 * torch.randn(shape)
        for ab, shape in (("A", (4, width)), ("B", (width, 4)))
    }
    save_file(lora, folder / "my-lora.safetensors")


def write_nunchaku(file: Path) -> None:
    from diffusers import FluxTransformer2DModel

    dense = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=128, num_attention_heads=1,
        joint_attention_dim=64, pooled_projection_dim=64, guidance_embeds=True, axes_dims_rope=(16, 56, 56),
    )  # fmt: skip
    nunchaku_files.Model(dense.to(torch.bfloat16)).save_native(file)


def captions() -> list[str]:
    return [s.caption() for s in prompts(3, seed=5, held_out=False)]
