"""What is trained, and what it costs: full, LoRA, QLoRA, a linear probe, biases; beside PEFT's LoRA. SST-2, MiniLM.

    python benchmarks/methods.py --engines lora,qlora,head,bias,peft-lora --seeds 42,43,44

Two epochs, batch 32; LoRA with r=8, alpha=32, dropout 0.1, on query and value, lr 5e-4, classifier trained (as PEFT
does); the probe and biases with lr 1e-3, full fine-tuning with 5e-5. qlora: lora, the base in NF4 with double
quantisation; int8: lora, the base in 8 bits. Every case in a fresh process; time and memory are as in peers.py, whose
data this uses.
"""

import json

from common import command, parse, with_lora, write_section
from peers import accuracies_and_costs, run_all, run_minift, run_trainer, seeds_parser

OPTIONS = {
    "full": dict(method="full", lr=5e-5),
    "lora": dict(method="lora", lr=5e-4),
    "qlora": dict(method="lora", base="nf4", lr=5e-4),
    "int8": dict(method="lora", base="int8", lr=5e-4),
    "dora": dict(method="dora", lr=5e-4),
    "head": dict(method="head", lr=1e-3),
    "bias": dict(method="bias", lr=1e-3),
    "norm": dict(method="norm", lr=1e-3),
}


def main() -> None:
    p = seeds_parser(__doc__, "lora,qlora,head,bias,peft-lora")
    p.add_argument("--note", default="", help="with --write: what a reader should know of the circumstances")
    a = parse(p, engines="qlora,peft-lora")
    if a.here:
        engine, seed = a.here["engine"], a.here["seed"]
        if engine == "peft-lora":
            row = run_trainer("sst2", a, seed, lambda model: with_lora(model, "bert"), lr=5e-4)
        else:
            row = run_minift("sst2", a, seed, **OPTIONS[engine])
        print(json.dumps(row))
        return
    rows = run_all(a)
    found = accuracies_and_costs(rows)
    print(found)
    if a.write:
        text = f"float32, dropout 0.1. {a.note}\n\n{OPTIONS}\n\n{found}"
        write_section(a.write, "methods", "SST-2: what is trained, beside PEFT", command(p, a), rows, text)


if __name__ == "__main__":
    main()
