"""The CUDA launchers: what they check and refuse, and how torch sees their ops. The kernels run in the emulator."""

from __future__ import annotations

import math

import pytest
import torch

from tests.emulator.backend import emulated
from tests.emulator.emulated_lape import random, random_tables
from tests.emulator.test_emulated_lape_add import Case as LapeCase
from tests.emulator.test_emulated_lape_scatter import scatter_case
from tests.emulator.test_emulated_linear_lape_gelu import Case as LinearCase
from tests.emulator.test_emulated_normalized_attention import Case as NormalizedCase
from tests.ops.test_errors import BAD_DENSE, BAD_PACKED, CASE, dense, packed
from tests.ops.test_torch_integration import raw_calls


@pytest.fixture
def ops():
    """The raw ops. The tensors are on the device but for `grid_thw`, which is read on the host."""
    with emulated(tensors_on_device=False) as ops:
        yield ops


@pytest.mark.parametrize(("changes", "expected", "came"), BAD_DENSE)
def test_bad_dense_arguments(ops, changes, expected, came):
    if isinstance(changes.get("value"), torch.Tensor) and changes["value"].is_meta:
        pytest.skip("the dispatcher sends this to the fake")
    with pytest.raises(RuntimeError, match=f"point_to_region_attention: {expected}.*{came}"):
        ops.point_to_region_attention(*dense(**changes).values())


@pytest.mark.parametrize(("changes", "expected", "came"), BAD_PACKED)
def test_bad_packed_arguments(ops, changes, expected, came):
    with pytest.raises(RuntimeError, match=f"point_to_region_attention_packed: {expected}"):
        ops.point_to_region_attention_packed(*packed(**changes).values())


def test_bad_gradients(ops):
    arguments = [*CASE.inputs(torch.float32), [2, 3, 3]]
    with pytest.raises(RuntimeError, match="grad_output must have shape"):
        ops.point_to_region_attention_backward(torch.randn(3), *arguments)
    with pytest.raises(RuntimeError, match="grad_output must have the dtype of query"):
        ops.point_to_region_attention_backward(torch.randn(CASE.query_shape).double(), *arguments)


def test_float64_has_no_kernel(ops):
    with pytest.raises(RuntimeError, match="query must be float32, bfloat16 or float16 .*, got float64"):
        ops.point_to_region_attention(*CASE.inputs(torch.float64), [2, 3, 3])


@pytest.mark.parametrize("axis", [1, 2, 3])
@pytest.mark.parametrize("size", [2**31, 2**40])
def test_regions_beyond_32_bits(ops, axis, size):
    """One token, repeated along time, height or width."""
    one = torch.zeros(1, 1, 1, 1, 1, 8)
    shape, region = list(one.shape), [1, 1, 1]
    shape[axis] = region[axis - 1] = size
    many = one.expand(shape)
    with pytest.raises(RuntimeError, match=r"regions of 2\^31 tokens or more along one axis are not supported"):
        ops.point_to_region_attention(one, many, many, region)


@pytest.mark.parametrize("name", ["dense", "packed", "dense_backward", "packed_backward"])
def test_opcheck(name):
    with emulated(name) as ops:
        op, arguments = raw_calls(torch.float32, requires_grad=not name.endswith("backward"), ops=ops)[name]
        torch.library.opcheck(op, arguments)


# lape_add and lape_scatter -------------------------------------------------------------------------------------------


def test_expanded_features_are_not_changed_in_place(ops):
    features, *tables = LapeCase(1, (3, 4, 5), (4, 3, 5), 8).inputs(torch.float32)
    with pytest.raises(RuntimeError, match="lape_add_: features must have memory for every entry"):
        ops.lape_add_(features[:, :1].expand(features.shape), *tables)


def test_packed_grids_on_the_host_are_checked(ops):
    features, *tables = [random(7, 8), *random_tables((2, 5, 3), 8, torch.float32)]
    for op in (ops.lape_add_packed, ops.lape_add_packed_backward):
        for grids, complaint in (([(1, 2, 2)], "add up to.*got 4"), ([(1, 2, -2)], "not be negative")):
            with pytest.raises(RuntimeError, match=f"grid_thw must {complaint}"):
                op(features, *tables, torch.tensor(grids))


def test_float64_has_no_kernel_of_lape(ops):
    features, *tables = LapeCase(1, (1, 2, 2), (2, 2, 2), 4).inputs(torch.float64)
    only = "must be float32, bfloat16 or float16 on a CUDA device, got float64"
    with pytest.raises(RuntimeError, match=f"lape_add: features {only}"):
        ops.lape_add(features, *tables)
    with pytest.raises(RuntimeError, match=f"lape_add_: temporal {only}"):
        ops.lape_add_(features.float(), *tables)
    with pytest.raises(RuntimeError, match=f"lape_add_backward: grad_output {only}"):
        ops.lape_add_backward(features, *tables)
    with pytest.raises(RuntimeError, match=f"lape_add_packed: features {only}"):
        ops.lape_add_packed(features.flatten(0, 3), *tables, torch.tensor([[1, 2, 2]]))
    case = scatter_case(torch.float64)
    with pytest.raises(RuntimeError, match=f"lape_scatter: embed {only}"):
        ops.lape_scatter(*case.arguments())
    case = scatter_case(torch.float32, torch.float64)
    with pytest.raises(RuntimeError, match=f"lape_scatter_backward: temporal {only}"):
        ops.lape_scatter_backward(random(40, 16), *case.entries(), *case.sources())


def test_shapes_of_lape_are_checked(ops):
    features, *tables = LapeCase(1, (1, 2, 2), (2, 2, 2), 4).inputs(torch.float32)
    with pytest.raises(RuntimeError, match=r"lape_add: features must have 5 dimensions \[B, T, H, W, C\]"):
        ops.lape_add(features[0], *tables)
    with pytest.raises(RuntimeError, match="lape_add: width must have shape"):
        ops.lape_add(features, *tables[:2], tables[2][:, :3])
    with pytest.raises(RuntimeError, match="lape_add_packed: grid_thw must be int32 or int64"):
        ops.lape_add_packed(features.flatten(0, 3), *tables, torch.ones(1, 3))


# normalized_region_attention ------------------------------------------------------------------------------------------


NORMALIZED = NormalizedCase(1, (1, 3, 3), (1, 3, 3), 2, 8)


def normalized(**changes):
    inputs = NORMALIZED.inputs(torch.float32)
    arguments = dict(zip(("query", "key", "value"), inputs, strict=True))
    return [*{**arguments, "region": [1, 3, 3], "eps": 1e-5, **changes}.values()]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"region": [1, 3]}, "region must be three positive sizes .* got .1, 3."),
        ({"query": torch.zeros(2, 8)}, "query must have 6 dimensions .* got 2"),
        ({"key": torch.zeros(2, 8)}, "key must have 5 dimensions .* got 2"),
        ({"key": torch.zeros(1, 1, 3, 3, 8).half()}, "key must have the dtype of query, float32, got float16"),
        ({"value": torch.zeros(1, 1, 3, 3, 9)}, "value must have shape .1, 1, 3, 3, 8., got .1, 1, 3, 3, 9."),
        ({"query": torch.zeros(1, 1, 1, 2, 2, 8)}, "query must have shape .1, 1, 1, 1, 2, 8., got .1, 1, 1, 2, 2, 8."),
        ({"eps": -1.0}, "eps must be a finite number, not below 0, got -1"),
        ({"eps": math.nan}, "eps must be a finite number, not below 0, got nan"),
    ],
)
def test_bad_normalized_arguments(ops, changes, message):
    with pytest.raises(RuntimeError, match=message):
        ops.normalized_region_attention(*normalized(**changes))
    with pytest.raises(RuntimeError, match=message):
        ops.normalized_region_attention_backward(torch.zeros(1, 1, 1, 1, 2, 8), *normalized(**changes))


def test_what_normalized_attention_refuses(ops):
    rows = torch.zeros(1, 1, 3, 3, 0)
    with pytest.raises(RuntimeError, match="at least one channel to normalise over"):
        ops.normalized_region_attention(*normalized(query=torch.zeros(1, 1, 1, 1, 2, 0), key=rows, value=rows))
    doubles = [x.double() for x in NORMALIZED.inputs(torch.float32)]
    with pytest.raises(RuntimeError, match="query must be float32, bfloat16 or float16 .* got float64"):
        ops.normalized_region_attention(*doubles, [1, 3, 3], 1e-5)
    with pytest.raises(RuntimeError, match="grad_output must have shape"):
        ops.normalized_region_attention_backward(torch.zeros(1, 1, 1, 1, 2, 9), *normalized())
    huge = torch.zeros(1, 1, 1, 1, 1, 1).expand(1, 1, 1, 1, 1, 2**30)
    with pytest.raises(RuntimeError, match=r"2\^30 channels or more are not supported, got 1073741824"):
        ops.normalized_region_attention(huge, huge[..., 0, :], huge[..., 0, :], [1, 1, 1])
    long = torch.zeros(1, 1, 1, 1, 8).expand(1, 2**31, 1, 1, 8)
    with pytest.raises(RuntimeError, match=r"regions of 2\^31 tokens or more along one axis are not supported"):
        ops.normalized_region_attention(torch.zeros(1, 1, 1, 1, 1, 8), long, long, [2**31, 1, 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_opcheck_of_normalized_attention(ops, dtype):
    inputs = [x.requires_grad_() for x in NORMALIZED.inputs(dtype)]
    torch.library.opcheck(ops.normalized_region_attention.default, (*inputs, [1, 3, 3], 1e-5))
    grad_output, *inputs = (x.detach() for x in (inputs[0], *inputs))
    torch.library.opcheck(ops.normalized_region_attention_backward.default, (grad_output, *inputs, [1, 3, 3], 1e-5))


# linear_lape_gelu and gelu_linear_gradient ---------------------------------------------------------------------------

LINEAR = LinearCase(1, (2, 3, 5), 8, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.ones(2, 3, 5, 8)}, "features must have 5 dimensions"),
        ({1: torch.ones(16, 7)}, r"weight must have shape \[16, 8\], got \[16, 7\]"),
        ({1: torch.ones(16, 8).double()}, "weight must have the dtype of features, float32, got float64"),
        ({2: torch.ones(15)}, r"bias must have shape \[16\]"),
        ({2: torch.ones(16).half()}, "bias must have the dtype of temporal"),
        ({3: torch.ones(3, 16)}, r"temporal must have shape \[2, 16\], got \[3, 16\]"),
        ({4: torch.ones(3, 15)}, r"height must have shape \[3, 16\]"),
        ({5: torch.ones(0, 16)}, "width must have at least one row"),
    ],
)
def test_bad_linear_arguments(ops, change, message):
    arguments = LINEAR.arguments(torch.float32)
    for place, tensor in change.items():
        arguments[place] = tensor
    with pytest.raises(RuntimeError, match=f"linear_lape_gelu: {message}"):
        ops.linear_lape_gelu(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([(6, 4), (4, 8), (6,)], r"preactivation must have 2 dimensions"),
        ([(6, 4), (4, 7), (6, 8)], r"weight must have shape \[4, 8\]"),
        ([(5, 4), (4, 8), (6, 8)], r"grad_output must have shape \[6, 4\]"),
    ],
)
def test_bad_gelu_gradient_arguments(ops, arguments, message):
    with pytest.raises(RuntimeError, match=f"gelu_linear_gradient: {message}"):
        ops.gelu_linear_gradient(*(torch.ones(shape) for shape in arguments))


def test_float64_has_no_kernel_for_an_mlp(ops):
    with pytest.raises(RuntimeError, match="features must be float32, bfloat16 or float16 on a CUDA device"):
        ops.linear_lape_gelu(*LINEAR.arguments(torch.float64))
    with pytest.raises(RuntimeError, match="preactivation must be float32, bfloat16 or float16 on a CUDA device"):
        ops.gelu_linear_gradient(*[torch.ones(2, 2).double()] * 3)


def test_preactivations_beyond_32_bits(ops):
    """Rows more than 2^31 elements apart; only the pages that are touched take memory."""
    far = 2**31 + 8
    try:
        memory = torch.empty(far + 8, dtype=torch.bfloat16)
    except RuntimeError as error:
        pytest.skip(f"no address space: {error}")
    x = random(2, 8, dtype=torch.bfloat16)
    apart = memory.as_strided((2, 8), (far, 1)).copy_(x)
    factors = random(2, 4, dtype=torch.bfloat16), random(4, 8, dtype=torch.bfloat16)
    results = ops.gelu_linear_gradient(*factors, apart)
    assert all(torch.equal(a, b) for a, b in zip(results, ops.gelu_linear_gradient(*factors, x), strict=True))
