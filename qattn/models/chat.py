"""Conversations as text, by the Jinja template that a model brings along.

A template is a program from a file that somebody else made, so it runs in Jinja's sandbox, which keeps it from
Python's internals, and its loops are counted, for nested ones could go on for years.
"""

from __future__ import annotations

import datetime
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from qattn.errors import QattnError
from qattn.models._extra import require

MAX_STEPS = 1_000_000  # turns of all loops together: a second of work; real templates take hundreds
MAX_OUTPUT = 64_000_000  # characters: more than any context
MAX_EXPONENT = 1000


class TemplateError(QattnError, ValueError):
    """A chat template is no valid Jinja, fails, or refuses the conversation."""


class ChatTemplate:
    """A chat template, compiled.

    Parameters
    ----------
    source : str
        The template, as in a file's ``tokenizer.chat_template``.
    bos_token, eos_token : str
        What the template inserts under these names.

    Raises
    ------
    TemplateError
        It is no valid template.
    MissingExtraError
        The package ``jinja2`` is needed and not installed.
    """

    def __init__(self, source: str, *, bos_token: str = "", eos_token: str = "") -> None:
        self._jinja: Any = require("jinja2")
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        try:
            self._template = _environment().from_string(source)
        except self._jinja.TemplateSyntaxError as error:
            raise TemplateError(f"line {error.lineno} of the chat template: {error.message}") from error

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **values: Any
    ) -> str:
        """Write a conversation as the model was trained to read it.

        Parameters
        ----------
        messages : sequence of mappings
            ``{"role": "user", "content": "…"}`` each; roles are "system", "user", "assistant" and what else the
            template knows.
        add_generation_prompt : bool
            End with the beginning of the assistant's answer.
        values
            Further names for the template, such as ``tools``.

        Raises
        ------
        TemplateError
            The template fails, or refuses these messages.
        """
        names = {"tools": None, **self._tokens, **values}
        try:
            pieces = self._template.generate(messages=messages, add_generation_prompt=add_generation_prompt, **names)
            return _joined(pieces)
        except TemplateError:
            raise
        except Exception as error:  # a template can fail in every way that a program can
            raise TemplateError(f"the chat template failed: {type(error).__name__}: {error}") from error


def _joined(pieces: Iterable[str]) -> str:
    lengths, kept = 0, []
    for piece in pieces:
        lengths += len(piece)
        if lengths > MAX_OUTPUT:
            raise TemplateError(f"the chat template wrote more than {MAX_OUTPUT} characters")
        kept.append(piece)
    return "".join(kept)


def _environment() -> Any:
    """Make a sandbox with what templates rely on: the names and whitespace rules of the transformers library."""
    jinja: Any = require("jinja2")
    sandbox: Any = require("jinja2.sandbox")

    class Environment(sandbox.ImmutableSandboxedEnvironment):  # type: ignore[misc]
        intercepted_binops = frozenset({"*", "**"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator == "**" and isinstance(right, int) and abs(right) > MAX_EXPONENT:
                raise TemplateError(f"the chat template raises something to the power of {right}")
            for sequence, count in ((left, right), (right, left)):
                if hasattr(sequence, "__len__") and isinstance(count, int) and len(sequence) * count > MAX_OUTPUT:
                    raise TemplateError(f"the chat template repeats something {count} times")
            return super().call_binop(context, operator, left, right)

        def _parse(self, source: str, name: str | None, filename: str | None) -> Any:
            """Make every loop count its turns: ``for x in xs`` becomes ``for x in xs | counted``."""
            tree = super()._parse(source, name, filename)
            for loop in tree.find_all(jinja.nodes.For):
                loop.iter = jinja.nodes.Filter(loop.iter, "counted", [], [], None, None, lineno=loop.lineno)
            return tree

    @jinja.pass_context  # type: ignore[untyped-decorator]
    def counted(context: Any, items: Any) -> Iterator[Any]:
        steps = context.parent.setdefault("__steps", itertools.count(1))
        for item in items:
            if next(steps) > MAX_STEPS:
                raise TemplateError(f"the chat template loops more than {MAX_STEPS} times")
            yield item

    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters.update(counted=counted, tojson=_to_json)
    environment.globals.update(raise_exception=_refuse, strftime_now=_strftime_now)
    return environment


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Jinja's own filter would escape HTML, which no model was trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _refuse(message: str) -> None:
    raise TemplateError(f"the chat template refuses the conversation: {message}")


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)
