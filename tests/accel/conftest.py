"""What needs an accelerator is collected where there is one; elsewhere the summary says that it was not run."""

import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]
