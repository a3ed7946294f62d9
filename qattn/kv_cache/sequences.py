"""What can be done with sequences beside appending to them: copies, edits, turned positions, files."""

from __future__ import annotations

import operator
import os

import numpy as np

from qattn import _check, devices
from qattn._backend import as_host
from qattn.errors import CacheError
from qattn.kv_cache import files
from qattn.kv_cache.base import NEVER, Array, CacheBase
from qattn.kv_cache.layouts import Layout
from qattn.rope import RotaryEmbedding

_PIECE = 4096  # tokens that are read and written again at once


class SequenceCache(CacheBase):
    """A cache whose sequences can be copied, edited, saved and loaded.

    An edit changes what later queries see, and computes nothing anew: values, and what earlier layers made of a token,
    stay what they were.  Where keys have to turn, and where tokens move by anything but whole pages, they are read and
    written again.  That rounds what turns once more, and in quantized types maybe what moves, too.
    """

    def copy(self, source: int, target: int, start: int = 0, stop: int | None = None) -> None:
        """Append tokens start … stop - 1 of one sequence to another, with their positions.

        A paged cache shares what lies alike in pages of both, without a copy.

        Raises
        ------
        CacheError
            If there is no such token, or no room.  The cache is as it was.

        Examples
        --------
        >>> cache = KVCache(KVCacheParams(n_kv_heads=1, head_dim=4), sequences=2)
        >>> cache.append(np.ones((3, 1, 4)), np.zeros((3, 1, 4)))
        >>> cache.copy(0, 1, start=1)
        >>> cache.lengths, cache.positions(1)
        (array([3, 2]), array([1, 2]))
        """
        self._check(target)
        if source == target:
            raise CacheError(f"source and target are both sequence {source}")
        before = int(self.lengths[target])
        whole = start == 0 and before == 0  # whose beginning may have been left behind
        start, stop = self._range(source, start, stop, gone=whole)
        positions = np.concatenate([self.positions(target), self.positions(source)[start:stop]])
        edited = self._edited[source] if whole else min(self._edited[target], before)
        if not self._share(source, target, start, stop):
            self._append(target, *self.read(source, start, stop))
        self._place(target, positions)
        self._mark_edited(target, int(edited))

    def fork(self, source: int, target: int) -> None:
        """Let a sequence be the same as another, and forget what it had.

        In a paged cache the two share their pages, and one is copied when either writes to it.

        Examples
        --------
        >>> cache = PagedKVCache(KVCacheParams(n_kv_heads=1, head_dim=4), sequences=2, pages=8)
        >>> cache.append(np.ones((300, 1, 4)), np.zeros((300, 1, 4)))
        >>> cache.fork(0, 1)
        >>> cache.lengths, cache.free_pages
        (array([300, 300]), 5)
        """
        self._check(source)
        self._check(target)
        if source != target:
            self.reset(target)
            self.copy(source, target)

    def keep(self, sequence: int) -> None:
        """Forget all other sequences.

        Examples
        --------
        >>> cache = KVCache(KVCacheParams(n_kv_heads=1, head_dim=4), sequences=2)
        >>> for sequence in range(2):
        ...     cache.append(np.ones((3, 1, 4)), np.zeros((3, 1, 4)), sequence)
        >>> cache.keep(1)
        >>> cache.lengths
        array([0, 3])
        """
        self._check(sequence)
        for each in range(self.sequences):
            if each != sequence:
                self.truncate(0, each)

    def remove(self, sequence: int, start: int, stop: int | None = None) -> None:
        """Take tokens start … stop - 1 out of a sequence.  Those behind them move up, and keep their positions.

        `shift` closes the gap between positions, too.

        Raises
        ------
        CacheError
            If there is no such token, or no page for a copy of what others share.  The cache is as it was.

        Examples
        --------
        >>> cache = KVCache(KVCacheParams(n_kv_heads=1, head_dim=4))
        >>> cache.append(np.ones((6, 1, 4)), np.zeros((6, 1, 4)))
        >>> cache.remove(0, 1, 4)
        >>> cache.positions(), cache.next_positions
        (array([0, 4, 5]), array([6]))
        """
        start, stop = self._range(sequence, start, stop)
        if start == stop:
            return
        length = int(self.lengths[sequence]) - (stop - start)
        self._check_window(sequence, length)
        positions = np.delete(self.positions(sequence), slice(start, stop))
        edited = min(int(self._edited[sequence]), start)
        if not self._splice(sequence, start, stop):
            keys, values = self.read(sequence, stop)
            self._claim(sequence, start, length)
            self._write(sequence, start, keys, values)
            self.truncate(length, sequence)
        self._place(sequence, positions)
        self._mark_edited(sequence, edited)

    def shift(self, sequence: int, start: int, stop: int | None, by: int, rope: RotaryEmbedding | None) -> None:
        """Add `by` to the positions of tokens start … stop - 1, and turn their keys on accordingly.

        Parameters
        ----------
        sequence, start, stop
            stop None: up to the last token.
        by : int
            May be negative, as long as no position gets so.
        rope : RotaryEmbedding or None
            What the layer rotates keys by, its `rope`.  Keys that the layer then multiplies by the weights of a norm
            (`AttentionConfig.norm_after_rope`) only nearly turn so.

        Raises
        ------
        CacheError
            If there is no such token, a position would be negative, or there is no page for a copy of what others
            share.  The cache is as it was.

        Examples
        --------
        A text that is longer than the context: keep its first 4 tokens, and half of the others.

        >>> half = (len(cache) - 4) // 2                                # doctest: +SKIP
        >>> cache.remove(0, 4, 4 + half)                                # doctest: +SKIP
        >>> cache.shift(0, 4, None, -half, attn.rope)                   # doctest: +SKIP
        """
        start, stop = self._range(sequence, start, stop)
        positions, by = self.positions(sequence)[start:stop], operator.index(by)
        if start < stop and not 0 <= int(positions.min()) + by <= int(positions.max()) + by <= _check.MAX_POSITION:
            raise CacheError(
                f"by is {by}; positions of sequence {sequence} would reach from {int(positions.min()) + by} to "
                f"{int(positions.max()) + by}, and are from 0 to {_check.MAX_POSITION}"
            )
        positions = positions + (by if start < stop else 0)
        self._turn(sequence, start, positions, rope)

    def divide(self, sequence: int, start: int, stop: int | None, by: int, rope: RotaryEmbedding | None) -> None:
        """Divide the positions of tokens start … stop - 1, rounding down, and turn their keys accordingly.

        Far tokens then share positions, so that a model sees farther than it was trained to (self-extend; Jin et al.,
        2024).  Parameters and errors are those of `shift`.

        Raises
        ------
        NotImplementedError
            For an embedding with sections: of the positions of a token only the largest is known.

        Examples
        --------
        >>> cache = KVCache(KVCacheParams(n_kv_heads=1, head_dim=4))
        >>> cache.append(np.ones((6, 1, 4)), np.zeros((6, 1, 4)))
        >>> cache.divide(0, 0, 4, 2, RotaryEmbedding(4))
        >>> cache.positions()
        array([0, 0, 1, 1, 4, 5])
        """
        start, stop = self._range(sequence, start, stop)
        _check.at_least("by", by, 1)
        by = min(int(by), _check.MAX_POSITION + 1)  # from there on, all are 0
        if rope is not None and rope.sections:
            raise NotImplementedError("positions in sections can't be divided: only the largest of a token is known")
        self._turn(sequence, start, self.positions(sequence)[start:stop] // by, rope)

    def save(self, path: str | os.PathLike[str], sequence: int | None = None, *, overwrite: bool = False) -> None:
        """Write one sequence, or all, to a file: in one step, so that there is all of it or nothing.

        Raises
        ------
        FileExistsError
            If there is such a file, unless it may be overwritten.

        Examples
        --------
        >>> cache.save("conversation.kv", 0)                            # doctest: +SKIP
        >>> other.load("conversation.kv", 2)                            # doctest: +SKIP
        """
        if sequence is not None:
            self._check(sequence)
        chosen = range(self.sequences) if sequence is None else [sequence]
        kept = [files.Sequence(int(self.starts[s]), self.positions(s), self._raw(s)) for s in chosen]
        files.save(path, files.describe(self.params, self._layout), kept, overwrite=overwrite)

    def load(self, path: str | os.PathLike[str], sequence: int | None = None) -> None:
        """Take all sequences from a file, or one from a file that has one; what they had is forgotten.

        They have the bits that were saved, whether either cache is paged or not, and on whatever device either is; but
        with `hadamard` on the other kind of device, float types are rounded once more.

        Raises
        ------
        CacheError
            If the file is damaged, is no saved cache, or is of one that stores something else, or if there is no room.
            The cache is as it was.
        """
        if sequence is not None:
            self._check(sequence)
        saved, targets = files.load(path), list(range(self.sequences)) if sequence is None else [sequence]
        layout = saved.layout(self.params, path)
        if len(saved.sequences) != len(targets):
            wanted = f"the cache has {self.sequences}" if sequence is None else "one was asked for"
            raise CacheError(f"{os.fspath(path)} has {len(saved.sequences)} sequences; {wanted}")
        self._restore(targets, saved.sequences, layout)

    # How

    def _share(self, source: int, target: int, start: int, stop: int) -> bool:
        """Let the target's next tokens be tokens of the source without a copy, if that can be."""
        return False

    def _splice(self, sequence: int, start: int, stop: int) -> bool:
        """Take tokens out of a sequence without moving others, if that can be."""
        return False

    def _mark_edited(self, sequence: int, first: int) -> None:
        self._edited[sequence] = first if first < self.lengths[sequence] else NEVER

    def _turn(self, sequence: int, start: int, positions: Array, rope: RotaryEmbedding | None) -> None:
        """Give tokens from `start` on other positions."""
        before, stop = self.positions(sequence), start + len(positions)
        if rope is not None and rope.rope_dims > self.params.head_dim:
            raise ValueError(f"rope turns {rope.rope_dims} elements; the cache has heads of {self.params.head_dim}")
        steps = positions - before[start:stop]
        if not steps.any():
            return
        if rope is not None:
            unit = self._layout.unit  # the first write to a unit of memory clears it, so all of it is written again
            stop = min(len(before), -(-stop // unit) * unit)
            keys, values = self.read(sequence, start, stop)
            steps = np.concatenate([steps, np.zeros(stop - start - len(steps), np.int64)])
            self._claim(sequence, start, stop)
            self._write(sequence, start, keys, values, rope.rotation_by(steps, self.device))
        before[start : start + len(positions)] = positions
        edited = min(int(self._edited[sequence]), start)
        self._place(sequence, before)
        self._mark_edited(sequence, edited)

    def _entries(self, sequence: int, start: int, stop: int) -> list[tuple[int, slice]]:
        """Where in memory tokens lie: page, and entries there."""
        step, pieces = self._layout.step, self._pieces(sequence, start, stop)
        return [(page, slice(first // step, -(-end // step))) for page, first, end in pieces]

    def _raw(self, sequence: int) -> list[Array]:
        """A sequence as it lies in memory: for each array (kv_heads, entries, …)."""
        there = self._entries(sequence, int(self.starts[sequence]), int(self.lengths[sequence]))
        parts = [[as_host(array[page, :, entries]) for page, entries in there] for array in self._arrays]
        raw = [
            np.concatenate([as_host(array[0, :, :0]), *part], axis=1)
            for array, part in zip(self._arrays, parts, strict=True)
        ]
        if there:  # a last page that others have, too, may hold more of theirs
            count = int(self.lengths[sequence] - self.starts[sequence])
            self._layout.forget(self.params, raw[0][None], raw[1][None], 0, count)
        return raw

    def _restore(self, targets: list[int], sequences: list[files.Sequence], layout: Layout) -> None:
        starts, lengths = [each.start for each in sequences], [len(each.positions) for each in sequences]
        for start, needed in zip(starts, self._seen(np.array(lengths)).tolist(), strict=True):
            if start > needed:
                raise CacheError(
                    f"what was saved begins at token {start}, since a window had left others behind; this cache needs "
                    f"those from {needed} on"
                )
            if start % self._layout.step:
                raise CacheError(f"what was saved begins at token {start}, where no cache on this device can begin")
        self._replace(targets, starts, lengths)
        for target, saved in zip(targets, sequences, strict=True):
            if type(layout) is type(self._layout):
                self._copy_raw(target, saved)
            else:
                self._rewrite(target, saved, layout)
            self._set_length(target, len(saved.positions))
            self._place(target, saved.positions)
            self._mark_edited(target, 0)  # which tokens they are, the file doesn't say

    def _copy_raw(self, target: int, saved: files.Sequence) -> None:
        """Take over what lies in memory as it does here."""
        done = 0
        with devices.current(self.device):
            for page, entries in self._entries(target, saved.start, len(saved.positions)):
                count = entries.stop - entries.start
                for array, raw in zip(self._arrays, saved.arrays, strict=True):
                    array[page, :, entries] = devices.asarray(raw[:, done : done + count], self.device)
                done += count

    def _rewrite(self, target: int, saved: files.Sequence, layout: Layout) -> None:
        """Write anew what lies otherwise: to round what was rounded gives the same bits."""
        (keys, values), tokens = saved.arrays, len(saved.positions) - saved.start
        for first in range(0, tokens, _PIECE):
            piece = layout.read(self.params, keys[None], values[None], 0, first, min(first + _PIECE, tokens))
            self._write(target, saved.start + first, *piece)
