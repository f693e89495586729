"""What all tests share: the folder of real data and weights, and one thread pool size.

MINIFT_ASSETS=../shared python -m pytest        real data (data/) and weights (weights/); without it those tests skip
"""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface-hub is imported: no test may look outside

import pytest  # noqa: E402


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder with data/ and weights/."""
    folder = os.environ.get("MINIFT_ASSETS")
    if not folder:
        pytest.skip(
            "MINIFT_ASSETS is not set; it names the folder that benchmarks/assets.py fills with data/ and weights/"
        )
    if not Path(folder, "weights").is_dir():
        pytest.fail(f"MINIFT_ASSETS={folder} has no weights/")
    return Path(folder).resolve()


@pytest.fixture(scope="session")
def minilm(assets) -> Path:
    """all-MiniLM-L6-v2, a real pretrained BERT."""
    return assets / "weights/all-MiniLM-L6-v2"
