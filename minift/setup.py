"""From a model to a job: what a step runs on. `prepare` does it in one call, in Python too."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from .adapters import adapt, changes_base, learning_rate, saved_as
from .checkpoints import loading, resume
from .config import TrainConfig
from .data.batch import Sequence
from .data.tokenizer import Tokenizer
from .engine import memory
from .engine.distributed import ALONE, World, join
from .engine.graph import Graphs
from .engine.optim import make_optimizer
from .engine.optimizers import Optimizer, choose_settings, rule_named
from .engine.precision import choose_device, choose_dtype
from .errors import InputError
from .layers import Embedding, Linear
from .layers.packed import is_cheap, is_exact, quantize, way_named
from .measure.track import say
from .models import Model, check_length
from .ops import native
from .ops.linear import cpu_bfloat16
from .tables import BASES
from .tasks import task_of

BASE = 109_000_000  # weights of BERT-base

# of an adapter's micro-batch on a CPU, by what multiplies bfloat16 there. Each reads all weights: the faster products
# are, the more a small one costs. With more tokens steps are hardly faster (benchmarks/LOG.md, 2026-11-25, 2026-12-01).
TOKENS = {"": 512, "AVX512-BF16": 1024, "AMX": 2048}


@dataclass
class Job:
    """What every step works with."""

    model: Model
    task: ModuleType  # the file of what it learns
    config: TrainConfig
    parameters: list[nn.Parameter]  # those that learn
    optimizer: Optimizer
    scaler: torch.amp.GradScaler  # does nothing unless activations are float16
    world: World = ALONE
    in_order: bool = False  # whether sums of floats keep to one order (ops/in_order.py), as those of integers need not
    base: dict = field(default_factory=dict)  # resume.fingerprint_base of the model as it was loaded
    graphs: Graphs | None = None  # with --graph, from the first step on
    caught: list[int] = field(default_factory=list)  # signals that arrived

    def micro_batches(self, sequences: list[Sequence]) -> list[list[Sequence]]:
        """This process's part of a step on these, in micro-batches of `--tokens`."""
        return self.world.micro_batches(sequences, self.config.tokens, self.in_order)


@dataclass(frozen=True)
class Engine:
    """Where and in what a run computes."""

    device: torch.device
    dtype: torch.dtype  # of activations
    world: World = ALONE


def load_model(config: TrainConfig, labels: list[str] | None) -> tuple[Model, Tokenizer | None]:
    """The model of a configuration, made ready for `--method`, and its tokenizer. Raises InputError."""
    base = Path(config.out, "base")
    source = config.model
    method = config.method
    if config.resume and base.is_dir() and resume.latest(Path(config.out)):
        # a method that changed the frozen weights kept them there; the checkpoint has the rest
        source = str(base)
        method = saved_as(method)
    packs = config.base if config.base in BASES else ""
    is_packed_later = packs and changes_base(method)  # it needs the weights as they are
    model, tokenizer = loading.load(
        source,
        config.task,
        labels,
        ordered=bool(config.labels),
        base="" if is_packed_later else packs,
        dropout=config.dropout,
        seed=config.seed,
        init=config.init,
    )
    say(f"{config.model}: {model.report}")
    adapt(model, method, **adapter_options(config))
    if model.adapter and config.init == "random":
        raise InputError(f"--init is 'random' with --method {method}, which saves an adapter and not what it is around")
    if is_packed_later:
        quantize(model, packs)
    return model, tokenizer


def adapter_options(config: TrainConfig) -> dict:
    """The options of a configuration that are about adapters, as adapters.Options takes them."""
    return dict(
        rank=config.rank,
        alpha=config.alpha,
        dropout=config.adapter_dropout,
        targets=config.targets,
        exclude=config.exclude,
        layers=tuple(int(n) for n in config.layers.split(",") if n),
        rank_pattern=read_pattern(config.rank_pattern),
        alpha_pattern=read_pattern(config.alpha_pattern),
        rslora=config.rslora,
        seed=config.seed,
    )


def read_pattern(text: str) -> dict[str, int]:
    """`--rank-pattern` or `--alpha-pattern`, as "c_proj=4,layer.0.*=16" (config.check has seen it)."""
    found = {}
    for pair in filter(None, text.split(",")):
        name, _, number = pair.partition("=")
        found[name] = int(number)
    return found


def prepare(model: Model, config: TrainConfig | None = None, **options) -> Job:
    """Makes a model ready for training steps: `job = minift.prepare(model, lr=5e-5, precision="bf16")`.

    options: fields of TrainConfig; those about files have no meaning here. The model goes to the device and is kept
    there as the options say. Raises InputError, and ValueError for a wrong option.
    """
    task_of(model)
    config = replace(config or TrainConfig(**options), task=model.task)
    config.check()
    return make_job(model, config, choose_engine(config))


def make_job(model: Model, config: TrainConfig, engine: Engine) -> Job:
    """The job of a checked configuration."""
    model.max_length = check_length(model, config.max_length)  # eval and predict cut where training cut
    base = {}
    if engine.device.type != "meta":  # of the weights as they were loaded, whatever dtype they are kept in
        base = resume.fingerprint_base(model)
    model.to(engine.device)
    if config.base == "bf16":
        keep_frozen(model, torch.bfloat16)
    elif config.base == "auto" and model.adapter:  # without an adapter they are saved with the model
        keep_frozen(model, engine.dtype)
    model.compute_in(engine.dtype, config.recompute)
    engine.world.shard(model, model.family.SHARDED)
    config = replace(
        config,
        lr=config.lr or default_lr(model) * rule_named(config.optimizer).LR,
        tokens=config.tokens or default_tokens(model, engine.device, engine.dtype),
    )
    settings = optimizer_settings(config)
    optimizer = make_optimizer(model, config.lr, config.weight_decay, config.lora_plus, config.optimizer, **settings)
    return Job(
        model=model,
        task=task_of(model),
        config=config,
        parameters=[p for p in model.parameters() if p.requires_grad],
        optimizer=optimizer,
        scaler=torch.amp.GradScaler(engine.device.type, enabled=engine.dtype == torch.float16),
        world=engine.world,
        in_order=is_exact(model) and engine.device.type != "cuda",
        base=base,
    )


def optimizer_settings(config: TrainConfig) -> dict[str, float]:
    """--beta1, --beta2 and --eps as the optimizer takes them. Raises InputError for one that it does not have."""
    given = {"beta1": config.beta1, "beta2": config.beta2, "eps": config.eps}
    return choose_settings(config.optimizer, given)


def choose_engine(config: TrainConfig) -> Engine:
    """The device, the dtype of activations and the processes of a run; says which, and why. Raises InputError."""
    device, why = choose_device(config.device)
    world = join(device, config.shard)
    dtype, reason = choose_dtype(config.precision, device)
    processes = "1 process" if world.size == 1 else f"{world.size} processes"
    say(f"{device.type} ({why}), {str(dtype)[6:]} ({reason}), {processes}")
    say(f"kernels: {use_kernels(config, device)}")
    if config.graph and not rule_named(config.optimizer).RECORDABLE:
        raise InputError(f"--graph is True with --optimizer {config.optimizer}, whose updates cannot be recorded")
    if config.graph and config.base in BASES and not way_named(config.base).Packed.RECORDABLE:
        raise InputError(f"--graph is True with --base {config.base}, whose products cannot be recorded")
    if config.graph and (device.type, dtype, world.size) != ("cuda", torch.bfloat16, 1):
        found = f"{str(dtype)[6:]} on {device.type} with {processes}"
        raise InputError(f"--graph is True, with {found}; expected bfloat16 on cuda with 1 process")
    if device.type == "cpu":
        memory.keep_memory()
    return Engine(device, dtype, world)


def use_kernels(config: TrainConfig, device: torch.device) -> str:
    """Sets which kernels run; says which, in words. Raises InputError where --kernels native finds no way."""
    try:
        return native.use(config.kernels, device)
    except ValueError as e:
        raise InputError(str(e)) from e


def keep_frozen(model: Model, dtype: torch.dtype) -> None:
    """Stores the frozen weights of linear layers and embeddings in `dtype`; what is trained stays float32."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, Linear | Embedding) and not weight.requires_grad:
            weight.data = weight.data.to(dtype)


def default_lr(model: Model) -> float:
    """AdamW's learning rate where none is given: an adapter's own or, the more of a model is trained, the smaller."""
    if model.adapter:
        return learning_rate(model.adapter.variant)
    everything = all(p.requires_grad for p in model.parameters())
    return 5e-5 if everything else 1e-3


def default_tokens(model: Model, device: torch.device, dtype: torch.dtype) -> int:
    """Tokens in memory at once where no number is given, 0 for no limit.

    Adapters on a CPU take what TOKENS says, and more of a model smaller than BERT-base. Elsewhere a micro-batch costs
    more: a launch of each kernel, an addition to each gradient, each weight out of NF4.
    """
    if not model.adapter or device.type != "cpu" or not is_cheap(model):
        return 0
    fast = ""
    if dtype == torch.bfloat16:
        fast = cpu_bfloat16()
    tokens = TOKENS[fast]
    return max(tokens, tokens * BASE // model.size())
