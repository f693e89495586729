"""`python -m minift` is `minift`; as torchrun starts it, too."""

import os
import sys

from .cli import main

code = main()
if "TORCHELASTIC_RUN_ID" in os.environ:  # all is written; threads of torch.distributed may abort a process that unwinds
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
sys.exit(code)
