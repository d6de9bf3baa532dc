"""What is known of a plan while adapters are being read: touched tensors, reasons to refuse."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from infold.checkpoint.shards import Checkpoint
from infold.plan.edits import BaseTensor, Operation, Source
from infold.plan.match import Names
from infold.plan.quantized import StoredModules

__all__ = ["Draft", "State"]


@dataclass
class State:
    """What is known so far of one tensor of the output."""

    source: Source
    dtype: str
    shape: tuple[int, ...]
    operations: list[Operation] = field(default_factory=list)
    scales: bool = False  # see Edit
    exponent: int = 0  # see Edit


class Draft:
    """Collects the states of all touched tensors, and the reasons to refuse."""

    def __init__(self, base: Checkpoint, pair: tuple[str, str] | None, lossy: bool = False) -> None:
        self.base = base
        self.names = Names(base.where)
        self.modules = StoredModules(base, self.names, lossy)
        self.states: dict[str, State] = {}
        self.reasons: list[str] = []
        self.stuck: set[str] = set()  # quantized modules with a vector that has no place in scales
        self.elements: set[str] = set()  # quantized modules with an update of single elements
        self.ways = ""  # what else can be done with a quantized module, for messages
        self.unknown: Mapping[str, str] = {}  # quantized modules without known values, and why
        self.removed: set[str] = set()  # tensors that the output lacks
        self.amended: dict[str, bytes] = {}  # tensors with other bytes
        self.notes: list[str] = []
        self.labels: int | None = None  # outputs of a head that is added
        self.pair = pair  # (embedding, head) that share their values
        self.copies: Mapping[str, tuple[str, ...]] = {}  # a shared table -> what repeats it

    def state(self, tensor: str) -> State:
        """The state of an output tensor, begun from the base where it is new."""
        if tensor not in self.states:
            source = tensor
            if self.pair and tensor == self.pair[1] and tensor not in self.base.where:
                source = self.pair[0]
            info = self.base.info(source)
            self.states[tensor] = State(BaseTensor(source), info.dtype, info.shape)
        return self.states[tensor]

    def unnest(self, tensor: str) -> None:
        """Make nested scales plain; once, whatever comes to them."""
        nested, state = self.modules.nested[tensor], self.state(tensor)
        if state.source != nested.source:
            state.source, state.dtype = nested.source, "F32"
            self.removed.update(nested.removed)
            self.amended.update(nested.amended)
