"""Data that nothing can be learned from, or the wrong thing, is noticed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastpeft
from fastpeft.noticing import dependence
from fastpeft.noticing.batches import FIRST
from tests.integration.models import VOCABULARY, batch, make

from .watched import Batches, kinds, loop


class Late:
    """Batches of another kind after the first."""

    def __init__(self, first: int, before: Batches, after: Batches) -> None:
        self.left, self.before, self.after = first, before, after

    def __call__(self, model: nn.Module) -> dict[str, Tensor]:
        self.left -= 1
        return (self.before if self.left >= 0 else self.after)(model)


class TestData:
    def test_all_labels_are_ignored(self) -> None:
        def ignored(model: nn.Module) -> dict[str, Tensor]:
            given = batch(model)
            return given | {"labels": torch.full_like(given["labels"], -100)}

        [notice] = loop(make("llama"), batches=ignored).notices
        assert notice.kind == "no-labels" and "all labels of the first 8 batches are -100" in notice.text
        [notice] = loop(make("llama"), 2, batches=ignored).notices
        assert "all labels of the first 2 batches are -100" in notice.text

        model = make("llama")
        optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1e-3)
        with fastpeft.watch(model) as watch:
            for _ in range(9):
                model(**ignored(model)).logits.square().mean().backward()  # a loss of the script's own
                optimizer.step()
        assert kinds(watch) == []

    def test_batches_whose_labels_are_ignored_later(self) -> None:
        def ignored(model: nn.Module) -> dict[str, Tensor]:
            given = batch(model)
            return given | {"labels": torch.full_like(given["labels"], -100)}

        late = Late(8, batch, ignored)
        [notice] = loop(make("llama"), 12, batches=late).notices
        assert notice.kind == "loss" and "all labels of the batch are -100" in notice.text

    def test_padding_that_attention_hides(self) -> None:
        def careless(model: nn.Module) -> dict[str, Tensor]:
            given = batch(model)
            return given | {"labels": given["input_ids"]}

        [notice] = loop(make("llama"), batches=careless).notices
        assert notice.kind == "padding" and notice.text.startswith("3 of the 30 labels")

    @pytest.mark.parametrize("name", ["llama", "t5"])
    def test_padding_without_a_mask(self, name: str) -> None:
        def careless(model: nn.Module) -> dict[str, Tensor]:
            ids = torch.randint(3, VOCABULARY, (3, 12))
            ids[1:, 6:] = 0
            return {"input_ids": ids, "labels": ids}

        [notice] = loop(make(name), batches=careless).notices
        assert (
            notice.kind == "padding"
            and "2 of the 3 rows of a batch learn to write the padding token (id 0)" in notice.text
        )

    def test_ends_of_text_that_are_the_padding_token_are_no_fault(self) -> None:
        def ended(model: nn.Module) -> dict[str, Tensor]:
            ids = torch.randint(3, VOCABULARY, (3, 12))
            ids[:, -2:] = 0
            return {"input_ids": ids, "labels": ids}

        assert kinds(loop(make("llama"), batches=ended)) == []

    def test_an_id_without_an_embedding(self) -> None:
        def foreign(model: nn.Module) -> dict[str, Tensor]:
            given = batch(model)
            given["input_ids"][0, 0] = VOCABULARY
            return given

        with pytest.raises(IndexError), fastpeft.watch(make("llama")) as watch:
            watch.model(**foreign(watch.model))
        [notice] = watch.notices
        assert notice.text.startswith(
            f"input_ids: expected token ids below {VOCABULARY}, which is how many the model has, got 96"
        )

    @pytest.mark.parametrize(("tokens", "said"), [(97, True), (96, False), (40, False)])
    def test_a_tokenizer_with_more_tokens(self, tokens: int, said: bool) -> None:
        with fastpeft.watch(make("llama"), tokenizer=range(tokens)) as watch:
            pass
        assert kinds(watch) == ["vocabulary"] * said

    @pytest.mark.parametrize(("word", "said"), [("<image_soft_token>", False), ("<mine>", True)])
    def test_a_token_for_pictures_of_a_model_of_text(self, word: str, said: bool) -> None:
        """Gemma 3's small models are of text alone, and share their tokenizer with the others."""

        class Tokenizer(list[str]):
            def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
                return [self[one] for one in ids]

        words = Tokenizer([*map(str, range(VOCABULARY)), word])
        with fastpeft.watch(make("llama"), tokenizer=words) as watch:
            pass
        assert kinds(watch) == ["vocabulary"] * said

    def test_another_models_tokenizer(self) -> None:
        model = nn.Module()
        model.get_input_embeddings = lambda: nn.Embedding(50257, 1)  # type: ignore[assignment]
        for tokens, said in ((32000, True), (50000, False)):
            with fastpeft.watch(model, tokenizer=range(tokens)) as watch:
                pass
            assert kinds(watch) == ["vocabulary"] * said

    @pytest.mark.parametrize("as_table", [False, True])
    def test_evaluation_rows_that_are_trained_on(self, as_table: bool) -> None:
        from datasets import Dataset

        def rows(*ids: int) -> Any:
            given = [{"input_ids": [one, 1, 2], "labels": one % 2} for one in ids]
            return Dataset.from_list(given) if as_table else given

        model = make("llama")
        with fastpeft.watch(model, train_dataset=rows(4, 5, 6), eval_dataset=rows(7, 6, 5)) as watch:
            pass
        assert [notice.text for notice in watch.notices] == [
            "2 rows (2, 3) of the evaluation's 3 have a text that is trained on: they measure memory"
        ]
        with fastpeft.watch(model, train_dataset=rows(4, 5), eval_dataset={"one": rows(6), "two": rows(5)}) as watch:
            pass
        assert watch.notices[0].text.startswith("two: 1 row (1)")
        for other in (rows(7), rows(), None, iter([1]), 3, [object()]):
            with fastpeft.watch(model, train_dataset=rows(4, 5, 6), eval_dataset=other) as watch:
                pass
            assert kinds(watch) == []


class Constant(nn.Module):
    """A classifier whose loss knows the labels alone, or, with `begins`, what it reads once it has learned."""

    def __init__(self, begins: bool) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, 3)
        self.begins = begins
        nn.init.zeros_(self.head.weight)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        read = self.embedding(input_ids).mean(1)
        return {"loss": nn.functional.cross_entropy(self.head(read if self.begins else torch.ones_like(read)), labels)}


class TestInput:
    @pytest.mark.parametrize("begins", [False, True])
    def test_the_loss_does_not_depend_on_it(self, begins: bool) -> None:
        def read(model: nn.Module) -> dict[str, Tensor]:
            return {"input_ids": torch.randint(3, VOCABULARY, (6, 8)), "labels": torch.arange(6) % 3}

        model = Constant(begins)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        with fastpeft.watch(model) as watch:
            for _ in range(max(dependence.TRIALS) + 5):
                model(**read(model))["loss"].backward()
                optimizer.step()
        assert kinds(watch) == ["no-input"] * (not begins)

    def test_all_rows_are_the_same(self) -> None:
        def same(model: nn.Module) -> dict[str, Tensor]:
            return {"input_ids": torch.full((3, 10), 7), "labels": torch.tensor([0, 1, 2])}

        def one(model: nn.Module) -> dict[str, Tensor]:
            return same(model) | {"labels": torch.tensor([1, 1, 1])}

        [notice] = loop(make("bert"), batches=same).notices
        assert notice.kind == "no-input" and notice.text.startswith("all 24 rows of the first 8 batches")
        assert kinds(loop(make("bert"), batches=one)) == [], "one row that is learned by heart"

    def test_the_same_prompt_with_pictures_is_no_fault(self) -> None:
        model = Coarse(torch.float32)
        with fastpeft.watch(model) as watch:
            for _ in range(FIRST + 1):
                given = {"input_ids": torch.full((6, 8), 7), "labels": torch.arange(6) % 3}
                model(**given, pixel_values=torch.randn(6, 8))["loss"].backward()
        assert kinds(watch) == []

    @pytest.mark.parametrize("blind", [False, True])
    def test_few_bits_of_a_loss_tell_nothing(self, blind: bool) -> None:
        """In bfloat16 the losses of two inputs are often the same; what they are computed from is not."""
        model = Coarse(torch.bfloat16, blind)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        with fastpeft.watch(model) as watch:
            for _ in range(max(dependence.TRIALS) + 5):
                given = {"input_ids": torch.randint(3, VOCABULARY, (6, 8)), "labels": torch.arange(6) % 3}
                model(**given)["loss"].backward()
                optimizer.step()
        assert kinds(watch) == ["no-input"] * blind


class Coarse(nn.Module):
    """A classifier that has hardly begun to tell its inputs apart, or, if `blind`, never will."""

    def __init__(self, dtype: torch.dtype, blind: bool = False) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, 8, dtype=dtype), nn.Linear(8, 3, dtype=dtype)
        self.blind = blind
        nn.init.normal_(self.head.weight, std=1e-4)
        nn.init.zeros_(self.head.bias)

    def forward(self, input_ids: Tensor, labels: Tensor, pixel_values: Tensor | None = None) -> Any:
        read = self.embedding(input_ids).mean(1) + (0 if pixel_values is None else pixel_values)
        logits = self.head(torch.ones_like(read) if self.blind else read)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}
