"""What is learned, one file each. A task encodes examples, names the rows it asks about, has a summed loss, streaming
metrics and predictions."""

from . import classify

TASKS = {"classify": classify}
