"""Checkpoints as Nunchaku and nunchaku_lite store them, written element by element, and their arithmetic in float64.

Addresses follow the fragments of the PTX instruction mma.m16n8k64 and the order in which lanes load scales; nothing of
the package is used.
"""

import json

import numpy as np
import torch
from safetensors.torch import save_file

SHIFT = 0.171875


def code_address(n, k, columns):
    """(byte, high nibble?) of the code of row n, column k."""
    tile = (n // 128) * (columns // 64) + k // 64  # 128 rows × 64 columns: 4096 bytes
    lane = (n % 8) * 4 + (k // 8) % 4
    register = ((n // 8) % 2) * 2 + (k // 32) % 2  # four words a lane
    return tile * 4096 + (n // 16) % 8 * 512 + lane * 16 + register * 4 + (k % 8) // 2, k % 2


def row_address(n, group, groups):
    """Place of row n's scale of a group (or of element n of a vector, groups = 1)."""
    within = n % 16
    return (n // 128 * groups + group) * 128 + n % 128 // 16 * 16 + within % 8 // 2 * 4 + within // 8 * 2 + within % 2


def block_address(row, column):
    """Place of an element of a 16 × 16 block of a low-rank factor."""
    lane = (row % 8) * 4 + column % 8 // 2
    return lane * 8 + row // 8 * 4 + column // 8 * 2 + column % 2


def weight_only_address(n, k, columns):
    """(word of 16 bits, nibble) of a weight-only code."""
    word = k % 64 // 32 * 8 + k % 8
    return ((n // 4) * (columns // 64) + k // 64) * 64 + n % 4 * 16 + word, k % 32 // 8


def grid(rows, columns):
    return np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")


def pack_codes(values):
    """values: integers −8 … 7, [N, K]."""
    byte, high = code_address(*grid(*values.shape), values.shape[1])
    out = np.zeros(values.size // 2, np.uint8)
    np.bitwise_or.at(out, byte, (values & 15).astype(np.uint8) << (4 * high).astype(np.uint8))
    return torch.from_numpy(out.view(np.int8)).reshape(len(values), -1)


def pack_rows(values):
    """values [N, G] → [G, N], or [N] → [N]."""
    matrix = values.reshape(len(values), -1)
    out = torch.empty(matrix.numel(), dtype=values.dtype)
    out[torch.from_numpy(row_address(*grid(*matrix.shape), matrix.shape[1]))] = matrix
    return out if values.ndim == 1 else out.reshape(matrix.shape[1], -1)


def pack_blocks(values, transposed):
    """A down-projection [K, r] (in blocks of its transpose) or an up-projection [N, r]."""
    i, j = grid(*values.shape)
    block = (i // 16) * (values.shape[1] // 16) + j // 16
    within = block_address(j % 16, i % 16) if transposed else block_address(i % 16, j % 16)
    out = torch.empty(values.numel(), dtype=values.dtype)
    out[torch.from_numpy(block * 256 + within)] = values
    return out.reshape(values.shape)


def pack_weight_only(values):
    """values: integers 0 … 15, [N, K]."""
    word, nibble = weight_only_address(*grid(*values.shape), values.shape[1])
    out = np.zeros(values.size // 4, np.uint16)
    np.bitwise_or.at(out, word, values.astype(np.uint16) << (4 * nibble).astype(np.uint16))
    return torch.from_numpy(out.view(np.int32)).reshape(len(values) // 4, -1)


class Linear:
    """A W4A4 linear, random: codes [N, K], scale [N, K/64], smooth [K], down [K, r], up [N, r], bias [N]."""

    def __init__(self, n, k, rank, seed, shifted=False, smooth=None, down=None):
        g = torch.Generator().manual_seed(seed)
        self.shifted = shifted
        self.codes = torch.randint(-8, 8, (n, k), generator=g).numpy()
        self.scale = (torch.rand(n, k // 64, generator=g) * 0.02 + 0.005).bfloat16()
        self.smooth = (torch.rand(k, generator=g) + 0.5).bfloat16() if smooth is None else smooth
        self.down = (torch.randn(k, rank, generator=g) / k**0.5).bfloat16() if down is None else down
        self.up = (torch.randn(n, rank, generator=g) / rank**0.5).bfloat16()
        self.bias = torch.randn(n, generator=g).bfloat16()

    def stored(self, prefix, names):
        down, up, smooth = names
        return {
            f"{prefix}.qweight": pack_codes(self.codes), f"{prefix}.wscales": pack_rows(self.scale),
            f"{prefix}.bias": pack_rows(self.bias), f"{prefix}.{smooth}": pack_rows(self.smooth),
            f"{prefix}.{down}": pack_blocks(self.down, True), f"{prefix}.{up}": pack_blocks(self.up, False),
        }  # fmt: skip

    @property
    def residual(self):
        """q ∘ s, as it multiplies x / λ."""
        return self.codes * np.repeat(self.scale.double().numpy(), 64, axis=1)

    @property
    def weight(self):
        """What multiplies x, without rounding of activations."""
        low = self.up.double().numpy() @ self.down.double().numpy().T
        return self.residual / self.smooth.double().numpy() + low

    @property
    def plain_bias(self):
        """The bias without the share that makes up for the shifted input."""
        share = SHIFT * (self.residual / self.smooth.double().numpy()).sum(1) if self.shifted else 0
        return self.bias.double().numpy() + share

    def forward(self, x, lite=False, bits=4):
        """As Nunchaku computes it, x float64 [M, K]: 4-bit activations per 64 columns, unsigned behind GELU.

        lite: as nunchaku_lite does: always with a sign, and the bias without what makes up for the shift. bits: 16 for
        activations that are not rounded. What the branch has in the middle is bfloat16, as there.
        """
        low = torch.from_numpy(x @ self.down.double().numpy()).bfloat16().double().numpy() @ self.up.double().numpy().T
        if bits == 16:
            return (x / self.smooth.double().numpy()) @ self.residual.T + low + self.plain_bias
        shifted = self.shifted and not lite
        v = (x + (SHIFT if shifted else 0)) / self.smooth.double().numpy()
        v = v.reshape(len(v), -1, 64)
        top = 15 if shifted else 7
        step = np.abs(v).max(-1, keepdims=True) / top
        q = np.clip(np.rint(v / step), 0 if shifted else -8, top) * step
        bias = self.plain_bias if lite else self.bias.double().numpy()
        return q.reshape(x.shape) @ self.residual.T + low + bias


class WeightOnly:
    """A modulation linear: codes 0 … 15, w = (u − zero) s, rows in diffusers' order."""

    def __init__(self, n, k, seed, zero=7):
        g = torch.Generator().manual_seed(seed)
        self.codes = torch.randint(0, 16, (n, k), generator=g).numpy()
        self.scale = (torch.rand(n, k // 64, generator=g) * 0.02 + 0.005).bfloat16()
        self.zeros = -zero * self.scale
        self.zero = zero
        self.bias = torch.randn(n, generator=g).bfloat16()

    @property
    def weight(self):
        return (self.codes - self.zero) * np.repeat(self.scale.double().numpy(), 64, axis=1)

    def stored(self, prefix, parts):
        """parts: how many the rows are interleaved of, and 1 added to the scales' biases; 0 for neither."""
        bias = self.bias.clone()
        order = torch.arange(len(bias))
        if parts:
            order = order.reshape(parts, -1).T.reshape(-1)
            ones = torch.zeros(parts)
            ones[[1, -2]] = 1
            bias = bias + ones.repeat_interleave(len(bias) // parts)
        return {
            f"{prefix}.qweight": pack_weight_only(self.codes[order.numpy()]),
            f"{prefix}.wscales": self.scale[order].T.contiguous(),
            f"{prefix}.wzeros": self.zeros[order].T.contiguous(),
            f"{prefix}.bias": bias[order].contiguous(),
        }


NATIVE, LITE = ("lora_down", "lora_up", "smooth"), ("proj_down", "proj_up", "smooth_factor")


class Model:
    """A FLUX.1 with one double and one single block of random contents, and files of it.

    linears: diffusers' name → its parts: (Linear, rows of it). A part's inputs follow those of the part before.
    """

    RANK = 16

    def __init__(self, dense, zero=7):
        self.dense, d = dense, dense.inner_dim
        self.config = {k: v for k, v in dense.config.items() if not k.startswith("_")}
        self.config["_class_name"] = "FluxTransformer2DModel"
        r = self.RANK
        double, single = "transformer_blocks.0", "single_transformer_blocks.0"
        self.fused = {
            f"{double}.qkv_proj": Linear(3 * d, d, r, 1), f"{double}.qkv_proj_context": Linear(3 * d, d, r, 2),
            f"{double}.out_proj": Linear(d, d, r, 3), f"{double}.out_proj_context": Linear(d, d, r, 4),
            f"{double}.mlp_fc1": Linear(4 * d, d, r, 5), f"{double}.mlp_context_fc1": Linear(4 * d, d, r, 6),
            f"{double}.mlp_fc2": Linear(d, 4 * d, r, 7, True),
            f"{double}.mlp_context_fc2": Linear(d, 4 * d, r, 8, True),
            f"{single}.qkv_proj": Linear(3 * d, d, r, 9), f"{single}.out_proj": Linear(d, d, r, 10),
            f"{single}.mlp_fc2": Linear(d, 4 * d, r, 12, True),
        }  # fmt: skip
        self.fused[f"{single}.mlp_fc1"] = Linear(4 * d, d, r, 11, smooth=self.fused[f"{single}.qkv_proj"].smooth)
        self.modulation = {
            f"{double}.norm1.linear": (WeightOnly(6 * d, d, 13, zero), 6),
            f"{double}.norm1_context.linear": (WeightOnly(6 * d, d, 14, zero), 6),
            f"{single}.norm.linear": (WeightOnly(3 * d, d, 15, zero), 3),
        }
        self.linears = {
            f"{double}.{n}": [(self.fused[f"{double}.{p}"], slice(None))]
            for n, p in {
                "attn.to_out.0": "out_proj", "attn.to_add_out": "out_proj_context", "ff.net.0.proj": "mlp_fc1",
                "ff.net.2": "mlp_fc2", "ff_context.net.0.proj": "mlp_context_fc1",
                "ff_context.net.2": "mlp_context_fc2",
            }.items()
        }  # fmt: skip
        for stem, names in (
            (f"{double}.qkv_proj", [f"{double}.attn.to_{c}" for c in "qkv"]),
            (f"{double}.qkv_proj_context", [f"{double}.attn.add_{c}_proj" for c in "qkv"]),
            (f"{single}.qkv_proj", [f"{single}.attn.to_{c}" for c in "qkv"]),
        ):
            self.linears |= {n: [(self.fused[stem], slice(i * d, i * d + d))] for i, n in enumerate(names)}
        self.linears[f"{single}.proj_mlp"] = [(self.fused[f"{single}.mlp_fc1"], slice(None))]
        self.linears[f"{single}.proj_out"] = [
            (self.fused[f"{single}.{p}"], slice(None)) for p in ("out_proj", "mlp_fc2")
        ]

    def rest(self):
        """What is not quantized, under diffusers' names."""
        gone = {*self.linears, *self.modulation}
        return {n: t.clone() for n, t in self.dense.state_dict().items() if n.rpartition(".")[0] not in gone}

    def native(self):
        """Tensors of Nunchaku's single file."""
        out = {n.replace(".attn.norm_", ".norm_"): t for n, t in self.rest().items()}
        for prefix, linear in self.fused.items():
            out |= linear.stored(prefix, NATIVE) | {f"{prefix}.smooth_orig": pack_rows(linear.smooth)}
        for prefix, (linear, parts) in self.modulation.items():
            out |= linear.stored(prefix, parts)
        return out

    def lite(self):
        """Tensors of a nunchaku_lite folder: one stored linear a module, twice the rank, no shift."""
        out = self.rest()
        for prefix, (linear, _) in self.modulation.items():
            out |= linear.stored(prefix, 0)
        for name, parts in self.linears.items():
            one = Linear.__new__(Linear)
            one.shifted = False
            one.codes = np.concatenate([p.codes[rows] for p, rows in parts], 1)
            one.scale = torch.cat([p.scale[rows] for p, rows in parts], 1)
            one.smooth = torch.cat([p.smooth for p, _ in parts])
            down = torch.block_diag(*(p.down for p, _ in parts))
            up = torch.cat([p.up[rows] for p, rows in parts], 1)
            missing = 2 * self.RANK - down.shape[1]
            one.down, one.up = (torch.nn.functional.pad(m, (0, missing)) for m in (down, up))
            one.bias = torch.from_numpy(self.bias(name)).bfloat16()
            out |= one.stored(name, LITE)
        return out

    def weight(self, name):
        return np.concatenate([p.weight[rows] for p, rows in self.linears[name]], 1)

    def bias(self, name):
        return sum(p.plain_bias[rows] for p, rows in self.linears[name])

    def filled(self):
        """The dense model that the file stands for, float64."""
        model = type(self.dense).from_config(self.config).double()
        state = {n: t.double() for n, t in self.rest().items()}
        for name in self.linears:
            state[f"{name}.weight"], state[f"{name}.bias"] = map(torch.from_numpy, (self.weight(name), self.bias(name)))
        for name, (linear, _) in self.modulation.items():
            state[f"{name}.weight"], state[f"{name}.bias"] = torch.from_numpy(linear.weight), linear.bias.double()
        model.load_state_dict(state)
        return model.eval()

    def save_native(self, path, config=None, **metadata):
        text = json.dumps(self.config if config is None else config)
        save_file(self.native(), path, {"config": text, "model_class": "NunchakuFluxTransformer2dModel", **metadata})
        return path

    def save_split(self, folder):
        folder.mkdir()
        tensors = self.native()
        blocks = {n for n in tensors if "transformer_blocks." in n}
        save_file({n: tensors[n] for n in blocks}, folder / "transformer_blocks.safetensors")
        save_file({n: t for n, t in tensors.items() if n not in blocks}, folder / "unquantized_layers.safetensors")
        (folder / "config.json").write_text(json.dumps(self.config))
        return folder

    def save_lite(self, folder):
        folder.mkdir()
        save_file(self.lite(), folder / "diffusion_pytorch_model.safetensors")
        quantization = {
            "quant_method": "nunchaku_lite", "compute_dtype": "bfloat16",
            "svdq_w4a4": {
                "precision": "int4", "group_size": 64, "rank": 2 * self.RANK, "targets": sorted(self.linears),
            },
            "awq_w4a16": {"precision": "int4", "group_size": 64, "targets": sorted(self.modulation)},
        }  # fmt: skip
        (folder / "config.json").write_text(json.dumps(self.config | {"quantization_config": quantization}))
        return folder
