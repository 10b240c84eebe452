"""Every example on every page runs, and prints what the page says."""

from __future__ import annotations

from pathlib import Path

import pytest

import fastpeft

from .pages import PAGES, README_SETUP, UNNAMED, read
from .snippets import Block, PageError, Replace, Runner, Setup, commands, read_page


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A page that forgot to replace a name fails at once, and nothing is left in the user's folders."""
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.mark.parametrize("page", PAGES)
def test_the_examples_of(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: None) -> None:
    steps = read_page(read(page), page, unnamed=page in UNNAMED)
    if page == "README.md":
        steps.insert(0, Setup(1, README_SETUP))
    (tmp_path / "page").mkdir()
    monkeypatch.chdir(tmp_path / "page")
    Runner(page).run(steps)


def run(text: str) -> Runner:
    runner = Runner("page.md")
    runner.run(read_page(text, "page.md"))
    return runner


class TestReading:
    def test_everything_in_order(self) -> None:
        text = """
<!-- test: setup a = 1 -->
<!-- test: replace "a" by "b" -->

```python title="x.py"
print(a)
```

<!-- test: output -->
```text
1
```
"""
        assert read_page(text, "page.md") == [
            Setup(2, "a = 1"),
            Replace("a", "b"),
            Block(6, "python", "print(a)", "x.py"),
            Block(11, "text", "1", output="exact"),
        ]

    def test_setup_of_several_lines_and_an_indented_block(self) -> None:
        text = "<!-- test: setup\na = 1\nif a:\n    b = 2\n-->\n- item\n\n    ```python\n    c = a + b\n    ```\n"
        assert run(text).namespace["c"] == 3

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("```rust\n```\n", r"page\.md:1: expected a block of one of python, .* got 'rust'"),
            ("```\n```\n", "got ''"),
            ("```python\n", "a block that does not end"),
            ("<!-- test: skip -->\n```bash\n```\n", "skip: expected a reason in words, got ''"),
            ("<!-- test: skip gpu -->\n```bash\n```\n", "skip: expected a reason in words, got 'gpu'"),
            ("<!-- test: skip needs a GPU -->\nwords\n", "expected a block after the comment before, got 'words'"),
            ("<!-- test: skip needs a GPU -->\n", "the end of the page"),
            ("<!-- test: ignore this -->\n", "not a comment that the test knows: 'ignore this'"),
            ("<!-- test: exit soon -->\n```bash\n```\n", "not a comment that the test knows: 'exit soon'"),
            ("<!-- test: replace a by b -->\n", "not a comment that the test knows"),
            ("<!-- test: setup a = 1\n", "a comment for the test that does not end"),
        ],
    )
    def test_mistakes(self, text: str, message: str) -> None:
        with pytest.raises(PageError, match=message):
            read_page(text, "page.md")


class TestRunning:
    def test_a_block_that_fails_names_its_line(self) -> None:
        with pytest.raises(ZeroDivisionError) as caught:
            run("# Page\n\n```python\n1 / 0\n```\n")
        assert caught.traceback[-1].lineno == 3  # counted from 0

    def test_a_skipped_block_is_not_run(self) -> None:
        run("<!-- test: skip needs two GPUs -->\n```python\n1 / 0\n```\n")

    @pytest.mark.parametrize(
        ("printed", "shown", "fits"),
        [
            ("a  1.5e-07   b", "a  2.25e-08  b", True),
            ("passed, 158 checks", "passed, 4 checks", True),
            ("passed, 158 checks", "FAILED, 158 checks", False),
        ],
    )
    def test_output_but_for_numbers(self, printed: str, shown: str, fits: bool) -> None:
        text = f"```python\nprint({printed!r})\n```\n<!-- test: output{{}} -->\n```text\n{shown}\n```\n"
        with pytest.raises(PageError, match="the page shows"):
            run(text.format(""))
        if fits:
            run(text.format(", details vary"))
        else:
            with pytest.raises(PageError, match="but this was printed"):
                run(text.format(", details vary"))

    def test_commands(self) -> None:
        assert list(commands("# first\nfastpeft a \\\n  --b\n\n", "bash")) == ["fastpeft a    --b"]
        assert list(commands("$ fastpeft a\nprinted\n", "console")) == ["fastpeft a"]
        assert "fastpeft" in run("```bash\nfastpeft --version\n```\n").printed

    @pytest.mark.parametrize(
        ("command", "message"), [("pip install .", "expected `fastpeft ...`"), ("fastpeft nope", "exit code 2")]
    )
    def test_wrong_commands(self, command: str, message: str) -> None:
        with pytest.raises(PageError, match=message):
            run(f"```bash\n{command}\n```\n")

    def test_commands_that_fail_as_the_page_says(self) -> None:
        text = "<!-- test: exit 2 -->\n```bash\nfastpeft nope\n```\n<!-- test: output -->\n```text\n{}\n```\n"
        run(text.format("fastpeft: No such command 'nope'."))
        run("<!-- test: exit 0 or 1 -->\n```bash\nfastpeft --version\n```\n")
        with pytest.raises(PageError, match="exit code 2"):
            run("<!-- test: exit 0 or 1 -->\n```bash\nfastpeft nope\n```\n")

    def test_hidden_lines_see_what_was_printed_and_shown(self) -> None:
        shown = '```bash\nfastpeft --version\n```\n```json\n{"a": 1}\n```\n'
        assert run(f"{shown}<!-- test: setup found = (printed, shown) -->").namespace["found"] == (
            f"fastpeft {fastpeft.__version__}\n",
            '{"a": 1}',
        )

    def test_a_block_with_a_title_is_a_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        rows = '{"text": "a"}\n{"text": "b"}'
        run(f"""```json title="train.jsonl"\n{rows}\n```\n```yaml title="run.yaml"\nlora: {{r: 8}}\n```\n""")
        assert Path("train.jsonl").read_text() == rows + "\n" and Path("run.yaml").exists()

    def test_json_that_is_none(self) -> None:
        with pytest.raises(ValueError, match="Expecting"):
            run("```json\n{]\n```\n")

    def test_configurations(self) -> None:
        run("```yaml\nlora: {r: 8}\n```\n")
        with pytest.raises(ValueError, match=r"lora\.rank: unknown key"):
            run("```yaml\nlora: {rank: 8}\n```\n")
