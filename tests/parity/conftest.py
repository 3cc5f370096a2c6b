"""Limit torch's threads: the threads of several test processes on few cores would wait for each other."""

import torch

torch.set_num_threads(1)
