"""Ranks the values of rows that belong together, whatever the number of rows of each group.

All shapes are known to the host, so that nobody waits for a GPU: groups are numbered, counted and
ranked without asking how many there are. This file is copied into exported models.

Shape suffixes: T rows, F values of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class GroupedRows:
    """Knows which rows are of one group.

    Attributes:
        number_T: int64, the group of each row. They count from 0 in the order of the numbers that
            the groups were given by, so that there are at most T.
    """

    number_T: Tensor

    @classmethod
    def of(cls, group_T: Tensor) -> GroupedRows:
        """Returns the groups of rows.

        Args:
            group_T: int64, equal for rows of one group.
        """
        sorted_T, order_T = group_T.sort()
        begins_T = group_T.new_zeros(group_T.shape)
        begins_T[1:] = sorted_T[1:] != sorted_T[:-1]
        return cls(begins_T.new_zeros(group_T.shape).scatter(0, order_T, begins_T.cumsum(0)))

    def sum(self, value_T: Tensor) -> Tensor:
        """Returns, at each row, the sum of its group's values, ``[T]``."""
        zeros_T = value_T.new_zeros(value_T.shape)
        sum_T: Tensor = zeros_T.index_add(0, self.number_T, value_T)[self.number_T]
        return sum_T

    def count(self) -> Tensor:
        """Returns, at each row, how many rows its group has, int64 ``[T]``."""
        return self.sum(self.number_T.new_ones(self.number_T.shape))

    def least(self, value_T: Tensor) -> Tensor:
        """Returns, at each row, the smallest of its group's values, ``[T]``."""
        largest_T = value_T.new_full(value_T.shape, float("inf"))
        least_T: Tensor = largest_T.scatter_reduce(0, self.number_T, value_T, "amin")[self.number_T]
        return least_T

    def before(self, value_T: Tensor, order_T: Tensor | None = None) -> Tensor:
        """Returns, at each row, the sum of the values of its group's rows before it, int64 ``[T]``.

        Args:
            value_T: int64.
            order_T: the rows in their order; None for as they lie.
        """
        if order_T is None:
            order_T = self.number_T.argsort(stable=True)
        else:
            order_T = order_T[self.number_T[order_T].argsort(stable=True)]
        sorted_T = value_T[order_T]
        before_T = sorted_T.cumsum(0) - sorted_T
        # Of all groups before it, at the first row of each: sums never fall.
        first_T = before_T.new_full(before_T.shape, _limits(before_T)[1])
        number_T = self.number_T[order_T]
        first_T = first_T.scatter_reduce(0, number_T, before_T, "amin")[number_T]
        return before_T.new_zeros(before_T.shape).scatter(0, order_T, before_T - first_T)

    def largest(self, values_TF: Tensor, kept_T: Tensor, order_T: Tensor | None = None) -> Tensor:
        """Returns the mask of the largest values of each group, ``[T, F]`` bool.

        The last value that is kept is found bit by bit, from the highest: each bit asks how many
        values of the group are not below.

        Args:
            values_TF: floating, without NaN.
            kept_T: int64, how many values of a group to keep, at each of its rows.
            order_T: the rows in the order in which equal values are taken, each from its first
                value to its last; None for as they lie.
        """
        keys_TF = _ordered(values_TF)
        least, most = _limits(keys_TF)

        def enough(last_T: Tensor) -> Tensor:
            return self.sum((keys_TF >= last_T.unsqueeze(-1)).sum(dim=-1)) >= kept_T

        last_T = keys_TF.new_zeros(len(keys_TF))
        last_T = last_T.masked_fill(~enough(last_T), least)
        for bit in reversed(range(most.bit_length())):
            higher_T = last_T + (1 << bit)
            last_T = higher_T.where(enough(higher_T), last_T)
        last_T1 = last_T.unsqueeze(-1)
        above_TF, tied_TF = keys_TF > last_T1, keys_TF == last_T1
        room_T = kept_T - self.sum(above_TF.sum(dim=-1))
        room_T = room_T - self.before(tied_TF.sum(dim=-1), order_T)
        return above_TF | (tied_TF & (tied_TF.cumsum(dim=-1) <= room_T.unsqueeze(-1)))


def _ordered(values: Tensor) -> Tensor:
    """Returns integers of the same width that compare as floating values do."""
    from torch import int16, int32, int64

    width = values.element_size()
    # Adding 0 leaves one zero of two. Of negative numbers the larger bits are the lower value.
    bits = (values + 0.0).view({2: int16, 4: int32, 8: int64}[width])
    ordered: Tensor = bits ^ ((bits >> (8 * width - 1)) & _limits(bits)[1])
    return ordered


def _limits(integers: Tensor) -> tuple[int, int]:
    from torch import iinfo

    limits = iinfo(integers.dtype)
    return limits.min, limits.max
