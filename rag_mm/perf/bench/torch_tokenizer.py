"""SPAE's autoencoder in PyTorch: plain functions of our parameters, in torch's own layout of images."""

import types
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from rag_mm.core import code_grids
from rag_mm.models.spae.spae_config import SPAEConfig
from rag_mm.nn import param_trees
from rag_mm.nn.param_trees import Params
from rag_mm.ops import quantize
from rag_mm.perf.bench import torch_peer

_EPS = 1e-6
_GROUPS = 32


class TorchTokenizer:
    """The peer; images are float32 [B, 3, H, W] tensors in 0..1.

    Convolutions are of channels-first tensors, and each level has one matrix of distances.
    """

    def __init__(self, config: SPAEConfig, params: Params, num_threads: int):
        """Copies our parameters.

        Args:
            config: convolutions at one pixel a patch, with a learned codebook and plain averages.
            params: of `autoencoder.SPAE`.
            num_threads: of torch.
        """
        self.torch, _ = torch_peer.load()
        self.torch.set_num_threads(num_threads)
        self.config = config
        self.grids = config.grids_at(config.image_size, config.image_size)
        leaves = param_trees.leaves_by_path(jax.device_get(params))
        self.weights = {path: self._take(leaf) for path, leaf in leaves.items()}

    def _take(self, leaf: np.ndarray) -> Any:
        """A parameter in torch's layout: kernels are [out, in, rows, columns] or [out, in]."""
        axes = {4: (3, 2, 0, 1)}.get(leaf.ndim)
        array = np.array(leaf if axes is None else leaf.transpose(axes), order="C")
        return self.torch.from_numpy(array).requires_grad_()

    def embed(self, images: Any) -> Any:
        """Embeddings [B, D, R, S] of the finest grid."""
        count = len(self.config.width_multipliers)
        h = self._conv("encoder/stem", images)
        for scale in range(count + 1):
            h = self._blocks(f"encoder/scales/{scale}", h)
            if scale < count - 1:
                h = self._functions.avg_pool2d(h, 2)
        h = self._functions.silu(self._norm("encoder/norm", h))
        kernel = self.weights["encoder/to_embedding/kernel"].t()[:, :, None, None]
        return self._functions.conv2d(h, kernel, self.weights["encoder/to_embedding/bias"])

    def render(self, z: Any) -> Any:
        """Images [B, 3, H, W] from embeddings."""
        h = self._blocks("decoder/blocks", self._conv("decoder/stem", z))
        count = len(self.config.width_multipliers)
        for scale in range(count):
            h = self._blocks(f"decoder/scales/{scale}", h)
            if scale < count - 1:
                h = self._functions.interpolate(h, scale_factor=2, mode="nearest")
                h = self._conv(f"decoder/ups/{scale}", h)
        return self._conv("decoder/to_patches", self._functions.silu(self._norm("decoder/norm", h)))

    def quantize(self, z: Any) -> Any:
        """Codes [B, N] of embeddings, by streaming averages."""
        torch = self.torch
        with torch.no_grad():
            z, sums, codes = z.permute(0, 2, 3, 1), torch.zeros_like(z.permute(0, 2, 3, 1)), []
            codebook = self.weights["codebook"]
            norms = (codebook**2).sum(1)
            for grid, counts in zip(self.grids, quantize.word_counts(self.grids), strict=True):
                at = self._places(grid)
                weight = torch.from_numpy(counts[at[1:]].astype(np.float32))[None, :, :, None]
                target = (weight * z[at] - sums[at]).reshape(-1, z.shape[-1])
                found = (norms - 2 * target @ codebook.t()).argmin(1)
                sums[at] += codebook[found].reshape(z.shape[0], *grid, -1)
                codes.append(found.reshape(z.shape[0], -1))
            return torch.cat(codes, 1)

    def averages(self, codes: Any) -> list[Any]:
        """zhat_<=l [B, D, R, S] of each level."""
        torch, codebook, found, start = self.torch, self.weights["codebook"], [], 0
        sums = torch.zeros(codes.shape[0], *self.grids[-1], codebook.shape[1])
        for grid, counts in zip(self.grids, quantize.word_counts(self.grids), strict=True):
            end = start + grid[0] * grid[1]
            sums = sums.clone()
            sums[self._places(grid)] += codebook[codes[:, start:end]].reshape(
                -1, *grid, sums.shape[-1]
            )
            total = torch.from_numpy(np.maximum(counts, 1).astype(np.float32))
            found.append((sums / total[None, :, :, None]).permute(0, 3, 1, 2))
            start = end
        return found

    def loss(self, images: Any) -> Any:
        """Pixel error + codebook loss + weighted commitment loss, as `objective.loss_fn`."""
        z = self.embed(images)
        averages = self.averages(self.quantize(z))
        image = self.render(averages[-1].detach() + (z - z.detach()))
        loss = ((image - images) ** 2).mean()
        for counts, average in zip(quantize.word_counts(self.grids), averages, strict=True):
            covered = self.torch.from_numpy((counts > 0).astype(np.float32))
            size = covered.sum() * z.shape[0] * z.shape[1]
            for weight, a, b in (
                (1.0, z.detach(), average),
                (self.config.commitment_weight, z, average.detach()),
            ):
                loss = loss + weight * (covered * (a - b) ** 2).sum() / size
        return loss

    def make_train_step(self, learning_rate: float) -> Callable[[Any], float]:
        """images -> the loss of one float32 Adam step on them."""
        adam = self.torch.optim.Adam(self.weights.values(), lr=learning_rate)

        def step(images: Any) -> float:
            adam.zero_grad(set_to_none=True)
            loss = self.loss(images)
            loss.backward()
            adam.step()
            return float(loss.detach())

        return step

    @property
    def _functions(self) -> types.ModuleType:
        return self.torch.nn.functional

    def _places(self, grid: tuple[int, int]) -> tuple[slice, slice, slice]:
        rows, columns = map(code_grids.patches, grid, self.grids[-1])
        return slice(None), rows, columns

    def _conv(self, path: str, x: Any) -> Any:
        bias = self.weights.get(f"{path}/bias")
        return self._functions.conv2d(x, self.weights[f"{path}/kernel"], bias, padding=1)

    def _norm(self, path: str, x: Any) -> Any:
        scale, bias = (self.weights[f"{path}/{name}"] for name in ("scale", "bias"))
        groups = int(np.gcd(x.shape[1], _GROUPS))
        return self._functions.group_norm(x, groups, scale, bias, _EPS)

    def _blocks(self, path: str, x: Any) -> Any:
        for block in range(self.config.num_res_blocks):
            x = self._block(f"{path}/layers/{block}", x)
        return x

    def _block(self, path: str, x: Any) -> Any:
        silu = self._functions.silu
        h = self._conv(f"{path}/conv1", silu(self._norm(f"{path}/norm1", x)))
        h = self._conv(f"{path}/conv2", silu(self._norm(f"{path}/norm2", h)))
        skip = self.weights.get(f"{path}/skip/kernel")
        if skip is not None:
            x = self._functions.conv2d(x, skip.t()[:, :, None, None])
        return h + x
