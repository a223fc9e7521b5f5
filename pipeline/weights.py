"""Writes a published encoder's weights for PyTorch: `./moco weights`.

Needs the SavedModel alone: its variables bear the names of the layers that they come from.
"""

import dataclasses

import numpy as np

from pipeline.embed import check_out
from pipeline.embedding.encoder import load_encoder
from trainer_module import torch_weights
from trainer_module.errors import UserError


@dataclasses.dataclass(frozen=True)
class Summary:
    """What was written.

    Attributes:
        tensors: how many, batch normalisation's counters left out.
        parameters: numbers in them.
        out: the file.
    """

    tensors: int
    parameters: int
    out: str

    def __str__(self) -> str:
        """What the command says at its end."""
        return f"wrote {self.tensors:,} tensors of {self.parameters:,} numbers to {self.out}"


def write(model: str, out: str) -> Summary:
    """Writes the weights of an encoder in torchvision's names and layouts.

    Args:
        model: see `pipeline.embed.embed`.
        out: path ending in .safetensors or .npz; it appears when it is whole, and not before.

    Raises:
        UserError: model or out cannot be used.
    """
    check_out(out, ".npz", ".safetensors")
    loaded = load_encoder(model).model  # kept, since its signatures do not keep the variables alive
    variables = loaded.signatures["serving_default"].variables
    named = {variable.name.partition(":")[0]: variable.numpy() for variable in variables}
    if len(named) < len(variables) or not all("/" in name for name in named):
        raise UserError(f"--model {model}: its variables have no names, as it is of an older release; train it anew")
    torch_weights.write_tensors(out, torch_weights.torch_tensors(named.items()))
    return Summary(len(named), sum(int(np.size(value)) for value in named.values()), out)
