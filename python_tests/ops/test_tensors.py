"""Both readers of tensors answer alike: what changed differs, and what did not is equal."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lowrank_kernels.ops.tensors import READER, OneByOne

READERS = [OneByOne()]
if not isinstance(READER, OneByOne):
    READERS.append(READER)
READERS_NAMES = [type(reader).__name__ for reader in READERS]
each_reader = pytest.mark.parametrize("reader", READERS, ids=READERS_NAMES)


def test_torch_with_dlpack_and_the_compiled_module_are_read_from_c():
    native = pytest.importorskip("lowrank_kernels._native")
    if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        pytest.skip("an older torch")
    assert isinstance(READER, native.TensorReader)


def some() -> list[torch.Tensor]:
    return [torch.ones(4, 6), torch.nn.Parameter(torch.ones(5, dtype=torch.bfloat16))]


def turned(tensors):
    tensors[0].t_()


def resized(tensors):
    tensors[0].resize_(2, 12)


def of_another_dtype(tensors):
    tensors[0] = tensors[0].view(torch.int32)


def of_another_half(tensors):
    tensors[1] = tensors[1].data.view(torch.float16)


def with_a_gap(tensors):
    tensors[0] = torch.ones(4, 12)[:, :6]


def expanded(tensors):
    tensors[0] = torch.ones(1, 6).expand(4, 6)


def longer(tensors):
    tensors.append(torch.ones(3))


def with_a_dimension_more(tensors):
    tensors[1] = tensors[1].data[None]


def on_meta(tensors):
    tensors[0] = tensors[0].to("meta")


LAYOUTS = [turned, resized, of_another_dtype, of_another_half, with_a_gap, expanded, longer]
LAYOUTS += [with_a_dimension_more, on_meta]


def elsewhere(tensors):
    tensors[0] = tensors[0].clone()


def another_view(tensors):
    tensors[0] = tensors[0][:]


def with_other_data(tensors):
    tensors[1].data = tensors[1].data.clone()


PLACES = [elsewhere, another_view, with_other_data]


@each_reader
@pytest.mark.parametrize("change", LAYOUTS)
def test_another_layout_is_seen(reader, change):
    tensors = some()
    kept = list(tensors)  # so that no new tensor is where an old one was
    layouts, places = reader.layouts(tensors), reader.places(tensors)
    change(tensors)
    assert reader.layouts(tensors) != layouts
    assert reader.places(tensors) != places
    assert kept


@each_reader
@pytest.mark.parametrize("change", PLACES)
def test_another_place_is_seen_and_is_no_other_layout(reader, change):
    tensors = some()
    kept = list(tensors), tensors[1].data
    layouts, places = reader.layouts(tensors), reader.places(tensors)
    change(tensors)
    assert reader.layouts(tensors) == layouts
    assert reader.places(tensors) != places
    assert kept


@each_reader
def test_other_values_are_no_change(reader):
    tensors = some()
    layouts, places = reader.layouts(tensors), reader.places(tensors)
    for tensor in tensors:
        tensor.detach().mul_(2)
    assert (reader.layouts(tensors), reader.places(tensors)) == (layouts, places)


@each_reader
def test_the_order_counts(reader):
    tensors = [torch.ones(2), torch.ones(2)]
    places = reader.places(tensors)
    assert reader.places(tensors[::-1]) != places


@each_reader
def test_counters_are_read_and_raised(reader):
    counters = [torch.tensor(float(count)) for count in (0, 7, 2**24 - 1)]
    reader.add_one(counters)
    assert reader.counts(counters) == [1, 8, 2**24]
    assert all(type(count) is int for count in reader.counts(counters))


@each_reader
@pytest.mark.parametrize(
    "other",
    [
        torch.tensor(3, dtype=torch.int64),
        torch.tensor(3.0, dtype=torch.float64),
        torch.tensor(3.0, dtype=torch.bfloat16),
        torch.tensor([3.0]),
    ],
    ids=["int64", "float64", "bfloat16", "one dimension"],
)
def test_other_counters_are_left_to_torch(reader, other):
    counters = [torch.tensor(1.0), other.clone()]
    reader.add_one(counters)
    assert reader.counts(counters) == [2, 4]


@each_reader
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_counter_without_a_number_raises(reader, value):
    with pytest.raises((ValueError, OverflowError)):
        reader.counts([torch.tensor(value)])


def test_a_device_that_cannot_be_read_is_remembered(monkeypatch):
    """For torch takes milliseconds to say so."""
    native = pytest.importorskip("lowrank_kernels._native")
    asked = []

    class Others(OneByOne):
        def layouts(self, tensors):
            asked.append(tensors[0].device.type)
            return super().layouts(tensors)

    if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        pytest.skip("an older torch")
    reader = native.TensorReader(torch.Tensor.__dlpack_c_exchange_api__, Others())
    for _ in "ab":
        assert isinstance(reader.layouts([torch.ones(2, device="meta")]), list)
        assert isinstance(reader.layouts([torch.ones(2)]), bytes)
    assert asked == ["meta", "meta"]


@each_reader
def test_a_counter_without_memory_is_not_written(reader):
    with FakeTensorMode():
        fake = torch.zeros(())
        reader.add_one([fake])
    reader.add_one([torch.zeros((), device="meta")])


@each_reader
@pytest.mark.parametrize("wrong", [[3], [None], ["text"], [torch.ones(2).to_sparse()]])
def test_what_is_no_tensor_raises(reader, wrong):
    with pytest.raises((AttributeError, RuntimeError, TypeError, NotImplementedError)):
        reader.places(wrong)


def test_a_capsule_of_another_kind_is_refused():
    native = pytest.importorskip("lowrank_kernels._native")
    if not hasattr(torch.Tensor, "__dlpack__"):
        pytest.skip("an older torch")
    with pytest.raises(ValueError, match=r"dlpack_exchange_api|incorrect name"):
        native.TensorReader(torch.ones(2).__dlpack__(), OneByOne())
