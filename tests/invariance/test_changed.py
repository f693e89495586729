"""What a run is resumed from is what it wrote, or it is refused by name: every single change of a checkpoint's files,
of the base model, of the options. A change that is let pass changes no bit.

python -m pytest tests/invariance/test_changed.py
"""

import shutil
from pathlib import Path

import pytest
import torch
from folders import configure, rewrite, weights_in
from helpers import cli, fails, metrics, model_and_data, works
from safetensors.torch import load_file, save_file

from minift.checkpoints import resume as checkpoint

pytestmark = pytest.mark.slow

FILES = ["model.safetensors", "optimizer.safetensors", "state.json", "minift.json"]
METHODS = ["lora", "lora-fa", "head", "full"]


TRAIN = (
    "train --model {f}/model --data {f}/train.tsv --out {out} --method {method} --steps 4 --save-every 2 --keep 9"
    " --lr 1e-3 --seed {seed} --kernels reference"
)
RESUME = "train --resume --out {run}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """model/, train.tsv; for each method a run of four steps, and the same as it was after two; another seed's."""
    folder = model_and_data(tmp_path_factory.mktemp("changed"), 32)
    for name, method, seed in [*((method, method, 42) for method in METHODS), ("other", "lora", 43)]:
        works(TRAIN, f=folder, out=folder / name, method=method, seed=seed)
        shutil.copytree(folder / name, folder / f"{name}-half")
        shutil.rmtree(folder / f"{name}-half/checkpoints/step-4")
    return folder


@pytest.fixture
def half(folder, tmp_path):
    """A function: a copy of a run as it was after two steps, in a place of its own. Its model may be changed there."""
    shutil.copytree(folder / "model", tmp_path / "model")

    def copy(name: str = "lora") -> Path:
        run = shutil.copytree(folder / f"{name}-half", tmp_path / "run")
        configure(run, model=str(tmp_path / "model"))
        return run

    return copy


def learned(run: Path) -> dict[str, torch.Tensor]:
    """The trained weights after the last step."""
    return weights_in(run / "checkpoints/step-4")


def check_refused(run: Path, *words: str) -> None:
    """The run is not resumed, the words are in the one message, and no step was made."""
    fails(RESUME, *words, run=run)
    assert not (run / "checkpoints/step-4").exists()


def check_equal(run: Path, whole: Path) -> str:
    """The run is resumed, and learns what the undisturbed one did, to the bit; what it said."""
    said = works(RESUME, run=run).err
    mine, theirs = learned(run), learned(whole)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    return said


def flip(path: Path, place: float) -> None:
    """One bit of a file becomes another, at a part of its length."""
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_changed(folder, half, method):
    check_equal(half(method), folder / method)


# ---- the files of a checkpoint


PLACES = pytest.mark.parametrize("place", [0.0, 0.1, 0.25, 0.4, 0.6, 0.8, 0.95, 1.0])


@PLACES
@pytest.mark.parametrize("file", FILES[:3])
def test_a_flipped_bit(half, file, place):
    run = half()
    flip(run / "checkpoints/step-2" / file, place)
    check_refused(run, f"step-2: not a whole checkpoint: {file} is not what was written")


@PLACES
def test_a_flipped_bit_among_the_checksums(folder, half, place):
    """What is not a checksum may be another: the run is the same."""
    run = half()
    flip(run / "checkpoints/step-2/minift.json", place)
    said = cli(RESUME, run=run)
    if said.code:
        assert "minift.json" in said.err or "step-2" in said.err
    else:
        assert all(torch.equal(t, learned(folder / "lora")[n]) for n, t in learned(run).items())


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file(folder, half, file):
    """Without minift.json it is as an older minift wrote it, and the rest is as it was."""
    run = half()
    (run / "checkpoints/step-2" / file).unlink()
    if file == "minift.json":
        check_equal(run, folder / "lora")
    else:
        check_refused(run, f"{file} is missing")


@pytest.mark.parametrize("file", FILES[:3])
def test_a_file_of_another_run(folder, half, file):
    run = half()
    shutil.copy(folder / "other-half/checkpoints/step-2" / file, run / "checkpoints/step-2")
    check_refused(run, f"{file} is not what was written")


def test_a_checkpoint_of_another_run(folder, half):
    run = half()
    shutil.rmtree(run / "checkpoints/step-2")
    shutil.copytree(folder / "other-half/checkpoints/step-2", run / "checkpoints/step-2")
    check_refused(run, "--seed is 42 in the run's config.json, but", "was made with 43")


def test_the_one_before_is_offered(folder, half):
    """And works, once the damaged one is out of the way."""
    run = half()
    shutil.copytree(folder / "lora/checkpoints/step-4", run / "checkpoints/step-3")
    (run / "checkpoints/step-3/model.safetensors").write_bytes(b"x")
    check_refused(run, "step-3: not a whole checkpoint", f"{run}/checkpoints/step-2 is whole", "mv ")
    (run / "checkpoints/step-3").rename(run / "checkpoints/step-3.damaged")
    check_equal(run, folder / "lora")


def test_no_other_is_there_to_be_offered(half):
    run = half()
    (run / "checkpoints/step-2/model.safetensors").write_bytes(b"x")
    check_refused(run, "no earlier checkpoint is whole")


TENSORS = {
    "no numbers": lambda t: t.flatten()[:0],
    "one number": lambda t: t.flatten()[:1].clone(),
    "five numbers": lambda t: torch.zeros(5),
    "another dtype": lambda t: t.double(),
    "transposed": lambda t: torch.zeros(*t.shape, 2)[..., 0].t().contiguous() if t.dim() == 2 else t[None],
    "not finite": lambda t: torch.full_like(t, torch.nan),
    "infinite": lambda t: torch.full_like(t, -torch.inf),
}


@pytest.mark.parametrize("what", [*TENSORS, "gone", "renamed", "all gone"])
@pytest.mark.parametrize("file", FILES[:2])
def test_tensors_that_do_not_fit(half, file, what):
    """In a checkpoint without checksums, as an older minift wrote them."""
    run = half()
    path = run / "checkpoints/step-2" / file
    (path.parent / "minift.json").unlink()
    tensors = load_file(path)
    name = next(n for n, t in tensors.items() if t.dim() == 2 and t.shape[0] != t.shape[1])
    tensor = tensors.pop(name)
    if what in TENSORS:
        tensors[name] = TENSORS[what](tensor)
    elif what == "renamed":
        tensors[f"{name}2"] = tensor
    elif what == "all gone":
        tensors = {}
    save_file(tensors, path)
    check_refused(run, str(path), "different: " if "gone" in what or what == "renamed" else name)


STATES = {
    "step": [10**9, -3, 0, "4", None, True, 2.5],
    "stale": [-1, "0", None],
    "best": [3, [], {"loss": "x"}, {"loss": [1]}],
    "data": [None, 3, "0" * 32],
    "scaler": [None, [], {"scale": "x"}],
    "base": [{}, None, [], 3, {"config": 3}],
    "options": [[], 3, None],
}


@pytest.mark.parametrize("name, value", [(name, value) for name, values in STATES.items() for value in values])
def test_a_state_that_was_tampered_with(half, name, value):
    run = half()
    path = run / "checkpoints/step-2/state.json"
    (path.parent / "minift.json").unlink()
    configure(path, **{name: value})
    check_refused(run, "step-2")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "[" * 100_000, '{"step": 2}', "\udcff"])
def test_a_state_that_is_none(half, text):
    run = half()
    path = run / "checkpoints/step-2/state.json"
    (path.parent / "minift.json").unlink()
    path.write_bytes(text.encode(errors="surrogateescape"))
    check_refused(run, "step-2")


# ---- the base model


CONFIGS = dict(
    num_attention_heads=2, hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.2, hidden_act="relu",
    layer_norm_eps=1e-5, classifier_dropout=0.5,
)  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CONFIGS)
def test_another_config_of_the_base(half, tmp_path, method, name):
    configure(tmp_path / "model", **{name: CONFIGS[name]})
    check_refused(half(method), f"config.json says {name}", "the run began with")


@pytest.mark.parametrize("method", METHODS)
def test_another_weight_of_the_base(folder, half, tmp_path, method):
    """One number by one unit in its last place. In full training the checkpoint has it, and the base's is not used."""
    tensors = weights_in(tmp_path / "model")
    weight = tensors["encoder.layer.1.output.dense.weight"]
    weight[3, 4] = torch.nextafter(weight[3, 4], torch.tensor(9.0))
    rewrite(tmp_path / "model", tensors)
    run = half(method)
    if method == "full":
        check_equal(run, folder / method)
    else:
        check_refused(run, "the base model's weights are not those that the run began with")


# ---- the options


OPTIONS = dict(
    lr=0.5, batch=4, steps=5, epochs=7, seed=1, dropout=0.4, alpha=3.0, rank=4, adapter_dropout=0.4, base="nf4",
    method="dora", targets="key", rslora=True, weight_decay=0.3, clip=3.0, schedule="cosine", warmup=2.0,
    max_length=12, precision="bf16", label_smoothing=0.2, lora_plus=4.0, limit=30,
)  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_another_option(half, name):
    """In the run's config.json. What changes the data or the model before it is looked at may be told as that."""
    run = half()
    configure(run, **{name: OPTIONS[name]})
    check_refused(run, f"--{name.replace('_', '-')} is {OPTIONS[name]!r} in the run's config.json")


def test_an_option_that_changes_nothing_learned_is_told(folder, half):
    run = half()
    configure(run, keep=3)
    said = check_equal(run, folder / "lora")
    assert "--keep is 3 from here on; until now it was 9" in said


# ---- the run's other files


def test_a_metrics_file_that_is_gone(folder, half):
    run = half()
    (run / "metrics.jsonl").unlink()
    said = check_equal(run, folder / "lora")
    assert "metrics.jsonl: has 0 of the 2 lines of the steps before" in said


def test_checkpoints_that_are_a_file(half):
    run = half()
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").write_text("mine")
    check_refused(run, "checkpoints: is a file; expected the folder of the run's checkpoints")
    assert (run / "checkpoints").read_text() == "mine"


def test_files_of_the_users_among_the_checkpoints_stay(folder, half):
    """A note in one that is removed, a folder with a name like theirs."""
    run = half()
    configure(run, keep=1)
    (run / "checkpoints/step-2/notes.md").write_text("mine")
    (run / "checkpoints/step-1").mkdir()
    (run / "checkpoints/step-1/mine").write_text("mine")
    check_equal(run, folder / "lora")
    assert [p.name for p in (run / "checkpoints/step-2").iterdir()] == ["notes.md"]
    assert (run / "checkpoints/step-1/mine").read_text() == "mine" and checkpoint.steps(run) == [4]


# ---- what is not finite is not saved


@pytest.mark.parametrize("lr", ["1e38", "1e30"])
@pytest.mark.parametrize("valid", ["", "--valid 0.25"])
def test_a_model_that_is_not_finite_is_never_saved(folder, tmp_path, lr, valid):
    """After one step the weights are about the learning rate, at the second nothing is finite any more."""
    for steps in (1, 3):
        run, line = tmp_path / f"run-{steps}", f"{TRAIN} --lr {lr} --steps {steps} --save-every 1 {valid}"
        said = cli(line, f=folder, out=run, method="full", seed=42)
        for path in run.rglob("*.safetensors"):
            assert all(t.isfinite().all() for t in load_file(path).values()), path
        text = (run / "metrics.jsonl").read_text()
        assert "NaN" not in text and "Infinity" not in text and all(metrics(run))
        if steps == 3 or valid:
            assert said.code == 1 and "minift: error: " in said.err and not (run / "best").exists()
