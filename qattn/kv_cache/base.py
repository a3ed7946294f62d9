"""What a cache is: sequences of tokens in pages of memory, each token with an index and a position.

The *index* is a token's place in its sequence, and tells what came before what; the *position* is what its key was
rotated by, and how windows measure.  The two are the same until a sequence is edited, or a layer is given other
positions.
"""

from __future__ import annotations

import abc
import contextlib
import copy
import operator
from collections.abc import Iterator
from typing import Any

import numpy as np

from qattn import _check, backends, devices
from qattn._backend import as_host
from qattn._changes import Watched
from qattn.batch import Batch
from qattn.errors import CacheError
from qattn.kv_cache.layouts import layout_for
from qattn.rope import Rotation

Array = np.ndarray[Any, Any]
NEVER = np.iinfo(np.int64).max


class CacheBase(Watched, abc.ABC):
    """Keys and values of several sequences, for one layer.  Keys are stored rotated.  One call at a time may use it.

    ``len(cache)`` is the number of tokens of the only sequence, `lengths` those of all.  Memory consists of pages that
    hold equally many tokens; how sequences get pages is up to the subclass.
    """

    cascade = False
    """Whether layers should read once what sequences share."""
    coming: tuple[Array, Array] | None = None
    """How long sequences will be when the tokens at hand are there, and the row offsets of those: kernels tell only the
    GPU.  None in between."""

    def __init__(self, params: Any, sequences: int, device: str) -> None:
        if operator.index(sequences) < 1:
            raise ValueError(f"sequences is {sequences}; expected at least 1")
        self.params, self.sequences, self.device = params, sequences, devices.resolve(device)
        self.lengths: Array = np.zeros(sequences, np.int64)
        self.counts: Any = self.lengths if self.device == "cpu" else devices.asarray(self.lengths, self.device)
        """The lengths that kernels read and update: `lengths` itself on a CPU, and on a GPU an array there."""
        self.starts: Array = np.zeros(sequences, np.int64)
        """The first token of each sequence that is still there: 0, unless a window lets go of what lies before it."""
        self._layout = layout_for(self.device)
        self._keys: Any
        self._values: Any
        self._known: list[Array] = [np.empty(0, np.int64)] * sequences
        """Positions of each sequence's first tokens.  Those of the rest, maybe all, follow on one by one."""
        self._ahead: Array = np.zeros(sequences, np.int64)
        """How far the positions of tokens that follow are ahead of their indices."""
        self._edited: Array = np.full(sequences, NEVER)
        """The index from which on tokens are not what computing their sequence anew would give."""

    # Memory, which subclasses divide among sequences

    @property
    @abc.abstractmethod
    def capacity(self) -> int:
        """Tokens of a sequence for which there is room now."""

    @abc.abstractmethod
    def view(self) -> Any:
        """The memory, for kernels."""

    @abc.abstractmethod
    def reserve(self, lengths: Array) -> None:
        """Make room for sequences of these lengths, (sequences,) int64.

        Raises
        ------
        CacheError
            If there is none.  The cache is as it was.
        """

    @abc.abstractmethod
    def _pieces(self, sequence: int, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Where tokens start … stop - 1 lie: page, and the first token and the end there."""

    @abc.abstractmethod
    def _claim(self, sequence: int, start: int, stop: int) -> None:
        """Let tokens start … stop - 1 lie where no other sequence sees them, since they will be written over."""

    @abc.abstractmethod
    def _cut(self, sequence: int, length: int) -> None:
        """Give back what lies behind the first `length` tokens."""

    @abc.abstractmethod
    def _replace(self, sequences: list[int], starts: list[int], lengths: list[int]) -> None:
        """Make room for other tokens start … length - 1 in place of what sequences have, or leave all as it is."""

    @property
    def _arrays(self) -> tuple[Any, ...]:
        """All memory: arrays whose axes are pages, KV heads, entries of tokens, and what these hold."""
        return self._keys, self._values

    def __copy__(self) -> CacheBase:
        """A copy of its own memory: two that shared theirs would write over each other's tokens."""
        return copy.deepcopy(self)

    # What sequences have

    def __len__(self) -> int:
        if self.sequences > 1:
            raise TypeError(f"a cache of {self.sequences} sequences has no single length; see its lengths")
        return int(self.lengths[0])

    @property
    def nbytes(self) -> int:
        """Bytes of memory held."""
        return sum(int(array.nbytes) for array in self._arrays)

    def __repr__(self) -> str:
        tokens = ", ".join(map(str, self.lengths[:8])) + (", …" if self.sequences > 8 else "")
        where = "" if self.device == "cpu" else f", device={self.device!r}"
        size = f"{self.nbytes / 1e6:.1f} MB{self._details()}{where}"
        return f"{type(self).__name__}({self.sequences} sequences, tokens: {tokens}, {self.params.dtype}, {size})"

    def _details(self) -> str:
        """What else there is to say of the memory."""
        return ""

    def read(self, sequence: int = 0, start: int = 0, stop: int | None = None) -> tuple[Array, Array]:
        """Copies of the cached keys (tokens, n_kv_heads, head_dim) and values (tokens, n_kv_heads, value_dim).

        They are float32, and NumPy arrays wherever the cache is.

        Raises
        ------
        CacheError
            If the sequence has no token `stop` - 1, or `start` is no longer there.
        """
        start, stop = self._range(sequence, start, stop)
        nothing = np.empty((2, 0, self.params.n_kv_heads, 1), np.float32)
        parts = [(nothing[0].repeat(self.params.head_dim, axis=2), nothing[1].repeat(self.params.values, axis=2))]
        for page, first, end in self._pieces(sequence, start, stop):
            parts.append(self._layout.read(self.params, self._keys, self._values, page, first, end))
        keys, values = (np.concatenate(each) for each in zip(*parts, strict=True))
        return keys, values

    def positions(self, sequence: int = 0) -> Array:
        """The positions of a sequence's tokens, (tokens,) int64; where tokens have several, the largest."""
        self._check(sequence)
        length, known = int(self.lengths[sequence]), self._known[sequence]
        return np.concatenate([known[:length], np.arange(len(known), length) + self._ahead[sequence]])

    @property
    def next_positions(self) -> Array:
        """The positions that the next tokens have by default, (sequences,) int64: each follows the last one."""
        return self.lengths + self._ahead

    @property
    def indexed(self) -> bool:
        """Whether the position of every token is its index."""
        return not self._ahead.any() and all(np.array_equal(each, np.arange(len(each))) for each in self._known)

    def positions_at(self, slots: Array, places: Array) -> Array:
        """The positions that tokens have, or will have by default: of sequences `slots`, at indices `places`.

        Indices below 0 are of tokens that would come before the first.
        """
        positions = places + self._ahead[slots]
        known = np.array([len(each) for each in self._known])
        for i in np.flatnonzero((places < known[slots]) & (known[slots] > 0)).tolist():
            positions[i] = self._known[slots[i]][max(places[i], 0)] + min(places[i], 0)
        return positions

    def note(self, lengths: Array, positions: Array | None = None, row_offsets: Array | None = None) -> None:
        """Take note of the lengths that kernels have brought about, and of positions that are not the default ones.

        Kernels of a GPU tell only the GPU.  positions : (tokens,) or (rows, tokens) int64, of which sequence s has
        tokens row_offsets[s] … row_offsets[s + 1] - 1
        """
        self.lengths[:] = lengths
        if positions is not None and row_offsets is not None:
            largest = positions if positions.ndim == 1 else positions.max(axis=0)
            for s in np.flatnonzero(np.diff(row_offsets)).tolist():
                new = largest[row_offsets[s] : row_offsets[s + 1]]
                self._place(s, np.concatenate([self.positions(s)[: lengths[s] - len(new)], new]))

    def append(self, keys: Any, values: Any, sequence: int = 0, positions: Any = None) -> None:
        """Append keys and values that come from elsewhere: for cross attention, or from another program.

        Parameters
        ----------
        keys : (tokens, n_kv_heads, head_dim) floats
            Rotated already.
        values : (tokens, n_kv_heads, value_dim) floats
        sequence : int
        positions : (tokens,) integers, optional
            By which keys are rotated; by default they follow on.

        Examples
        --------
        >>> cache = KVCache(KVCacheParams(n_kv_heads=1, head_dim=4))
        >>> cache.append(np.ones((3, 1, 4)), np.zeros((3, 1, 4)))
        >>> len(cache), cache.positions()
        (3, array([0, 1, 2]))
        """
        self._check(sequence)
        keys, values = (as_host(a, name) for a, name in ((keys, "keys"), (values, "values")))
        _check.shape("keys", keys, ("tokens", self.params.n_kv_heads, self.params.head_dim))
        _check.shape("values", values, (len(keys), self.params.n_kv_heads, self.params.values))
        for array, name in ((keys, "keys"), (values, "values")):
            if not _check.is_real(array):
                raise ValueError(f"{name} have dtype {array.dtype}; expected floats")
            _check.finite(name, array)
        if positions is not None:
            positions = as_host(positions, "positions")
            _check.shape("positions", positions, (len(keys),))
            _check.positions("positions", positions)
            positions = np.concatenate([self.positions(sequence), positions.astype(np.int64)])
        self._append(sequence, keys, values)
        if positions is not None:
            self._place(sequence, positions)

    def truncate(self, length: int, sequence: int = 0) -> None:
        """Keep the first `length` tokens of a sequence and forget the rest.

        Raises
        ------
        CacheError
            If it has fewer, or if the window of the token that follows begins before what is still there.
        """
        length = self.check_length(length, sequence)
        self._cut(sequence, length)
        self._set_length(sequence, length)
        if length < len(self._known[sequence]):
            self._place(sequence, self._known[sequence][:length])
        if length <= self._edited[sequence]:
            self._edited[sequence] = NEVER

    def check_length(self, length: int, sequence: int = 0) -> int:
        """Raise CacheError if `truncate` would → the length as an integer."""
        self._check(sequence)
        length = operator.index(length)
        if not 0 <= length <= self.lengths[sequence]:
            raise CacheError(f"length is {length}; sequence {sequence} has {self.lengths[sequence]} tokens")
        if length < self.lengths[sequence]:
            self._check_window(sequence, length)
        return length

    def reset(self, sequence: int | None = None) -> None:
        """Forget all tokens of one sequence, or of all."""
        for each in range(self.sequences) if sequence is None else [sequence]:
            self.truncate(0, each)

    # How

    @contextlib.contextmanager
    def appending(self, lengths: Array, row_offsets: Array) -> Iterator[None]:
        """While kernels append: so many tokens sequences will have, and these are theirs.  A failure leaves none."""
        before, self.coming = self.lengths.copy(), (lengths, row_offsets)
        try:
            yield
        except BaseException:  # an interrupt too
            for s in range(self.sequences):
                self._set_length(s, int(before[s]))
            raise
        finally:
            self.coming = None

    def _place(self, sequence: int, positions: Array) -> None:
        """Note the positions of a sequence's first tokens; further ones follow on."""
        self._known[sequence] = positions
        self._ahead[sequence] = positions[-1] + 1 - len(positions) if len(positions) else 0

    def _set_length(self, sequence: int, length: int) -> None:
        self.lengths[sequence] = length
        if self.device != "cpu":
            with devices.current(self.device):
                self.counts[sequence] = length

    def _append(self, sequence: int, keys: Array, values: Array) -> None:
        lengths = self.lengths.copy()
        lengths[sequence] += len(keys)
        self.reserve(lengths)
        self._write(sequence, int(self.lengths[sequence]), keys, values)
        self.lengths[:] = lengths

    def _write(
        self, sequence: int, start: int, keys: Array, values: Array, turn: tuple[Rotation, Array] | None = None
    ) -> None:
        """Write tokens from index `start` on, for which there is room, and turn keys by a table and rows of it."""
        tokens = len(keys)
        if not tokens:
            return
        xp, backend = devices.namespace(self.device), backends.get(self.device.split(":")[0])
        rows = np.concatenate([keys.reshape(tokens, -1), values.reshape(tokens, -1)], axis=1)
        offsets = np.zeros(self.sequences + 1, np.int64)
        offsets[sequence + 1 :] = tokens
        with devices.current(self.device):
            rotation, angles = turn or (Rotation.none(1, self.device), np.zeros(tokens, np.int64))
            places = np.arange(start, start + tokens)
            batch = Batch(np.full(tokens, sequence), places, angles, offsets).to(self.device)
            rows = xp.asarray(np.ascontiguousarray(rows, dtype=np.float32))
            backend.rotate_and_store(rows, rotation, batch, self, xp.empty((tokens, 0, keys.shape[2]), np.float32))

    def _check(self, sequence: int) -> None:
        if not 0 <= operator.index(sequence) < self.sequences:
            raise CacheError(f"there is no sequence {sequence}; the cache has {self.sequences}")

    def _seen(self, lengths: Array) -> Array:
        """The first token that tokens behind so many may see, and that appending them leaves in the cache."""
        return np.zeros_like(lengths)

    def check_mask(self, mask: Any, lengths: Array, row_offsets: Array, first: Array | None = None) -> None:
        """Check that the last tokens of sequences of these lengths, appended or to be, see none that are gone.

        first : (tokens,) int64, which keys they see first, if that isn't what the mask tells of their indices

        Raises
        ------
        CacheError
            If by their mask they see tokens that a window has left behind.
        """
        new = np.diff(row_offsets)
        kept = np.maximum(self.starts, self._seen(lengths - new))
        for s in np.flatnonzero((kept > 0) & (new > 0)).tolist():
            if first is None:
                sees = min(mask.bounds(query, int(lengths[s]))[0] for query in range(lengths[s] - new[s], lengths[s]))
            else:
                sees = int(first[row_offsets[s] : row_offsets[s + 1]].min())
            if sees < kept[s]:
                raise CacheError(
                    f"by the mask {mask}, new tokens of sequence {s} see token {sees}, and the cache's window leaves "
                    f"those before {kept[s]} behind"
                )

    def _check_window(self, sequence: int, length: int) -> None:
        """Raise CacheError if what a token at that index sees is no longer there."""
        sees = int(self._seen(np.array([length]))[0])
        if length and sees < self.starts[sequence]:
            raise CacheError(
                f"a token behind {length} of sequence {sequence} would see token {sees}, and the window has left those "
                f"before {self.starts[sequence]} behind"
            )

    def _check_limit(self, lengths: Array) -> None:
        """Raise CacheError for sequences that would be longer than `max_length`."""
        limit, longest = self.params.max_length, int(lengths.max(initial=0))
        if limit is not None and longest > limit:
            slot = int(lengths.argmax())
            raise CacheError(
                f"sequence {slot} would have {longest} tokens, but the cache holds at most {limit} "
                f"(it has {self.lengths[slot]}); reset() it, or make it with a larger max_length"
            )

    def _range(self, sequence: int, start: int, stop: int | None, *, gone: bool = False) -> tuple[int, int]:
        """Check a range of tokens, of which those before the window may be gone if `gone`."""
        self._check(sequence)
        length = int(self.lengths[sequence])
        stop = length if stop is None else operator.index(stop)
        if not 0 <= operator.index(start) <= stop <= length:
            raise CacheError(f"tokens {start} to {stop} of sequence {sequence} were asked for; it has {length}")
        if start < self.starts[sequence] and start < stop and not gone:
            raise CacheError(
                f"token {start} of sequence {sequence} was asked for; its window has left those before "
                f"{self.starts[sequence]} behind"
            )
        return int(start), stop
