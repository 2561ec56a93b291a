"""Whether an imported model computes what `transformers` does with the same folder: logits of a few tokens.

Both sides compute in fp32 from the weights as the checkpoint has them, one after the other: `transformers` before the
model of this project is built, so that one model in fp32 is the most that is in memory (4 bytes a parameter, and the
largest tensor once more). The rotary frequencies are compared too: those of long texts hardly show in few tokens.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from torch import Tensor

from megatron_speech.errors import InputError
from megatron_speech.model.builder import SpeechGPTModel
from megatron_speech.model.packed import PackedSequences
from megatron_speech.training.plan import machine_bytes

TOKENS = 32
TOLERANCE = 1e-3
"""Of the largest logit (of 1 where all are smaller): the largest difference that counts as none."""

_FREQUENCY_TOLERANCE = 1e-5


@dataclass(frozen=True)
class ReferenceLogits:
    """What `transformers` computed.

    Attributes:
        version: of transformers.
        ids: int64 [TOKENS].
        logits: fp32 [TOKENS, rows of the backbone].
        frequencies: rotary, fp32 [width of a head / 2].
    """

    version: str
    ids: Tensor
    logits: Tensor
    frequencies: Tensor


def reference(
    folder: Path, architecture: str, config: dict[str, Any], *, precision: Literal["fp32", "bf16"], trained: int,
    parameters: int, largest: int,
) -> ReferenceLogits | str:  # fmt: skip
    """Run a few tokens through the folder's model in `transformers`; or why that is left out, for a person.

    Args:
        folder: config.json and weights.
        architecture: its class.
        config: config.json.
        precision: to which the weights are rounded first: that of the checkpoint.
        trained: ids to draw from.
        parameters, largest: elements of all tensors, and of the largest.

    Raises:
        InputError: transformers cannot load the folder.
    """
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed"
    needed, free = 4 * (parameters + largest), _free_bytes()
    if needed > free:
        return f"that takes {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free"
    try:
        import transformers
    except ImportError as error:
        return f"transformers cannot be imported ({error})"
    if int(transformers.__version__.split(".")[0]) < 5 and config.get("rope_parameters"):
        return f"transformers {transformers.__version__} does not read rope_parameters; version 5 does"
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    verbosity = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        theirs = getattr(transformers, architecture).from_pretrained(folder, dtype=dtype, local_files_only=True)
    except Exception as error:  # of many kinds; all of them mean that transformers refuses the folder
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise InputError(
            f"transformers {transformers.__version__} does not load {folder} ({type(error).__name__}: {first}); repair "
            "the folder, or import it unseen with --no-probe"
        ) from error
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()
    theirs = theirs.float().eval()
    ids = torch.randint(trained, (TOKENS,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = theirs(ids[None]).logits[0].float()
    frequencies = theirs.model.rotary_emb.inv_freq.float().clone()
    return ReferenceLogits(transformers.__version__, ids, logits, frequencies)


def compare(model: SpeechGPTModel, wanted: ReferenceLogits, folder: Path) -> str:
    """Run the same tokens through `model`; returns one sentence.

    The model's parameters are fp32 meanwhile and afterwards of the type, and bit by bit the values, that they had.

    Raises:
        InputError: logits or rotary frequencies differ.
    """
    ours = model.model_config.inverse_frequencies()
    apart = (ours / wanted.frequencies - 1).abs().max().item() if ours.shape == wanted.frequencies.shape else torch.inf
    if not apart <= _FREQUENCY_TOLERANCE:
        raise InputError(
            f"{folder}: the rotary frequencies differ by up to {apart:.1e} of themselves from those of transformers "
            f"{wanted.version}: config.json is read otherwise there; --no-probe imports it all the same"
        )
    device = next(model.parameters()).device
    dtype = next(model.parameters()).dtype
    packed = PackedSequences.build(torch.tensor([0, TOKENS], dtype=torch.int32))
    training = model.training
    model.float().eval()
    try:
        with torch.no_grad():
            logits = model(wanted.ids[None].to(device), None, None, packed_seq_params=packed)
    finally:
        model.to(dtype).train(training)
    difference = (logits[:, : wanted.logits.shape[1]].cpu() - wanted.logits).abs().max().item()
    largest = wanted.logits.abs().max().item()
    tolerance = TOLERANCE * max(1.0, largest)
    if not difference <= tolerance:
        raise InputError(
            f"{folder}: logits of {TOKENS} tokens differ by up to {difference:.2g} from those of transformers "
            f"{wanted.version} (tolerance {tolerance:.1g}): weights or config.json are read otherwise there; "
            "--no-probe imports it all the same"
        )
    return (
        f"logits of {TOKENS} tokens are those of transformers {wanted.version} (largest difference {difference:.1e} of "
        f"{largest:.1f}, in fp32)"
    )


def _free_bytes() -> float:
    """Memory that this process may still fill."""
    limit = machine_bytes()
    own = psutil.Process().memory_info().rss
    return min(psutil.virtual_memory().available, (limit or float("inf")) - own)
