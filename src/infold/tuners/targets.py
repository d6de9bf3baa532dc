"""Which modules an adapter goes on when the caller names none.

IA³ scales keys, values and the inner activations of the feed-forward network (Liu et al. 2022,
section 3.3); LoRA updates the query and value projections (Hu et al. 2021, section 4.2), and where
no attention is to be found, both layers of the feed-forward network. All are found from the module
tree, so a new architecture needs no entry here:

  attention      linear children of one module whose names say key and value (`k_proj`, `linear_k`,
                 `key`, `kv_b_proj`, `qkv`), or the widening child of an attention module (`c_attn`)
  feed-forward   in a numbered block or beside attention, a layer h -> i before one i -> h

All towers of a model are meant: of a vision-language model also the vision encoder. State-space
mixers, convolution modules, projectors between towers, embeddings and output heads are not.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import nn

from infold.errors import Refusal

__all__ = ["Targets", "find_targets", "fused_experts"]

# What PEFT's defaults do beyond the structure: an adapter must fit what others trained.
_QUERY_FOR_KEY = frozenset(  # IA³ on query and value
    "bart gemma gemma2 gemma3_text gpt_neo gptj llama4 phi qwen2 qwen3".split()
)
_QUERY_FOR_VALUE = frozenset(("opt",))
_ENDINGS = {
    ("ia3", "mt5"): ("k", "v", "wi_1"),  # wi_1 as a layer whose outputs are scaled
    ("lora", "phi"): ("q_proj", "v_proj", "fc1", "fc2"),
    ("lora", "nemotron_h"): ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("lora", "rwkv"): ("key", "value", "receptance", "output"),
}
_LORA_ON_LANGUAGE_ONLY = frozenset(("blip-2", "gemma4"))
_FEEDFORWARD_OF_LANGUAGE_ONLY = frozenset(("llama4",))

_ROLES = {word: role for role, words in {
    "q": "q query queries wq", "k": "k key keys wk", "v": "v value values wv",
    "qk": "qk", "kv": "kv wkv", "qkv": "qkv wqkv qkvz",
}.items() for word in words.split()}  # fmt: skip
# A name with one of these is not what attention compares or mixes, whatever else it says.
_OTHER_ROLES = frozenset(
    ("pos", "position", "rel", "relative", "sine", "gate", "bias", "index", "conv", "sconv")
)
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_BETWEEN = re.compile("bbox|PredictionHead|Projector|Merger")  # heads, and joints of towers
_FEEDFORWARD = re.compile(r"mlp|ffn?\b|feed_?forward|expert|intermediate", re.IGNORECASE)


@dataclass(frozen=True)
class Targets:
    """Trailing paths of modules, by whole components, as PEFT's config fields take them.

    modules:     `target_modules`, for example ("down_proj", "k_proj", "v_proj")
    feedforward: `feedforward_modules`: those of `modules` whose inputs IA³ scales; () for LoRA
    """

    modules: tuple[str, ...]
    feedforward: tuple[str, ...]


def find_targets(model: nn.Module, method: str) -> Targets:
    """Where adapters of a method ("ia3", or "lora", which serves DoRA too) go by default.

    Reads the module tree, no values: a model on the meta device will do. For the model types that
    PEFT 0.21 has defaults for, the modules hit are the same as PEFT's.

    Warns (UserWarning) when a part that the method adapts is not made of modules: experts fused
    into 3-D parameters, attention with its projections in one parameter; and when there is none.
    Raises Refusal when nothing fits; it lists the endings of all linear-like modules.
    """
    if method not in ("ia3", "lora"):
        raise Refusal(f"no default targets for the method {method!r}: give target_modules")
    tree = _Tree(model)
    kind = str(getattr(getattr(model, "config", None), "model_type", ""))
    fixed = tuple(ending for ending in _ENDINGS.get((method, kind), ()) if tree.hits(ending))
    if fixed:
        return Targets(tuple(sorted(fixed)), ())
    attention = _attention(tree)
    pairs = _feedforward(tree, attention)
    feedforward: set[str] = set()
    if method == "ia3":
        roles = {"k", "v"}
        if kind in _QUERY_FOR_KEY:
            roles = {"q", "v"}
        elif kind in _QUERY_FOR_VALUE:
            roles = {"q", "k"}
        modules = {path for path, said in attention.roles.items() if said & roles}
        feedforward = {pair.second for pair in pairs}
        if kind in _FEEDFORWARD_OF_LANGUAGE_ONLY:
            feedforward = _of_language(feedforward)
    else:
        modules = {path for path, said in attention.roles.items() if said & {"q", "v"}}
        if not modules:
            modules = {path for pair in pairs for path in (*pair.first, pair.second)}
        if kind in _LORA_ON_LANGUAGE_ONLY:
            modules = _of_language(modules)
    missing = list(_out_of_reach(tree, attention, method, bool(modules), bool(feedforward)))
    if not modules and not feedforward:
        raise Refusal(_nothing_fits(tree, type(model).__name__, missing))
    for sentence in missing:
        warnings.warn(f"{type(model).__name__}: {sentence}", UserWarning, stacklevel=2)
    inner = tree.endings(feedforward, also=attention.outputs)
    return Targets(tuple(sorted({*tree.endings(modules), *inner})), tuple(sorted(inner)))


def _of_language(paths: Set[str]) -> set[str]:
    return {path for path in paths if "language_model" in path.split(".")}


class _Size(NamedTuple):
    """Features or channels of a linear-like module."""

    inputs: int
    outputs: int


class _Tree:
    """A model's modules by path, and the sizes of the linear-like ones."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = {path: module for path, module in model.named_modules() if path}
        sizes = ((path, _size(module)) for path, module in self.modules.items())
        self.linear = {path: size for path, size in sizes if size is not None}
        self.children: dict[str, list[str]] = defaultdict(list)
        self._named: dict[str, list[str]] = defaultdict(list)
        self._hits: dict[str, frozenset[str]] = {}
        for path in self.modules:
            self.children[_parent(path)].append(path)
            self._named[_leaf(path)].append(path)

    def linear_children(self, path: str) -> list[str]:
        return [child for child in self.children[path] if child in self.linear]

    def is_convolution(self, path: str) -> bool:
        return hasattr(self.modules[path], "kernel_size")

    def is_square(self, path: str) -> bool:
        return self.linear[path].inputs == self.linear[path].outputs

    def hits(self, ending: str) -> Set[str]:
        """The modules that an ending in `target_modules` selects."""
        if ending not in self._hits:
            named = self._named.get(_leaf(ending), ())
            self._hits[ending] = frozenset(p for p in named if f".{p}".endswith(f".{ending}"))
        return self._hits[ending]

    def kind(self, path: str) -> str:
        """The name and the class of a module: what its author says that it is."""
        return f"{_leaf(path)} {type(self.modules[path]).__name__}" if path else ""

    def said(self, path: str) -> str:
        """A module's path, and the class that it is a part of."""
        return f"{path} {type(self.modules.get(_parent(path))).__name__}"

    def endings(self, meant: Set[str], also: Set[str] = frozenset()) -> set[str]:
        """The shortest endings that select what is meant and nothing else.

        Where only a layer's number would part the meant ones from `also`, both are selected: so
        does PEFT with BERT's `output.dense`, of the feed-forward network and of the attention.
        """
        found = set()
        for path in meant:
            suffixes = list(_suffixes(path))
            plain = [s for s in suffixes if not s[0].isdigit() and not _numbered(_parent(s))]
            for choice, allowed in ((plain, meant), (plain, meant | also), (suffixes, meant)):
                fitting = next((s for s in choice if self.hits(s) <= allowed), None)
                if fitting is not None:
                    found.add(fitting)
                    break
        return found


def _size(module: nn.Module) -> _Size | None:
    """Of nn.Linear and what quantization makes of it, nn.Conv1d/2d/3d, transformers' Conv1D."""
    for names in (
        ("in_features", "out_features"), ("infeatures", "outfeatures"),
        ("in_channels", "out_channels"), ("nx", "nf"),
    ):  # fmt: skip
        inputs, outputs = (getattr(module, name, None) for name in names)
        if isinstance(inputs, int) and isinstance(outputs, int):
            return _Size(inputs, outputs)
    return None


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _suffixes(path: str) -> Iterator[str]:
    """Trailing paths, the shortest first."""
    parts = path.split(".")
    return (".".join(parts[start:]) for start in reversed(range(len(parts))))


def _numbered(path: str) -> bool:
    return any(map(str.isdigit, path.split(".")))


def _block(path: str) -> str:
    """A path up to its last number: the innermost repeated block that holds it."""
    parts = path.split(".")
    while parts and not parts[-1].isdigit():
        parts.pop()
    return ".".join(parts)


def _words(name: str) -> list[str]:
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+|\d+", name)]


def _roles(name: str) -> frozenset[str]:
    """Which of q, k and v a module's name says that it makes."""
    words = _words(name)
    if not _OTHER_ROLES.isdisjoint(words):
        return frozenset()
    return frozenset("".join(_ROLES.get(word, "") for word in words))


@dataclass
class _Attention:
    """What attention consists of: projections with their roles, the rest, and what is no module."""

    roles: dict[str, frozenset[str]] = field(default_factory=dict)
    outputs: set[str] = field(default_factory=set)
    tops: set[str] = field(default_factory=set)
    parameters: set[str] = field(default_factory=set)  # modules that hold q, k, v as parameters


def _attention(tree: _Tree) -> _Attention:
    found = _Attention()
    classes: set[type[nn.Module]] = set()
    for path, module in tree.modules.items():
        if isinstance(module, nn.MultiheadAttention) or _has_projection_parameters(module):
            found.parameters.add(path)
            found.tops.add(_top(tree, path))
        elif _makes_keys_and_values(tree, group := _projections(tree, path)):
            found.roles |= group
            found.tops.add(_top(tree, path))
            classes.add(type(module))
    for path, module in tree.modules.items():
        if path in found.tops:
            continue
        # A layer that takes keys and values from another one makes only queries.
        if group := _projections(tree, path) if type(module) in classes else _fused(tree, path):
            found.roles |= group
            found.tops.add(_top(tree, path))
    inside = (path for path in tree.linear if _is_inside(path, found.tops))
    found.outputs = {path for path in inside if path not in found.roles}
    return found


def _has_projection_parameters(module: nn.Module) -> bool:
    """XLNet's q, k, v are parameters (h, heads, d), not modules."""
    own = {name for name, value in module.named_parameters(recurse=False) if value.dim() == 3}
    return {"k", "v"} <= own


def _projections(tree: _Tree, path: str) -> dict[str, frozenset[str]]:
    """The linear children of one module whose names say query, key or value."""
    group = {}
    names = set(map(_leaf, tree.children[path]))
    for child in tree.children[path]:
        name = _leaf(child)
        said = _roles(name)
        if not said or re.sub(r"_a(_|$).*", "_b_proj", name) in names - {name}:
            continue  # of a low-rank pair, as in DeepSeek, `b` makes the heads' vectors
        if child in tree.linear:
            group[child] = said
        elif len(inner := tree.linear_children(child)) == 1:  # a linear in a wrapper
            group[inner[0]] = said
    return group


def _makes_keys_and_values(tree: _Tree, group: dict[str, frozenset[str]]) -> bool:
    if not {"k", "v"} <= frozenset().union(*group.values()):
        return False
    keys = [tree.linear[child] for child, said in group.items() if said == {"k"}]
    values = [tree.linear[child] for child, said in group.items() if said == {"v"}]
    # RWKV names the two layers of its feed-forward network key and value.
    return not any(key == value[::-1] != value for key in keys for value in values)


def _fused(tree: _Tree, path: str) -> dict[str, frozenset[str]]:
    """The widening child of an attention module whose names say nothing of q, k, v: `c_attn`."""
    if not _ATTENTION.search(tree.kind(path)):
        return {}
    if any(_roles(_leaf(child)) & {"k", "v"} for child in tree.children[path]):
        return {}
    children = tree.linear_children(path)
    wide = [child for child in children if tree.linear[child].outputs > tree.linear[child].inputs]
    inputs = {tree.linear[child].inputs for child in children}
    if len(wide) != 1 or tree.linear[wide[0]].outputs in inputs:
        return {}
    return {wide[0]: frozenset("qkv")}


def _top(tree: _Tree, path: str) -> str:
    """The outermost module around `path` that calls itself attention and holds nothing else."""
    while _ATTENTION.search(tree.kind(above := _parent(path))) and not any(
        _FEEDFORWARD.search(tree.kind(child)) for child in tree.children[above]
    ):
        path = above
    return path


def _is_inside(path: str, tops: Set[str]) -> bool:
    while path := _parent(path):
        if path in tops:
            return True
    return False


class _Pair(NamedTuple):
    """The layers of a feed-forward network: h -> i (two when gated) and i -> h."""

    first: tuple[str, ...]
    second: str


def _feedforward(tree: _Tree, attention: _Attention) -> list[_Pair]:
    beside = {_parent(top) for top in attention.tops}
    attending = {block for top in attention.tops if (block := _block(top))}
    candidates = [
        path
        for path in tree.linear
        if not _is_inside(path, attention.tops)
        and path not in attention.roles
        and not _is_mixer(tree, _parent(path))
        and (not tree.is_convolution(path) or _block(path) in attending)
    ]
    siblings: dict[str, list[str]] = defaultdict(list)
    for path in candidates:
        siblings[_parent(path)].append(path)
    found = [pair for paths in siblings.values() for pair in _pairs(tree, paths)]
    paired = {_parent(pair.second) for pair in found}
    cousins: dict[str, list[str]] = defaultdict(list)
    for path in candidates:  # BERT's intermediate.dense and output.dense
        between = _parent(path)
        if between not in paired and not _leaf(between).isdigit():
            cousins[_parent(between)].append(path)
    for paths in cousins.values():
        found += [pair for pair in _pairs(tree, paths) if not tree.is_square(pair.second)]
    found = [
        pair
        for pair in found
        if (_numbered(_parent(pair.second)) or _parent(_parent(pair.second)) in beside)
        and not (tree.is_square(pair.second) and tree.is_convolution(pair.second))
        and not _BETWEEN.search(tree.said(pair.second))
    ]
    widest: dict[str, int] = defaultdict(int)
    for pair in found:
        block = _block(_parent(pair.second))
        widest[block] = max(widest[block], tree.linear[pair.second].inputs)

    def is_main(second: str) -> bool:
        """Adapters, per-layer inputs and the like stand beside a wider network in a block."""
        block = _block(_parent(second))
        said = tree.said(second).removeprefix(block)
        return tree.linear[second].inputs == widest[block] or bool(_FEEDFORWARD.search(said))

    return [pair for pair in found if is_main(pair.second)]


def _pairs(tree: _Tree, paths: Sequence[str]) -> list[_Pair]:
    """Layers h -> i (or 2i, gate and up in one) with the i -> h that comes after them."""
    found: list[_Pair] = []
    first: list[str] = []
    for path in paths:
        inner, outer = tree.linear[path]
        partners = [f for f in first if tree.linear[f] in ((outer, inner), (outer, 2 * inner))]
        if partners:
            found.append(_Pair(tuple(partners), path))
        else:
            first.append(path)
    square = [pair for pair in found if tree.is_square(pair.second)]
    if len(square) > 1:  # of gate, up and down that are all h -> h, down comes last
        last = square[-1]
        between = tuple(pair.second for pair in square[:-1])
        found = [pair for pair in found if pair not in square]
        found.append(_Pair(last.first + between, last.second))
    return found


def _is_mixer(tree: _Tree, path: str) -> bool:
    """Whether a module convolves over time, each channel alone: state spaces, short convolutions.

    Its in_proj and out_proj have the shapes of a feed-forward network and are none.
    """
    convolutions = (tree.modules.get(child) for child in tree.children[path])
    return any(isinstance(c, nn.Conv1d) and 1 < c.groups == c.in_channels for c in convolutions)


def _out_of_reach(
    tree: _Tree, attention: _Attention, method: str, modules: bool, feedforward: bool
) -> Iterator[str]:
    """Sentences about what the method adapts and no module path can name."""
    if attention.parameters:
        yield (
            f"query, key and value of {_places(attention.parameters)} are parameters, not modules "
            "of their own; they get no adapter"
        )
    elif not attention.roles:
        yield "no key and value projections found; attention gets no adapter"
    if method == "lora" and modules:
        return
    if experts := fused_experts(tree.modules):
        yield experts
    elif not feedforward:
        yield "no feed-forward network found; none gets an adapter"


def fused_experts(modules: Mapping[str, nn.Module]) -> str | None:
    """A sentence about experts that no adapter reaches; None where there are none."""
    experts = {path for path, module in modules.items() if _holds_experts(path, module)}
    if not experts:
        return None
    return (
        f"the experts in {_places(experts)} are 3-D parameters, not modules; "
        "their feed-forward networks get no adapter"
    )


def _holds_experts(path: str, module: nn.Module) -> bool:
    stacks = [v for v in module.parameters(recurse=False) if v.dim() == 3 and v.shape[0] > 1]
    return bool(stacks) and bool(re.search("expert|moe", f"{path} {type(module).__name__}", re.I))


def _places(paths: Set[str]) -> str:
    """Paths with N for each number, so that a layer stands for all."""
    return ", ".join(sorted({re.sub(r"(?<=\.)\d+(?=\.|$)", "N", path) for path in paths}))


def _nothing_fits(tree: _Tree, name: str, missing: Sequence[str]) -> str:
    endings = Counter(_leaf(path) for path in tree.linear)
    listed = ", ".join(f"{ending} ({count})" for ending, count in sorted(endings.items()))
    return (
        f"{name}: no default targets: {'; '.join(missing)}. Give target_modules; "
        f"the linear-like modules end in {listed or '(there are none)'}"
    )
