"""What holds for every test."""

import torch

# The tests' matrices are tiny: a second thread only waits for the first.
torch.set_num_threads(1)
