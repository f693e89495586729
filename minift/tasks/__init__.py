"""What is learned, one file each. A task reads and encodes examples, names the rows it asks about, has a summed
loss, streaming metrics and predictions."""

from . import classify, complete

TASKS = {"classify": classify, "complete": complete}
