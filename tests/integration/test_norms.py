"""Norms of models' own classes: recognised on the instance, proved, computed in one pass; the same numbers."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

import fastpeft
from fastpeft.bench.kept import bytes_kept
from fastpeft.layers import norm as norm_layer
from fastpeft.layers.norm import FEW, FastNorm
from fastpeft.layers.norm_proof import proved
from fastpeft.layers.norm_structure import candidates
from tests.budget import assert_within_budget
from tests.integration.models import batch, make
from tests.integration.steps import assert_step_close, step, truth

CLASSES = {
    LlamaRMSNorm: ("input", 0.0),
    T5LayerNorm: ("weight", 0.0),
    Olmo2RMSNorm: ("once", 0.0),
    Gemma2RMSNorm: ("once", 1.0),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTH = 48


class WrittenOut(nn.Module):
    """LayerNorm as some models write it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(torch.randn(WIDTH)), nn.Parameter(torch.randn(WIDTH)), 1e-5

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() - x.float().mean(-1, keepdim=True)
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * self.weight.float() + self.bias.float()).to(x.dtype)


class Clamped(LlamaRMSNorm):
    """Nearly a norm."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states).clamp(-2, 2)


class Detached(LlamaRMSNorm):
    """A norm's values, but not its gradient."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        wide = hidden_states.float()
        rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).detach()
        return self.weight * (wide * rstd).to(hidden_states.dtype)


class Ungated(LlamaRMSNorm):
    """Its second argument is a factor as it is."""

    def forward(self, hidden_states: Tensor, gate: Tensor) -> Tensor:
        return super().forward(hidden_states) * gate


def norm_of(kind: type[nn.Module], dtype: torch.dtype = torch.float32, trained: bool = False) -> nn.Module:
    made = kind() if kind is WrittenOut else kind(WIDTH)  # type: ignore[call-arg]
    nn.init.normal_(made.weight)
    return made.to(dtype).requires_grad_(trained)


def fast(kind: type[nn.Module], dtype: torch.dtype = torch.float32, trained: bool = False) -> Any:
    holder = nn.ModuleDict({"norm": norm_of(kind, dtype, trained)})
    return fastpeft.accelerate(holder)["norm"]


@pytest.fixture
def however_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm_layer, "FEW_ON_CPU", dict.fromkeys(DTYPES, 0))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = norm_of(LlamaRMSNorm), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(self.norm(x))
        return y


@pytest.mark.usefixtures("however_few")
def test_sharded_before_it_is_accelerated(tmp_path: Any) -> None:
    """FSDP2 in one process: a block's norm is served, its weight plain in forward; one sharded by itself is not."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    plain, x = Block(), torch.randn(3, WIDTH)
    ours, alone = copy.deepcopy(plain), copy.deepcopy(plain)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        fully_shard(ours, mesh=mesh)
        fully_shard(alone.norm, mesh=mesh)
        found = []
        for model in (fastpeft.accelerate(ours), fastpeft.accelerate(alone), plain):
            leaf = x.clone().requires_grad_()
            y = model(leaf)
            found.append([y.detach(), *torch.autograd.grad(y.square().sum(), leaf)])
    finally:
        dist.destroy_process_group()
    for mine in found[:2]:
        torch.testing.assert_close(mine, found[2])
    assert ours.norm.fastpeft_calls == {"fused": 1} and not isinstance(alone.norm, FastNorm)
    assert "sharded by itself (fully_shard)" in rows(alone)[0].note


def rows(model: nn.Module) -> list[Any]:
    return [row for row in fastpeft.report(model).rows if row.kind == "norms" and row.op != "rotary"]


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_recognised_by_what_it_computes(kind: type[nn.Module], dtype: torch.dtype) -> None:
    module = norm_of(kind, dtype)
    found = proved(module, candidates(module))
    assert not isinstance(found, str)
    # of fp32 weights, rounding of the normalised values shows in 16-bit inputs only
    assert (found.rounding, found.offset) == CLASSES[kind]


@pytest.mark.usefixtures("however_few")
@pytest.mark.parametrize("kind", [*CLASSES, WrittenOut])
@pytest.mark.parametrize("weight", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("autocast", (False, True))
def test_the_same_numbers(kind: type[nn.Module], weight: torch.dtype, autocast: bool) -> None:
    ours = fast(kind, weight, trained=True)
    theirs = fastpeft.restore(copy.deepcopy(ours))
    assert isinstance(ours, FastNorm) and type(theirs) is kind
    wide = copy.deepcopy(theirs).double()
    for dtype in DTYPES:
        x, dy = (torch.randn(3, 40, WIDTH).to(dtype) for _ in range(2))

        def both(module: nn.Module, x: Tensor = x, dy: Tensor = dy) -> list[Tensor]:
            leaf = x.clone().requires_grad_()
            y = module(leaf)
            return [y.detach(), *torch.autograd.grad(y, [leaf, *module.parameters()], dy.to(y.dtype))]

        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            pairs = list(zip(both(ours), both(theirs), strict=True))
        exact = both(wide, x.double(), dy.double())  # its class rounds to fp32, which is nothing beside 16 bits
        for (a, b), c in zip(pairs, exact, strict=True):
            if torch.float32 in (dtype, weight, b.dtype):
                torch.testing.assert_close(a, b, rtol=4 * torch.finfo(torch.bfloat16).eps, atol=0.05)
            else:
                assert_within_budget(a, b, c.double())
    assert ours.fastpeft_calls == {"fused": 3}


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Clamped, "it computes none of the known norms"),
        (Detached, "it computes none of the known norms"),
        (Ungated, "it computes none of the known norms"),
    ],
)
def test_what_only_looks_like_one_is_left(kind: type[nn.Module], reason: str) -> None:
    module = fast(kind)
    assert type(module) is kind
    assert [row.note for row in rows(nn.ModuleDict({"norm": module}))] == [reason]


def test_torch_s_own_and_other_modules_are_none_of_its_business() -> None:
    for module in (nn.LayerNorm(8), nn.RMSNorm(8), nn.BatchNorm1d(8), nn.GroupNorm(2, 8), nn.Linear(8, 8)):
        assert not candidates(module)
    meta = norm_of(LlamaRMSNorm).to("meta")
    assert proved(meta, candidates(meta)) == "its weight is on the meta device, so that it cannot be tried"


@pytest.mark.usefixtures("however_few")
def test_calls_that_are_left_to_the_module() -> None:
    module = fast(LlamaRMSNorm)
    x = torch.randn(4, WIDTH)
    module(x.double())
    module(hidden_states=x)
    torch.func.vmap(module)(x[None])
    module.half()(x)
    assert set(module.fastpeft_calls) == {
        "an input in torch.float64",
        "called with other arguments than x",
        "a torch.func transform",
        "a weight cast from torch.float32 to torch.float16",
    }


@pytest.mark.usefixtures("however_few")
def test_a_norm_cast_since_is_proved_anew() -> None:
    model = nn.ModuleDict({"norm": norm_of(LlamaRMSNorm), "other": norm_of(LlamaRMSNorm)})
    fastpeft.accelerate(model)
    module: Any = model["norm"].bfloat16()
    x = torch.randn(4, WIDTH).bfloat16()
    module(x)
    assert rows(model)[0].note == "every call by its own forward: a weight cast from torch.float32 to torch.bfloat16"
    fastpeft.accelerate(model)
    assert torch.equal(module(x), LlamaRMSNorm.forward(fastpeft.restore(copy.deepcopy(module)), x))
    assert [row.note for row in rows(model)] == ["", ""] and module.fastpeft_calls == {"fused": 1}
    module.double()
    fastpeft.accelerate(model)
    assert [type(each) is LlamaRMSNorm for each in model.values()] == [True, False]


def test_few_numbers_on_a_cpu_are_the_module_s() -> None:
    module = fast(LlamaRMSNorm)
    module(torch.randn(4, WIDTH))
    assert module.fastpeft_calls == {FEW: 1}


@pytest.mark.usefixtures("however_few")
def test_a_changed_eps_counts_and_hooks_run() -> None:
    module = fast(LlamaRMSNorm)
    seen: list[Any] = []
    module.register_forward_hook(lambda *_: seen.append(1))
    x = torch.randn(4, WIDTH)
    before = module(x)
    module.variance_epsilon = 10.0
    assert not torch.allclose(module(x), before, rtol=0.1) and seen == [1, 1]
    torch.testing.assert_close(module(x), fastpeft.restore(copy.deepcopy(module))(x))


@pytest.mark.usefixtures("however_few")
def test_copies_pickles_and_restoring() -> None:
    module = fast(Gemma2RMSNorm, trained=True)
    x = torch.randn(4, WIDTH)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert isinstance(other, FastNorm) and torch.equal(other(x), module(x))
    state = module.state_dict()
    fastpeft.restore(module)
    assert type(module) is Gemma2RMSNorm and module.state_dict().keys() == state.keys() == {"weight"}
    assert not [name for name in module.__dict__ if name.startswith("fastpeft")]


@pytest.mark.usefixtures("however_few")
@pytest.mark.parametrize("reentrant", (True, False))
def test_checkpointing(reentrant: bool) -> None:
    module = fast(LlamaRMSNorm, trained=True)
    x = torch.randn(4, WIDTH, requires_grad=True)
    wanted = torch.autograd.grad(module(x).square().sum(), [x, module.weight])
    checkpoint(module, x, use_reentrant=reentrant).square().sum().backward()
    assert torch.equal(x.grad, wanted[0]) and torch.equal(module.weight.grad, wanted[1])


@pytest.mark.usefixtures("however_few")
def test_compiled_it_is_the_module_s_own() -> None:
    module = fast(LlamaRMSNorm)
    x = torch.randn(4, WIDTH)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), LlamaRMSNorm.forward(module, x)) and not hasattr(module, "fastpeft_calls")


@pytest.mark.usefixtures("however_few")
@pytest.mark.parametrize("name", ("llama", "qwen3", "gemma2", "t5"))
def test_whole_models(name: str) -> None:
    model = make(name)
    given = batch(model)
    theirs, exact = step(model, given), truth(model, given)
    fastpeft.accelerate(model)
    assert_step_close(step(model, given), theirs, exact)
    assert rows(model) and all(row.op == "rms_norm" for row in rows(model))
    assert all(row.note == "" for row in rows(model))
    assert fastpeft.verify(model).passed
    fastpeft.accelerate(model, norms=False)
    assert {row.note for row in rows(model)} == {"norms=False"}


@pytest.mark.usefixtures("however_few")
def test_what_is_kept_for_backward() -> None:
    """The module keeps a copy in fp32 of a frozen norm's input in bf16; ours keeps the input, and 4 bytes a row."""
    tokens, x = 30, torch.randn(30, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    module = fast(LlamaRMSNorm, torch.bfloat16)

    def forward() -> Tensor:
        made = x * 1
        return module(made).sum()  # type: ignore[no-any-return]

    assert bytes_kept(module, forward) == tokens * (2 * WIDTH + 4) + 2  # and the loss
    theirs = bytes_kept(fastpeft.restore(module), forward)
    assert theirs >= tokens * 4 * WIDTH


@pytest.mark.usefixtures("however_few")
def test_without_a_weight() -> None:
    """Gemma 4's norm of values, Llama 4's of queries and keys."""
    from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm
    from transformers.models.llama4.modeling_llama4 import Llama4TextL2Norm

    model: Any = nn.ModuleList([Gemma4RMSNorm(WIDTH, with_scale=False), Llama4TextL2Norm(1e-5)])
    plain = copy.deepcopy(model)
    fastpeft.accelerate(model)
    for ours, theirs in zip(model, plain, strict=True):
        for dtype in DTYPES:
            x, dy = (torch.randn(3, 7, WIDTH).to(dtype) for _ in range(2))
            leaves = [x.clone().requires_grad_() for _ in range(2)]
            ys = [module(leaf) for module, leaf in zip((ours, theirs), leaves, strict=True)]
            grads = [torch.autograd.grad(y, leaf, dy)[0] for y, leaf in zip(ys, leaves, strict=True)]
            wide = x.double().requires_grad_()
            exact = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + ours.eps)
            assert_within_budget(ys[0].detach(), ys[1].detach(), exact.detach())
            assert_within_budget(*grads, torch.autograd.grad(exact, wide, dy.double())[0])
        ours(x.double())
        assert ours.fastpeft_calls == {"fused": 3, "an input in torch.float64": 1}
    assert [row.note for row in rows(model)] == ["1 of 4 calls by its own forward: an input in torch.float64"] * 2
