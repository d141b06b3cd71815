"""How much Python a step between two refreshes may be: counts, and no clock."""

import pytest

from bench.calls import Way
from bench.host import way_of_a_gradient
from lowrank_kernels import backends
from lowrank_kernels.ops.tensors import READER, OneByOne

# Of one step of two equal matrices and a bias. Lower them where a change allows it.
BUDGETS = {
    "fira": Way(functions=29, files=4, changes=9, calls=58),
    "galore": Way(functions=26, files=4, changes=9, calls=34),
}


@pytest.mark.skipif(not backends()["native"][0], reason="the compiled module was not built")
@pytest.mark.skipif(isinstance(READER, OneByOne), reason="this torch is not read from C")
@pytest.mark.parametrize("method", BUDGETS)
def test_a_step_keeps_within_its_budget(method):
    way = way_of_a_gradient(method)
    assert way.within(BUDGETS[method]), f"{way}, at most {BUDGETS[method]}"
