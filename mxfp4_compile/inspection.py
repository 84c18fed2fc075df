"""``inspect(directory)``: everything the compiler made of a model, as files one can read.

>>> with mxfp4_compile.inspect("dump"):
...     torch.compile(model)(**inputs)
... # dump/index.md names every file and says what it shows

What was compiled before is compiled again inside, and caches are off: a graph that comes from a cache never
passes our passes and would be missing. depyf, where it is installed, adds the decompiled bytecode and its own
view of each graph; without it, or where it fails, the plain dumps are there all the same, and the index says so.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import fx

from .passes.observe import observers

INDEX = "index.md"

# Stage -> what its file shows, in the order in which the compiler gets there.
STAGES = {
    "site_traced": "experts as optimize() traced them (ATen, functional), one file for each structure",
    "site_rewritten": "the same experts as optimize() rewrote them",
    "traced": "a whole graph as Dynamo traced it",
    "rewritten": 'the same graph after backend="mxfp4_compile" put MXFP4 experts into it',
    "before_lowering": "Inductor's graph before our lowering pass (decomposed)",
    "after_lowering": "Inductor's graph after our lowering pass",
    "final": "Inductor's graph after all of its passes: what is scheduled",
    "kernels": "the code Inductor generated: kernels, and the wrapper that calls them",
}
# What depyf writes, by its file names.
_DEPYF = (
    (r"full_code_for_", "depyf: the whole compiled function, as readable Python with its guards"),
    (r"__transformed_code_", "depyf: the decompiled bytecode that Dynamo made of a function"),
    (r"__compiled_fn_.*Traced[_ ]graph", "depyf: the traced graph"),
    (r"__compiled_fn_.*exported_program", "depyf: experts while torch.export traced them"),
    (r"__compiled_fn_\d+\.__compiled_fn_", "depyf: the traced graph"),
    (r"__compiled_fn_.*BEFORE_PRE_GRAD", "depyf: before Inductor's pre-grad passes"),
    (r"__compiled_fn_.*AFTER_PRE_GRAD", "depyf: after Inductor's pre-grad passes"),
    (r"__compiled_fn_.*Forward[_ ]graph", "depyf: the forward graph from AOTAutograd"),
    (r"__compiled_fn_.*Joint[_ ]graph", "depyf: the joint graph from AOTAutograd"),
    (r"__compiled_fn_.*AFTER_POST_GRAD", "depyf: after all post-grad passes, ours among them"),
    (r"__compiled_fn_.*kernel_?", "depyf: generated kernel code"),
    (r"__compiled_fn_", "depyf: a graph at another stage, named in the file name"),
)


class Inspection:
    """What ``inspect`` hands to its block: the directory, and the files written so far by stage."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.files: dict[str, list[Path]] = {stage: [] for stage in STAGES}
        self.notes: list[str] = []

    def write(self, stage: str, text: str) -> Path:
        """Write the next file of a stage."""
        path = self.directory / f"{list(STAGES).index(stage)}_{stage}_{len(self.files[stage])}.py"
        path.write_text(text)
        self.files[stage].append(path)
        return path

    def graph(self, stage: str, graph: fx.Graph) -> None:
        """Dump a graph: a comment for each node's shape and dtype, then the code."""
        self.write(stage, f'"""{STAGES[stage]}"""\n\n' + readable(graph))

    def index(self) -> str:
        """The text of index.md."""
        lines = ["# What the compiler made", ""]
        for stage, what in STAGES.items():
            names = [path.name for path in self.files[stage]]
            lines.append(f"- **{stage.replace('_', ' ')}**: {what}. " + (", ".join(f"`{n}`" for n in names) or "None."))
        own = {path.name for paths in self.files.values() for path in paths} | {INDEX}
        rest = sorted(p.name for p in self.directory.iterdir() if p.is_file() and p.name not in own)
        if rest:
            lines += ["", "## From depyf", ""]
            for name in rest:
                what = next((what for pattern, what in _DEPYF if re.match(pattern, name)), "depyf: other")
                lines.append(f"- `{name}`: {what}")
        if self.notes:
            lines += ["", "## Notes", ""] + [f"- {note}" for note in self.notes]
        return "\n".join(lines) + "\n"


def readable(graph: fx.Graph) -> str:
    """One line a node: name, shape and dtype where traced, op and arguments."""
    lines = []
    for node in graph.nodes:
        if node.op == "output":
            lines.append(f"return {node.args[0]}")
            continue
        value = node.meta.get("val", node.meta.get("example_value"))
        shown = (
            f"  # {str(value.dtype).removeprefix('torch.')}{[str(d) for d in value.shape]}".replace("'", "")
            if isinstance(value, torch.Tensor)
            else ""
        )
        if node.op == "placeholder":
            lines.append(f"{node.name} = input({node.target!r}){shown}")
            continue
        target = node.target if isinstance(node.target, str) else torch.fx.node._get_qualified_name(node.target)
        if isinstance(node.target, torch._ops.OpOverload):
            target = f"torch.ops.{node.target}"
        args = [str(a) if not isinstance(a, str) else repr(a) for a in node.args]
        args += [f"{k}={v!r}" for k, v in node.kwargs.items()]
        lines.append(f"{node.name} = {target}({', '.join(args)}){shown}")
    return "\n".join(lines) + "\n"


@contextmanager
def inspect(directory: str | Path) -> Iterator[Inspection]:
    """Dump every graph and kernel that is compiled inside the block into ``directory`` (made if need be).

    Raises FileExistsError if the directory is not empty: old files among new ones would mislead.
    """
    path = Path(directory).resolve()
    path.mkdir(parents=True, exist_ok=True)
    if any(path.iterdir()):
        raise FileExistsError(f"{path} is not empty: inspect() needs a directory of its own")
    inspection = Inspection(path)
    torch._dynamo.reset()
    with ExitStack() as stack:
        stack.callback(lambda: (path / INDEX).write_text(inspection.index()))
        _depyf(stack, inspection)
        stack.enter_context(_observing(inspection))
        stack.enter_context(_inductor(inspection))
        yield inspection


def _depyf(stack: ExitStack, inspection: Inspection) -> None:
    try:
        import depyf
    except ImportError:
        inspection.notes.append(
            "depyf is not installed (pip install mxfp4_compile[inspect]): no decompiled code; the graphs and kernels "
            "above do not need it"
        )
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            debug = depyf.prepare_debug(str(inspection.directory))
            debug.__enter__()
    except Exception as error:  # it follows torch's internals, which change
        inspection.notes.append(f"depyf {getattr(depyf, '__version__', '')} failed ({type(error).__name__}: {error})")
        return

    def leave() -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                debug.__exit__(None, None, None)
        except Exception as error:
            inspection.notes.append(f"depyf failed at its end ({type(error).__name__}: {error})")

    stack.callback(leave)


@contextmanager
def _observing(inspection: Inspection) -> Iterator[None]:
    observer: Callable[[str, fx.Graph], None] = inspection.graph
    observers.append(observer)
    try:
        yield
    finally:
        observers.remove(observer)


@contextmanager
def _inductor(inspection: Inspection) -> Iterator[None]:
    import torch._functorch.config as functorch
    import torch._inductor.config as inductor
    from torch._inductor.custom_graph_pass import CustomGraphPass
    from torch._inductor.graph import GraphLowering

    from .dynamo.router_pass import chained

    saved = GraphLowering.__dict__["save_output_code"]
    before: Callable[[str], None] | None = GraphLowering.save_output_code

    def save(code: str) -> None:
        inspection.write("kernels", code)
        if before is not None:
            before(code)

    class Dump(CustomGraphPass):
        def __init__(self, stage: str) -> None:
            self.stage = stage

        def __call__(self, graph: fx.Graph) -> None:
            inspection.graph(self.stage, graph)

        def uuid(self) -> str:
            return f"mxfp4_compile.inspect:{self.stage}"

    traced = chained(inductor.pre_grad_custom_pass, Dump("traced"))
    final = chained(inductor.post_grad_custom_post_pass, Dump("final"))
    patches: dict[str, Any] = {
        "force_disable_caches": True,
        "fx_graph_cache": False,
        "pre_grad_custom_pass": traced,
        "post_grad_custom_post_pass": final,
    }
    with inductor.patch(patches), functorch.patch(enable_autograd_cache=False):
        GraphLowering.save_output_code = staticmethod(save)  # type: ignore[method-assign,assignment]
        try:
            yield
        finally:
            GraphLowering.save_output_code = saved


__all__ = ["Inspection", "inspect"]
