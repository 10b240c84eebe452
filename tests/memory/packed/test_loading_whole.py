"""fastpeft.load of 260 MB, in processes of their own: host memory, and an end by SIGKILL."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.fresh import ROOT, run_fresh

from .checkpoints import check_same, checkpoint, plain

pytestmark = pytest.mark.full
LAYERS = 8

LOAD = """
import threading, time
from pathlib import Path
import torch
import fastpeft
torch.set_num_threads(1)

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

def load(path):
    return fastpeft.load(path, device="cpu", dtype=torch.bfloat16, cache_dir={cache!r})
"""
PEAK = """
load({small!r})  # what libraries set up when they are first used
before, highest, done = anonymous(), 0, False
def watch():
    global highest
    while not done:
        highest = max(highest, anonymous())
        time.sleep(0.002)
watching = threading.Thread(target=watch)
watching.start()
model = load({large!r})
done = True
watching.join()
kept = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
print(highest - before, kept)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("large")
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": LAYERS, "num_attention_heads": 8}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=1000)).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="60MB")
    return str(folder)


def test_host_memory_holds_the_packed_model_and_little_more(
    large: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(1 << 20))  # else glibc keeps hundreds of MiB of freed memory
    small = checkpoint(tmp_path)
    shards = [path.stat().st_size / 2**20 for path in Path(large).glob("*.safetensors")]
    for _ in ("packing", "packed"):
        code = LOAD.format(cache=str(tmp_path / "cache")) + PEAK.format(small=small, large=large)
        peak, kept = map(float, run_fresh(code).split())
        print(f"peak {peak:.0f} MiB, model {kept:.0f} MiB, checkpoint {sum(shards):.0f} MiB")
        assert 0.9 * kept < peak < 0.7 * sum(shards)


def test_a_load_that_was_killed_is_gone_on_with(large: str, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    smaller = "from fastpeft.memory.packed import cache\ncache.FILE_BYTES = 4 << 20\n"
    code = LOAD.format(cache=str(cache)) + smaller + f"load({large!r})"
    path = f"import sys\nsys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'kernels')!r}]\n"
    process = subprocess.Popen([sys.executable, "-c", path + code], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(cache.glob("*/*.safetensors"))) < 4 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    assert process.wait(30) == -signal.SIGKILL
    before = set(cache.glob("*/*.safetensors"))
    count = """
import transformers.integrations.bitsandbytes as home
convert, names = home.Bnb4bitQuantize.convert, []
def counted(self, tensors, **more):
    names.extend(tensors)
    return convert(self, tensors, **more)
home.Bnb4bitQuantize.convert = counted
"""
    anew = int(run_fresh(LOAD.format(cache=str(cache)) + count + f"load({large!r})\nprint(len(names))"))
    assert len(before) >= 4 and 0 < anew <= 7 * LAYERS - len(before) and before <= set(cache.glob("*/*.safetensors"))
    assert int(run_fresh(LOAD.format(cache=str(cache)) + count + f"load({large!r})\nprint(len(names))")) == 0


def test_the_bits_are_those_of_transformers(large: str, tmp_path: Path) -> None:
    import fastpeft

    expected = plain("llama", large, "nf4", True, torch.bfloat16)
    for _ in range(2):
        check_same(fastpeft.load(large, device="cpu", dtype=torch.bfloat16, cache_dir=tmp_path), expected)
