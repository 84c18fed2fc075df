"""Collapse: an unrolled loop over experts as stacked products, in which each projection of all experts is ONE node.

Contract: the trace (``unroll``) and the module are read, never changed; TraceError with the reason where the
loop is not one computation with different weights.

1. Find each expert's products: a matrix that is expert e's share of the weights, times rows of unknown number.
2. Prove that the experts compute the same with different weights: every projection must exist once for each
   expert, in the experts' order, and what lies between the projections must be op for op the same graph; and that
   an expert without tokens contributes nothing (``passes.trace.idle``).
3. Put one ``expert_products`` in place of the E products of a projection, on all experts' rows one after the
   other; each expert's part is taken out of it again (``rows_of_expert``).
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from ..graph import ancestors, op_name
from ..weights import families, is_packed, stack
from .idle import check_idle
from .traced import Traced, TraceError

aten = torch.ops.aten


def expert_products(rows: Tensor, weight: Tensor, experts: Tensor) -> Tensor:
    """``rows[s] @ weight[experts[s]].T``: the meaning of a collapsed projection (rows [S, K], weight [E, N, K])."""
    return torch.einsum("sk,snk->sn", rows, weight[experts])


def expert_products_transposed(rows: Tensor, weight: Tensor, experts: Tensor) -> Tensor:
    """``rows[s] @ weight[experts[s]]`` (rows [S, K], weight [E, K, N])."""
    return torch.einsum("sk,skn->sn", rows, weight[experts])


def rows_of_expert(values: Tensor, experts: Tensor, expert: int) -> Tensor:
    """The rows of ``values`` [S, ...] that belong to one expert, in their order."""
    return values[experts == expert]


_ROUTING = frozenset("topk sort argsort argmax argmin max min one_hot nonzero nonzero_numpy multinomial".split())


def routed(graph: fx.Graph) -> bool:
    """Whether a graph chooses something by values: it has places or integers made of floats."""
    for node in graph.nodes:
        if node.op == "call_function" and op_name(node) in _ROUTING:
            values = node.meta.get("val")
            leaves = values if isinstance(values, (tuple, list)) else (values,)
            if any(isinstance(v, Tensor) and not v.is_floating_point() for v in leaves):
                return True
    return False


def _operands(node: fx.Node) -> list[Any]:
    """Of a product: both its matrices, before they are turned."""
    if node.op != "call_function" or op_name(node) not in ("linear", "mm", "matmul", "addmm", "bmm"):
        return []
    operands = []
    for operand in node.all_input_nodes:
        while operand.op == "call_function" and operand.target in _TURNED:
            operand = operand.all_input_nodes[0]
        operands.append(operand)
    return operands


_TURNED = (aten.t.default, aten.transpose.int, aten.permute.default)


def collapse(module: nn.Module, traced: Traced) -> Traced:
    """The loop over experts of a trace as stacked products; TraceError with the reason where there is none."""
    return _Collapse(module, traced).run()


def expression(size: Any) -> Any:
    """A size as a number or formula that compares fast (printing sums of many sizes does not)."""
    return size.node.expr if isinstance(size, torch.SymInt) else size


def _choice(mask: Any) -> tuple[Hashable, int] | None:
    """Of a mask that says where the router gives a number: what is compared or taken a part of, and how; the number."""
    steps: list[Hashable] = []
    while isinstance(mask, fx.Node) and mask.op == "call_function":
        rest = list(mask.args[1:])
        if mask.target == aten.eq.Scalar and isinstance(rest[0], int):
            return (*steps, mask.target, mask.args[0]), rest[0]
        if mask.target == aten.select.int and rest[0] == 0 and isinstance(rest[1], int):
            return (*steps, mask.target, mask.args[0]), rest[1]
        if len(mask.all_input_nodes) != 1:
            return None
        steps.append((mask.target, repr(rest), repr(mask.kwargs)))
        mask = mask.args[0]
    return None


class _Product:
    """One expert's product: node = rows @ weight(.T) (+ bias)."""

    def __init__(self, node: fx.Node, rows: fx.Node, bias: fx.Node | None, role: str, expert: int, flip: bool) -> None:
        self.node, self.rows, self.bias, self.role, self.expert, self.transposed = node, rows, bias, role, expert, flip


class _Collapse:
    def __init__(self, module: nn.Module, traced: Traced) -> None:
        self.module, self.traced, self.graph = module, traced, traced.graph
        self.families = families(module)

    def run(self) -> Traced:
        products: list[_Product] = []
        self.order = {node: i for i, node in enumerate(self.graph.nodes)}
        for node in self.graph.nodes:
            product = self._product(node)
            if product is not None:
                products.append(product)
        roles: dict[str, list[_Product]] = {}
        for product in products:
            roles.setdefault(product.role, []).append(product)
        if len(roles) < 2:
            raise TraceError(self._without_choice())
        roles, self.sentinels = self._without_weights(roles)
        counts = {role: len(found) for role, found in roles.items()}
        for role, found in roles.items():
            self._check_role(role, found)
        if len(set(counts.values())) != 1:
            raise TraceError(f"the projections exist for different numbers of experts: {counts}")
        self._check_same(roles)
        self._check_idle(roles)
        return self._rebuilt(roles)

    def _without_choice(self) -> str:
        """Why no product takes rows that the routing chose."""
        several = [n for n in self.graph.nodes if any(self._share(a) is not None for a in _operands(n))]
        if len(several) >= 2 and routed(self.graph):
            return (
                "the routing does not say how many rows an expert is multiplied with: as many for each, of a capacity "
                "that depends on the number of tokens, or those of every token"
            )
        return (
            "no two projections whose rows an index chooses: fewer than two matrices per expert are multiplied "
            "with rows whose number depends on the routing"
        )

    def _without_weights(self, roles: dict[str, list[_Product]]) -> tuple[dict[str, list[_Product]], int]:
        """How many experts past the last multiply nothing, although one of the projections has room for them.

        That projection's role then names the others alone. What becomes of the tokens of the rest is the matcher's.
        """
        sizes = {role: stack(self.module, role).shape[0] for role in roles}
        experts, everyone = min(sizes.values()), max(sizes.values())
        renamed: dict[str, list[_Product]] = {}
        for role, found in roles.items():
            if sizes[role] > experts and is_packed(role) and {p.expert for p in found} == set(range(experts)):
                role = f"{role}@{experts}"
                for product in found:
                    product.role = role
            renamed[role] = found
        return renamed, everyone - experts

    def _product(self, node: fx.Node) -> _Product | None:
        if node.op != "call_function":
            return None
        bias: Any = None
        if node.target == aten.linear.default:
            rows, weight = node.args[:2]
            bias = node.args[2] if len(node.args) > 2 else None
            flip = False
        elif node.target in (aten.mm.default, aten.matmul.default):
            rows, weight = node.args[:2]
            flip = True
        elif node.target == aten.addmm.default and not node.kwargs:
            bias, rows, weight = node.args[:3]
            flip = True
        else:
            return None
        value = rows.meta.get("val") if isinstance(rows, fx.Node) else None
        if not isinstance(rows, fx.Node) or not isinstance(value, Tensor) or value.dim() != 2:
            return None
        if not free_unbacked_symbols(value.shape[0]):
            return None
        while isinstance(weight, fx.Node) and weight.target in _TURNED:
            if weight.meta["val"].dim() != 2:
                break
            flip = not flip
            weight = weight.args[0]
        share = self._share(weight)
        if share is None:
            return None
        return _Product(node, rows, bias if isinstance(bias, fx.Node) else None, share[0], share[1], flip)

    def _share(self, node: Any) -> tuple[str, int] | None:
        """(stacked name, expert) of a node that is one expert's part of the weights."""
        if not isinstance(node, fx.Node):
            return None
        if node.op == "placeholder":
            name = self.traced.parameters.get(node.name)
            return None if name is None else self.families.get(name)
        while node.target in (aten.clone.default, aten.alias.default, aten.squeeze.dim, aten.detach.default):
            node = node.args[0]  # type: ignore[assignment]
        if node.target == aten.select.int:
            source, dim, expert = node.args
        elif node.target == operator.getitem and node.args[0].target in (  # type: ignore[union-attr]
            aten.unbind.int,
            aten.split.Tensor,
        ):
            source, dim, expert = node.args[0].args[0], 0, node.args[1]  # type: ignore[union-attr]
        else:
            return None
        if dim != 0 or not isinstance(expert, int) or not isinstance(source, fx.Node):
            return None
        value = source.meta["val"]
        expert = expert % value.shape[0] if node.target == aten.select.int else expert
        shape = tuple(value.shape)
        while source.op == "call_function" and source.target in (aten.view.default, aten.reshape.default):
            source = source.args[0]  # type: ignore[assignment]
        if source.op != "placeholder" or source.name not in self.traced.parameters:
            return None
        name = self.traced.parameters[source.name]
        stored = tuple(source.meta["val"].shape)
        if stored == shape:
            return name, expert
        if len(stored) == 2 and len(shape) == 3 and stored == (shape[0] * shape[1], shape[2]):
            return f"{name}#{shape[0]}", expert
        return None

    # 2. the same computation with different weights

    def _check_role(self, role: str, found: list[_Product]) -> None:
        experts = stack(self.module, role).shape[0]
        numbers = sorted(p.expert for p in found)
        if numbers != list(range(experts)):
            missing = sorted(set(range(experts)) - set(numbers))
            what = self._beside(role, missing[0]) if missing else "an expert is in several"
            raise TraceError(f"{role}: {experts} experts, but {len(found)} products in the loop ({what})")
        found.sort(key=lambda p: p.expert)
        if len({(p.transposed, p.bias is not None) for p in found}) != 1:
            raise TraceError(f"{role}: the experts' products differ in layout or bias")

    def _beside(self, role: str, expert: int) -> str:
        """What becomes of an expert that the loop has no product of."""
        for node in self.graph.nodes:
            if (role, expert) in [self._share(a) for a in _operands(node)]:
                return f"expert {expert} serves every token: it is shared, and in one list with the routed"
        return f"expert {expert} is in none"

    def _check_same(self, roles: dict[str, list[_Product]]) -> None:
        """Everything from an expert's first products to its last must be the same graph for every expert."""
        experts = len(next(iter(roles.values())))
        nodes = {p.node: (role, p.expert) for role, found in roles.items() for p in found}
        reference: dict[str, Hashable] = {}
        for expert in range(experts):
            for role, found in roles.items():
                product = found[expert]
                form = (
                    self._form(product.rows, nodes, expert, {}),
                    self._form(product.bias, nodes, expert, {}),
                    len(product.node.users),
                )
                if reference.setdefault(role, form) != form:
                    others = self._owners(nodes)[product.rows] - {expert}
                    if others:
                        raise TraceError(
                            f"the rows of expert {expert} before {role} come out of a tensor that holds the output of "
                            f"expert {min(others)}: the experts depend on their order"
                        )
                    raise TraceError(
                        f"expert {expert} computes something else than expert 0 before {role}: "
                        "the experts are not the same function with different weights"
                    )

    def _check_idle(self, roles: dict[str, list[_Product]]) -> None:
        experts: dict[Any, int] = {}
        for found in roles.values():
            for p in found:
                for symbol in free_unbacked_symbols(p.rows.meta["val"].shape[0]):
                    experts.setdefault(symbol, p.expert)
        self._check_branched_sizes(experts)
        known = {n: self._share(n) for n in self.graph.nodes}
        check_idle(self.graph, experts, lambda n: None if known[n] is None else known[n][1])  # type: ignore[index]

    def _check_branched_sizes(self, experts: Mapping[Any, int]) -> None:
        """What a branch asked must be whether an expert has rows: then the proof covers what the branch guards.

        Or a number beside the experts' that the router may give, as identity experts have: their mask must be an
        expert's but for the number.
        """
        others = self.traced.branched_sizes - set(experts)
        masks = {
            symbol: _choice(node.args[0])
            for node in self.graph.nodes
            if node.target == aten.nonzero.default
            for symbol in free_unbacked_symbols(node.meta["val"].shape[0])
        }
        ours = [masks.get(symbol) for symbol in experts]
        numbers = [mask[1] for mask in masks.values() if mask is not None]
        alike = {mask and mask[0] for mask in (*ours, *map(masks.get, others))}
        if others and (len(alike) != 1 or None in alike or len(set(numbers)) != len(masks)):
            raise TraceError(
                "it branches on whether a mask is true anywhere, or on a count, that does not choose the rows of an "
                "expert"
            )

    def _form(
        self, node: Any, products: dict[fx.Node, tuple[str, int]], expert: int, memo: dict[fx.Node, Hashable]
    ) -> Hashable:
        """A value that is equal for equal graphs from the products down to ``node``; ``rows`` where none is met."""
        if not isinstance(node, fx.Node):
            return repr(node)
        if node in memo:
            return memo[node]
        memo[node] = form = self._form_of(node, products, expert, memo)
        return form

    def _form_of(
        self, node: fx.Node, products: dict[fx.Node, tuple[str, int]], expert: int, memo: dict[fx.Node, Hashable]
    ) -> Hashable:
        if node in products:
            role, owner = products[node]
            return ("product", role, "own" if owner == expert else owner)
        if node in self._joined(products):
            return ("joined", node.name)
        if node.target == operator.getitem and node.args[0] in self._joined(products):
            return ("part", node.args[0].name, "own" if node.args[1] == expert else node.args[1])  # type: ignore[union-attr]
        if not self._reaches(node, products):
            share = self._share(node)
            if share is not None:
                return ("share", share[0], "own" if share[1] == expert else share[1])
            if node.op == "placeholder":
                return ("placeholder", node.name)
            return "outside"  # rows and routing: execution on probes tells what they are
        if node.target == aten.cat.default:
            parts: Any = node.args[0]
            if len(parts) == len({e for _, e in products.values()}) and len(parts) > 1:
                # All experts' rows together: the same to every expert if each part is the same to its own.
                forms = {self._form(part, products, e, {}) for e, part in enumerate(parts)}
                if len(forms) == 1:
                    return ("joined", *node.args[1:], *forms)
        flat, _ = torch.utils._pytree.tree_flatten((node.args, node.kwargs))
        return (str(node.target), *(self._form(a, products, expert, memo) for a in flat))

    def _reaches(self, node: fx.Node, products: dict[fx.Node, tuple[str, int]]) -> bool:
        return bool(self._owners(products)[node])

    def _owners(self, products: dict[fx.Node, tuple[str, int]]) -> dict[fx.Node, frozenset[int]]:
        """The experts whose products each node depends on."""
        if not hasattr(self, "_owned"):
            owned: dict[fx.Node, frozenset[int]] = {}
            for n in self.graph.nodes:
                own = frozenset({products[n][1]} if n in products else ())
                owned[n] = own.union(*(owned[a] for a in n.all_input_nodes))
            self._owned = owned
        return self._owned

    def _joined(self, products: dict[fx.Node, tuple[str, int]]) -> set[fx.Node]:
        """Tensors of several experts' rows that several experts read: these are the same for all of them."""
        if not hasattr(self, "_read_by_several"):
            readers: dict[fx.Node, set[int]] = {}
            for product, (_, expert) in products.items():
                waiting = list(product.all_input_nodes)
                while waiting:
                    node = waiting.pop()
                    if len(self._owners(products)[node]) > 1 and expert not in readers.setdefault(node, set()):
                        readers[node].add(expert)
                        waiting.extend(node.all_input_nodes)
            self._read_by_several = {node for node, experts in readers.items() if len(experts) > 1}
        return self._read_by_several

    # 3. one node per projection

    def _rebuilt(self, roles: dict[str, list[_Product]]) -> Traced:
        old = self.traced
        graph = fx.Graph()
        new = Traced(graph, list(old.inputs), {}, dict(old.buffers), dict(old.constants), old.pattern, old.out_spec)
        new.sentinels = self.sentinels
        mapped: dict[fx.Node, fx.Node] = {}
        used = self._weights_used_elsewhere(roles)
        for node in self.graph.nodes:
            if node.op == "placeholder":
                name = old.parameters.get(node.name)
                if name is not None and node not in used:
                    continue
                mapped[node] = graph.node_copy(node)
                if name is not None:
                    new.parameters[mapped[node].name] = name
        stacks: dict[str, fx.Node] = {}
        biases: dict[str, fx.Node] = {}
        for i, (role, found) in enumerate(roles.items()):
            stacks[role] = self._stack_placeholder(graph, new, f"stacked_{i}", role)
            if found[0].bias is not None:
                biases[role] = self._bias_placeholder(graph, new, f"stacked_bias_{i}", role, found)
        self._order(graph, mapped, roles, stacks, biases)
        graph.lint()
        return new

    def _weights_used_elsewhere(self, roles: dict[str, list[_Product]]) -> set[fx.Node]:
        """Placeholders of parameters that something beside the collapsed products reads."""
        products = {p.node: p for found in roles.values() for p in found}
        live: set[fx.Node] = set()
        waiting = [self.graph.output_node()]
        while waiting:
            node = waiting.pop()
            if node in live:
                continue
            live.add(node)
            waiting.extend([products[node].rows] if node in products else node.all_input_nodes)
        return {n for n in live if n.op == "placeholder"}

    def _stack_placeholder(self, graph: fx.Graph, new: Traced, label: str, role: str) -> fx.Node:
        source = stack(self.module, role)
        node = graph.placeholder(label)
        node.meta["val"] = torch.empty(source.shape, dtype=source.dtype, device="meta")
        new.parameters[node.name] = role
        return node

    def _bias_placeholder(self, graph: fx.Graph, new: Traced, label: str, role: str, found: list[_Product]) -> fx.Node:
        shares = [self._share(p.bias) for p in found]
        names = {s[0] for s in shares if s is not None}
        if len(names) != 1 or [s[1] for s in shares if s is not None] != list(range(len(found))):
            raise TraceError(f"{role}: the biases of its experts are not one bias per expert")
        node = graph.placeholder(label)
        source = stack(self.module, names.pop())
        node.meta["val"] = torch.empty(source.shape, dtype=source.dtype, device="meta")
        new.parameters[node.name] = self._share(found[0].bias)[0]  # type: ignore[index]
        return node

    def _order(
        self,
        graph: fx.Graph,
        mapped: dict[fx.Node, fx.Node],
        roles: dict[str, list[_Product]],
        stacks: dict[str, fx.Node],
        biases: dict[str, fx.Node],
    ) -> None:
        """Copy what the output needs in an order of dependence: all experts' rows come before the products."""
        products = {p.node: p for found in roles.values() for p in found}
        joined: dict[str, fx.Node] = {}

        def needs(node: fx.Node) -> Iterable[fx.Node]:
            return [p.rows for p in roles[products[node].role]] if node in products else node.all_input_nodes

        output = self.graph.output_node()
        waiting: list[tuple[fx.Node, bool]] = [(output, False)]
        open_: set[fx.Node] = set()
        while waiting:
            node, ready = waiting.pop()
            if node in mapped:
                continue
            if not ready:
                if node in open_:
                    raise TraceError("an expert's rows depend on another expert's output")
                open_.add(node)
                waiting.append((node, True))
                waiting.extend((n, False) for n in reversed(list(needs(node))) if n not in mapped)
                continue
            open_.discard(node)
            if node in products:
                mapped[node] = self._collapsed(graph, mapped, products[node], roles, joined, stacks, biases)
            elif node.op == "output":
                graph.output(fx.node.map_arg(node.args[0], lambda n: mapped[n]))
            else:
                mapped[node] = self._copied(graph, node, mapped)

    def _copied(self, graph: fx.Graph, node: fx.Node, mapped: dict[fx.Node, fx.Node]) -> fx.Node:
        copy = graph.node_copy(node, lambda n: mapped[n])
        if node.target == aten.where.default:
            copy.target = aten.nonzero_numpy.default  # the same under a name that does not mean a choice
        return copy

    def _collapsed(
        self,
        graph: fx.Graph,
        mapped: dict[fx.Node, fx.Node],
        product: _Product,
        roles: dict[str, list[_Product]],
        joined: dict[str, fx.Node],
        stacks: dict[str, fx.Node],
        biases: dict[str, fx.Node],
    ) -> fx.Node:
        role, found = product.role, roles[product.role]
        value = product.node.meta["val"]
        if role not in joined:
            rows = graph.call_function(aten.cat.default, ([mapped[p.rows] for p in found], 0))
            first = found[0].rows.meta["val"]
            rows.meta["val"] = torch.empty((7, first.shape[1]), dtype=first.dtype, device="meta")
            if not joined:
                # The first projection's rows; that the others have as many of each expert shows on the probes.
                self.experts = self._experts_of_rows(graph, mapped, found)
            target = expert_products_transposed if product.transposed else expert_products
            node = graph.call_function(target, (rows, stacks[role], self.experts))
            node.meta["val"] = torch.empty((7, value.shape[1]), dtype=value.dtype, device="meta")
            joined[role] = node
        part = graph.call_function(rows_of_expert, (joined[role], self.experts, product.expert))
        part.meta["val"] = value
        if role not in biases:
            return part
        bias = graph.call_function(aten.select.int, (biases[role], 0, product.expert))
        bias.meta["val"] = torch.empty((value.shape[1],), dtype=value.dtype, device="meta")
        result = graph.call_function(aten.add.Tensor, (part, bias))
        result.meta["val"] = value
        return result

    def _count(self, graph: fx.Graph, mapped: dict[fx.Node, fx.Node], rows: fx.Node) -> fx.Node:
        """The number of ``rows``, from the integers that chose them (so that it depends on no values)."""
        size = expression(rows.meta["val"].shape[0])
        for node in sorted(ancestors([rows]), key=lambda n: self.order[n]):
            value = node.meta.get("val")
            if isinstance(value, torch.SymInt) and expression(value) == size and node in mapped:
                return mapped[node]
            if isinstance(value, Tensor) and value.dim() and not value.is_floating_point() and node in mapped:
                if expression(value.shape[0]) == size:
                    count = graph.call_function(aten.sym_size.int, (mapped[node], 0))
                    count.meta["val"] = value.shape[0]
                    return count
        masked = any(
            isinstance(v, Tensor) and v.dtype == torch.bool for v in (n.meta.get("val") for n in rows.all_input_nodes)
        )
        what = "a mask of tokens" if masked else "something"
        raise TraceError(f"what chooses an expert's rows is {what}, no index")

    def _experts_of_rows(self, graph: fx.Graph, mapped: dict[fx.Node, fx.Node], found: list[_Product]) -> fx.Node:
        """[S] expert of each row."""
        parts = []
        for p in found:
            count = self._count(graph, mapped, p.rows)
            parts.append(graph.call_function(aten.full.default, ([count], p.expert), {"dtype": torch.int64}))
            parts[-1].meta["val"] = torch.empty((7,), dtype=torch.int64, device="meta")
        experts = graph.call_function(aten.cat.default, (parts, 0))
        experts.meta["val"] = torch.empty((7,), dtype=torch.int64, device="meta")
        return experts


__all__ = ["collapse", "expert_products", "expert_products_transposed", "expression", "rows_of_expert"]
