import os

import torch
from hypothesis import settings

# Examples are the same in every run, and a slow machine fails none of them.
settings.register_profile("ci", derandomize=True, deadline=None)
settings.load_profile("ci")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores
