"""Which device a run computes on, and why. (Everything is float32 so far.)"""

import torch


def choose_device(wanted: str) -> tuple[torch.device, str]:
    """(device, reason) for `--device auto|cpu|cuda`. Raises ValueError where cuda is asked for and absent."""
    if wanted == "cpu":
        return torch.device("cpu"), "asked for"
    if torch.cuda.is_available():
        return torch.device("cuda"), torch.cuda.get_device_name()
    if wanted == "cuda":
        raise ValueError("--device is 'cuda', but torch finds no CUDA device; expected auto or cpu")
    return torch.device("cpu"), f"no CUDA device; {torch.get_num_threads()} threads"
