"""Rows of an embedding table for ids that a backbone does not know, drawn from the rows that it has.

`covariance`: normal with the mean and the covariance of the known rows, x = μ + L z with L Lᵀ = Σ (+ 10⁻⁶ of its mean
eigenvalue, so that it has a factor) and z standard normal. New rows then lie where the model is used to seeing rows
(Hewitt, "Initializing New Word Embeddings for Pretrained Language Models", 2021; without its shrinking of Σ, so that
codes differ from the first step on). `normal`: each dimension by itself, with its own mean and variance. `mean`:
the mean itself.

The draw depends on the seed, the table's name and the known rows. Statistics are sums in fp64 of products in fp32.

Shapes: n known rows, k new ones, H hidden size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

NewRows = Literal["covariance", "normal", "mean"]
KINDS: tuple[NewRows, ...] = ("covariance", "normal", "mean")
_CHUNK = 8192
_JITTER = 1e-6


def draw_rows(known_nH: Tensor, new_kH: Tensor, *, kind: NewRows, seed: int, name: str) -> None:
    """Fill `new_kH` in place from the statistics of `known_nH` (any float dtypes and devices; n ≥ 1)."""
    mean_H = _mean(known_nH)
    if kind == "mean":
        new_kH.copy_(mean_H.expand_as(new_kH))
        return
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    if kind == "normal":
        square_H = torch.zeros_like(mean_H)
        for rows in _chunks(known_nH, mean_H):
            square_H += rows.square().sum(0)
        factor = (square_H / len(known_nH)).sqrt().float()
    else:
        factor = _factor(known_nH, mean_H)
    for rows in new_kH.split(_CHUNK):
        noise = torch.randn(rows.shape, generator=generator)
        shaped = noise * factor if kind == "normal" else noise @ factor.t()
        rows.copy_(shaped.add_(mean_H.float()))


def _mean(known_nH: Tensor) -> Tensor:
    total = torch.zeros(known_nH.shape[1], dtype=torch.float64)
    for rows in known_nH.split(_CHUNK):
        total += rows.cpu().double().sum(0)
    return total / len(known_nH)


def _chunks(known_nH: Tensor, mean_H: Tensor) -> Iterator[Tensor]:
    """Some rows at a time, less their mean, fp32."""
    mean = mean_H.float()
    for rows in known_nH.split(_CHUNK):
        yield rows.cpu().float() - mean


def _factor(known_nH: Tensor, mean_H: Tensor) -> Tensor:
    """L with L Lᵀ = the covariance, fp32 [H, H]."""
    covariance = torch.zeros(len(mean_H), len(mean_H), dtype=torch.float64)
    for rows in _chunks(known_nH, mean_H):
        covariance += rows.t() @ rows
    covariance /= len(known_nH)
    scale = covariance.diagonal().mean()
    if scale == 0:
        return torch.zeros_like(covariance, dtype=torch.float32)
    covariance.diagonal().add_(_JITTER * scale)
    return torch.linalg.cholesky(covariance).float()
