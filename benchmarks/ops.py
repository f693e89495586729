"""Each operator forward and backward on the CPU: by its kernel, by its PyTorch reference, and by plain PyTorch.

    python benchmarks/ops.py [--only norm,gelu] [--threads N] [--dtype bf16]

Plain PyTorch is what a model would call without minift: F.dropout, F.layer_norm, F.gelu, F.cross_entropy,
F.scaled_dot_product_attention, for LoRA F.dropout before the small product, for NF4 bitsandbytes
where it is installed. The three take turns and the fastest of many counts, so a busy machine slows all alike. Beside
them stands what the native one amounts to: GB/s of the tensors that have to be read and written once, or GFLOP/s of the
matrix products alone. The ceilings, a copy and a product by torch.mm and by minift, are measured in the same run.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from common import command, in_turns, make_parser, parse, table, told, write_section
from torch import Tensor

from minift.data.batch import token_keys
from minift.engine import memory
from minift.ops import int8, lora, native, nf4
from minift.ops.attention import Settings, attention
from minift.ops.dropout import Noise, dropout
from minift.ops.gelu import gelu_erf, gelu_tanh
from minift.ops.linear import product
from minift.ops.loss import linear_cross_entropy
from minift.ops.norm import add_norm

TOKENS, P, EPS = (512, 2048), 0.1, 1e-5
ENGINES = ("native", "reference", "plain")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# a case: (operator, shape, ours, plain, bytes, FLOPs); both functions do forward and backward
Case = tuple[str, str, Callable, Callable, float, float]


def draw(*shape: int, dtype: torch.dtype) -> Tensor:
    return (0.1 * torch.randn(*shape)).to(dtype).requires_grad_()


def passes(f: Callable, inputs: list[Tensor], dy: Tensor) -> Callable:
    """Forward and backward of y = f(*inputs)."""
    return lambda: torch.autograd.grad(f(*inputs), inputs, dy)


def dropout_cases(dtype: torch.dtype) -> Iterator[Case]:
    for n in TOKENS:
        x, noise, dy = draw(n, 768, dtype=dtype), tokens(n), torch.ones(n, 768, dtype=dtype)
        ours = passes(lambda x, z=noise: dropout(x, P, z, 1), [x], dy)
        yield "dropout", f"{n} x 768", ours, passes(lambda x: F.dropout(x, P), [x], dy), 4 * x.nbytes, 0


def norm_cases(dtype: torch.dtype) -> Iterator[Case]:
    for n in TOKENS:
        x, r, w, b = *(draw(n, 768, dtype=dtype) for _ in range(2)), *(draw(768, dtype=torch.float32) for _ in range(2))
        noise, dy = tokens(n), torch.randn(n, 768, dtype=dtype)
        ours = passes(lambda x, r, w, b, z=noise: add_norm(x, r, w, b, EPS, P, z, 1)[1], [x, r, w, b], dy)
        plain = passes(lambda x, r, w, b: torch_norm(r + F.dropout(x, P), w, b), [x, r, w, b], dy)
        yield "norm", f"{n} x 768", ours, plain, 8 * x.nbytes, 0


def gelu_cases(dtype: torch.dtype) -> Iterator[Case]:
    for n in TOKENS:
        x, dy = draw(n, 3072, dtype=dtype), torch.randn(n, 3072, dtype=dtype)
        for f, form in ((gelu_erf, "none"), (gelu_tanh, "tanh")):
            plain = passes(lambda x, form=form: F.gelu(x, approximate=form), [x], dy)
            yield "gelu", f"{n} x 3072 {f.__name__[5:]}", passes(f, [x], dy), plain, 5 * x.nbytes, 0


def loss_cases(dtype: torch.dtype) -> Iterator[Case]:
    for n, v in ((128, 50257), (2048, 2)):
        x, w, t, one = draw(n, 768, dtype=dtype), draw(v, 768, dtype=dtype), torch.randint(v, (n,)), torch.ones(())
        ours = passes(lambda x, w, t=t: linear_cross_entropy(x, w, None, t)[0], [x, w], one)
        plain = passes(lambda x, w, t=t: F.cross_entropy((x @ w.t()).float(), t, reduction="sum"), [x, w], one)
        yield "loss", f"{n} x 768 to {v}", ours, plain, 0, 6 * n * 768 * v


def attention_cases(dtype: torch.dtype) -> Iterator[Case]:
    """12 heads of 64: BERT-base's sequences, and GPT-2's. The six products; causal ones by half."""
    for count, length, causal in ((8, 128, False), (2, 512, False), (2, 1024, True)):
        n = count * length
        qkv, dy = [draw(n, 12, 64, dtype=dtype) for _ in range(3)], torch.randn(n, 12, 64, dtype=dtype)
        padded = [t.detach().view(count, length, 12, 64).transpose(1, 2).requires_grad_() for t in qkv]
        settings = Settings(0.125, causal, P, tokens(n))
        offsets = torch.arange(count + 1) * length
        ours = passes(lambda q, k, v, o=offsets, s=settings: attention(q, k, v, o, None, s), qkv, dy)
        dy = dy.view(count, length, 12, 64).transpose(1, 2)
        plain = passes(lambda q, k, v, c=causal: F.scaled_dot_product_attention(q, k, v, None, P, c), padded, dy)
        work = 6 * 2 * n * length * 768 / (2 if causal else 1)
        yield "attention", f"{count} x {length}{' causal' * causal}", ours, plain, 0, work


def lora_cases(dtype: torch.dtype) -> Iterator[Case]:
    """The products with x and A alone: h, dA, and the update's part of dx."""
    for n, rank in ((512, 8), (2048, 8), (512, 16)):
        x, A, noise = torch.randn(n, 768).to(dtype), torch.randn(rank, 768), tokens(n)
        g, dx = torch.randn(n, rank).to(dtype), torch.zeros(n, 768, dtype=dtype)

        def ours(x=x, A=A, g=g, dx=dx, noise=noise):
            drop = noise.drop(P, 1, 768)
            lora.shrink(x, A, drop)
            lora.spread(x, g, A, dx, drop)

        low = [x.clone().requires_grad_(), A.to(dtype).clone().requires_grad_()]
        plain = passes(lambda x, A: F.dropout(x, P) @ A.t(), low, g)
        yield "lora", f"{n} x 768 rank {rank}", ours, plain, 4 * x.nbytes, 0


def nf4_cases(dtype: torch.dtype) -> Iterator[Case]:
    """There and back, for a matrix of 768 x 3072, as bytes of the matrix and its codes."""
    try:
        import bitsandbytes.functional as bnb
    except ImportError:
        bnb = None
    w = (0.02 * torch.randn(1, 768 * 3072)).to(dtype)
    out, (codes, absmax) = torch.empty_like(w), nf4.quantize(w)
    d, nested, mean = nf4.compress(absmax)
    packed, state = bnb.quantize_4bit(w, quant_type="nf4", compress_statistics=True) if bnb else (None, None)
    nothing, size = (lambda: None), w.nbytes + codes.nbytes
    plain = (lambda: bnb.dequantize_4bit(packed, state)) if bnb else nothing
    yield "nf4", "768 x 3072 to weights", lambda: nf4.dequantize(codes, d, out, nested, mean), plain, size, 0
    plain = (lambda: bnb.quantize_4bit(w, quant_type="nf4")) if bnb else nothing
    yield "nf4", "768 x 3072 to codes", lambda: nf4.quantize(w), plain, size, 0


def int8_cases(dtype: torch.dtype) -> Iterator[Case]:
    """y and dx of a frozen layer, beside the products with a matrix of floats."""
    for n, channels, outputs in ((512, 768, 768), (1024, 768, 3072), (1024, 3072, 768)):
        x, dy = torch.randn(n, channels).to(dtype), torch.randn(n, outputs).to(dtype)
        w = 0.02 * torch.randn(outputs, channels)
        products, floats = int8.Products(*int8.quantize(w)), w.to(dtype)

        def ours(x=x, dy=dy, products=products):
            products.times(x, None)
            products.times_transposed(dy)

        def plain(x=x, dy=dy, w=floats):
            product(x, w)
            product(dy, w.t())

        yield "int8", f"{n} x {channels} to {outputs}", ours, plain, 0, 4 * n * channels * outputs


CASES = {
    "attention": attention_cases,
    "lora": lora_cases,
    "nf4": nf4_cases,
    "int8": int8_cases,
    "dropout": dropout_cases,
    "norm": norm_cases,
    "gelu": gelu_cases,
    "loss": loss_cases,
}


def tokens(n: int) -> Noise:
    """Dropout keys of n tokens."""
    return Noise(1, 2, token_keys(torch.arange(n) // 64, torch.arange(n) % 64))


def torch_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[1:], weight.to(x.dtype), bias.to(x.dtype), EPS)


def fastest(functions: list[Callable], seconds: float) -> list[float]:
    """The shortest time of each, in seconds; they take turns."""
    return [min(times) for times in in_turns(functions, at_least=seconds)]


def in_mode(mode: str, f: Callable) -> Callable:
    def run():
        native.mode = mode
        f()

    return run


def ceilings(dtype: torch.dtype, seconds: float) -> tuple[float, float, float]:
    """(bytes a second of a copy of 6 MB, FLOPs a second of a product of 512 x 768 and 768 x 3072, and by minift)."""
    x, y = torch.randn(512, 3072), torch.empty(512, 3072)
    a, b = torch.randn(512, 768, dtype=dtype), torch.randn(768, 3072, dtype=dtype)
    copy, *products = fastest([lambda: y.copy_(x), lambda: a @ b, lambda: product(a, b.t())], seconds)
    return 2 * x.nbytes / copy, *(2 * 512 * 768 * 3072 / t for t in products)


def measure(op: str, shape: str, ours: Callable, plain: Callable, size: float, work: float, seconds: float) -> dict:
    """The row of one case."""
    times = fastest([in_mode("native", ours), in_mode("reference", ours), plain], seconds)
    row = {"operator": op, "shape": shape} | dict(zip(ENGINES, (1e3 * t for t in times), strict=True))
    if size:
        return row | {"gb_s": size / times[0] / 1e9}
    return row | {"gflop_s": work / times[0] / 1e9}


def shown(row: dict) -> list[str]:
    """A line of the table."""
    times = [f"{row[engine]:.3f}" for engine in ENGINES]
    achieved = f"{row['gb_s']:.1f} GB/s" if "gb_s" in row else f"{row['gflop_s']:.1f} GFLOP/s"
    return [row["operator"], row["shape"], *times, f"{row['plain'] / row['native']:.2f}", achieved]


def main() -> None:
    p = make_parser(__doc__, needs_assets=False)
    p.add_argument("--only", default=",".join(CASES), help="operators (default %(default)s)")
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--dtype", choices=DTYPES, default="fp32")
    p.add_argument("--seconds", type=float, default=2.0, help="spent on each case, at least (default %(default)s)")
    a = parse(p, seconds=0.0)
    dtype = DTYPES[a.dtype]
    torch.manual_seed(0)
    torch.set_num_threads(a.threads)
    memory.keep_memory()  # as in training
    kernels = native.use("native")
    copy, mm, ours = (rate / 1e9 for rate in ceilings(dtype, a.seconds))
    rows = [told(measure(*case, a.seconds)) for name in a.only.split(",") for case in CASES[name](dtype)]
    found = f"{a.threads} threads, {a.dtype}; {kernels}. Milliseconds. Ceilings: copy {copy:.1f} GB/s; matrix product "
    found += f"{mm:.1f} GFLOP/s by torch.mm, {ours:.1f} by minift.\n\n"
    found += table(["operator", "shape", *ENGINES, "plain / native", "achieved"], list(map(shown, rows)), left=2)
    print(found)
    if a.write:
        title = f"Each operator, forward and backward, {a.dtype}"
        write_section(a.write, f"ops {a.dtype}", title, command(p, a), rows, found)


if __name__ == "__main__":
    main()
