"""Rows of the vocabulary's tables that an adapter trains: PEFT's `trainable_token_indices`.

The input embedding is such a table, and so is a head that scores tokens. Where a head is tied to
the embedding, one part serves both: what is looked up is also what scores.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from infold.errors import Refusal
from infold.tuners.config import TunerConfig, matches, within
from infold.tuners.layers import kind_of

if TYPE_CHECKING:
    from infold.tuners.model import Attached

__all__ = [
    "TokenRows",
    "alike",
    "check_order",
    "end_of",
    "find_rows",
    "followers",
    "misfits",
    "uncalled_tables",
    "untied",
]

FIELD = "trainable_token_indices"
INPUT, OUTPUT = "get_input_embeddings", "get_output_embeddings"


@dataclass(frozen=True)
class TokenRows:
    """The rows that one adapter trains.

    tokens: path of an embedding or a head -> the numbers of its rows, in the order of the file.
    tied: path of a module whose weight is an embedding's, so that it follows -> that one's path.
    """

    tokens: dict[str, tuple[int, ...]] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)

    def __iter__(self) -> Any:
        return iter((*self.tokens, *self.tied))


def find_rows(
    model: nn.Module, modules: Mapping[str, nn.Module], config: TunerConfig
) -> tuple[TokenRows, list[str]]:
    """The rows that a config means, and the names in it that mean no module."""
    wanted = getattr(config, FIELD, None)
    if wanted is None:
        return TokenRows(), []
    embedding = end_of(model, modules, INPUT)
    if isinstance(wanted, dict):
        named = {name: [p for p in modules if matches([name], p)] for name in wanted}
    else:
        named = {"embed_tokens": [p for p in modules if matches(["embed_tokens"], p)]}
        if embedding is not None:
            named = {embedding: [embedding]}
        wanted = dict.fromkeys(named, wanted)
    tokens: dict[str, tuple[int, ...]] = {}
    strangers = [name for name, paths in named.items() if not paths]
    for name, paths in named.items():
        for path in paths:
            if tokens.setdefault(path, tuple(wanted[name])) != tuple(wanted[name]):
                raise Refusal(f"{FIELD}: {path} has two names there, with different tokens")
    if embedding is None or embedding not in tokens:
        return TokenRows(tokens), strangers
    tied = _tied_to(embedding, model, modules)
    if any(tokens.get(path, tokens[embedding]) != tokens[embedding] for path in tied):
        return TokenRows(tokens), strangers  # each end its own, as PEFT takes it
    alone = {path: rows for path, rows in tokens.items() if path not in tied}
    return TokenRows(alone, dict.fromkeys(tied, embedding)), strangers


def misfits(
    rows: TokenRows, modules: Mapping[str, nn.Module], targets: Iterable[str], saved: Iterable[str]
) -> list[str]:
    """Why these rows cannot be trained. targets, saved: the modules that get another adapter."""
    targets, saved = set(targets), set(saved)
    problems = []
    for path in rows:
        module, end = modules[path], f" (tied to {rows.tied[path]})" if path in rows.tied else ""
        kind = kind_of(module)
        if kind is None or "trainable_tokens" not in kind.METHODS:
            problems.append(f"{FIELD}: {path}{end} is a {type(module).__name__}, not an embedding")
            continue
        if path in targets or path in saved:
            field = "target_modules" if path in targets else "modules_to_save"
            problems.append(f"{FIELD}: {path}{end} is also one of {field}; leave it out of one")
        shape = getattr(module, "weight").shape  # noqa: B009
        over = [token for token in rows.tokens.get(path, ()) if token >= shape[0]]
        if over:
            problems.append(
                f"{FIELD}: token {over[0]} of {path}, which has {shape[0]}: call "
                "model.resize_token_embeddings first"
            )
    return problems


def check_order(attached: Attached, names: Sequence[str]) -> None:
    """Raise Refusal where trained rows or biases, a module of modules_to_save, or an embedding that
    an adapter brings would overwrite what an adapter before it did."""
    names = tuple(dict.fromkeys(names))
    problems = _biases_out_of_order(attached, names)
    replaced = {name: _replaced(attached, name) for name in names}
    for number, name in enumerate(names):
        for path, what in replaced[name].items():
            layer = attached.layers.get(path)
            earlier = [
                other
                for other in names[:number]
                if (layer is not None and other in layer.adapters)
                or (path in replaced[other] and not _bring_the_same(attached, name, other))
            ]
            if earlier:
                first = f"put {name} first, or "
                if any(path in replaced[other] for other in earlier):
                    first = ""  # which would lose the other's
                problems.append(
                    f"{name} replaces {what}{path}, which {', '.join(earlier)} changes before "
                    f"it: that work would be lost; {first}use one of them"
                )
    if problems:
        raise Refusal(problems)


def _biases_out_of_order(attached: Attached, names: Sequence[str]) -> list[str]:
    """An adapter that trains biases puts its own in their place."""
    problems = []
    for number, name in enumerate(names):
        own = attached.biases[name].parameters if name in attached.biases else {}
        for layer, bias in ((attached.layers.get(path.rpartition(".")[0]), path) for path in own):
            adapters = {} if layer is None else dict(layer.adapters.items())
            earlier = [n for n in names[:number] if n in adapters and adapters[n].on_bias]
            if earlier:
                problems.append(
                    f"{name} replaces {bias}, which {', '.join(earlier)} changes before it: that "
                    f"work would be lost; put {name} first, or use one of them"
                )
    return problems


def _replaced(attached: Attached, name: str) -> dict[str, str]:
    """The paths of the modules that an adapter replaces, and whether it is only rows of them."""
    brings = attached.embeddings.get(name)
    whole = [path for path, module in attached.whole.items() if name in module.adapters]
    whole += sorted(brings.paths) if brings else []
    return dict.fromkeys(attached.tokens.get(name, ()), "rows of ") | dict.fromkeys(whole, "")


def _bring_the_same(attached: Attached, one: str, two: str) -> bool:
    brings = attached.embeddings.get(one)
    return brings is not None and brings is attached.embeddings.get(two)


def end_of(model: nn.Module, modules: Mapping[str, nn.Module], get: str) -> str | None:
    """The path of a model's input embedding or head; get: transformers' method for it."""
    try:
        module = getattr(model, get)()
    except (AttributeError, NotImplementedError):
        return None
    return next((path for path, own in modules.items() if own is module), None)


def untied(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    config: TunerConfig,
    rows: TokenRows,
    changed: Iterable[str],
) -> list[str]:
    """Where ensure_weight_tying asks for more than trained tokens have anyway. changed: the modules
    that get another adapter, or are trained whole."""
    field, embedding = "ensure_weight_tying", end_of(model, modules, INPUT)
    if not getattr(config, field, False) or embedding is None:
        return []
    changed = list(changed)
    ends = [embedding, *_tied_to(embedding, model, modules)]
    if len(ends) == 1:
        return []
    problems = [
        f"{field}: {path} shares its weight with {' and '.join(e for e in ends if e != path)}, and "
        "here each trains an adapter of its own; leave the field out, or train tokens of it "
        f"({FIELD}), which are shared; `infold merge` takes what PEFT has trained so"
        for path in ends
        if within(path, changed)
    ]
    if sum(path in rows.tokens for path in ends) > 1:
        problems.append(f"{field}: {FIELD} names other tokens for {' than for '.join(ends)}")
    return problems


def _tied_to(embedding: str, model: nn.Module, modules: Mapping[str, nn.Module]) -> list[str]:
    """The other modules whose weight is the embedding's, where the config tells so too."""
    shared = _weight(modules[embedding]) if _says_tied(model) else None
    return [p for p, m in modules.items() if p != embedding and _weight(m) is shared is not None]


def followers(modules: Mapping[str, nn.Module], targets: Iterable[str]) -> dict[str, str]:
    """Embeddings deeper below a target's parent that have its weight -> path of the target.

    T5's and BART's `shared` only holds the table, in which encoder and decoder look up by modules
    of their own: an adapter on it is one of each of them, as it is where the table is merged.
    """
    return {
        path: target
        for target in targets
        for path, module in _below(modules, target)
        if _weight(module) is _weight(modules[target])
    }


def uncalled_tables(
    modules: Mapping[str, nn.Module],
    targets: Collection[str],
    saved: Collection[str],
    tied: Mapping[str, str],
) -> list[str]:
    """Why tables that only others look up in take no adapter so. tied: `followers` of the targets;
    saved: modules that are trained whole."""
    problems = [
        f"{path} looks up in the table of {owner}, whose adapter it gets; leave one of the two out"
        for path, owner in tied.items()
        if path in targets or within(path, saved)
    ]
    for path in (*targets, *saved):
        others = [other for other, _ in _below(modules, path)]
        looking = followers(modules, [path])
        if looking and path in saved:
            problems.append(
                f"modules_to_save: {path} is not called: {' and '.join(looking)} look up in its "
                f"table, so a copy of it would do nothing; train rows of it ({FIELD}), or give it "
                "to LoRA; `infold merge` takes what is saved so"
            )
        elif others and not looking and path.rpartition(".")[2] == "shared":
            problems.append(
                f"{path} is not called, and {' and '.join(others)} have tables of their own; give "
                "their names instead"
            )
    return problems


def _below(modules: Mapping[str, nn.Module], target: str) -> Iterator[tuple[str, nn.Embedding]]:
    """The embeddings of a table's shape that lie deeper below its parent than itself."""
    table, above = modules[target], target.rpartition(".")[0]
    if not isinstance(table, nn.Embedding):
        return
    beginning = f"{above}." if above else ""
    for path, module in modules.items():
        deeper = path.startswith(beginning) and "." in path[len(beginning) :]
        if deeper and isinstance(module, nn.Embedding):
            if module.weight.shape == table.weight.shape:
                yield path, module


def alike(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The embedding and the other modules that have a table of its shape, where the config ties
    them: accelerate leaves each a parameter of its own, which no longer tells that they are one."""
    embedding = end_of(model, modules, INPUT)
    shared = None if embedding is None else _weight(modules[embedding])
    if shared is None or not _says_tied(model):
        return {}
    tables = ((path, module, _weight(module)) for path, module in modules.items())
    found = {p: m for p, m, own in tables if own is not None and own.shape == shared.shape}
    return found if len(found) > 1 else {}


def _weight(module: nn.Module) -> Tensor | None:
    return module._parameters.get("weight")


def _says_tied(model: nn.Module) -> bool:
    """Whether the model's config ties its ends, so that a saved model is loaded so."""
    config = getattr(model, "config", None)
    holders = (config, getattr(config, "text_config", None))
    return any(getattr(holder, "tie_word_embeddings", False) for holder in holders)
