"""What can be chosen by name: one line per choice, its name and what `--help` says of it.

A fork adds a choice as one new file (a schedule: one function) and one line here; the command line, its checks and its
help follow from the line. A file is found by its name, with "_" for "-". Nothing here imports torch: `--help` answers
at once.
"""

# a file each in engine/optimizers/, whose __init__.py says what such a file has
OPTIMIZERS = {
    "adamw": "Adam with decoupled weight decay",
    "sgd": "momentum beta1, decay as part of the gradient (default --lr: 100 times AdamW's)",
    "lion": "steps by the gradient's sign, one state instead of two (default --lr: 0.2 times AdamW's)",
    "muon": "hidden matrices by orthogonalised momentum (beta1), the rest by AdamW (beta2, eps)",
}

# a function each in engine/schedules.py
SCHEDULES = {
    "linear": "down to 0 in a straight line",
    "cosine": "down to 0 along half a cosine",
    "constant": "stays at its peak",
}
