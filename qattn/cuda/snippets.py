"""A format's snippets, as functions that kernels call: see `qattn.formats._registry` for what a snippet is.

Numba freezes the arrays that a function refers to in constant memory, anew for each call.  Threads of a warp that read
different places of it wait for each other, and 16 copies of a grid don't fit.  So such an array becomes a `Book` here:
one copy in global memory, which the first-level cache serves, read a row at a time.
"""

from __future__ import annotations

import functools
import hashlib
import operator
from types import FunctionType
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.cuda.extending import lower_builtin, typeof_impl
from numba.cuda.np import numpy_support
from numba.cuda.typing.templates import AbstractTemplate, infer_global, signature

from qattn.cuda.kernel import device

GLOBAL = 1  # the number of global memory among LLVM's address spaces


class Book:
    """An array that kernels read: one of integers, or rows of 4 or 8 bytes."""

    def __init__(self, values: np.ndarray[Any, Any]) -> None:
        self.values = np.ascontiguousarray(values)
        self.name = f"book_{_digest(self.values)}"
        self.rows = self.values.ndim == 2
        width = self.values.shape[1] if self.rows else self.values.itemsize
        self.words = np.frombuffer(self.values.tobytes(), f"<u{width}")

    def __getitem__(self, index: Any) -> Any:
        """What a kernel gets: for type checkers, and for snippets that run as Python."""
        return self.values[index]


class _BookType(types.Dummy):  # type: ignore[misc]
    """The type of one book: there is nothing of it at run time."""

    def __init__(self, book: Book) -> None:
        self.book = book
        super().__init__(name=book.name)


@typeof_impl.register(Book)
def _type_of_book(value: Book, _: Any) -> _BookType:
    return _BookType(value)


@infer_global(operator.getitem)
class _BookItem(AbstractTemplate):  # type: ignore[misc]
    """book[index] or book[row, column] → an integer as wide as the array's."""

    def generic(self, args: Any, kws: Any) -> Any:
        """The signature, if it is a book that is indexed."""
        if isinstance(args[0], _BookType):
            return signature(numpy_support.from_dtype(args[0].book.values.dtype), *args)
        return None


@lower_builtin(operator.getitem, _BookType, types.Any)
def _item(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    """Load a word; a row's columns are bytes of it, so that a row is loaded once if its number is known."""
    book, index_type = sig.args[0].book, sig.args[1]
    index, column = args[1], None
    if book.rows:
        index, column = (builder.extract_value(args[1], i) for i in range(2))
        column_type, index_type = index_type[1], index_type[0]
    wide = context.cast(builder, index, index_type, types.int64)
    address = builder.gep(_words(builder.module, book), [ir.Constant(ir.IntType(64), 0), wide])
    word = builder.load(address)
    word.set_metadata("invariant.load", builder.module.add_metadata([]))
    if column is None:
        return word
    column = context.cast(builder, column, column_type, types.uint32)
    shift = builder.shl(column, ir.Constant(column.type, 3))
    if word.type.width > shift.type.width:
        shift = builder.zext(shift, word.type)
    return builder.trunc(builder.lshr(word, shift), ir.IntType(8))


def _words(module: Any, book: Book) -> Any:
    """The module's only copy of a book."""
    if book.name not in module.globals:
        element = ir.IntType(8 * book.words.itemsize)
        made = ir.GlobalVariable(module, ir.ArrayType(element, book.words.size), book.name, addrspace=GLOBAL)
        made.linkage, made.global_constant, made.align = "internal", True, 16
        made.initializer = ir.Constant(made.value_type, [int(word) for word in book.words])
    return module.globals[book.name]


def _digest(values: np.ndarray[Any, Any]) -> str:
    return hashlib.sha256(repr((values.dtype.str, values.shape)).encode() + values.tobytes()).hexdigest()[:12]


@functools.cache
def compiled(snippet: Any) -> Any:
    """A snippet as a function that kernels can call; None stands for one that gives 1."""
    if snippet is None:
        return device(_one)
    scope = {name: Book(v) if isinstance(v, np.ndarray) else v for name, v in snippet.__globals__.items()}
    made = FunctionType(snippet.__code__, scope, snippet.__name__, snippet.__defaults__, snippet.__closure__)
    return device(made)


def _one(b: Any, g: int) -> int:
    return 1
