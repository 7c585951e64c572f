"""What a service offers, read off its class."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable
from typing import Any

import msgspec

from .._native import Ref
from .frames import Method
from .marshal import Reader
from .ownership import AnyRef

__all__ = ["Bound", "Interface"]

MISSING = type("Missing", (), {"__slots__": ()})()  # the caller left it to the method's default
RESERVED = frozenset({"aio", "close", "future", "traffic", "using"})  # what clients have themselves
_ALLOWED = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class Bound:
    """A method of a service object, ready to be called with what a frame holds."""

    __slots__ = ("function", "is_async", "name", "nr_max", "nr_required", "reader", "takes_none")

    def __init__(self, method: Method, function: Callable[..., Any], reader: Reader) -> None:
        self.name = method.name
        self.function = function
        self.is_async = inspect.iscoroutinefunction(function)
        self.reader = reader
        self.nr_required = method.nr_required
        self.nr_max = len(method.parameters)
        self.takes_none = not method.parameters


class Interface:
    """The methods of a class: all that are public and defined with def or async def.

    Parameters are positional; the client turns keywords into positions. Annotations are checked by msgspec; a parameter
    without one takes whatever comes. Defaults are the server's.

    Raises:
        TypeError: a method takes * or ** or keyword-only parameters, has a name that clients use themselves, or there
            is none.
    """

    def __init__(self, cls: type) -> None:
        self.name = cls.__qualname__
        self.methods: list[Method] = []
        self._parameters: list[Reader] = []
        self.results: dict[str, Any] = {}
        self.defaults: dict[str, dict[str, Any]] = {}
        for name in sorted(dir(cls)):
            function = inspect.getattr_static(cls, name)
            if isinstance(function, (staticmethod, classmethod)):
                function = function.__func__
            if not name.startswith("_") and inspect.isfunction(function):
                self._add(cls, name, function)
        if not self.methods:
            raise TypeError(f"{cls.__qualname__} has no public methods to serve")

    def _add(self, cls: type, name: str, function: Callable[..., Any]) -> None:
        static = isinstance(inspect.getattr_static(cls, name), staticmethod)
        if name in RESERVED:
            raise TypeError(
                f"{cls.__qualname__}.{name} cannot be called remotely: a client's own {name} is in the way; rename it"
            )
        try:
            signature = inspect.signature(function, eval_str=True)
        except (NameError, TypeError):  # said below
            signature = inspect.signature(function)
        parameters = list(signature.parameters.values())[0 if static else 1 :]
        for parameter in parameters:
            if parameter.kind not in _ALLOWED:
                raise TypeError(
                    f"{cls.__qualname__}.{name}: parameter {parameter} cannot be called remotely; "
                    "give every parameter a name and a position"
                )
        try:
            hints = typing.get_type_hints(function, include_extras=True)
        except (NameError, TypeError) as error:
            raise TypeError(
                f"{cls.__qualname__}.{name}: its annotations cannot be read: {error}"
            ) from error
        fields: list[Any] = []
        for parameter in parameters:
            wanted = _of_any_memory(hints.get(parameter.name, Any))
            default = parameter.default
            if default is inspect.Parameter.empty:
                fields.append((parameter.name, wanted))
            else:
                fields.append((parameter.name, wanted, MISSING))
        self.methods.append(
            Method(
                name,
                tuple(parameter.name for parameter in parameters),
                sum(parameter.default is inspect.Parameter.empty for parameter in parameters),
                str(signature),
                inspect.getdoc(function),
            )
        )
        self.defaults[name] = {
            parameter.name: parameter.default
            for parameter in parameters
            if parameter.default is not inspect.Parameter.empty
        }
        self.results[name] = _of_any_memory(hints.get("return", Any))
        self._parameters.append(_reader(name, fields))

    def bind(self, service: object) -> list[Bound]:
        """Return the methods of an object of the class."""
        return [
            Bound(method, getattr(service, method.name), reader)
            for method, reader in zip(self.methods, self._parameters, strict=True)
        ]


def _of_any_memory(wanted: Any) -> Any:
    """Return an annotation that takes Refs of either memory where it says Ref; fields of classes are left as they are."""
    if wanted is Ref:
        return AnyRef
    args = typing.get_args(wanted)
    if not any(arg is Ref or typing.get_args(arg) for arg in args):
        return wanted
    every = tuple(_of_any_memory(arg) for arg in args)
    if isinstance(wanted, types.UnionType):
        return typing.Union[every]  # noqa: UP007 - of a tuple
    try:
        return wanted.copy_with(every) if hasattr(wanted, "copy_with") else wanted.__origin__[every]
    except (AttributeError, TypeError):
        return wanted


def _reader(name: str, fields: list[Any]) -> Reader:
    """Return a reader of an argument list; its type has one field per parameter, in order."""
    plain = [
        (f"p{i}", field[1], *field[2:]) for i, field in enumerate(fields)
    ]  # a parameter may be called like a method of Struct
    try:
        wanted = msgspec.defstruct(
            f"{name}_arguments", plain, array_like=True, forbid_unknown_fields=True, gc=False
        )
        return Reader(wanted)
    except TypeError:  # an annotation that msgspec cannot check
        loose = [(field[0], Any, *field[2:]) for field in plain]
        return Reader(
            msgspec.defstruct(
                f"{name}_arguments", loose, array_like=True, forbid_unknown_fields=True, gc=False
            )
        )
