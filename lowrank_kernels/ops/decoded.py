"""Moments in fewer than 32 bits for backends that take wide ones: decoded before operation 1 and
encoded after it. What other backends do in registers is specified here.
"""

from collections.abc import Callable
from types import ModuleType

from torch import Tensor

from .codes import channel_groups, channel_noise, loaded, store, stored_of
from .contract import AdamScalars, ChannelSums, Matrices, Operations, Projection, Scalars, scalar_of


def operations_of(backend: ModuleType, matrices: Matrices) -> Operations:
    """A backend's operations, over moments in whatever format."""
    prepare: Callable[[Matrices], Operations] = backend.Operations
    if matrices.exp_avgs[0].dtype in backend.MOMENTS:
        return prepare(matrices)
    return Decoded(matrices, prepare)


class Decoded:
    """See `contract.Operations`. Operation 1 holds M and V of the batch once more, in float32.

    An entry of R that is left out keeps its moments as far as codes go: its group is encoded anew,
    and M may move by half a code, V by one.
    """

    def __init__(self, matrices: Matrices, backend: Callable[[Matrices], Operations]) -> None:
        self._groups = channel_groups(matrices.side)
        self._operations = backend(self._wide(matrices))

    def project_moments(
        self, matrices: Matrices, adam: AdamScalars, step: int | Tensor = 0
    ) -> Projection:
        wide, salts = self._wide(matrices), matrices.moment_salts
        projection = self._operations.project_moments(wide, adam)
        moments = zip(stored_of(matrices), wide.exp_avgs, wide.exp_avg_sqs, strict=True)
        for index, (stored, exp_avg, exp_avg_sq) in enumerate(moments):
            bits = None
            if salts is not None:
                of_one = scalar_of(step, index)
                bits = channel_noise(exp_avg_sq, matrices.side, salts[index], of_one)
            store(stored, exp_avg, exp_avg_sq, self._groups, bits)
        return projection

    def channel_scale(self, matrices: Matrices, sums: ChannelSums) -> Tensor:
        return self._operations.channel_scale(matrices, sums)

    def back_project_update(
        self,
        matrices: Matrices,
        projection: Projection,
        factor: Tensor | None,
        scalars: Scalars,
    ) -> None:
        self._operations.back_project_update(matrices, projection, factor, scalars)

    def _wide(self, matrices: Matrices) -> Matrices:
        pairs = [loaded(stored, self._groups) for stored in stored_of(matrices)]
        exp_avgs, exp_avg_sqs = map(list, zip(*pairs, strict=True))
        return matrices._replace(
            exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs, exp_avg_scales=(), exp_avg_sq_scales=()
        )
