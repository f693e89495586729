"""Operators are tested on two threads, whatever the other tests have."""

import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
