"""Regions: the experts of a mixture, cut out of a whole graph that Dynamo traced.

Contract: the graph is read; ``splice`` alone changes it, and only after everything about a region is proven.
::

    whole graph:  h -> router -> ids, weights --+
                  h ----------------------------+-> [ sort, products, combine ] -> y     the brackets are a region,
                                                                                         a module (x, ids, weights) -> y

A region becomes a small module of its own with the arguments of an experts module, x [T, H], ids [T, K] and
weights [T, K], so that trace, match, prep, rewrite and verify run on it as they do on a module.

1. anchors: products of rows with a packed 3-D parameter; those that share one selector (offsets, or ids) form
   one site;
2. cut: the ids nearest to the selector; the nearest tokens that do not depend on them; the nearest routing
   weights that no product feeds; the first [T, H] value through which all that follows the products passes;
3. sizes: a region is written for any T. Where Dynamo has a number, the sizes that are T or T * K become so
   again; at the T of the graph the result is the same graph, so what holds for all T holds for it;
4. what the cut guesses is proven afterwards by the matcher; a wrong cut can only lose a site.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..passes.calls import TensorInfo
from ..passes.graph import CALLED_IN_PLACE, CALLED_LAYOUT, CALLED_SIZED, FLOATS, ancestors, descendants
from ..passes.match.forms.grouped_mm import experts_of_offsets
from ..passes.trace.traced import CallPattern

# The token count at which a region is traced: neither 0 nor 1, which tracing specializes.
_TRACED = 24
# With one expert per token: the steps after the products that may be the region's last.
_CUTS = 8


class RegionError(RuntimeError):
    """A site in a whole graph that cannot be cut out, with the reason."""


@dataclass(frozen=True)
class Anchor:
    """One product with a packed parameter: ``weight`` is its placeholder, ``selector`` tells each row's expert."""

    node: fx.Node
    weight: fx.Node
    rows: fx.Node
    selector: fx.Node


@dataclass
class Region:
    """A cut: the module it became, and where it lies in the whole graph.

    ``sources``: parameter name in the module -> placeholder in the graph. ``inside``: its nodes in order.
    """

    module: RegionModule
    pattern: CallPattern
    inputs: tuple[fx.Node, fx.Node, fx.Node]
    output: fx.Node
    sources: dict[str, fx.Node]
    inside: list[fx.Node]

    @property
    def key(self) -> Any:
        """Equal for regions that compute the same function of their inputs and parameters."""
        tensors = [
            (n, tuple(p.shape), p.dtype, p.device, p.stride())
            for n, p in (*self.module.named_parameters(), *self.module.named_buffers())
        ]
        return self.module.program.code, tuple(tensors), self.pattern


class RegionModule(nn.Module):
    """A region as an experts module: forward(x [T,H], ids [T,K], weights [T,K]) -> [T,H].

    The casts written in the graph follow the dtype of the weights, as the code it was traced from did.
    """

    def __init__(self, graph: fx.Graph, tensors: Mapping[str, Tensor], packed: str) -> None:
        super().__init__()
        self.program = fx.GraphModule(nn.Module(), graph, class_name="Region")
        self.names = tuple(tensors)
        self.packed = packed
        for name, tensor in tensors.items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor, persistent=False)
        self.traced_dtype = tensors[packed].dtype

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Run the region."""
        own = [getattr(self, name) for name in self.names]
        runner = _Runner(self.program, self.traced_dtype, getattr(self, self.packed).dtype)
        result = runner.run(x, ids, weights, *own)
        assert isinstance(result, Tensor)
        return result


class _Runner(fx.Interpreter):
    def __init__(self, program: fx.GraphModule, traced: torch.dtype, now: torch.dtype) -> None:
        super().__init__(program)
        self.traced, self.now = traced, now

    def run_node(self, n: fx.Node) -> Any:
        if self.traced == self.now or n.op not in ("call_function", "call_method"):
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        args, kwargs = pytree.tree_map(lambda v: self.now if v is self.traced else v, (args, kwargs))
        if n.op == "call_method" and n.target in ("bfloat16", "half"):
            return args[0].to(self.now)
        if _is_grouped(n):
            rows, stack, offsets = _grouped_operands(args, kwargs)
            return _grouped_product(rows.to(self.now), stack, offsets)
        return getattr(self, n.op)(n.target, args, kwargs)


def _grouped_product(rows: Tensor, stack: Tensor, offsets: Tensor) -> Tensor:
    """rows [S, K] sorted by expert, stack [E, K, N], offsets [E] -> [S, N], in any float dtype."""
    out = rows.new_zeros((rows.shape[0], stack.shape[2]))
    if stack.shape[0] != offsets.shape[0]:
        raise ValueError(f"{stack.shape[0]} experts for {offsets.shape[0]} offsets")
    expert = experts_of_offsets(offsets, rows.shape[0])
    for e in expert.unique().tolist():
        if e < stack.shape[0]:
            out[expert == e] = rows[expert == e] @ stack[e]
    return out


# 1. anchors


def op_of(node: fx.Node) -> str:
    """ "view" of a method call or function of that name."""
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return ""
    return str(getattr(node.target, "__name__", node.target)).split(".")[0]


def _is_grouped(node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    text = str(node.target)
    return op_of(node) in ("_grouped_mm", "grouped_mm") or text.startswith(
        ("transformers.grouped_mm_fallback", "aten._grouped_mm")
    )


def _grouped_operands(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    named = dict(kwargs)
    rest = list(args)
    offsets = named.get("offs", rest[2] if len(rest) > 2 else None)
    return rest[0], rest[1] if len(rest) > 1 else named.get("mat2", named.get("weight")), offsets


def value_of(node: fx.Node) -> Any:
    """The traced value of a node of Dynamo's graph (or of an ATen graph)."""
    return node.meta.get("example_value", node.meta.get("val"))


def anchors(graph: fx.Graph, parameters: Mapping[fx.Node, Tensor]) -> Iterator[Anchor]:
    """All products of rows with packed parameters, in graph order."""
    for node in graph.nodes:
        if _is_grouped(node):
            if node.kwargs.get("bias") is not None:
                continue
            rows, stack, offsets = _grouped_operands(node.args, node.kwargs)
            weight, ids = _trace(stack, parameters)
            if weight is not None and ids is None and isinstance(offsets, fx.Node):
                yield Anchor(node, weight, rows, offsets)
        elif op_of(node) in ("bmm", "matmul") and len(node.args) == 2:
            for stack, rows in (node.args, node.args[::-1]):
                weight, ids = _trace(stack, parameters)
                if weight is not None and ids is not None and isinstance(rows, fx.Node):
                    yield Anchor(node, weight, rows, ids)
                    break


def _trace(node: Any, parameters: Mapping[fx.Node, Tensor]) -> tuple[fx.Node | None, fx.Node | None]:
    """(placeholder of the packed parameter, ids of a gather on the way or None), or (None, None)."""
    ids: fx.Node | None = None
    while isinstance(node, fx.Node):
        if node.op == "placeholder":
            found = parameters.get(node)
            return (node, ids) if found is not None and found.dim() == 3 else (None, None)
        name = op_of(node)
        if name in ("getitem", "index", "index_select"):
            index: Any = node.args[2] if name == "index_select" and len(node.args) > 2 else node.args[1]
            if isinstance(index, (tuple, list)):
                index = index[0] if len(index) == 1 else None
            if not isinstance(index, fx.Node) or ids is not None:
                return None, None
            ids = index
        elif name not in CALLED_LAYOUT:
            return None, None
        node = node.args[0]
    return None, None


def find_sites(graph: fx.Graph, parameters: Mapping[fx.Node, Tensor]) -> list[list[Anchor]]:
    """The anchors of each site, in graph order."""
    sites: dict[fx.Node, list[Anchor]] = {}
    for anchor in anchors(graph, parameters):
        sites.setdefault(anchor.selector, []).append(anchor)
    return list(sites.values())


# 2. cut


def cuts(graph: fx.Graph, site: Sequence[Anchor], parameters: Mapping[fx.Node, Tensor]) -> Iterator[Region]:
    """The region of one site, or several to choose from, the smallest first: see ``_Cut.run``.

    RegionError with the reason if it cannot be separated from the rest.
    """
    return _Cut(graph, site, parameters).run()


def _is_size(node: fx.Node) -> bool:
    return isinstance(value_of(node), (int, torch.SymInt)) and not isinstance(value_of(node), bool)


def _shape(node: fx.Node) -> tuple[Any, ...] | None:
    value = value_of(node)
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _floating(node: fx.Node) -> bool:
    value = value_of(node)
    return isinstance(value, Tensor) and value.dtype in FLOATS


def mutated(node: fx.Node) -> fx.Node | None:
    """The tensor an in-place op writes to."""
    name = op_of(node)
    writes = (name.endswith("_") and not name.endswith("__")) or name in CALLED_IN_PLACE
    target = node.kwargs.get("out") or (node.args[0] if writes and node.args else None)
    return target if isinstance(target, fx.Node) else None


class _Cut:
    def __init__(self, graph: fx.Graph, site: Sequence[Anchor], parameters: Mapping[fx.Node, Tensor]) -> None:
        self.graph, self.site, self.parameters = graph, site, parameters
        self.nodes = list(graph.nodes)
        self.order = {node: i for i, node in enumerate(self.nodes)}

    def run(self) -> Iterator[Region]:
        """With several experts for each token only the sum over them has the tokens' shape, and there is one
        region. With one expert each step after the products has it: any may be the last."""
        site = self.site
        if len(site) < 2:
            raise RegionError("a single product with a packed weight, two or three were expected")
        first, last = site[0], site[-1]
        self.ids = self._nearest(
            ancestors([first.selector]),
            lambda n, s: len(s) == 2 and isinstance(s[1], int) and value_of(n).dtype in (torch.int32, torch.int64),
            "expert ids [T, K]",
        )
        shape = _shape(self.ids)
        assert shape is not None
        self.tokens, self.top_k = shape
        hidden = value_of(first.rows).shape
        width = self.parameters[first.weight].shape
        routed = descendants([self.ids])
        self.x = self._nearest(
            ancestors([first.rows], [self.ids]) - routed,
            lambda n, s: (
                len(s) == 2 and s[1] in hidden and s[1] in width and self._same(s[0], self.tokens) and _floating(n)
            ),
            "tokens [T, H]",
        )
        products = descendants([a.node for a in site])
        following = descendants([last.node])
        x_shape = _shape(self.x)
        assert x_shape is not None
        refusal: RegionError | None = None
        found = 0
        for output in sorted(following, key=lambda n: self.order[n]):
            value, out_shape = value_of(output), _shape(output)
            if out_shape is None or len(out_shape) != 2 or not self._same(out_shape[0], self.tokens):
                continue
            if out_shape[1] != x_shape[1] or value.dtype != value_of(self.x).dtype or output is last.node:
                continue
            try:
                region = self._region(output, products, following)
            except RegionError as error:
                refusal = refusal or error
                continue
            yield region
            found += 1
            if self.top_k > 1 or found == _CUTS:
                return
        if not found:
            raise refusal or RegionError("nothing of the tokens' shape and dtype follows the products")

    def _nearest(self, nodes: set[fx.Node], accept: Any, what: str) -> fx.Node:
        for node in sorted(nodes, key=lambda n: -self.order[n]):
            shape = _shape(node)
            if shape is not None and accept(node, shape):
                return node
        raise RegionError(f"no {what} lead to the products")

    def _same(self, a: Any, b: Any) -> bool:
        return self._ratio(a, b) == 1

    def _ratio(self, value: Any, base: Any) -> int | None:
        """``value / base`` if it is the same whole number for every size, else None."""
        if isinstance(value, int) and isinstance(base, int):
            return value // base if base and value % base == 0 else None
        if not isinstance(base, torch.SymInt) or not isinstance(value, torch.SymInt):
            return None
        ratio = (value.node.expr / base.node.expr).simplify()
        return int(ratio) if ratio.is_Integer else None

    def _region(self, output: fx.Node, products: set[fx.Node], following: set[fx.Node]) -> Region:
        # Not the weights in the products' order: with one expert per token they have the same shape.
        ordering = descendants(ancestors([self.site[0].selector], [self.ids]) - {self.ids})
        weights = self._nearest(
            ancestors([output], [self.ids]) - products - ordering,
            lambda n, s: (
                len(s) == 2
                and s[1] == self.top_k
                and self._same(s[0], self.tokens)
                and _floating(n)
                and n is not self.x
            ),
            "routing weights [T, K]",
        )
        inputs = (self.x, self.ids, weights)
        inside = self._inside(output, inputs)
        for node in inside & following - {output}:
            for user in node.users:
                if user not in inside:
                    raise RegionError(f"{node.name}, behind the products, is also used by {user.name}")
        ordered = sorted(inside, key=lambda n: self.order[n])
        for node in self.nodes[self.order[ordered[0]] : self.order[output]]:
            if node not in inside and mutated(node) is not None:
                raise RegionError(f"{node.name} writes in place between the region's inputs and its output")
        return self._build(inputs, output, ordered)

    def _inside(self, output: fx.Node, inputs: tuple[fx.Node, ...]) -> set[fx.Node]:
        stop = {*inputs, *self.parameters, *(n for n in self.nodes if _is_size(n))}
        inside = ancestors([output], stop)
        while True:
            writers = [n for n in self.nodes[: self.order[output]] if n not in inside and mutated(n) in inside]
            if not writers:
                break
            inside |= ancestors(writers, stop)
        for node in inside:
            if node.op == "placeholder":
                raise RegionError(
                    f"it also reads the graph's input {node.name}"
                    + (
                        ": a Python number that dynamic=True made an input; set "
                        "torch._dynamo.config.specialize_float = True"
                        if value_of(node) is None or not _shape(node)
                        else ""
                    )
                )
            if node.op not in ("call_function", "call_method"):
                raise RegionError(f"{node.name} ({node.op}) lies between the region's inputs and its output")
        return inside

    # 3. sizes

    def _build(self, inputs: tuple[fx.Node, fx.Node, fx.Node], output: fx.Node, ordered: list[fx.Node]) -> Region:
        graph = fx.Graph()
        mapped: dict[fx.Node, fx.Node] = {}
        for node, name in zip(inputs, ("x", "ids", "weights"), strict=True):
            mapped[node] = graph.placeholder(name)
        read = dict.fromkeys(n for node in ordered for n in node.all_input_nodes if n in self.parameters)
        sources: dict[str, fx.Node] = {}
        for node in read:
            name = unique(short_name(node), sources)
            sources[name] = node
            mapped[node] = graph.placeholder(name)
        size = graph.call_method("size", (mapped[inputs[0]], 0))
        multiples: dict[int, fx.Node] = {1: size}

        def times(factor: int) -> fx.Node:
            if factor not in multiples:
                multiples[factor] = graph.call_function(operator.mul, (size, factor))
            return multiples[factor]

        def lookup(node: fx.Node) -> Any:
            if node in mapped or node.graph is graph:  # the latter: a size put in by _generalized
                return mapped.get(node, node)
            value = value_of(node)
            ratio = self._ratio(value, self.tokens)
            if ratio is not None:
                return times(ratio)
            if isinstance(value, int):
                return value
            raise RegionError(f"the size {value} is no multiple of the {self.tokens} tokens")

        for node in ordered:
            args, kwargs = self._generalized(node, times)
            args, kwargs = fx.node.map_arg((args, kwargs), lookup)
            mapped[node] = graph.create_node(node.op, node.target, args, dict(kwargs))
        graph.output(mapped[output])
        graph.lint()
        tensors = {name: self.parameters[node] for name, node in sources.items()}
        packed = next(name for name, node in sources.items() if node is self.site[0].weight)
        return Region(RegionModule(graph, tensors, packed), self._pattern(inputs), inputs, output, sources, ordered)

    def _generalized(self, node: fx.Node, times: Any) -> tuple[Any, Any]:
        """The arguments of a node with numbers that are T or T * K in the place of a leading size made so."""
        args: tuple[Any, ...] = node.args
        name = op_of(node)
        if not isinstance(self.tokens, int) or name not in CALLED_SIZED:
            return args, node.kwargs
        new = not (node.op == "call_method" or name in ("view", "reshape", "expand"))
        at = 0 if new else 1
        if name == "full" or len(args) <= at:
            return args, node.kwargs

        def general(value: Any) -> Any:
            if isinstance(value, int) and not isinstance(value, bool):
                for factor in (self.top_k, 1):
                    if value == factor * self.tokens:
                        return times(factor)
            return value

        changed = args[at]
        if isinstance(changed, (tuple, list)):
            changed = type(changed)([general(changed[0]), *changed[1:]]) if changed else changed
        else:
            changed = general(changed)
        return (*args[:at], changed, *args[at + 1 :]), node.kwargs

    def _pattern(self, inputs: tuple[fx.Node, fx.Node, fx.Node]) -> CallPattern:
        infos = tuple(
            TensorInfo((_TRACED, int(value_of(n).shape[1])), value_of(n).dtype, value_of(n).device) for n in inputs
        )
        return CallPattern(3, (), infos, (frozenset({0}),) * 3)


def short_name(node: fx.Node) -> str:
    """The last part of the path of a parameter: "gate_up_proj"."""
    path = source_path(node)
    return "".join(c if c.isalnum() or c == "_" else "_" for c in path.rsplit(".", 1)[-1]) or "weight"


def source_path(node: fx.Node) -> str:
    """ "model.layers.0.mlp.experts.gate_up_proj" for a parameter's placeholder, as far as Dynamo tells."""
    argument = node.meta.get("grapharg")
    name = getattr(getattr(argument, "source", None), "name", None)
    text = str(name() if callable(name) else name or node.name)
    for part in ("_modules", "_parameters", "_buffers", "[", "]", "'", '"'):
        text = text.replace(part, "." if part == "[" else "")
    while ".." in text:
        text = text.replace("..", ".")
    return text.removeprefix("L.self.").removeprefix("G.")


def unique(name: str, taken: Iterable[str]) -> str:
    """``name``, numbered if it is taken."""
    names, number = set(taken), 1
    candidate = name if name not in ("x", "ids", "weights") else f"{name}_0"
    while candidate in names:
        candidate, number = f"{name}_{number}", number + 1
    return candidate


# 4. splice


def splice(region: Region, rewritten: fx.GraphModule, extra: Sequence[fx.Node], retained: Sequence[str]) -> None:
    """Put ``rewritten`` in the region's place; ``extra``: nodes for its last inputs, then for its constants."""
    graph, output = region.output.graph, region.output
    supply = iter([*region.inputs, *(region.sources[name] for name in retained), *extra])
    mapped: dict[fx.Node, fx.Node] = {}
    for node in rewritten.graph.nodes:
        if node.op == "placeholder":
            mapped[node] = next(supply)
    for node in rewritten.graph.nodes:
        if node.op == "get_attr":
            mapped[node] = next(supply)
    result = None
    for node in rewritten.graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            continue
        if node.op == "output":
            result = mapped[node.args[0]]
            break
        with graph.inserting_before(output):
            mapped[node] = graph.node_copy(node, lambda n: mapped[n])
        mapped[node].meta = {}
    assert result is not None
    result.meta = dict(output.meta)
    output.replace_all_uses_with(result)
    for node in reversed(region.inside):
        if not node.users:
            graph.erase_node(node)


__all__ = ["Region", "RegionError", "RegionModule", "cuts", "find_sites", "source_path", "splice"]
