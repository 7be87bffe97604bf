"""From what a user wrote to the engine's options, by the table of :mod:`lance_ray.store_keys`: mappings in and out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from lance_ray.errors import InvalidArgumentError
from lance_ray.options import pairs
from lance_ray.store_keys import (
    ALIASES,
    ALTERNATIVES,
    ANONYMOUS,
    CLIENT_KEYS,
    ENDPOINT,
    ENGINE_TOO,
    FSSPEC,
    FSSPEC_ONLY,
    KINDS,
    PREFIXES,
    REFUSED,
    ROWS,
    TOGETHER,
)
from lance_ray.store_values import WrongValueError


def from_config(config: Any, kind: str) -> dict[str, str]:
    """The options of a configuration for one kind of store."""
    source = type(config).__name__
    values = {item.name: getattr(config, item.name) for item in fields(config)}
    found = translated(((source, name, value) for name, value in values.items() if value is not None), source)
    return _settled(found, kind, source, source)


def from_filesystem(filesystem: Any, parameter: str) -> tuple[str, dict[str, str]]:
    """Kind of store and options of an fsspec filesystem; neither for the local disk."""
    names = [filesystem.protocol] if isinstance(filesystem.protocol, str) else list(filesystem.protocol)
    if "file" in names or "local" in names:
        return "", {}
    kind = next((KINDS[name] for name in names if name in KINDS), None)
    if kind is None:
        raise InvalidArgumentError(parameter, names, f"no filesystem of this kind; known are those of {sorted(KINDS)}")
    if getattr(filesystem, "storage_args", ()):
        raise InvalidArgumentError(
            parameter, names, "has arguments given without their names, which cannot be told apart"
        )
    options = dict(filesystem.storage_options)
    if kind == "oss" and options.get("endpoint") is None:  # it may have been set later
        options["endpoint"] = getattr(filesystem, "_endpoint", None)
    return kind, from_fsspec(flattened(options, kind, parameter), kind, parameter)


def named(given: Mapping[Any, Any], parameter: str) -> Mapping[str, Any]:
    """The same mapping, refused if its keys are not names."""
    if not all(isinstance(name, str) for name in given):
        pairs(given, parameter)  # refuses
    return given


def is_fsspec(flat: Mapping[str, Any], kind: str) -> bool:
    """Whether some name is one that only fsspec has: the engine's own options pass without a look at each."""
    source = FSSPEC.get(kind)
    if source is None:
        return False
    known = {*ROWS[source], *(name for owner, name in REFUSED if owner == source), *FSSPEC_ONLY}
    nests = {name.partition(".")[0] for name in known if "." in name}
    told = {name for name in flat if name in known or name.partition(".")[0] in nests}
    return bool(told - ENGINE_TOO.get(kind, set()))


def from_fsspec(flat: dict[str, Any], kind: str, parameter: str) -> dict[str, str]:
    """Options with fsspec's names, and the engine's beside them; all others are refused by name."""
    source = FSSPEC[kind]
    told: list[tuple[str, str, Any]] = []
    unknown: list[str] = []
    for name, value in flat.items():
        if name in ROWS[source]:
            told.append((source, name, value))
        elif reason := REFUSED.get((source, name)):
            raise InvalidArgumentError(f"{parameter}[{name!r}]", "...", reason)
        elif name.startswith((PREFIXES[kind], "headers.", "lance_")) or name in CLIENT_KEYS:
            told.append(("engine", ALIASES.get(name, name), _plain(value)))
        elif name not in FSSPEC_ONLY:
            unknown.append(name)
    if unknown:
        raise InvalidArgumentError(parameter, sorted(unknown), f"unknown beside options in the style of {source}")
    return _settled(translated(told, parameter), kind, source, parameter)


def flattened(given: Mapping[str, Any], kind: str, parameter: str, prefix: str = "") -> dict[str, Any]:
    """Nested options by their dotted names, without those that are None. Other values than plain ones are refused."""
    found: dict[str, Any] = {}
    for key, value in given.items():
        name = f"{prefix}{key}"
        nests = any(known.startswith(f"{name}.") for known in ROWS.get(FSSPEC.get(kind, ""), ()))
        if isinstance(value, Mapping) and nests:
            found |= flattened(value, kind, parameter, f"{name}.")
        elif isinstance(value, (Mapping, list, tuple, set)) and not _takes_any(name, kind):
            raise InvalidArgumentError(f"{parameter}[{name!r}]", type(value).__name__, "must be a plain value")
        elif value is not None:
            found[name] = value
    return found


def _takes_any(name: str, kind: str) -> bool:
    """Whether the table itself has a word on nested values of this option."""
    return (kind, name) == ("gcs", "token") or (FSSPEC.get(kind), name) in REFUSED or name in FSSPEC_ONLY


def translated(told: Iterable[tuple[str, str, Any]], parameter: str) -> dict[str, str]:
    """The engine's keys and values of options given as (source, name, value)."""
    found: dict[str, str] = {}
    for source, name, value in told:
        where = f"{source}.{name}" if source in ROWS and parameter == source else f"{parameter}[{name!r}]"
        for key, text in _engine_pairs(source, name, value, where):
            if found.setdefault(key, text) != text:
                raise InvalidArgumentError(where, "...", f"contradicts another option that sets {key}")
    return found


def _engine_pairs(source: str, name: str, value: Any, where: str) -> Iterator[tuple[str, str]]:
    row = ROWS["DLF"].get(name) if source == "engine" else ROWS[source][name]
    if row is None:
        yield name, str(value)
        return
    try:
        made = row.convert(value)
    except WrongValueError as error:
        raise InvalidArgumentError(where, "...", str(error)) from None
    yield from made.items() if isinstance(made, dict) else ((row.key, made),)


def _plain(value: Any) -> str:
    text = str(value)
    return text.lower() if text.lower() in ("true", "false") else text


def _settled(options: dict[str, str], kind: str, source: str, parameter: str) -> dict[str, str]:
    """Options with a complete endpoint, after a look at what contradicts itself or would silently not be used."""
    for first, *others in TOGETHER.get(kind, ()):
        missing = [key for key in others if key not in options]
        if first in options and missing:
            reason = f"is of no use without {_names(source, missing)}"
            raise InvalidArgumentError(parameter, _names(source, [first]), reason)
    used = [key for key in ALTERNATIVES[kind] if key in options]
    used += [key for key in (ANONYMOUS.get(kind),) if key and options.get(key) == "true"]
    if len(used) > 1:
        raise InvalidArgumentError(
            parameter, _names(source, used), "contradict each other: give one kind of credentials"
        )
    return _with_scheme(options, kind, source, parameter)


def _names(source: str, keys: Iterable[str]) -> list[str]:
    """What the engine's keys are called in the user's way of writing."""
    return [next((row.name for row in ROWS[source].values() if key in row.key), key) for key in keys]


def _with_scheme(options: dict[str, str], kind: str, source: str, parameter: str) -> dict[str, str]:
    """Options whose endpoint says http or https (the engine panics without), and is allowed to be plain http."""
    key, plain = ENDPOINT[kind], options.get("allow_http")
    endpoint = options.get(key)
    if endpoint is None:
        if plain == "true":
            raise InvalidArgumentError(parameter, _names(source, ["allow_http"]), "plain http needs an endpoint")
        return options
    if "://" not in endpoint:
        endpoint = f"{'http' if plain == 'true' else 'https'}://{endpoint}"
    is_plain = endpoint.lower().startswith("http://")
    names = _names(source, [key, "allow_http"])
    if plain is not None and (plain == "true") != is_plain:
        raise InvalidArgumentError(parameter, names, "contradict each other on http and https")
    if is_plain and kind == "tos":
        raise InvalidArgumentError(parameter, names[:1], "the engine speaks only https to TOS")
    return options | {key: endpoint} | ({"allow_http": "true"} if is_plain and kind != "oss" else {})


def with_bucket(options: dict[str, str], bucket: str) -> dict[str, str]:
    """Options whose endpoint has the bucket in its host for virtual addressing: the engine adds none."""
    endpoint = options.get(ENDPOINT["s3"])
    if endpoint is None or options.get("aws_virtual_hosted_style_request") != "true":
        return options
    parts = urlsplit(endpoint)
    if not bucket or parts.netloc.startswith(f"{bucket}."):
        return options
    return options | {ENDPOINT["s3"]: urlunsplit(parts._replace(netloc=f"{bucket}.{parts.netloc}"))}
