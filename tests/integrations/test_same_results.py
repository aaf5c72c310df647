"""Accelerated modules give what they gave before: outputs and all gradients, in every dtype and way of running."""

from __future__ import annotations

import copy

import pytest
import torch

from benchmarks.integration_peers import LlavaStResampler
from llava_st_ops import use_backend
from llava_st_ops.integrations import accelerate_llava_st
from tests.integrations.families import FAMILIES, cast, inputs_of, make, results, tensors
from tests.nn.test_packers import assert_close_to_golden, load_golden
from tests.tolerance import assert_accurate

families = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())


def assert_accurate_in_norm(actual, exact, same_dtype, name):
    """The rule of tests.tolerance for a tensor as a whole: of thousands of gradients the worst is a matter of luck."""
    assert actual.dtype == same_dtype.dtype
    error, reference_error = ((x.double() - exact).norm() for x in (actual, same_dtype))
    computing = torch.finfo(torch.float32).eps * max(1.0, exact.abs().max()) * exact.numel() ** 0.5
    bound = 2 * reference_error + computing + torch.finfo(actual.dtype).eps * exact.norm()
    assert error <= bound, f"{name}: error {error:.3g}, allowed {bound:.3g}"


@families
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_outputs_and_gradients(family, dtype):
    torch.manual_seed(0)
    module = make(family, dtype)
    inputs = inputs_of(family, dtype)
    grads = [torch.randn_like(x) for x in tensors(module(*inputs))]
    exact = results(copy.deepcopy(module).double(), cast(inputs, torch.float64), grads)
    same_dtype = results(copy.deepcopy(module), cast(inputs, dtype), grads)
    report = family.accelerate(module)
    assert len(report.replaced) == family.replaced
    found = results(module, cast(inputs, dtype), grads)
    assert found.keys() == exact.keys()
    for name, result in found.items():
        if name.startswith("output") or dtype == torch.float64:
            assert_accurate(result, exact[name], same_dtype[name], name)
        else:
            assert_accurate_in_norm(result, exact[name], same_dtype[name], name)
    again = results(module, cast(inputs, dtype))  # no longer compared with the module's own forward
    assert torch.equal(again["output 0"], found["output 0"])


@families
def test_inference_follows_the_parameters(family):
    module, inputs = make(family, torch.float32).eval(), inputs_of(family, torch.float32)
    reference = copy.deepcopy(module)
    family.accelerate(module)
    with torch.no_grad():
        for factor in (1, 2, 0.5):
            for parameter in (*module.parameters(), *reference.parameters()):
                parameter.mul_(factor)
            torch.testing.assert_close(module(*inputs), reference(*inputs), rtol=1e-4, atol=1e-4)


@families
def test_autocast(family):
    torch.manual_seed(0)
    module, inputs = make(family, torch.float32), inputs_of(family, torch.float32)
    exact = results(copy.deepcopy(module).double(), cast(inputs, torch.float64))
    with torch.autocast("cpu", torch.bfloat16):
        before = results(copy.deepcopy(module), inputs)
        family.accelerate(module)
        grads = [torch.randn_like(x) for x in before.values()]
        after = results(module, inputs, grads)
    for name, expected in before.items():
        assert after[name].dtype == expected.dtype
        error, allowed = ((x.double() - exact[name]).abs().max() for x in (after[name], expected))
        rounding = torch.finfo(torch.bfloat16).eps * exact[name].abs().max()
        assert error <= 2 * allowed + rounding
    assert all(parameter.grad is not None for parameter in module.parameters())


@families
def test_frozen_parameters(family):
    """Gradients of the inputs alone."""
    module, inputs = make(family).requires_grad_(False), inputs_of(family)
    grads = [torch.randn_like(x) for x in tensors(module(*inputs))]
    expected = results(copy.deepcopy(module), cast(inputs, torch.float64), grads)
    family.accelerate(module)
    for name, result in results(module, cast(inputs, torch.float64), grads).items():
        if result is not None or expected[name] is not None:
            assert_accurate(result, expected[name], expected[name], name)


@pytest.mark.parametrize(
    "name", ["llava_st", "token_packer, scale 3", "oryx, video", "vision_sampler", "vision_sampler, one tower"]
)
def test_compiles_without_a_graph_break(name):
    family = FAMILIES[name]
    torch.compiler.reset()
    module, inputs = make(family), inputs_of(family)
    expected = module(*inputs)
    family.accelerate(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), expected)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", ["packer_video_small", "packer_image"])
def test_golden_vectors_of_llava_st(name, backend):
    """Those of the published implementation, under its own parameter names."""
    tensors_, config, _ = load_golden(name)
    module = LlavaStResampler(config["visual_dim"], config["embed_dim"], config["num_heads"]).double()
    module.load_state_dict({key[len("param.") :]: x for key, x in tensors_.items() if key.startswith("param.")})
    assert len(accelerate_llava_st(module).replaced) == 3
    features = tensors_["input.image_features"].clone().requires_grad_()
    with use_backend(backend):
        assert_close_to_golden(module.token_packer(features), tensors_["output.packed"], "packed")
        slow, fast = module(features)
        (slow.flatten() @ tensors_["cotangent.slow"].flatten()).backward(retain_graph=True)
        (fast.flatten() @ tensors_["cotangent.fast"].flatten()).backward()
    assert_close_to_golden(slow, tensors_["output.slow"], "slow")
    assert_close_to_golden(fast, tensors_["output.fast"], "fast")
    assert_close_to_golden(features.grad, tensors_["grad.image_features"], "grad of the features")
    for key, parameter in module.named_parameters():
        assert_close_to_golden(parameter.grad, tensors_[f"grad.{key}"], f"grad of {key}")
