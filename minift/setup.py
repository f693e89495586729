"""From a configuration to a job: the examples, the model made ready for its method, and what a step runs on."""

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch

from . import files
from .adapters import CHANGES_BASE, apply
from .adapters.lora import adapters, names
from .checkpoints import loading, resume, saving
from .config import TrainConfig, is_number
from .data.batch import Sequence
from .data.examples import sample, split
from .data.tokenizer import Tokenizer
from .engine import memory
from .engine.distributed import ALONE, World, join
from .engine.graph import Graphs
from .engine.optim import make_optimizer
from .engine.optimizers import Optimizer, choose_settings, find
from .engine.precision import choose_device, choose_dtype
from .errors import InputError, printable
from .layers import Embedding, Linear
from .layers.nf4 import NF4Linear, quantize
from .measure.track import check_loggers, say
from .models import Model, check_length
from .ops import native
from .tasks import TASKS

BASE = 109_000_000  # weights of BERT-base


@dataclass
class Job:
    """What every step works with."""

    model: Model
    config: TrainConfig
    optimizer: Optimizer
    scaler: torch.amp.GradScaler  # does nothing unless activations are float16
    world: World = ALONE
    base: dict = field(default_factory=dict)  # resume.fingerprint_base of the model as it was loaded
    graphs: Graphs | None = None  # with --graph, from the first step on
    caught: list[int] = field(default_factory=list)  # signals that arrived


def read_examples(config: TrainConfig) -> tuple[list, list]:
    """(training, validation) examples of a configuration; the second is empty without --valid. Raises InputError."""
    return set_aside(config, read_training(config, config.data))


def read_training(config: TrainConfig, path: str) -> list:
    """All examples of a file, as the configuration says that it is read."""
    return TASKS[config.task].read(path, config.columns, header=config.header, max_line=config.max_line)


def set_aside(config: TrainConfig, examples: list) -> tuple[list, list]:
    """(training, validation) examples, of which the second come from the first where --valid is a fraction."""
    valid = []
    if is_number(config.valid):
        examples, valid = split(examples, float(config.valid), config.seed)
    elif config.valid:
        valid = read_training(config, config.valid)
    return sample(examples, config.limit, config.seed) if config.limit else examples, valid


def load_model(config: TrainConfig, labels: list[str] | None) -> tuple[Model, Tokenizer | None]:
    """The model of a configuration, made ready for `--method`, and its tokenizer. Raises InputError."""
    base, method = Path(config.out, "base"), config.method
    source = config.model
    if config.resume and base.is_dir() and resume.latest(Path(config.out)):
        # a variant that changed the frozen weights kept them there; the checkpoint has the rest
        source, method = str(base), "lora"
    before = "" if config.base != "nf4" or method in CHANGES_BASE else "nf4"
    options = {"base": before, "dropout": config.dropout, "seed": config.seed}
    model, tokenizer = loading.load(source, config.task, labels, ordered=bool(config.labels), **options)
    say(f"{config.model}: {model.report}")
    pairs = (
        dict(pair.split("=") for pair in text.split(",") if pair)
        for text in (config.rank_pattern, config.alpha_pattern)
    )
    ranks, alphas = ({key: int(value) for key, value in pattern.items()} for pattern in pairs)
    apply(
        model,
        method,
        rank=config.rank,
        alpha=config.alpha,
        dropout=config.adapter_dropout,
        targets=names(config.targets),
        exclude=names(config.exclude),
        layers=tuple(int(n) for n in config.layers.split(",") if n),
        rank_pattern=ranks,
        alpha_pattern=alphas,
        rslora=config.rslora,
        seed=config.seed,
    )
    if config.base == "nf4" and method in CHANGES_BASE:
        quantize(model)
    return model, tokenizer


def prepare_run(
    model: Model, tokenizer: Tokenizer, config: TrainConfig, examples: tuple[list, list] | None
) -> tuple[Job, list[Sequence], list[Sequence]]:
    """(what every step works with, the encoded training examples, the encoded validation examples).

    Everything is checked before the run folder is begun. Raises InputError.
    """
    config.check()
    check_out(config)
    check_loggers(config.log)
    settings = choose_settings(config.optimizer, {name: getattr(config, name) for name in ("beta1", "beta2", "eps")})
    device, dtype, world = choose_engine(config)
    max_length = check_length(model, config.max_length)
    encode = TASKS[config.task].encode
    examples, held_out = examples or read_examples(config)
    sequences = encode(examples, model, tokenizer, max_length)
    valid = encode(held_out, model, tokenizer, max_length) if held_out else []
    tokens = config.tokens or default_tokens(model, device)
    if world.first:
        describe(model, config, sequences, valid, max_length, tokens)
        begin_folder(config, model)
    world.wait()
    model.settings["minift"] = {"max_length": max_length}  # eval and predict cut where training cut
    if model.adapter and model.adapter.variant in CHANGES_BASE:
        saving.save_base(model, tokenizer, Path(config.out, "base"), world.first)
    base = resume.fingerprint_base(model)  # of the weights as they were loaded, whatever dtype they are kept in
    model.to(device)
    if config.base == "bf16":
        keep_frozen(model, torch.bfloat16)
    elif config.base == "auto" and model.adapter:  # without an adapter they are saved with the model
        keep_frozen(model, dtype)
    model.body.dtype, model.body.recompute = dtype, config.recompute
    world.shard(model, model.family.SHARDED)
    lr = config.lr or default_lr(model) * find(config.optimizer).LR
    config = dataclasses.replace(config, lr=lr, tokens=tokens)
    optimizer = make_optimizer(model, lr, config.weight_decay, config.lora_plus, config.optimizer, **settings)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    return Job(model, config, optimizer, scaler, world, base), sequences, valid


def choose_engine(config: TrainConfig) -> tuple[torch.device, torch.dtype, World]:
    """The device, the dtype of activations and the processes of a run; says which, and why. Raises InputError."""
    device, why = choose_device(config.device)
    world = join(device, config.shard)
    dtype, reason = choose_dtype(config.precision, device)
    processes = "1 process" if world.size == 1 else f"{world.size} processes"
    say(f"{device.type} ({why}), {str(dtype)[6:]} ({reason}), {processes}")
    try:
        kernels = native.use(config.kernels, device)
    except ValueError as e:  # --kernels native, and there is no way
        raise InputError(str(e)) from e
    say(f"kernels: {kernels}")
    if config.graph and not find(config.optimizer).RECORDABLE:
        raise InputError(f"--graph is True with --optimizer {config.optimizer}, whose updates cannot be recorded")
    if config.graph and (device.type, dtype, world.size) != ("cuda", torch.bfloat16, 1):
        found = f"{str(dtype)[6:]} on {device.type} with {processes}"
        raise InputError(f"--graph is True, with {found}; expected bfloat16 on cuda with 1 process")
    if device.type == "cpu":
        memory.keep_memory()
    return device, dtype, world


def begin_folder(config: TrainConfig, model: Model) -> None:
    """Makes the run folder and its config.json; in one that is gone on with, clears what a killed process left."""
    out = Path(config.out)
    files.real(out).mkdir(parents=True, exist_ok=True)
    for folder in (out, out / "checkpoints", out / "best", out / "last", out / "base"):
        files.remove_leftovers(folder)
    if not config.resume or not (out / "config.json").exists():
        files.write_text(out / "config.json", recorded(config, model).to_json())


def check_out(config: TrainConfig) -> None:
    """Raises InputError unless the run folder is free, or is to be gone on with."""
    out = Path(config.out)
    if not config.resume and (out / "config.json").exists():
        raise InputError(f"--out {out}: is there already; expected a new or empty folder, or --resume")
    if not config.resume:
        files.check_new_folder("--out", out)
    for option, text in (("--data", config.data), ("--valid", config.valid)):
        if text and os.path.isdir(text) and files.real(text) in (files.real(out), *files.real(out).parents):
            raise InputError(f"--out {out}: lies in the folder of {option} {text}, whose sub-folders are its classes")
    if (out / "checkpoints").exists() and not (out / "checkpoints").is_dir():
        raise InputError(f"{out / 'checkpoints'}: is a file; expected the folder of the run's checkpoints")


def recorded(config: TrainConfig, model: Model) -> TrainConfig:
    """The configuration that the command line would have to be given to repeat this run, one made in Python too."""
    config = dataclasses.replace(config, resume=False, model=config.model or model.source)
    if not model.adapter or config.method != "full":
        return config
    adapter = model.adapter

    def text(value: str | tuple | dict) -> str:
        value = [f"{k}={v:g}" for k, v in value.items()] if isinstance(value, dict) else value
        return value if isinstance(value, str) else ",".join(map(str, value))

    packed = any(not lora.base.weight.is_floating_point() for _, lora in adapters(model))
    return dataclasses.replace(
        config,
        method=adapter.variant,
        base="nf4" if packed else config.base,
        adapter_dropout=adapter.dropout,
        **{name: getattr(adapter, name) for name in ("rank", "alpha", "rslora")},
        **{
            name: text(getattr(adapter, name))
            for name in ("targets", "exclude", "layers", "rank_pattern", "alpha_pattern")
        },
    )


def keep_frozen(model: Model, dtype: torch.dtype) -> None:
    """Stores the frozen weights of linear layers and embeddings in `dtype`; what is trained stays float32."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, Linear | Embedding) and not weight.requires_grad:
            weight.data = weight.data.to(dtype)


def default_lr(model: Model) -> float:
    """AdamW's learning rate where none is given: the more of a model is trained, the smaller."""
    if model.adapter:
        return 5e-4
    return 5e-5 if all(p.requires_grad for p in model.parameters()) else 1e-3


def default_tokens(model: Model, device: torch.device) -> int:
    """Tokens in memory at once where no number is given, 0 for no limit.

    Adapters on a CPU take 512, and more of a model smaller than BERT-base: with more, products are hardly faster
    (benchmarks/LOG.md, 2026-11-25). Elsewhere a micro-batch costs more: a launch of each kernel, an addition to each
    gradient, each weight out of NF4.
    """
    packed = any(isinstance(m, NF4Linear) for m in model.modules())
    return max(512, 512 * BASE // model.size()) if model.adapter and device.type == "cpu" and not packed else 0


# options that may be another when a run goes on: they change where and how fast it runs, and not what it learns
FREE = {"model", "data", "valid", "out", "columns", "labels", "header", "max_line", "tokens", "device", "kernels"}
FREE |= {"graph", "recompute", "save_every", "keep", "shard", "log", "resume"}


def resume_run(job: Job, fresh: dict, total: int) -> dict:
    """The state of the latest checkpoint, with model and optimizer as they were; `fresh` where there is none yet."""
    folder = resume.latest(Path(job.config.out))
    if folder is None:
        say(f"{job.config.out}: no checkpoint yet; the run begins at its first step")
        return fresh

    def check(state: dict) -> None:
        check_options(folder, fresh["options"], state.get("options", {}))
        if state["step"] > total:
            raise InputError(f"{folder}: is of step {state['step']}; expected one of the run's {total} steps")
        if state["data"] != fresh["data"]:
            raise InputError(f"{folder}: the training data or the tokenizer is not what the run began with")
        if state.get("valid", fresh["valid"]) != fresh["valid"]:
            raise InputError(f"{folder}: the validation data is not what the run began with")
        if "base" in state:  # not in a checkpoint of an older minift
            resume.check_base(folder, fresh["base"], state["base"])

    state = resume.load(folder, job.model, job.optimizer, check)
    scaler = state.pop("scaler")
    if job.scaler.is_enabled():
        load_scaler(job, folder, scaler)
    say(f"resumed after step {state['step']}")
    return fresh | state | {"options": fresh["options"]}


def check_options(folder: Path, now: dict, then: dict) -> None:
    """Raises InputError where an option that changes what is learned is not what the checkpoint was made with."""
    for name in sorted(now.keys() & then.keys()):
        if now[name] == then[name]:
            continue
        flag = "--" + name.replace("_", "-")
        if name not in FREE:
            raise InputError(
                f"{flag} is {now[name]!r} in the run's config.json, but {folder} was made with {then[name]!r}; "
                "a run goes on as it began"
            )
        if name not in ("resume", "out"):
            say(f"{flag} is {now[name]!r} from here on; until now it was {then[name]!r}")


def load_scaler(job: Job, folder: Path, state: dict) -> None:
    """Puts back the scale of float16's loss."""
    if missing := job.scaler.state_dict().keys() - state.keys():
        raise InputError(f"{folder / resume.STATE}: scaler lacks {', '.join(sorted(missing))}")
    job.scaler.load_state_dict(state)


def describe(
    model: Model, config: TrainConfig, sequences: list[Sequence], valid: list[Sequence], max_length: int, at_once: int
) -> None:
    """Says what is about to happen."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    tokens, cut = [len(s) for s in sequences], sum(s.cut for s in sequences)
    mean = sum(tokens) / len(tokens)
    labels = f"; labels: {', '.join(map(printable, model.labels))}" if config.task == "classify" else ""
    split = f", at most {at_once:,} at once" if at_once else ""
    say(f"{trainable:,} of {model.size():,} parameters are trained{labels}")
    if config.task == "classify":
        seen = {int(s.targets[0]) for s in sequences}
        if unseen := [printable(name) for i, name in enumerate(model.labels) if i not in seen]:
            say(f"no example to train on has the label {', '.join(unseen)}")
    if empty := sum(not len(s.targets) for s in sequences):
        say(f"nothing is left to learn of {empty:,} examples, cut to {max_length} tokens")
    say(
        f"{len(tokens):,} examples to train on, {len(valid):,} to validate on; {mean:.1f} tokens each on average, "
        f"{config.batch * mean:,.0f} a step{split}; {cut:,} cut to {max_length} tokens"
    )
