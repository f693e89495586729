"""A step as a tree of nodes: its sums, folded by layer, in lines of text, as JSON, as a Chrome trace.

trace.py grows it. What a node says of itself it says of all that is below it, too.
"""

import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

LEAVES = ("torch", "kernel", "python")  # kinds of nodes that take time themselves
SMALL = 0.005  # share of the step below which a line is not worth one of a few
MOST = 5  # nodes below one that are worth a line each
FEW = 8  # lines of the list of what costs most


@dataclass(eq=False)
class Node:
    """A part of a step. Times in milliseconds, sizes in bytes."""

    name: str  # of a module within the one around it
    kind: str  # step, phase, module, operator, again (computed once more); line (of data); or one of LEAVES
    file: str = ""  # "minift/ops/linear.py", "kernels/cpu/gelu.cpp"; "" where it has none
    line: int = 0
    ms: float = 0.0
    flops: int = 0  # of products
    read: int = 0
    written: int = 0
    saved: int = 0  # made here, and there when the backward pass began
    peak: int = 0  # made here, and there when most was held
    bound: float = 0.0  # ms that the machine would need at its rates of products and copies
    start: float = 0.0  # of a leaf: ms since the step began
    calls: int = 1
    error: float | None = None  # of a kernel's results, relative (verify.py)
    shapes: list[list[int]] = field(default_factory=list)  # of a leaf's inputs, then of its outputs
    dtypes: list[str] = field(default_factory=list)
    users: dict[str, None] = field(default_factory=dict)  # backward operators that read what is saved here
    each: list[float] = field(default_factory=list)  # of nodes that were folded into one: the time of each
    children: list["Node"] = field(default_factory=list, repr=False)

    @property
    def where(self) -> str:
        """File and line, or nothing."""
        return f"{self.file}:{self.line}" if self.file else ""

    @property
    def roof(self) -> float:
        """Share of the roofline: what the machine would need, of what it took."""
        return self.bound / self.ms if self.ms else 0.0


SUMS = ("ms", "flops", "read", "written", "saved", "peak", "bound")


def leaves(node: Node) -> Iterator[Node]:
    """All nodes below that have none below them."""
    if not node.children:
        yield node
    for child in node.children:
        yield from leaves(child)


def add_up(node: Node, product_rate: float, copy_rate: float) -> None:
    """Sets the bound of each leaf, by FLOP/s and bytes/s, and the sums of all other nodes."""
    if not node.children:
        seconds = max(node.flops / product_rate, (node.read + node.written) / copy_rate)
        node.bound = 1000 * seconds
        return
    for child in node.children:
        add_up(child, product_rate, copy_rate)
    for name in SUMS:
        setattr(node, name, sum(getattr(child, name) for child in node.children))
    errors = [child.error for child in node.children if child.error is not None]
    node.error = max(errors, default=None)
    if node.kind == "operator":
        for child in node.children:
            node.users |= child.users


# ---- folding


def joined(nodes: list[Node], name: str = "") -> Node:
    """Several nodes as one, with their sums; their children joined too, where they are alike."""
    first = nodes[0]
    if len(nodes) == 1:
        return first
    longest = max(nodes, key=lambda node: node.ms)
    sums = {what: sum(getattr(node, what) for node in nodes) for what in SUMS}
    errors = [node.error for node in nodes if node.error is not None]
    users: dict[str, None] = {}
    for node in nodes:
        users |= node.users
    return replace(
        first,
        **sums,
        name=name or first.name,
        file=longest.file,
        line=longest.line,
        calls=sum(node.calls for node in nodes),
        error=max(errors, default=None),
        users=users,
        shapes=longest.shapes,
        dtypes=longest.dtypes,
        each=[ms for node in nodes for ms in node.each or [node.ms]],
        children=alike_joined([child for node in nodes for child in node.children]),
    )


def alike_joined(nodes: Iterable[Node], by_line: bool = False) -> list[Node]:
    """Nodes of the same name and place as one. by_line: of Python too, of which else all is one."""
    groups: dict[tuple, list[Node]] = {}
    for node in nodes:
        place = "" if node.kind == "python" and not by_line else node.where
        groups.setdefault((node.kind, node.name, place), []).append(node)
    return [joined(group) for group in groups.values()]


def folded(node: Node, whole: float = 0.0) -> Node:
    """The same tree with repeated calls as one, and layers of the same parts as one, unless one is slow.

    whole: ms of the step.
    """
    whole = whole or node.ms
    children = alike_joined([folded(child, whole) for child in node.children])
    return replace(node, children=layers_joined(children, whole))


def layers_joined(nodes: list[Node], whole: float) -> list[Node]:
    """Numbered modules ("layers.0", "layers.1") of the same parts as one, "2 x layers.0-1"."""
    groups: dict[object, list[Node]] = {}
    for node in nodes:
        stem, _, number = node.name.rpartition(".")
        key: object = node
        if node.kind == "module" and stem and number.isdigit():
            key = stem, parts(node)
        groups.setdefault(key, []).append(node)
    found = []
    for group in groups.values():
        usual = statistics.median(node.ms for node in group)
        slow = [node for node in group if node.ms > 2 * usual and node.ms - usual > 0.01 * whole]
        rest = [node for node in group if node not in slow]
        found += slow
        if len(rest) > 1:
            stem = rest[0].name.rpartition(".")[0]
            numbers = ranges(int(node.name.rpartition(".")[2]) for node in rest)
            found.append(joined(rest, f"{len(rest)} x {stem}.{numbers}"))
        else:
            found += rest
    return found


def parts(node: Node) -> frozenset:
    """What two layers have in common that do the same."""
    inside = [child for child in node.children if child.kind != "python"]
    return frozenset((child.kind, child.name, child.where, parts(child)) for child in inside)


def ranges(numbers: Iterable[int]) -> str:
    """ "0-3,5" for 0, 1, 2, 3 and 5."""
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


# ---- lines of text


def tree_lines(root: Node, width: int, most: int, depth: int = 0) -> list[str]:
    """The tree in lines of `width` columns. Opened are the costliest nodes, in `most` lines; or all down to a depth."""
    rows = [*open_by_depth(root, depth)] if depth else [*open_by_cost(root, most)]
    return rows_in_columns(rows, root, width)


def open_by_depth(node: Node, depth: int, level: int = 0) -> Iterator[tuple[int, Node]]:
    """(level, node) of all nodes of at most this level, from top to bottom."""
    yield level, node
    if level < depth:
        for child in in_order(node):
            yield from open_by_depth(child, depth, level + 1)


def open_by_cost(root: Node, most: int) -> Iterator[tuple[int, Node]]:
    """The same of the nodes that cost most, with as many opened as fit into `most` lines."""
    opened: dict[Node, list[Node]] = {}
    waiting = [root]
    room = most - 1
    while waiting and room > 0:
        node = max(waiting, key=lambda node: node.ms)
        waiting.remove(node)
        shown = worth_showing(node, root.ms, room)
        opened[node] = shown
        room -= len(shown)
        waiting += shown

    def walk(node: Node, level: int) -> Iterator[tuple[int, Node]]:
        yield level, node
        for child in opened.get(node, ()):
            yield from walk(child, level + 1)

    return walk(root, 0)


def worth_showing(node: Node, whole: float, room: int) -> list[Node]:
    """The children that take most, in at most so many lines; the others as one, where it counts."""
    large = [child for child in in_order(node) if child.ms >= SMALL * whole or child.kind == "phase"]
    large = large[: min(room, MOST)]
    rest = [child for child in node.children if child not in large]
    if large and len(large) < room and sum(child.ms for child in rest) >= SMALL * whole:
        large.append(replace(joined(rest), name=f"{len(rest)} more", kind="", file="", shapes=[], children=[]))
    return large


def in_order(node: Node) -> list[Node]:
    """The children, the costliest first; phases as they come."""
    if any(child.kind == "phase" for child in node.children):
        return sorted(node.children, key=lambda child: child.kind != "phase")
    return sorted(node.children, key=lambda child: -child.ms)


def costliest_lines(root: Node, width: int) -> list[str]:
    """The places in the code that take most time, whatever module calls them."""
    found = alike_joined((leaf for leaf in leaves(root) if leaf.kind in LEAVES), by_line=True)
    found.sort(key=lambda leaf: -leaf.ms)
    return rows_in_columns([(0, leaf) for leaf in found[:FEW]], root, width)


def rows_in_columns(rows: list[tuple[int, Node]], root: Node, width: int) -> list[str]:
    """Aligned lines of at most `width` columns, under a head. The wider, the more they say."""
    columns = {
        "ms": lambda n: f"{n.ms:,.1f}",
        "share": lambda n: f"{100 * n.ms / root.ms:.0f} %",
        "roof": lambda n: f"{100 * n.roof:.0f} %" if n.bound and n.ms > 1e-4 * root.ms else "",
    }
    if width >= 80:
        columns["GFLOP"] = lambda n: f"{n.flops / 1e9:,.1f}" if n.flops else ""
        columns["moved"] = lambda n: f"{(n.read + n.written) / 1e6:,.0f}" if n.read + n.written else ""
    if width >= 100:
        columns["saved"] = lambda n: f"{n.saved / 1e6:,.1f}" if n.saved else ""
    if root.error is not None and width >= 80:
        columns["error"] = lambda n: "" if n.error is None else f"{n.error:.0e}"
    cells = [[*columns], *([say(node) for say in columns.values()] for _, node in rows)]
    sizes = [max(map(len, column)) for column in zip(*cells, strict=True)]
    numbers = [" ".join(f"{cell:>{n}}" for cell, n in zip(row, sizes, strict=True)) for row in cells]

    # what is left is shared by the name, the place and, where there is much, shapes
    left = width - len(numbers[0]) - 2
    indent = 2 if width >= 100 else 1
    names = ["where the time goes"]
    places = ["file and line"]
    notes = ["shapes, dtype; saved for"]
    for level, node in rows:
        names.append(" " * indent * level + label(node))
        places.append(place(node, width))
        notes.append(note(node))
    for_places = min(max(map(len, places)), left * 2 // 5)
    for_names = min(max(map(len, names)), left - for_places - 2)
    lines = []
    for number, name, where, more in zip(numbers, names, places, notes, strict=True):
        line = f"{number}  {cut(name, for_names):<{for_names}}  {cut_left(where, for_places):<{for_places}}"
        room = width - len(line) - 2
        if room > 30:
            line += "  " + cut(more, room)
        lines.append(line.rstrip())
    return lines


def label(node: Node) -> str:
    """A node's name, how often it is called, and what the shortest and the longest of those folded into it took."""
    text = node.name
    if node.kind in LEAVES and node.calls > 1:
        text += f" x{node.calls}"
    elif node.kind == "module" and " x " in text:
        text += f" ({min(node.each):.1f} to {max(node.each):.1f} ms)"
    return text


def place(node: Node, width: int) -> str:
    """Where a node is in the code; on narrow terminals without the folder."""
    text = node.where.removeprefix("minift/")
    return text if width >= 100 else text.rpartition("/")[2]


def note(node: Node) -> str:
    """Shapes and dtypes of a leaf, and by what is read in backward what it saved."""
    texts = []
    if node.shapes:
        dtypes = dict.fromkeys(node.dtypes)
        texts.append(f"{' '.join(shape_text(shape) for shape in node.shapes)} {'/'.join(dtypes)}")
    if node.users and node.kind in (*LEAVES, "operator"):
        texts.append("for " + ", ".join(dict.fromkeys(user.partition(" of ")[0] for user in node.users)))
    return "; ".join(texts)


def shape_text(shape: list[int]) -> str:
    """ "8x768", or "()" of a single number."""
    return "x".join(map(str, shape)) or "()"


def cut(text: str, n: int) -> str:
    """The text in n columns, its end left out where it is longer."""
    return text if len(text) <= n else text[: max(0, n - 2)] + ".."


def cut_left(text: str, n: int) -> str:
    """The same, its beginning left out."""
    return text if len(text) <= n else ".." + text[len(text) - max(0, n - 2) :]


# ---- files


def as_json(node: Node, around: str = "") -> dict:
    """The tree as JSON: every call by itself, modules by their whole names."""
    name = node.name
    if node.kind == "module":
        name = f"{around}.{name}" if around else name
        around = name
    found = {what: getattr(node, what) for what in ("kind", "file", "line", *SUMS, "start", "shapes", "dtypes")}
    found["roof"] = node.roof
    found["used_by"] = [*node.users]
    if node.error is not None:
        found["error"] = node.error
    return {"name": name} | found | {"children": [as_json(child, around) for child in node.children]}


def as_chrome(leaves_in_time: list[tuple[tuple[Node, ...], Node]]) -> dict:
    """What chrome://tracing and https://ui.perfetto.dev show. Each leaf comes with the nodes around it, in their order.

    A node around leaves lasts from the first of a run of them to the last.
    """
    events = []
    open_: list[tuple[Node, float]] = []  # with the beginning of each
    end = 0.0

    def close(n: int) -> None:
        while len(open_) > n:
            node, start = open_.pop()
            events.append(event(node, start, end))

    for path, leaf in leaves_in_time:
        same = 0
        while same < min(len(open_), len(path)) and open_[same][0] is path[same]:
            same += 1
        close(same)
        open_ += [(node, leaf.start) for node in path[same:]]
        end = leaf.start + leaf.ms
        events.append(event(leaf, leaf.start, end))
    close(0)
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def event(node: Node, start: float, end: float) -> dict:
    """A slice of time; Chrome's unit is the microsecond."""
    args = {"where": node.where, "flops": node.flops, "read": node.read, "written": node.written}
    if node.shapes:
        args["shapes"] = note(node)
    times = {"ts": round(1000 * start, 3), "dur": round(1000 * (end - start), 3)}
    return {"name": node.name, "cat": node.kind, "ph": "X", "pid": 1, "tid": 1, **times, "args": args}
