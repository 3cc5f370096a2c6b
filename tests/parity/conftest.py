"""Two test processes on few cores: torch's own threads would only wait for each other."""

import torch

torch.set_num_threads(1)
