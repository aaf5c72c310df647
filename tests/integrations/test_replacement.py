"""What replacing a forward leaves as it was, how it is undone, and when the module's own forward takes over."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

from benchmarks.integration_peers import LlavaStPacker, LlavaStResampler, OryxCompressor, SamplerLayer
from llava_st_ops import integrations
from llava_st_ops.integrations import accelerate_llava_st, accelerate_oryx, accelerate_vision_sampler, restore
from tests.integrations.families import FAMILIES, inputs_of, make, tensors

families = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
LLAVA_ST = FAMILIES["llava_st"]


def own_forward(module):
    return not any("forward" in vars(child) for child in module.modules())


@families
def test_state_and_parameters_stay_as_they_are(family):
    module = make(family)
    before = {name: (id(x), x.clone()) for name, x in module.state_dict(keep_vars=True).items()}
    children = list(module.named_modules())
    family.accelerate(module)
    module(*inputs_of(family))
    after = module.state_dict(keep_vars=True)
    assert after.keys() == before.keys()
    assert all(id(x) == before[name][0] and torch.equal(x, before[name][1]) for name, x in after.items())
    assert list(module.named_modules()) == children


@families
def test_undo(family):
    module, inputs = make(family), inputs_of(family)
    expected = tensors(module(*inputs))
    report = family.accelerate(module)
    assert not own_forward(module)
    report.undo()
    assert own_forward(module)
    assert all(map(torch.equal, tensors(module(*inputs)), expected))
    report.undo()  # has nothing left to do
    with family.accelerate(module) as report:
        assert len(report.replaced) == family.replaced
        assert not own_forward(module)
    assert own_forward(module)


def test_twice_is_once():
    module = make(LLAVA_ST)
    first = accelerate_llava_st(module)
    forwards = [child.forward for child in module.children()]
    second = accelerate_llava_st(module)
    assert not second.replaced
    assert [entry.text for entry in second.skipped] == ["already accelerated"] * 3
    assert [child.forward for child in module.children()] == forwards
    second.undo()  # what it did: nothing
    assert not own_forward(module)
    first.undo()
    assert own_forward(module)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
@families
def test_copies_are_accelerated_and_of_their_own(family, copied):
    module, inputs = make(family), inputs_of(family)
    family.accelerate(module)
    expected = tensors(module(*inputs))
    other = copied(module)
    assert all(map(torch.equal, tensors(other(*inputs)), expected))
    for ours, theirs in zip(module.parameters(), other.parameters(), strict=True):
        with torch.no_grad():
            theirs.mul_(2)
        assert not torch.equal(ours, theirs)
    assert restore(copied(other)) == family.replaced
    changed = tensors(other(*inputs))
    assert restore(other) == family.replaced
    assert own_forward(other)
    assert not own_forward(module)
    for ours, theirs in zip(changed, tensors(other(*inputs)), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert restore(other) == 0


def test_the_report_says_what_and_why():
    model = nn.ModuleDict({"resampler": LlavaStResampler(24, 32, 4), "other": LlavaStPacker(24, 32, 4)})
    model.resampler.token_packer_fast.devide_attention.ln_v.eps = 1.0
    report = accelerate_llava_st(model)
    assert str(report).splitlines() == [
        "LLaVA-ST's packers: 2 replaced, 2 skipped",
        "  replaced resampler.token_packer (LlavaStPacker): spatial, 3 x 3 tokens, 24 channels, 4 heads",
        "  replaced resampler.token_packer_slow (LlavaStPacker): temporal, 5 frames, 24 channels, 4 heads",
        "  skipped resampler.token_packer_fast (LlavaStPacker): key_norm and value_norm differ in eps, 1e-05 and 1.0",
        "  skipped other (LlavaStPacker): of which pattern it is, its name does not tell; known are token_packer, "
        "token_packer_slow, token_packer_fast",
    ]
    assert "no module of the model looks like one" in str(accelerate_llava_st(nn.Linear(2, 2)))


@pytest.mark.parametrize("name", [name for name in integrations.__all__ if name.startswith("accelerate")])
def test_only_modules_are_accelerated(name):
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got dict"):
        getattr(integrations, name)({})


# When the module's own forward takes over -----------------------------------------------------------------------------


class Gated(LlavaStPacker):
    """A fork of the same structure that computes something else."""

    def forward(self, x):
        return super().forward(x) * 0.5


@pytest.mark.parametrize("training", [True, False])
def test_a_module_that_computes_something_else_is_found_out(training):
    module = nn.ModuleDict({"token_packer": Gated(24, 32, 4)})
    x = torch.randn(2, 81, 24)
    expected = module.token_packer(x)
    accelerate_llava_st(module)
    with (
        torch.set_grad_enabled(training),
        pytest.warns(UserWarning, match="Gated computes something else than is known of its kind"),
    ):
        found = module.token_packer(x)
    assert torch.equal(found, expected)
    assert found.requires_grad == training
    assert own_forward(module)
    accelerate_llava_st(module, check=False)
    torch.testing.assert_close(module.token_packer(x) * 0.5, expected)


def test_nothing_is_concluded_from_results_that_are_not_finite():
    module = nn.ModuleDict({"token_packer": Gated(24, 32, 4)})
    accelerate_llava_st(module)
    module.token_packer(torch.full((2, 81, 24), torch.nan))
    with pytest.warns(UserWarning, match="something else"):
        module.token_packer(torch.randn(2, 81, 24))


def hook(module):
    module.token_packer.devide_attention.to_k[0].register_forward_hook(lambda layer, inputs, output: output * 2)


def adapt(module):
    class Adapter(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, x):
            return self.base(x).relu()

    module.token_packer.devide_attention.to_v[2] = Adapter(module.token_packer.devide_attention.to_v[2])


def drop(module):
    module.token_packer.devide_attention.attn.dropout = 0.5


def hook_inner(module):
    module.token_packer.devide_attention.register_forward_hook(lambda layer, inputs, output: output * 2)


def patch_inner(module):
    inner = module.token_packer.devide_attention
    own = inner.forward
    inner.forward = lambda *arguments: own(*arguments) * 2


def wrap_inner(module):
    class Twice(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, *arguments):
            return self.inner(*arguments) * 2

    module.token_packer.devide_attention = Twice(module.token_packer.devide_attention)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (hook_inner, "devide_attention has hooks or another forward"),
        (patch_inner, "devide_attention has hooks or another forward"),
        (wrap_inner, "it has no devide_attention.to_q any more"),
        (hook, "key_mlp: a layer is not a plain Linear"),
        (adapt, "value_mlp: a layer is not a plain Linear, but .*Adapter"),
        (drop, "attention drops 50% of the weights in training"),
    ],
)
def test_changes_after_the_replacement_are_seen(change, reason):
    module, (x,) = make(LLAVA_ST), inputs_of(LLAVA_ST)
    accelerate_llava_st(module)
    before = module.token_packer(x)
    change(module)
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match=f"LlavaStPacker takes its own forward: {reason}"):
        found = module.token_packer(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module.token_packer(x)  # says so once
    torch.manual_seed(1)
    assert torch.equal(found, LlavaStPacker.forward(module.token_packer, x))
    assert not torch.allclose(found, before)


@pytest.mark.parametrize("change", [hook_inner, patch_inner])
def test_changes_before_the_replacement_are_seen(change):
    module = make(LLAVA_ST)
    change(module)
    report = accelerate_llava_st(module)
    assert len(report.replaced) == 2
    assert [entry.text for entry in report.skipped] == ["devide_attention has hooks or another forward"]


def test_a_layer_that_is_gone_is_told():
    family = FAMILIES["oryx, video"]
    module = make(family)
    family.accelerate(module)
    module.vlm_key_projector = None
    with pytest.warns(UserWarning, match="it has no vlm_key_projector any more"), pytest.raises(TypeError):
        module(*inputs_of(family))  # which is what its own forward says


def test_undo_reaches_a_forward_that_was_wrapped():
    """As accelerate wraps forwards. What was wrapped cannot be taken out, but takes the module's own from then on."""
    family = FAMILIES["oryx, video"]
    module, inputs = make(family), inputs_of(family)
    expected = module(*inputs)[0]
    report = family.accelerate(module)
    accelerated = module.forward
    module.forward = lambda *arguments: accelerated(*arguments)
    report.undo()
    assert torch.equal(module(*inputs)[0], expected)
    module.forward = accelerated
    assert torch.equal(module(*inputs)[0], expected)
    assert len(family.accelerate(module).replaced) == 1
    assert not torch.equal(module(*inputs)[0], expected), "it computes in another order"


def test_what_computes_something_else_does_so_wrapped_too():
    module = Gated(24, 32, 4)
    accelerate_llava_st(nn.ModuleDict({"token_packer": module}))
    accelerated = module.forward
    module.forward = lambda *arguments: accelerated(*arguments)
    x = torch.randn(2, 81, 24)
    with pytest.warns(UserWarning, match="something else"):
        module(x)
    assert torch.equal(module(x), Gated.forward(module, x))


def test_dropouts_are_not_taken_for_another_forward():
    family = FAMILIES["token_packer, scale 2"]
    module, inputs = make(family), inputs_of(family)
    module.mlp.append(nn.Dropout(0.5))
    family.accelerate(module)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module(*inputs)
        module.eval()(*inputs)  # is compared
    assert not own_forward(module)


def test_arguments_by_name_keep_their_names():
    family = FAMILIES["token_packer, scale 2"]

    class Named(type(family.make())):
        def forward(self, coarse, fine):
            return super().forward((coarse, fine))

    torch.manual_seed(0)
    module = Named(24, 24, 32, 4, 40, 2).double()
    coarse, fine = torch.randn(2, 2, 144, 24, dtype=torch.float64)
    expected = module(coarse, fine)
    family.accelerate(module)
    torch.testing.assert_close(module(coarse, fine), expected)
    torch.testing.assert_close(module(fine=fine, coarse=coarse), expected)


def test_dropout_does_not_matter_in_inference():
    module, (x,) = make(LLAVA_ST), inputs_of(LLAVA_ST)
    drop(module)
    module.eval()
    assert len(accelerate_llava_st(module).replaced) == 3
    expected = LlavaStPacker.forward(module.token_packer, x)
    torch.testing.assert_close(module.token_packer(x), expected)


def test_calls_of_another_form_take_the_modules_own_forward():
    packers = LlavaStResampler(24, 32, 4)
    accelerate_llava_st(packers)
    with pytest.raises(RuntimeError):  # a grid that three does not divide
        packers.token_packer(torch.randn(1, 64, 24))
    with pytest.raises(RuntimeError):  # frames that five does not divide
        packers.token_packer_slow(torch.randn(7, 81, 24))
    with pytest.raises(TypeError, match="unexpected keyword argument 'speed'"):
        packers.token_packer(torch.randn(1, 81, 24), speed=2)

    oryx = OryxCompressor(48, 16)
    accelerate_oryx(oryx)
    with pytest.raises(KeyError, match="audio"):
        oryx(torch.randn(1, 16, 48), "audio")
    with pytest.raises(RuntimeError):
        oryx(torch.randn(1, 9, 48), "video")

    sampler = SamplerLayer(24, 20, [16, 16], [1, 1], 32, num_heads=4)
    inputs = [torch.randn(2, 3, size) for size in (24, 20)] + [torch.randn(2, 4, 16)] * 2
    masks = [torch.ones(2, 1, 3, 4, dtype=torch.bool)] * 2
    attention = sampler.cross_attn
    queries = torch.randn(2, 3, 32)
    expected = attention(queries, *inputs[2:], *masks)
    additive = [torch.randn(2, 1, 1, 4)] * 2
    expected_additive = attention(queries[:, :1], *inputs[2:], *additive)
    accelerate_vision_sampler(sampler)
    assert torch.equal(attention(queries, *inputs[2:], *masks), expected)  # several queries
    assert torch.equal(attention(queries[:, :1], *inputs[2:], *additive), expected_additive)


def test_hooks_of_the_module_itself_still_run():
    module, (x,) = make(LLAVA_ST), inputs_of(LLAVA_ST)
    seen = []
    module.token_packer.register_forward_hook(lambda *_: seen.append(1))
    accelerate_llava_st(module)
    module.token_packer(x)
    assert seen == [1]


def test_oryx_without_gradients_of_parameters_doubles_images():
    family = FAMILIES["oryx, image"]
    module, inputs = make(family), inputs_of(family)
    accelerate_oryx(module)
    with torch.no_grad():
        assert torch.equal(module(*inputs)[0], inputs[0] * 2)


def test_a_query_without_keys_gets_no_gradient():
    family = FAMILIES["vision_sampler, one tower"]
    module, (window, queries, mask) = make(family), inputs_of(family)
    accelerate_vision_sampler(module)
    module(window, queries, mask).sum().backward()
    assert not mask[2].any()
    assert not window.grad[2].any()
    assert not queries.grad[2].any()
    assert window.grad[0].any()
