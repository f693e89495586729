"""The training loop.

A step takes `--batch` examples in the order that (seed, epoch) gives, splits them into micro-batches of `--tokens`
tokens, sums the loss over all of them, divides by the number of targets of the whole step, clips, and updates. So
micro-batches change memory, and nothing else; nor do more processes, or a run that was killed and resumed.
"""

import dataclasses
import math
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from . import checkpoint, data, files, hub
from .adapters import CHANGES_BASE, apply
from .adapters.lora import adapters, names
from .batch import Sequence, order, pack
from .config import InputError, TrainConfig, is_number, printable
from .distributed import ALONE, World, join
from .evaluate import check_length, measure
from .graph import Graphs
from .layers import Embedding, Linear
from .models import Model
from .ops import native
from .ops.again import lean
from .ops.dropout import Noise
from .optim import AdamW, clip, make_optimizer, schedule, warmup_steps
from .precision import choose_device, choose_dtype
from .quantize import NF4Linear, quantize
from .tasks import TASKS
from .tokenizer import Tokenizer
from .track import Tracker, check_loggers, make_loggers, peak_memory, say, stop_signals

BASE = 109_000_000  # weights of BERT-base


@dataclass
class Run:
    """What a finished run leaves: its folder, and what was measured at its end."""

    out: Path
    steps: int
    seconds: float
    model: Path  # the folder to take away: best/ where there was a validation, else last/
    metrics: dict  # of the best validation, or empty


@dataclass
class Job:
    """What every step works with."""

    model: Model
    config: TrainConfig
    optimizer: AdamW
    scaler: torch.amp.GradScaler  # does nothing unless activations are float16
    world: World = ALONE
    base: dict = field(default_factory=dict)  # checkpoint.fingerprint_base of the model as it was loaded
    graphs: Graphs | None = None  # with --graph, from the first step on
    caught: list[int] = field(default_factory=list)  # signals that arrived


class Interrupted(Exception):
    """The run was asked to stop, and did after a checkpoint; `number` is the signal's."""

    def __init__(self, number: int, folder: Path):
        super().__init__(f"stopped by {signal.Signals(number).name}; the checkpoint is {folder}")
        self.number = number


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
        examples, valid = data.split(examples, float(config.valid), config.seed)
    elif config.valid:
        valid = read_training(config, config.valid)
    return data.sample(examples, config.limit, config.seed) if config.limit else examples, valid


def load_model(config: TrainConfig, labels: list[str] | None) -> tuple[Model, Tokenizer | None]:
    """The model of a configuration, made ready for `--method`, and its tokenizer. Raises InputError."""
    base, method = Path(config.out, "base"), config.method
    source = config.model
    if config.resume and base.is_dir() and checkpoint.latest(Path(config.out)):
        # a variant that changed the frozen weights kept them there; the checkpoint has the rest
        source, method = str(base), "lora"
    before = "" if config.base != "nf4" or method in CHANGES_BASE else "nf4"
    options = {"base": before, "dropout": config.dropout, "seed": config.seed}
    model, tokenizer = hub.load(source, config.task, labels, ordered=bool(config.labels), **options)
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


def train(model: Model, tokenizer: Tokenizer, config: TrainConfig, examples: tuple[list, list] | None = None) -> Run:
    """Trains `model` in place as `config` says (its `model` option is only recorded) and writes the run folder.

    examples: what read_examples gave, to save reading twice. Raises InputError before anything is written,
    FloatingPointError when the loss is no longer finite, Interrupted after SIGINT or SIGTERM, OSError on a full disk.
    """
    config.check()
    check_out(config)
    check_loggers(config.log)
    out = Path(config.out)
    device, why = choose_device(config.device)
    world = join(device, config.shard)
    dtype, reason = choose_dtype(config.precision, device)
    say(f"{device.type} ({why}), {str(dtype)[6:]} ({reason}), {world.size} process{'es' * (world.size > 1)}")
    try:
        kernels = native.use(config.kernels, device)
    except ValueError as e:  # --kernels native, and there is no way
        raise InputError(str(e)) from e
    say(f"kernels: {kernels}")
    if config.graph and (device.type, dtype, world.size) != ("cuda", torch.bfloat16, 1):
        found = f"{str(dtype)[6:]} on {device.type} with {world.size} process{'es' * (world.size > 1)}"
        raise InputError(f"--graph is True, with {found}; expected bfloat16 on cuda with 1 process")
    if device.type == "cpu":
        native.keep_memory()
    max_length = check_length(model, config.max_length)
    encode = TASKS[config.task].encode
    examples, held_out = examples or read_examples(config)
    sequences = encode(examples, model, tokenizer, max_length)
    valid = encode(held_out, model, tokenizer, max_length) if held_out else []
    tokens = config.tokens or default_tokens(model, device)
    if world.first:
        describe(model, config, sequences, valid, max_length, tokens)
        files.real(out).mkdir(parents=True, exist_ok=True)
        for folder in (out, out / "checkpoints", out / "best", out / "last"):
            files.remove_leftovers(folder)
        if not config.resume or not (out / "config.json").exists():
            files.write_text(out / "config.json", recorded(config, model).to_json())
    world.wait()
    model.settings["minift"] = {"max_length": max_length}  # eval and predict cut where training cut
    if model.adapter and model.adapter.variant in CHANGES_BASE:
        hub.save_base(model, tokenizer, out / "base", world.first)
    base = checkpoint.fingerprint_base(model)
    model.to(device)
    if config.base == "bf16" or config.base == "auto" and model.adapter:  # else they are saved with the model
        keep_frozen(model, torch.bfloat16 if config.base == "bf16" else dtype)
    model.body.dtype, model.body.recompute = dtype, config.recompute
    world.shard(model, model.family.SHARDED)
    config = dataclasses.replace(config, lr=config.lr or default_lr(model), tokens=tokens)
    optimizer = make_optimizer(model, config.lr, config.weight_decay, config.lora_plus)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    return loop(Job(model, config, optimizer, scaler, world, base), tokenizer, sequences, valid)


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
    """The learning rate where none is given: the more of a model is trained, the smaller."""
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


def loop(job: Job, tokenizer: Tokenizer, sequences: list[Sequence], valid: list[Sequence]) -> Run:
    """Every step of a run, from the beginning or from its latest checkpoint."""
    config, world, out, start = job.config, job.world, Path(job.config.out), time.perf_counter()
    per_epoch = math.ceil(len(sequences) / config.batch)
    total = config.steps or per_epoch * config.epochs
    warmup = warmup_steps(config.warmup, total)
    state = {"step": 0, "best": {}, "stale": 0, "data": checkpoint.fingerprint(sequences)}
    state["valid"] = checkpoint.fingerprint(valid)
    state["base"] = job.base
    state["options"] = dataclasses.asdict(recorded(config, job.model))
    if config.resume:
        state = resume(job, state, total)

    def due(every: str) -> bool:
        """Whether something is done `every` epoch or N steps, and now."""
        n = per_epoch if every == "epoch" else int(every)
        return state["step"] == total or n > 0 and state["step"] % n == 0

    loggers = make_loggers(config.log, out, dataclasses.asdict(config)) if world.first else []
    with Tracker(out, total, state["step"], world.first, loggers) as tracker, stop_signals() as job.caught:
        for step in range(state["step"], total):
            if config.patience and state["stale"] >= config.patience:
                say(f"no better for {state['stale']} validations: stopped after step {step}")
                break
            epoch, i = divmod(step, per_epoch)
            chosen = order(len(sequences), config.seed, epoch)[i * config.batch : (i + 1) * config.batch].tolist()
            lr = config.lr * schedule(config.schedule, step, total, warmup)
            values, stop = train_step(job, [sequences[j] for j in chosen], step, lr)
            state["step"] = step + 1
            evaluated = validate(job, tokenizer, valid, state) if valid and due(config.eval_every) else None
            tracker.step({**values, "train/epoch": (step + 1) / per_epoch, "train/global_step": step + 1}, evaluated)
            if stop or due(config.save_every):
                check_finite(job, step + 1)
                saved = state | {"scaler": job.scaler.state_dict()}
                checkpoint.save(out, job.model, job.optimizer, saved, config.keep, world.first)
            world.wait()
            if stop:
                raise Interrupted(stop, checkpoint.latest(out))
        check_finite(job, state["step"])
        hub.write_model(job.model, tokenizer, out / "last", world.first)
        model = out / ("best" if state["best"] else "last")
        tracker.finish(model)
    return Run(out, state["step"], time.perf_counter() - start, model, state["best"])


def train_step(job: Job, sequences: list[Sequence], step: int, lr: float) -> tuple[dict[str, float], int]:
    """One update from `sequences` at learning rate `lr`.

    Returns the step's values by their names in metrics.jsonl, and the signal that a process was asked to stop by, or 0.
    """
    model, config, world, start = job.model, job.config, job.world, time.perf_counter()
    n_targets = sum(len(s.targets) for s in sequences)  # of the whole step, before any backward
    sums = torch.tensor([0, 0, signal.SIGINT in job.caught, signal.SIGTERM in job.caught], dtype=torch.float64)
    micros = world.micro_batches(sequences, config.tokens)
    if config.graph:
        job.graphs = job.graphs or Graphs(job, model.settings["minift"]["max_length"])
        sums[0], sums[1], norm = job.graphs.step(micros, Noise(config.seed, step), n_targets, lr)
    for micro in () if config.graph else micros:
        batch = pack(micro).to(model.device)
        noise = Noise(config.seed, step, batch.keys)
        with lean():
            loss, right = TASKS[config.task].loss(model, batch, noise, config.label_smoothing)
        job.scaler.scale(loss / max(1, n_targets)).backward()
        sums[0] += loss.item()
        sums[1] += right.item()
    loss_sum, right, interrupted, terminated = world.add_up(sums.to(model.device)).tolist()
    if not math.isfinite(loss_sum):
        numbers = ", ".join(str(s.number) for s in sequences)
        raise FloatingPointError(
            f"the loss of step {step + 1} is {loss_sum}; its examples, counted from 0: {numbers}; "
            f"the last checkpoint: {checkpoint.latest(Path(config.out)) or 'none yet'}"
        )
    norm = norm if config.graph else update(job, lr)
    n_tokens = sum(map(len, sequences))
    values = {
        "train/loss": loss_sum / max(1, n_targets),
        "train/accuracy": right / max(1, n_targets),
        "train/grad_norm": norm if math.isfinite(norm) else None,
        "train/learning_rate": lr,
        "train/tokens": n_tokens,
        "train/tokens_per_second": n_tokens / (time.perf_counter() - start),
        "train/peak_memory": peak_memory(),
    }
    if job.scaler.is_enabled():
        values["train/loss_scale"] = job.scaler.get_scale()
    return values, signal.SIGTERM if terminated else signal.SIGINT if interrupted else 0


def update(job: Job, lr: float) -> float:
    """Clips the gradients of all processes and updates the weights; returns the gradients' norm."""
    parameters = [p for p in job.model.parameters() if p.requires_grad]
    job.world.add_gradients(parameters)
    job.scaler.unscale_(job.optimizer)
    norm = clip(parameters, job.config.clip)
    for group in job.optimizer.param_groups:
        group["lr"] = lr * group["ratio"]
    job.scaler.step(job.optimizer)  # float16: not where a gradient overflowed
    job.scaler.update()
    job.optimizer.zero_grad()
    return norm


def validate(job: Job, tokenizer: Tokenizer, valid: list[Sequence], state: dict) -> dict[str, float]:
    """The metrics of the validation examples; keeps the model in best/ if they are the best so far."""
    model, world = job.model, job.world
    name, better = TASKS[model.task].Metrics.best
    if world.sharded:  # every forward pass is a conversation of all: all measure all
        found = measure(model, valid)
        world.settle(model)
    else:
        found = measure(model, valid[world.rank :: world.size], add_up=world.add_up)
    if not math.isfinite(found["loss"]):
        raise FloatingPointError(
            f"the validation loss after step {state['step']} is {found['loss']}; "
            f"the last checkpoint: {checkpoint.latest(Path(job.config.out)) or 'none yet'}"
        )
    best = state["best"]
    state["stale"] += 1
    if not best or is_better(found, best, name, better):
        check_finite(job, state["step"])
        state["best"], state["stale"] = found, 0
        hub.write_model(model, tokenizer, Path(job.config.out, "best"), world.first)
    say(f"step {state['step']} valid: " + "  ".join(f"{k} {v:.4f}" for k, v in found.items() if type(v) is float))
    return found


def is_better(found: dict, best: dict, name: str, better: Callable) -> bool:
    """Whether a validation is better by the metric `name`, or as good with a lower loss."""
    if found[name] != best[name]:
        return better(found[name], best[name]) == found[name]
    return found["loss"] < best["loss"]


def check_finite(job: Job, step: int) -> None:
    """Raises FloatingPointError where a trained weight or its moments are not finite: no such model is saved."""
    faults = []
    for name, p in checkpoint.trained(job.model):
        for tensor in (p, *job.optimizer.state.get(p, {}).values()):
            tensor = tensor.detach()
            if hasattr(tensor, "to_local"):  # a process's own part of a sharded one
                tensor = tensor.to_local()
            if not checkpoint.is_finite(tensor):
                faults.append(name)
    count = torch.tensor([len(faults)], dtype=torch.float64, device=job.model.device)
    if job.world.add_up(count).item():
        where = faults[0] if faults else "a weight of another process"
        raise FloatingPointError(
            f"after step {step} {where} is not finite, and nothing of it was saved; "
            f"the last checkpoint: {checkpoint.latest(Path(job.config.out)) or 'none yet'}"
        )


# options that may be another when a run goes on: they change where and how fast it runs, and not what it learns
FREE = {"model", "data", "valid", "out", "columns", "labels", "tokens", "device", "kernels", "graph", "recompute"}
FREE |= {"save_every", "keep", "shard", "log", "resume"}


def resume(job: Job, fresh: dict, total: int) -> dict:
    """The state of the latest checkpoint, with model and optimizer as they were; `fresh` where there is none yet."""
    folder = checkpoint.latest(Path(job.config.out))
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
            checkpoint.check_base(folder, fresh["base"], state["base"])

    state = checkpoint.load(folder, job.model, job.optimizer, check)
    scaler = state.pop("scaler")
    if job.scaler.is_enabled():
        load_scaler(job, folder, scaler)
    say(f"resumed after step {state['step']}")
    return fresh | state | {"options": fresh["options"]}


def check_options(folder: Path, now: dict, then: dict) -> None:
    """Raises InputError where an option that changes what is learned is not what the checkpoint was made with."""
    for name in now.keys() & then.keys():
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
        raise InputError(f"{folder / checkpoint.STATE}: scaler lacks {', '.join(sorted(missing))}")
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
