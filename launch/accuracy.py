"""Print the accuracy of the transformer in a checkpoint of train_fsdp.py.

    python launch/accuracy.py runs/fsdp/latest_checkpoint_12.pt

The ranks that wrote the file held shards of each tensor. The file holds whole tensors: this script imports neither
distckpt nor torch.distributed, and needs one process and no GPU.
"""

import sys
from pathlib import Path

import torch
from digits import load
from transformer import Transformer


def accuracy_of(checkpoint: Path) -> float:
    """Return the share of the validation samples that the model in a checkpoint classifies correctly."""
    state = torch.load(checkpoint, weights_only=True, mmap=True)
    model = Transformer()
    model.load_state_dict(state["model"])
    model.eval()
    _, samples = load(torch.device("cpu"))
    with torch.inference_mode():
        found = model(samples.images).argmax(dim=1)
    return float((found == samples.labels).float().mean())


if __name__ == "__main__":
    if len(sys.argv) != 2:  # noqa: PLR2004 - the script's name and its argument
        sys.exit(f"usage: {sys.argv[0]} FILE")
    print(f"accuracy {accuracy_of(Path(sys.argv[1])):.4f}")
