"""Files and copies: what is written is PEFT's, byte for byte; a copy is a model of its own."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn

import fastpeft
from tests.fresh import run_fresh
from tests.integration.models import batch, make, make_base
from tests.integration.quantised import make_quantised
from tests.integration.reports import notes, shape_of, siblings
from tests.integration.steps import assert_step_close, step, truth


@pytest.fixture(params=["watching", "grouped"])
def accelerated(request: pytest.FixtureRequest) -> PeftModel:
    """Before its first forward, and after."""
    model = fastpeft.accelerate(make())
    if request.param == "grouped":
        step(model, batch(model))
    return model


def test_state_dict_keys_and_values(accelerated: PeftModel) -> None:
    ours = accelerated.state_dict()
    peft = fastpeft.restore(copy.deepcopy(accelerated)).state_dict()
    assert list(ours) == list(peft)
    assert all(torch.equal(ours[name], peft[name]) for name in peft)


def test_saved_files_are_those_of_peft(accelerated: PeftModel, tmp_path: Path) -> None:
    accelerated.save_pretrained(tmp_path / "ours")
    fastpeft.restore(accelerated).save_pretrained(tmp_path / "peft")
    ours, peft = (sorted((tmp_path / name).iterdir()) for name in ("ours", "peft"))
    assert [f.name for f in ours] == [f.name for f in peft]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(ours, peft, strict=True))


def test_saved_adapters_load_into_plain_peft_and_into_ours(tmp_path: Path) -> None:
    base = make_base()
    model = make()
    model.get_base_model().load_state_dict(base.state_dict(), strict=False)
    fastpeft.accelerate(model).save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True).train()
    ours = fastpeft.accelerate(PeftModel.from_pretrained(base, tmp_path, is_trainable=True)).train()
    inputs = batch(ours)
    assert_step_close(step(ours, inputs), step(plain, inputs), truth(plain, inputs))


def test_adapters_loaded_into_an_accelerated_model(accelerated: PeftModel, tmp_path: Path) -> None:
    accelerated.save_pretrained(tmp_path)
    accelerated.load_adapter(tmp_path, "again")
    inputs = batch(accelerated)
    first = accelerated(**inputs).logits
    accelerated.set_adapter("again")
    assert torch.equal(accelerated(**inputs).logits, first)
    assert not notes(accelerated)


def test_a_deep_copy_is_a_model_of_its_own(accelerated: PeftModel) -> None:
    copied = copy.deepcopy(accelerated)
    assert shared(accelerated, copied) == set()
    inputs = batch(accelerated)
    plain = fastpeft.restore(copy.deepcopy(accelerated))
    peft, exact = step(plain, inputs), truth(plain, inputs)
    for model in (copied, accelerated):
        assert_step_close(step(model, inputs), peft, exact)
    groups = siblings(copied)
    assert groups == siblings(accelerated) != set()
    shape = shape_of(plain)
    fastpeft.restore(accelerated)
    assert siblings(copied) == groups
    assert comparable(shape_of(fastpeft.restore(copied))) == comparable(shape)
    with torch.no_grad():
        for parameter in accelerated.parameters():
            parameter.zero_()
    assert step(copied, inputs).equals(peft)


@pytest.mark.parametrize("nf4", [False, True], ids=["dense", "nf4"])
def test_pickled_and_back(accelerated: PeftModel, nf4: bool) -> None:
    model = fastpeft.accelerate(make_quantised()) if nf4 else accelerated
    inputs = batch(model)
    copied = pickle.loads(pickle.dumps(model))
    assert step(copied, inputs).equals(step(model, inputs))
    assert siblings(copied) == siblings(model) != set()
    assert shared(model, copied) == set()


def test_saved_whole_and_loaded_in_another_process(tmp_path: Path) -> None:
    """Both processes are fresh ones: in pytest's, products on a CPU may be rounded in other places.

    They have in common what imports slowly, and nothing of fastpeft.
    """
    run_fresh(f"""
import os
import peft, torch
torch.set_num_threads(1)
if os.fork() == 0:
    import fastpeft
    from tests.integration.test_saving import batch, make, step
    torch.manual_seed({torch.initial_seed()})
    watching, grouped = fastpeft.accelerate(make()), fastpeft.accelerate(make())
    inputs = batch(grouped)
    step(grouped, inputs)
    models = [watching, grouped]
    torch.save((models, inputs), {str(tmp_path / "models.pt")!r})
    torch.save([step(model, inputs).gradients for model in models], {str(tmp_path / "gradients.pt")!r})
    sys.exit()
assert os.wait()[1] == 0
from torch.utils.hooks import RemovableHandle
assert "fastpeft" not in sys.modules
models, inputs = torch.load({str(tmp_path / "models.pt")!r}, weights_only=False)
import fastpeft
for model, expected in zip(models, torch.load({str(tmp_path / "gradients.pt")!r}, weights_only=False)):
    kept = {{number for m in model.modules() for number in (*m._forward_hooks, *m._forward_pre_hooks)}}
    assert kept and max(kept) < RemovableHandle.next_id, "the next hook would take the number of one of ours"
    model(**inputs).loss.backward()
    found = {{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}
    assert found.keys() == expected.keys() and all(torch.equal(g, expected[name]) for name, g in found.items())
    assert any(row.partners for row in fastpeft.report(model).rows)
    fastpeft.restore(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
""")


def test_parameters_assigned_anew(accelerated: PeftModel) -> None:
    """`load_state_dict(assign=True)` puts other tensors in the parameters' place."""
    plain = fastpeft.restore(copy.deepcopy(accelerated))
    torch.manual_seed(1)
    state = {name: torch.randn_like(value) * 0.1 for name, value in plain.state_dict().items()}
    for model in (plain, accelerated):
        model.load_state_dict({name: value.clone() for name, value in state.items()}, assign=True)
    inputs = batch(plain)
    assert_step_close(step(accelerated, inputs), step(plain, inputs), truth(plain, inputs))


def test_moved_to_another_dtype(accelerated: PeftModel) -> None:
    plain = fastpeft.restore(copy.deepcopy(accelerated)).to(torch.bfloat16)
    accelerated.to(torch.bfloat16)
    inputs = batch(plain)
    assert_step_close(step(accelerated, inputs), step(plain, inputs), truth(plain, inputs))


def shared(one: nn.Module, other: nn.Module) -> set[str]:
    """Paths of modules that a model's groups, watches or hooks take from the other model."""
    foreign = {id(module) for module in one.modules()}
    return {path for path, module in other.named_modules() for known in reached(module) if id(known) in foreign}


def reached(module: Any) -> list[nn.Module]:
    group, watch = getattr(module, "fastpeft_group", None), getattr(module, "fastpeft_watch", None)
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    owners = [group, watch, *(getattr(hook, "__self__", None) for hook in hooks)]
    found = []
    for owner in owners:
        found += [getattr(owner, "parent", None), *getattr(owner, "members", ())]
        found += [*getattr(owner, "parents", {}).values(), *getattr(owner, "waiting", {}).values()]
    return [module for module in found if module is not None]


def comparable(shape: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
    """Hooks by their number only: a copy has its own."""
    return {path: [list(v) if isinstance(v, dict) else v for v in row] for path, row in shape.items()}
