"""What all tests share: the folder of real data and weights, and one thread pool size.

MINIFT_ASSETS=../shared python -m pytest        real data (data/) and weights (weights/); without it those tests skip
"""

import os
import shutil
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface-hub is imported: no test may look outside

# before torch is: the processes of `pytest -n` share the cores, and whoever waits for a core does not spin meanwhile
workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def few_forecasts(request):
    """What a run says of itself at its end takes longer than most runs here: it is left out, but where FORECASTS is."""
    if getattr(request.module, "FORECASTS", False):
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minift.planning.forecast_run", lambda *_: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def float32_by_default():
    """--precision auto is float32 on every CPU, as the figures here want it; test_precision.py tests the choice."""
    from minift.engine import precision  # here, for whoever only asks for --help does without torch

    real = precision.native_bf16

    def native_bf16(device):
        return (False, "a CPU in a test") if device.type == "cpu" else real(device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "native_bf16", native_bf16)
        yield


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


@pytest.fixture(scope="session")
def untouched(tmp_path_factory) -> Path:
    """bert/, a classifier of three labels, and gpt2/, a language model: small, random, to be read or copied only."""
    import transformers  # here, for tests of the operators alone do without it
    from helpers import peer

    folder = tmp_path_factory.mktemp("untouched")
    peer(transformers.BertForSequenceClassification, folder / "bert", num_labels=3)
    peer(transformers.GPT2LMHeadModel, folder / "gpt2")
    return folder


@pytest.fixture
def bert(untouched, tmp_path) -> Path:
    """A copy of the BERT classifier, to be changed."""
    return shutil.copytree(untouched / "bert", tmp_path / "bert")


@pytest.fixture
def gpt2(untouched, tmp_path) -> Path:
    """A copy of the GPT-2 language model, to be changed."""
    return shutil.copytree(untouched / "gpt2", tmp_path / "gpt2")


@pytest.fixture
def exact_bitsandbytes(monkeypatch):
    """bitsandbytes, computing in float32 on every CPU.

    Where a CPU has AVX512-BF16 its layers evaluate in bfloat16, and fail where their rows do not fill its blocks.
    """
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)


@pytest.fixture(scope="session")
def sentences(assets) -> list[str]:
    """1,000 real texts: 900 sentences and 100 reviews."""
    from folders import read_examples

    short = read_examples(assets / "data/sst2-sentences/train.tsv")[:900]
    long = read_examples(assets / "data/imdb/train.jsonl.gz")[::250]
    return [e.text for e in short + long]


@pytest.fixture(scope="session")
def entailment(assets) -> tuple[list[str], list[str]]:
    """RTE's pairs: texts and seconds, 277 of each, of 8 to 200 tokens."""
    from folders import read_examples

    examples = read_examples(assets / "data/glue-rte/dev.tsv", "text=sentence1,pair=sentence2,label=label")
    return [e.text for e in examples], [e.pair for e in examples]
