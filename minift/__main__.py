"""`python -m minift` is `minift`."""

import sys

from .cli import main

sys.exit(main())
