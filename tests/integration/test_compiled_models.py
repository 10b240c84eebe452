"""`torch.compile` over accelerated models: one node a group, the numbers of PEFT, changes noticed."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from transformers import Trainer, TrainingArguments

import fastpeft
from tests.integration.blocks import Stack, assert_same, blocks, check, gradients, inputs, pair
from tests.integration.models import ARCHITECTURES, batch, checkpointed, make, make_base, with_lora
from tests.integration.quantised import make_quantised
from tests.integration.reports import adapter_rows, mlp_rows
from tests.integration.steps import assert_step_close, step, truth
from tests.integration.test_loss import loss_row, never_made


class Compiled:
    """torch.compile that counts our nodes of the forward and backward graphs that it made."""

    def __init__(self) -> None:
        self.forward: Counter[str] = Counter()
        self.backward: Counter[str] = Counter()

    def __call__(self, model: nn.Module, **options: Any) -> Any:
        backend = aot_autograd(
            fw_compiler=self._count(self.forward),
            bw_compiler=self._count(self.backward),
            partition_fn=min_cut_rematerialization_partition,
        )
        return torch.compile(model, backend=backend, **options)

    @staticmethod
    def _count(found: Counter[str]) -> Callable[..., Any]:
        def compile(graph: torch.fx.GraphModule, _: Any) -> Any:
            found.update(str(node.target).split(".")[1] for node in graph.graph.nodes if "fastpeft" in str(node.target))
            return make_boxed_func(graph.forward)

        return compile


@pytest.fixture
def compiled() -> Iterator[Compiled]:
    torch._dynamo.reset()
    counters.clear()
    yield Compiled()
    torch._dynamo.reset()


def compiled_step(model: nn.Module, traced: Any, given: dict[str, Tensor]) -> Any:
    """`step` of what was compiled around `model`."""
    found = step(traced, given)
    prefix = "_orig_mod."
    found.gradients = {name.removeprefix(prefix): grad for name, grad in found.gradients.items()}
    return found


def nodes(**counts: int) -> Counter[str]:
    return Counter({name: count for name, count in counts.items() if count})


def of_one_layer(name: str, **config: Any) -> PeftModel:
    """As `make`; tracing takes seconds a layer."""
    return with_lora(make_base(name, num_hidden_layers=1), ARCHITECTURES[name].task, **config).train()


def op_counts(model: nn.Module) -> tuple[int, int]:
    """How many MLPs the report of a planned model shows, and how many groups outside them, those of one included."""
    mlps = [row.path for row in mlp_rows(model)]
    rows = [row for row in adapter_rows(model) if row.accelerated and row.path.rpartition(".")[0] not in mlps]
    return len(mlps), round(sum(1 / int(row.partners.rpartition(" ")[2]) if row.partners else 1 for row in rows))


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_one_graph_one_node_a_group(name: str, compiled: Compiled) -> None:
    check_one_graph(of_one_layer(name), compiled)


@pytest.mark.full
@pytest.mark.parametrize("name", ["llama", "bert", "t5", "gemma2"])
def test_one_graph_of_several_layers(name: str, compiled: Compiled) -> None:
    check_one_graph(make(name), compiled)


def check_one_graph(model: PeftModel, compiled: Compiled) -> None:
    """One node a group, PEFT's numbers at each step, nothing computed again."""
    given = batch(model)
    peft, exact = step(model, given), truth(model, given)
    fastpeft.accelerate(model, attention=False)
    step(model, given)  # the plan is learned here
    traced = compiled(model, fullgraph=True)
    for _ in range(2):
        assert_step_close(compiled_step(model, traced, given), peft, exact)
    mlps, groups = op_counts(model)
    assert compiled.forward == nodes(lora_group=groups, lora_mlp_up_to_down=mlps, lora_mlp_down=mlps)
    assert compiled.backward == nodes(lora_group_backward=groups, lora_mlp_backward=mlps), "nothing is computed again"


def test_the_report_says_that_compiled_losses_make_logits(compiled: Compiled) -> None:
    """Once a call with labels was traced; other calls are served and counted as ever."""
    model = fastpeft.accelerate(of_one_layer("llama"), lora=False, mlp=False, attention=False)
    given = batch(model)
    traced = torch.compile(model, fullgraph=True, backend="eager")
    expected = step(model, given).loss
    assert not loss_row(model).note
    for _ in range(2):
        torch.testing.assert_close(traced(**given).loss, expected)
    assert counters["stats"]["unique_graphs"] == 1, "the note makes nothing compile again"
    assert loss_row(model).note == "every call under torch.compile with logits, not counted"
    with never_made():
        model(**given)
    assert model.base_model.model.__dict__["fastpeft_loss"].outcomes == {"fused": 2}


def test_the_report_says_so_of_a_head_compiled_alone(compiled: Compiled) -> None:
    model = fastpeft.accelerate(of_one_layer("llama"), lora=False, mlp=False, attention=False)
    model.base_model.model.lm_head.compile(backend="eager")
    model(**batch(model)).loss.backward()
    assert loss_row(model).note == "every call under torch.compile with logits, not counted"


@pytest.mark.full
def test_without_a_plan_each_layer_is_a_node(compiled: Compiled) -> None:
    model = of_one_layer("llama")
    given = batch(model)
    peft, exact = step(model, given), truth(model, given)
    traced = compiled(fastpeft.accelerate(model, attention=False), fullgraph=True)
    assert_step_close(compiled_step(model, traced, given), peft, exact)
    assert compiled.forward == nodes(lora_group=4, lora_mlp_up_to_down=1, lora_mlp_down=1)
    assert_step_close(step(model, given), peft, exact)  # uncompiled: the plan is learned
    compiled.forward.clear()
    assert_step_close(compiled_step(model, traced, given), peft, exact)
    assert compiled.forward["lora_group"] == 2


def test_frozen_mlps(compiled: Compiled) -> None:
    model = of_one_layer("llama", target_modules=["q_proj", "v_proj"])
    given = batch(model)
    peft, exact = step(model, given), truth(model, given)
    traced = compiled(fastpeft.accelerate(model), fullgraph=True)
    assert_step_close(compiled_step(model, traced, given), peft, exact)
    assert compiled.forward["lora_mlp_down"] == compiled.backward["lora_mlp_backward"] == 1


def test_four_bit(compiled: Compiled) -> None:
    model = make_quantised(sizes={"num_hidden_layers": 1})
    given = batch(model)
    peft = step(model, given)
    fastpeft.accelerate(model, attention=False)
    eager = [step(model, given) for _ in range(2)][1]
    found = compiled_step(model, compiled(model, fullgraph=True), given)
    assert found.gradients.keys() == peft.gradients.keys()
    for name, grad in found.gradients.items():  # the same products as without compiling
        torch.testing.assert_close(grad, eager.gradients[name], rtol=1e-4, atol=1e-6)
    assert compiled.forward == nodes(lora_group=2, lora_mlp_up_to_down=1, lora_mlp_down=1)
    assert not [name for name in (compiled.forward | compiled.backward) if "decode" in name], (
        "no decoded weight is kept"
    )


@pytest.mark.full
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_checkpointed(name: str, compiled: Compiled) -> None:
    model = checkpointed(make(name), False)
    given = {**batch(model), "use_cache": False}
    peft = step(model, given)
    fastpeft.accelerate(model)
    step(model, given)
    found = compiled_step(model, compiled(model), given)
    for key, grad in found.gradients.items():
        assert (grad - peft.gradients[key]).norm() < 1e-4 * peft.gradients[key].norm()
    assert compiled.backward["lora_group"] > 0, "recomputed"
    stacks = {"llama": 1, "t5": 2}[name]  # what a last layer gives may be read by a norm that is not recomputed
    assert compiled.backward["lora_mlp_up_to_down"] > stacks >= compiled.backward["lora_mlp_down"]


def test_checkpointing_whole_blocks_of_one_graph(compiled: Compiled) -> None:
    """The projections' input comes from outside the checkpointed region."""

    class Checkpointed(Stack):
        def forward(self, x: Tensor) -> Tensor:
            h = self.embed(x)
            for block in self.blocks:
                h = h + torch.utils.checkpoint.checkpoint(block, h, use_reentrant=False)
            return h

    class Direct(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.q(x) * torch.sigmoid(self.k(x))

    stack = Checkpointed()
    stack.blocks = nn.ModuleList([Direct(), Direct()])
    ours, peft = pair(stack, target_modules=["q", "k"])
    x = inputs()
    check(ours, peft)
    traced = compiled(ours, fullgraph=True)
    assert_same(gradients(ours, x, traced), gradients(peft, x))
    assert compiled.forward["lora_group"] == 2


def test_changed_adapters_are_noticed(compiled: Compiled) -> None:
    ours, peft = pair(Stack(depth=1))
    config = LoraConfig(r=3, target_modules=["q", "k"], init_lora_weights=False)
    torch.manual_seed(1)
    peft.add_adapter("other", config)
    torch.manual_seed(1)
    ours.add_adapter("other", copy.deepcopy(config))
    ours.load_state_dict(peft.state_dict())
    x = inputs()
    check(ours, peft)
    traced = compiled(ours)
    for change in (
        lambda m: m.set_adapter("other"),
        lambda m: m.base_model.set_adapter(["default", "other"]),
        lambda m: m.set_adapter("default"),
        lambda m: [setattr(b.q, "scaling", {**b.q.scaling, "default": 0.7}) for b in blocks(m)],
        lambda m: m.eval(),
        lambda m: m.merge_adapter(),
        lambda m: m.unmerge_adapter(),
    ):
        change(ours), change(peft)
        assert_same(
            {"y": traced(x).detach()},
            {"y": peft(x).detach()},
        )
    with ours.disable_adapter(), peft.disable_adapter():
        assert_same({"y": traced(x).detach()}, {"y": peft(x).detach()})
    fastpeft.restore(ours)
    assert_same(gradients(ours, x, traced), gradients(peft, x))


def test_an_input_written_into_between_the_projections(compiled: Compiled) -> None:
    ours, peft = pair(Stack(depth=1))
    for model in (ours, peft):
        for block in blocks(model):
            block.between = lambda h: h.add_(1.0)
    x = inputs()
    with torch.no_grad():  # with gradients torch refuses such a write
        assert_same({"y": ours(x)}, {"y": peft(x)})  # no plan comes of this forward
        assert_same({"y": compiled(ours)(x)}, {"y": peft(x)})


def test_no_output_is_left_on_an_input(compiled: Compiled) -> None:
    ours, peft = pair(Stack())
    check(ours, peft)
    traced = compiled(blocks(ours)[0])
    x = inputs()
    with torch.no_grad():
        traced(x)
    assert not [name for name in vars(x) if "fastpeft" in name]


@pytest.mark.full
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_inductor_autocast(name: str) -> None:
    torch._dynamo.reset()
    model = make(name)
    given = batch(model)
    with torch.autocast("cpu", torch.bfloat16):
        peft = step(model, given)
    exact = truth(model, given)
    fastpeft.accelerate(model)
    with torch.autocast("cpu", torch.bfloat16):
        step(model, given)
        found = compiled_step(model, torch.compile(model, fullgraph=True), given)
    for key, true in exact.gradients.items():
        ours = (found.gradients[key].double() - true).norm()
        assert ours <= 4 * (peft.gradients[key].double() - true).norm() + 2**-8 * true.norm(), key


@pytest.mark.full
def test_trainer_compiles(tmp_path: Any) -> None:
    model = fastpeft.accelerate(make("llama"))
    given = batch(model, rows=8)
    data = [{name: value[i] for name, value in given.items()} for i in range(8)]
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, learning_rate=1e-2, torch_compile=True,
        torch_compile_backend="aot_eager", report_to=[], use_cpu=True, save_strategy="no",
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=data).train()
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if p.requires_grad)
