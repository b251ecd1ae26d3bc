"""The configuration: read from YAML and the command line, checked against utils/schema.py."""

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from utils import constraints
from utils.errors import UserError
from utils.names import canonical_name
from utils.schema import (
    MODEL_SECTIONS,
    SECTIONS,
    DataSection,
    EvalSection,
    ExportSection,
    FastFlowModel,
    ModelSection,
    NfaSection,
    TrainSection,
)


@dataclass(frozen=True)
class Config:
    """Everything a run depends on; `per_category` holds {category: {'section.key': value}}."""

    model: ModelSection = field(default_factory=FastFlowModel)
    data: DataSection = field(default_factory=DataSection)
    train: TrainSection = field(default_factory=TrainSection)
    eval: EvalSection = field(default_factory=EvalSection)
    nfa: NfaSection = field(default_factory=NfaSection)
    export: ExportSection = field(default_factory=ExportSection)
    per_category: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts, lists and scalars, ready for YAML or JSON."""
        plain = dataclasses.asdict(self)
        return {
            name: {k: list(v) if isinstance(v, tuple) else v for k, v in section.items()}
            for name, section in plain.items()
        }

    def for_category(self, category: str) -> "Config":
        """Return the configuration with the values of `per_category` for this one applied.

        Names may be of any data set; their spelling does not matter ("Metal Nut", "metal_nut").
        """
        plain = self.to_dict()
        wanted = canonical_name(category)
        for name, values in plain.pop("per_category").items():
            if canonical_name(name) == wanted:
                for key, value in values.items():
                    _assign(plain, key, value, f"per_category.{name}")
        return from_dict(plain, f"per_category.{category}")


def differences(first: Config, second: Config) -> dict[str, tuple[Any, Any]]:
    """Return {'section.key': (value in first, value in second)} where the two are not equal."""
    one, two = first.to_dict(), second.to_dict()
    keys = {f"{s}.{k}": (s, k) for plain in (one, two) for s in plain for k in plain[s]}
    pairs = {name: (one[s].get(k), two[s].get(k)) for name, (s, k) in keys.items()}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def assignments(values: Mapping[str, Any]) -> list[str]:
    """Return overrides for all values but None; text stays text, whatever YAML would read in it."""
    return [f"{k}={json.dumps(v, ensure_ascii=False)}" for k, v in values.items() if v is not None]


def known_keys() -> list[str]:
    """List every `section.key` of any configuration."""
    models = [("model", kind) for kind in MODEL_SECTIONS.values()]
    sections = [*models, *SECTIONS.items()]
    return sorted({f"{name}.{f.name}" for name, kind in sections for f in dataclasses.fields(kind)})


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and apply `section.key=value` overrides; `UserError` on any fault."""
    path = Path(path)
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")])
        hint = f" (did you mean '{path.parent / near[0]}'?)" if near else ""
        raise UserError(f"{path}: no such config file{hint}")
    try:
        plain = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not a YAML file ({reason}); mend it") from None
    if not isinstance(plain, dict):
        raise UserError(f"{path}: no sections; a config has model, data, train, eval, export")
    return override(from_dict(plain, str(path)), overrides)


def override(config: Config, overrides: Sequence[str]) -> Config:
    """Apply `section.key=value` strings; the value is YAML, checked like the file's."""
    plain = config.to_dict()
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"-o {text}: no '='; write -o section.key=value")
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UserError(f"-o {text}: {value!r} is not a YAML value; quote it") from None
        _assign(plain, key.strip(), parsed, "-o")
    return from_dict(plain, "-o") if overrides else config


def from_dict(plain: Mapping[str, Any], where: str) -> Config:
    """Build a validated configuration from nested dicts; `where` opens every error message."""
    names = ["model", *SECTIONS, "per_category"]
    for name, section in plain.items():
        if name not in names:
            raise UserError(f"{where}: unknown section '{name}'{_nearest(str(name), names)}")
        if section is not None and not isinstance(section, Mapping):
            raise UserError(f"{where}: '{name}' is {section!r}; it must hold 'key: value' lines")
    model = dict(plain.get("model") or {})
    flow = model.get("flow", "fastflow")
    if not isinstance(flow, str) or flow not in MODEL_SECTIONS:
        raise UserError(f"{where}: model.flow is {flow!r}; choose from {', '.join(MODEL_SECTIONS)}")
    kinds = {"model": MODEL_SECTIONS[flow], **SECTIONS}
    known = [f"{name}.{f.name}" for name, kind in kinds.items() for f in dataclasses.fields(kind)]
    sections = {
        name: _section(kind, dict(plain.get(name) or {}), name, where, known)
        for name, kind in kinds.items()
    }
    config = Config(**sections, per_category=_per_category(plain, sections, where))
    constraints.check(config, where)
    return config


def _section(
    kind: type, values: dict[str, Any], section: str, where: str, known: Sequence[str]
) -> Any:
    hints = typing.get_type_hints(kind)
    for name in values:
        if name not in hints:
            key = f"{section}.{name}"
            raise UserError(f"{where}: unknown key '{key}'{_nearest(key, known)}")
    converted = {
        name: _convert(value, hints[name], f"{where}: {section}.{name}")
        for name, value in values.items()
    }
    return kind(**converted)


def _per_category(plain: Mapping[str, Any], sections: dict[str, Any], where: str) -> dict:
    table = dict(plain.get("per_category") or {})
    base = {name: dataclasses.asdict(section) for name, section in sections.items()}
    seen: dict[str, str] = {}
    for category, values in table.items():
        place = f"{where}: per_category.{category}"
        if not isinstance(category, str):
            raise UserError(f"{place}: the name is not text to YAML; put it in quotes")
        other = seen.setdefault(canonical_name(category), category)
        if other != category:
            raise UserError(f"{place}: is '{other}' in another spelling; merge the two")
        if not isinstance(values, Mapping):
            raise UserError(f"{place} is {values!r}; it must hold 'section.key: value' lines")
        changed = {name: dict(section) for name, section in base.items()}
        for key, value in values.items():
            _assign(changed, key, value, place)
        from_dict(changed, place)
    return table


def _assign(plain: dict[str, Any], key: str, value: Any, where: str) -> None:
    section, dot, name = str(key).partition(".")
    if not dot or section not in ("model", *SECTIONS):
        known = [f"{s}.{k}" for s, keys in plain.items() if isinstance(keys, dict) for k in keys]
        raise UserError(f"{where}: unknown key '{key}'{_nearest(key, known)}; use section.key")
    plain[section] = {**(plain.get(section) or {}), name: value}


def _nearest(name: str, known: Sequence[str]) -> str:
    section, _, tail = name.rpartition(".")
    short = "".join(word[:1] for word in tail.split("_"))  # learning_rate: lr
    near = [k for k in known if k.rpartition(".")[2] in (tail, short)][:1]  # in any section
    near = near or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if near:
        return f" (did you mean '{near[0]}'?)"
    same = [k for k in known if k.startswith(f"{section}.")]
    groups = dict.fromkeys(k.partition(".")[0] for k in known)
    return f" (known: {', '.join(same or groups)})"


_TRUE, _FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")


def parse_bool(value: Any) -> bool:
    """Read true/false/1/0/yes/no in any case; `ValueError` otherwise."""
    text = str(value).strip().lower()
    if text in _TRUE or text in _FALSE:
        return text in _TRUE
    raise ValueError(f"{value!r} is not one of true, false, 1, 0, yes, no")


def _convert(value: Any, hint: Any, key: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _convert(value, next(a for a in arguments if a is not type(None)), key)
    if origin is Literal:
        choice = str(value) if isinstance(arguments[0], str) else value
        if choice not in arguments:
            raise UserError(f"{key} is {value!r}; choose from {', '.join(map(str, arguments))}")
        return choice
    if origin is tuple:
        return _convert_tuple(value, arguments, key)
    return _convert_scalar(value, hint, key)


def _convert_tuple(value: Any, arguments: tuple, key: str) -> tuple:
    if arguments[-1] is Ellipsis:
        items = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        return tuple(_convert_scalar(item, arguments[0], key) for item in items)
    if isinstance(value, int) and not isinstance(value, bool):
        value = [value] * len(arguments)
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != len(arguments):
        raise UserError(f"{key} is {value!r}; give one number or a list of {len(arguments)}")
    return tuple(_convert_scalar(v, a, key) for v, a in zip(value, arguments, strict=True))


def _convert_scalar(value: Any, kind: type, key: str) -> Any:
    article = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}[kind]
    try:
        if kind is bool:
            return parse_bool(value)
        if isinstance(value, bool) or value is None or isinstance(value, list | dict):
            raise ValueError
        number = value if kind is str or isinstance(value, int) else float(value)
        if kind is float and not math.isfinite(number):
            raise ValueError
        if kind is int and number != int(number):
            raise ValueError
        return kind(number)
    except (ValueError, OverflowError):
        raise UserError(f"{key} is {value!r}; it must be {article}") from None
