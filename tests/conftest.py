"""What holds for every test."""

import torch
from s3_server import s3  # noqa: F401  a fixture

# The tests' matrices are tiny: a second thread only waits for the first.
torch.set_num_threads(1)
