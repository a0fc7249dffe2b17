"""The Jinja environment that chat templates run in: what they may call, and how large anything may become. Pure.

Templates come with a model and see what clients write, so neither may cost the service its memory. jinja2's sandbox
keeps them from Python's internals; here every operation that can make much out of little is capped besides. Time is
not bounded here: see `deadline_threads.py`. A cap that is passed raises `SecurityError`.
"""

from __future__ import annotations

import functools
import json
import re
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from jinja2 import nodes
from jinja2.environment import Template
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from weft import limits

# Characters or items of any one value; twice the largest message, since templates wrap what they are given.
MAX_SIZE: Final = 2 * limits.MAX_MESSAGE_BYTES
MAX_INT_BITS: Final = 4096
MAX_WIDTH: Final = 10_000  # columns that a string may be padded or indented to
_LONG_NUMBER: Final = re.compile(r"\d{5}|\*")
_WIDTH_FILTERS: Final = frozenset(("batch", "center", "indent", "slice", "wordwrap"))
_PADDING: Final = frozenset(("center", "expandtabs", "ljust", "rjust", "zfill"))


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """Renders as `transformers` does: trimmed blocks, loop controls, `generation` blocks, its globals and filters."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols])
        self.concat = concat  # type: ignore[method-assign]  # an instance's own, in place of "".join
        self.filters = {name: _capped_filter(name, function) for name, function in self.filters.items()}
        self.filters["tojson"] = tojson
        self.globals |= {"raise_exception": raise_exception, "dict": PlainDict(), "namespace": PlainNamespace}
        # Makes text of any length, and no template needs it.
        del self.globals["lipsum"]

    def compile_capped(self, source: str) -> Template:
        """Compile a template whose `~` is capped as well. Raises TemplateSyntaxError."""
        tree = _CapConcat().visit(self.parse(source))
        return self.template_class.from_code(self, self.compile(tree), self.make_globals(None))

    def concat_values(self, *values: Any) -> str:
        """What `~` does."""
        return concat(map(str, values))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        _CHECKS[operator](left, right)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: B902  # as in jinja2
        text = getattr(__obj, "__self__", None)
        if isinstance(__obj, types.BuiltinMethodType) and isinstance(text, str):
            _check_method(__obj.__name__, text, args, kwargs)
        return super().call(__context, __obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        formatter, text, is_map = _CappedFormatter(self), value.__self__, value.__name__ == "format_map"

        def format_capped(*args: Any, **kwargs: Any) -> str:
            return formatter.vformat(text, (), args[0]) if is_map else formatter.vformat(text, args, kwargs)

        return format_capped


class GenerationTag(Extension):
    """`{% generation %}` marks what the assistant said, for training; here it renders what it holds."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class PlainDict:
    """`dict` for templates: makes dictionaries, and leads nowhere else."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


class PlainNamespace(Namespace):
    """jinja2's `namespace`, without names that mean something to Python."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # noqa: B902  # as in jinja2: any name may be a keyword
        for name in dict(*args[1:], **kwargs):
            _check_public(name)
        Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_public(name)
        super().__setitem__(name, value)


def raise_exception(message: object) -> None:
    """How a template refuses a conversation."""
    raise TemplateError(str(message))


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as Python writes it; jinja2's own filter escapes what HTML would misread."""
    _check_width(indent if isinstance(indent, int) else 0)
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    _check_size(len(text))
    return text


def concat(pieces: Iterable[str]) -> str:
    """Join pieces, which may be made one by one, until there are too many."""
    kept: list[str] = []
    size = 0
    for piece in pieces:
        size += len(piece)
        _check_size(size)
        kept.append(piece)
    return "".join(kept)


class _CappedFormatter(SandboxedFormatter):
    def format_field(self, value: Any, format_spec: str) -> Any:
        if _LONG_NUMBER.search(format_spec):
            raise SecurityError("a width in a format is too large")
        return super().format_field(value, format_spec)


class _CapConcat(NodeTransformer):
    """`a ~ b` compiles to a plain join; make it a call that is capped."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        join = nodes.EnvironmentAttribute("concat_values", lineno=node.lineno)
        return nodes.Call(join, node.nodes, [], None, None, lineno=node.lineno)


def _capped_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def capped(*args: Any, **kwargs: Any) -> Any:
        # jinja2 puts its own context or environment before a filter's arguments.
        own = args[1:] if hasattr(function, "jinja_pass_arg") else args
        if name in _WIDTH_FILTERS:
            _check_width(max((value for value in (*own[1:], *kwargs.values()) if isinstance(value, int)), default=0))
        if own and name == "join":
            own_list = list(own[0])
            _check_size(sum(map(_size, own_list)) + len(own_list) * sum(map(_size, (*own[1:2], kwargs.get("d")))))
            args = tuple(own_list if value is own[0] else value for value in args)
        elif own and isinstance(own[0], str):
            _check_method(name, own[0], own[1:], kwargs)
        return function(*args, **kwargs)

    return capped


def _check_method(name: str, text: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Check a method or filter of a string, by name, before it makes a large one."""
    values = [*args, *kwargs.values()]
    widths = [value for value in values if isinstance(value, int)]
    if name in _PADDING:
        _check_width(max(widths, default=0))
    if name == "expandtabs":
        _check_size(len(text) * max(widths, default=8))
    elif name == "indent":
        longest = max(widths + [len(value) for value in values if isinstance(value, str)], default=4)
        _check_size(len(text) + (text.count("\n") + 1) * longest)
    elif name == "replace":
        old, new = (str(value) for value in (*values, "", "")[:2])
        _check_size(len(text) + (text.count(old) if old else len(text) + 1) * len(new))
    elif name == "join" and args and isinstance(args[0], list | tuple):
        _check_size(sum(map(_size, args[0])) + len(text) * len(args[0]))
    elif name == "format":
        _check_format(text, values)


def _check_add(left: Any, right: Any) -> None:
    _check_size(_size(left) + _size(right))


def _check_multiply(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() + right.bit_length())
    elif isinstance(left, int):
        _check_size(left * _size(right))
    elif isinstance(right, int):
        _check_size(_size(left) * right)


def _check_power(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() * abs(right))


def _check_percent(left: Any, right: Any) -> None:
    if isinstance(left, str):
        _check_format(left, right)


def _check_format(text: str, values: Any) -> None:
    if any(_LONG_NUMBER.search(spec) for spec in re.findall(r"%(?:\([^)]*\))?[^a-zA-Z%]*", text)):
        raise SecurityError("a width in a format is too large")
    held = values if isinstance(values, tuple | list) else values.values() if isinstance(values, dict) else (values,)
    _check_size(len(text) + text.count("%") * max((_size(value) for value in held), default=0))


_CHECKS: Final[dict[str, Callable[[Any, Any], None]]] = {
    "+": _check_add,
    "*": _check_multiply,
    "**": _check_power,
    "%": _check_percent,
}


def _size(value: Any) -> int:
    return len(value) if isinstance(value, str | bytes | list | tuple | dict) else 1


def _check_size(size: int) -> None:
    if size > MAX_SIZE:
        raise SecurityError(f"the template makes more than {MAX_SIZE} characters")


def _check_bits(bits: int) -> None:
    if bits > MAX_INT_BITS:
        raise SecurityError(f"the template makes a number of more than {MAX_INT_BITS} bits")


def _check_width(width: int) -> None:
    if width > MAX_WIDTH:
        raise SecurityError(f"the template asks for a width of {width}")


def _check_public(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a template's names do not begin with an underscore: {name!r}")
