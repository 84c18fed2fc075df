"""What tells two modules apart: every attribute by its value, and what has no value by itself."""

from __future__ import annotations

import dataclasses
import enum
import functools
import weakref
from collections import OrderedDict, namedtuple
from types import MethodType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mxfp4_compile.passes.same import structure_key


class Colour(enum.Enum):
    RED, BLUE = "red", "blue"


@dataclasses.dataclass
class Options:
    limit: float
    parts: list = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    limit: float


Pair = namedtuple("Pair", "a b")


class Opaque:
    pass


def scaled(x, factor=2.0):
    return x * factor


def _times(factor):
    return lambda x: x * factor


def _plus(factor):
    return lambda x: x + factor


def _defaults(value):
    def function(x, limit=value, *, low=value):
        return x.clamp(low, limit)

    return function


def _cyclic(number):
    made = {"number": number}
    made["self"] = [made]
    return made


class Module(nn.Module):
    def __init__(self, value=None):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.value = value(self) if getattr(value, "of_module", False) else value


def of_module(function):
    function.of_module = True
    return function


# (what one layer holds, what is equal, what another holds)
VALUES = {
    "list": ([1.0], [1.0], [2.0]),
    "types": ([1], [1], [True]),
    "nan": (float("nan"), float("nan"), 0.0),
    "nested": ({"a": ([1, {2}],)}, {"a": ([1, {2}],)}, {"a": ([1, {3}],)}),
    "order": (OrderedDict(a=1, b=2), OrderedDict(a=1, b=2), OrderedDict(b=2, a=1)),
    "enum": (Colour.RED, Colour.RED, Colour.BLUE),
    "dataclass": (Options(1.0, [1]), Options(1.0, [1]), Options(1.0, [2])),
    "slots": (Slotted(1.0), Slotted(1.0), Slotted(2.0)),
    "named tuple": (Pair(1, 2), Pair(1, 2), (1, 2)),
    "namespace": (SimpleNamespace(a=1), SimpleNamespace(a=1), SimpleNamespace(a=2)),
    "function": (F.silu, F.silu, F.relu),
    "partial": tuple(functools.partial(scaled, factor=factor) for factor in (1.0, 1.0, 3.0)),
    "closure": (_times(2.0), _times(2.0), _times(3.0)),
    "code": (_times(2.0), _times(2.0), _plus(2.0)),
    "defaults": (_defaults(1.0), _defaults(1.0), _defaults(2.0)),
    "tensor": (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0])),
    "tensor dtype": (torch.ones(2), torch.ones(2), torch.ones(2, dtype=torch.float64)),
    "dtype": (torch.float32, torch.float32, torch.float16),
    "slice": (slice(0, 2), slice(0, 2), slice(0, 3)),
    "cycle": (_cyclic(1), _cyclic(1), _cyclic(2)),
    "class": (Options, Options, Slotted),
    "method": (MethodType(scaled, [1]), MethodType(scaled, [1]), MethodType(scaled, [2])),
    "own method": (of_module(lambda m: m.linear.forward), of_module(lambda m: m.linear.forward),
                   of_module(lambda m: m.extra_repr)),
    "own module": (of_module(lambda m: [m.linear]), of_module(lambda m: [m.linear]), of_module(lambda m: [m])),
    "own parameter": (of_module(lambda m: [m.linear.weight]), of_module(lambda m: [m.linear.weight]),
                      of_module(lambda m: [m.linear.bias])),
    "weak": (of_module(lambda m: weakref.ref(m.linear)), of_module(lambda m: weakref.ref(m.linear)),
             of_module(lambda m: weakref.ref(m))),
}  # fmt: skip


@pytest.mark.parametrize("what", VALUES)
def test_attributes_are_compared_by_value(what):
    one, equal, other = (structure_key(Module(value)) for value in VALUES[what])
    assert one == equal and hash(one) == hash(equal)
    assert one != other


def test_what_has_no_value_is_compared_by_identity():
    shared = Opaque()
    assert structure_key(Module([shared])) == structure_key(Module([shared]))
    assert structure_key(Module([Opaque()])) != structure_key(Module([Opaque()]))
    large = torch.zeros(1 << 19)
    assert structure_key(Module(large)) == structure_key(Module(large))
    assert structure_key(Module(large)) != structure_key(Module(large.clone()))


def test_attributes_are_read_past_the_code_of_their_class():
    @dataclasses.dataclass
    class Guarded:
        limit: float

        def __getattribute__(self, name):
            if name == "limit":
                raise RuntimeError("not to be read")
            return super().__getattribute__(name)

    keys = [structure_key(Module(Guarded(limit))) for limit in (1.0, 1.0, 2.0)]
    assert keys[0] == keys[1] != keys[2]


def test_what_cannot_be_read_is_compared_by_identity():
    class Unreadable(set):
        def __iter__(self):
            raise RuntimeError("not to be read")

    shared = Unreadable()
    assert structure_key(Module(shared)) == structure_key(Module(shared)) != structure_key(Module(Unreadable()))


def test_shared_parameters_are_part_of_the_structure():
    def pair(tied):
        made = nn.ModuleList([nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)])
        if tied:
            made[1].weight = made[0].weight
        return made

    assert structure_key(pair(True)) == structure_key(pair(True)) != structure_key(pair(False))


def test_a_forward_of_its_own_tells_an_instance_apart():
    def own(self, x):
        return self.linear(x) * 2

    plain, changed, alike = Module(), Module(), Module()
    changed.forward, alike.forward = MethodType(own, changed), MethodType(own, alike)
    assert structure_key(changed) == structure_key(alike) != structure_key(plain)
