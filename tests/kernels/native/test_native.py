"""The C++ library: the same bits as PyTorch, rebuilt when its source changes, and never required."""

import os
import shutil
import signal
import subprocess
import sysconfig
import threading
import time
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from fastpeft_kernels.common import random
from fastpeft_kernels.native import build, dropout_native, extension, native_library


@pytest.fixture
def library():
    found = native_library()
    if found is None:
        pytest.skip("no C++ compiler here")
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(37, 301), (1, 1), (3, 4096), (0, 8), (8, 0)])
def test_same_numbers_as_pytorch(library, monkeypatch, dtype, shape):
    x = torch.randn(shape).to(dtype)
    if x.numel() > 2:
        x.view(-1)[0], x.view(-1)[1] = float("nan"), float("inf")
    seed = torch.tensor([-(2**62) - 12345])
    native = random.dropout(x, seed, 0.3, stream=2)
    monkeypatch.setattr(random, "dropout_native", lambda *_: False)
    torch.testing.assert_close(native, random.dropout(x, seed, 0.3, stream=2), rtol=0, atol=0, equal_nan=True)


def test_strided_rows(library):
    x = torch.randn(16, 64)
    seed = torch.tensor([7])
    torch.testing.assert_close(
        random.dropout(x[:, 16:48], seed, 0.5), random.dropout(x[:, 16:48].contiguous(), seed, 0.5)
    )


def test_other_layouts_and_dtypes_are_left_to_pytorch():
    x = torch.randn(8, 8)
    assert not dropout_native(x.t(), torch.empty(8, 8), 1, 0, 0, 1.0)
    assert not dropout_native(x.double(), torch.empty(8, 8).double(), 1, 0, 0, 1.0)


def test_faster_than_dropout_of_torch(library):
    x, seed = torch.randn(512, 512), torch.tensor([1])

    def best(function):
        times = []
        for _ in range(20):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
        return min(times)

    assert best(lambda: random.dropout(x, seed, 0.1)) < best(lambda: torch.nn.functional.dropout(x, 0.1))


def test_without_compiler_pytorch_serves_and_one_line_says_so(monkeypatch, caplog):
    def fails(*_, **__):
        raise subprocess.CalledProcessError(1, ["c++"], stderr="c++: no such instruction\nmore")

    monkeypatch.setattr(build, "FLAGS", ("-something-else",))
    monkeypatch.setattr(build.subprocess, "run", fails)
    native_library.cache_clear()
    try:
        assert native_library() is None
        x, seed = torch.randn(8, 8), torch.tensor([1])
        kept = random.dropout(x, seed, 0.5)
        assert torch.equal(kept != 0, random.dropout_bits(seed, 0, 8, 8) >= random.keep_threshold(0.5))
        assert [record.message for record in caplog.records] == [
            "the C++ kernels for CPU could not be built, PyTorch serves instead: c++: no such instruction"
        ]
    finally:
        native_library.cache_clear()


def test_a_build_whose_process_ends_is_finished(monkeypatch, tmp_path):
    """By the shell that called the compiler: half a minute's work is not begun anew by each short process."""
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\nsleep 0.2\necho compiled > "$2"\n')
    compiler.chmod(0o755)
    monkeypatch.setattr(cpp_extension, "get_cxx_compiler", lambda: str(compiler))
    monkeypatch.setattr(cpp_extension, "get_default_build_root", lambda: str(tmp_path))
    begun = []

    def ends(command, **options):
        names = ("start_new_session", "pass_fds")
        begun.append(subprocess.Popen(command, **{name: options[name] for name in names}))
        raise SystemExit

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(build.subprocess, "run", ends)
        build.built("some", ("dropout.cpp",), (), (), "")
    assert begun[0].wait(timeout=30) == 0
    (library,) = (tmp_path / "fastpeft").glob("*.so")
    assert library.read_text() == "compiled\n"
    assert build.built("some", ("dropout.cpp",), (), (), "") == library, "not compiled again"
    compiler.write_text("#!/bin/sh\necho no such instruction >&2; exit 3\n")
    with pytest.raises(subprocess.CalledProcessError) as raised:
        build.built("other", ("dropout.cpp",), (), (), "")
    assert build.reason(raised.value) == "no such instruction"
    compiler.write_text(
        "#!/bin/sh\nprintf 'In file included from a.h:\\nb.h:3: error: C++20 is needed\\nb.h: note' >&2; exit 1\n"
    )
    with pytest.raises(subprocess.CalledProcessError) as raised:
        build.built("other", ("dropout.cpp",), (), (), "")
    assert build.reason(raised.value) == "b.h:3: error: C++20 is needed"
    assert list((tmp_path / "fastpeft").glob("*.so")) == [library]


def test_processes_that_begin_together_compile_once(monkeypatch, tmp_path):
    compiler, log = tmp_path / "c++", tmp_path / "log"
    compiler.write_text(f'#!/bin/sh\necho called >> {log}\nwhile [ "$1" != -o ]; do shift; done\nsleep 0.3\n')
    compiler.chmod(0o755)
    monkeypatch.setattr(cpp_extension, "get_cxx_compiler", lambda: str(compiler))
    monkeypatch.setattr(cpp_extension, "get_default_build_root", lambda: str(tmp_path))
    threads = [threading.Thread(target=build.built, args=("some", ("dropout.cpp",), (), (), "")) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert log.read_text() == "called\n" and len(list((tmp_path / "fastpeft").glob("*.so"))) == 1


TOOLS = shutil.which(cpp_extension.get_cxx_compiler()) and Path(sysconfig.get_paths()["include"], "Python.h").exists()


@pytest.mark.skipif(not TOOLS, reason="needs a C++ compiler and the headers of Python")
def test_torch_s_headers_are_compiled():
    """The standard of C++ that they ask for rises. What needs the result is skipped where there is none."""
    assert extension.group_extension(wait=True) is not None


def test_groups_go_on_in_python_where_nothing_can_be_built(monkeypatch, caplog):
    """A home folder that is a file, say: one line, and no second attempt."""
    monkeypatch.setattr(extension, "_state", {})
    monkeypatch.setattr(cpp_extension, "get_default_build_root", lambda: __file__)
    assert extension.group_extension(wait=True) is None and extension.group_extension() is None
    (said,) = [record.message for record in caplog.records]
    assert said.startswith("the C++ for groups of projections could not be built, Python serves: [Errno ")


def test_a_forked_process_begins_its_own_build(monkeypatch):
    """Threads do not go with it."""
    monkeypatch.setattr(extension, "_state", {"thread": threading.Thread()})
    monkeypatch.setattr(extension, "_lock", threading.Lock())
    monkeypatch.setattr(extension, "_build", lambda: extension._state.update(module="built"))
    with extension._lock:  # as another thread has it at that moment
        child = os.fork()
        if child == 0:
            signal.alarm(30)  # in place of waiting for ever
            os._exit(0 if extension.group_extension(wait=True) == "built" else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_dropout_of_any_number_of_threads_is_the_same() -> None:
    x = torch.randn(300, 257)  # large enough for threads
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(torch.full_like(x, torch.nan))
            if not dropout_native(x, results[-1], 7, 1, 0, 1.25):
                pytest.skip("no C++ compiler")
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
