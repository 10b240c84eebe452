"""What a model can be trained to do, as far as its configuration tells."""

from __future__ import annotations

from typing import Any

from fastpeft.errors import UserError

AUTO = {
    "causal-lm": ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "a decoder (causal language model)"),
    "seq2seq-lm": (
        "AutoModelForSeq2SeqLM",
        "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
        "an encoder-decoder",
    ),
    "masked-lm": (
        "AutoModelForMaskedLM",
        "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
        "an encoder with a masked-language head",
    ),
    "sequence-classification": (
        "AutoModelForSequenceClassification",
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
        "a model that transformers has a classifier for",
    ),
    "token-classification": (
        "AutoModelForTokenClassification",
        "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
        "a model that transformers has a classifier of tokens for",
    ),
    "question-answering": (
        "AutoModelForQuestionAnswering",
        "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
        "a model that transformers has a head for extracted answers for",
    ),
    "feature-extraction": ("AutoModel", "MODEL_MAPPING_NAMES", "a model without a head"),
}
MEDIA = {
    "image-text-to-text": ("AutoModelForImageTextToText", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"),
    "speech-seq2seq": ("AutoModelForSpeechSeq2Seq", "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES"),
    "audio-classification": ("AutoModelForAudioClassification", "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES"),
}
"""Tasks of models that see or hear, which are planned and not trained by `fastpeft train`."""
SOUND = ("speech-seq2seq", "audio-classification")
"""Of these those whose rows are recordings."""
PEFT_TASKS = {
    "causal-lm": "CAUSAL_LM",
    "seq2seq-lm": "SEQ_2_SEQ_LM",
    "sequence-classification": "SEQ_CLS",
    "token-classification": "TOKEN_CLS",
    "question-answering": "QUESTION_ANS",
    "feature-extraction": "FEATURE_EXTRACTION",
}
"""PEFT has no name for masked language models."""
HEADS = {
    "sequence-classification": ("classifier", "score"),
    "token-classification": ("classifier", "score"),
    "question-answering": ("qa_outputs",),
}
"""Tasks with a head of their own, and the modules of it that PEFT trains and saves whole by itself."""
UNUSED = {"feature-extraction": ("pooler.dense",)}
"""Modules that have no part in what a task takes from the model."""

SAVED = {
    "ForSequenceClassification": "sequence-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMaskedLM": "masked-lm",
}
"""How the names of architectures end."""


def auto_class(task: str) -> Any:
    """transformers' Auto class for a task."""
    import transformers

    return getattr(transformers, (AUTO.get(task) or MEDIA[task])[0])


def head_options(task: str, labels: list[str] | None, problem_type: str | None) -> dict[str, Any]:
    """What `from_pretrained` is to know of a head.

    Args:
        labels: names of the classes; None where there are none.
        problem_type: as transformers' configurations have it; None for tasks without one.
    """
    if task not in HEADS:
        return {}
    if task == "question-answering":
        return {"num_labels": 2}  # start and end, whatever the checkpoint was for
    found: dict[str, Any] = {} if problem_type is None else {"problem_type": problem_type}
    if problem_type == "regression":
        return found | {"num_labels": 1}
    if labels is None:
        return found
    names = dict(enumerate(labels))
    return found | {"num_labels": len(labels), "id2label": names, "label2id": {name: n for n, name in names.items()}}


def fits(config: Any, task: str) -> bool:
    """Whether a model of this configuration can be loaded for a task, and would then see what it should.

    An encoder loads as a causal model too, but each token would see the next.
    """
    from transformers.models.auto import modeling_auto

    if getattr(config, "auto_map", None):  # its own code decides
        return True
    wanted = getattr(modeling_auto, (AUTO.get(task) or MEDIA[task])[1]).get(config.model_type)
    if wanted is None:
        return False
    if task != "causal-lm":
        return True
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    encoder = config.model_type in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    saved_as_decoder = bool({*names} & {*(config.architectures or ())}) or getattr(config, "is_decoder", False)
    return not getattr(config, "is_encoder_decoder", False) and (saved_as_decoder or not encoder)


def resolve_task(wanted: str, kind: Any, config: Any, name: str, key: str = "model.name") -> str:
    """The task for a kind of data and a model.

    Args:
        wanted: "auto", or one of AUTO.
        kind: of the data, with the tasks it can serve.
        config: the model's.
        name: of the model, for messages.
        key: what the user calls it.

    Raises:
        UserError: the model cannot do it.
    """
    tasks = kind.tasks if wanted == "auto" else (wanted,)
    if wanted == "auto" and getattr(config, "is_encoder_decoder", False) and "seq2seq-lm" in tasks:
        tasks = ("seq2seq-lm",)
    for task in tasks:
        if fits(config, task):
            return str(task)
    expected = " or ".join(AUTO[task][2] for task in tasks)
    got = (config.architectures or [config.model_type])[0]
    raise UserError(f"{key}: expected {expected} for data with columns {kind}, got {name}, which is {got}")


def task_of(config: Any) -> str:
    """The task that a checkpoint was saved for, else the first that its model can do."""
    saved = (getattr(config, "architectures", None) or [""])[0]
    for ending, task in SAVED.items():
        if saved.removesuffix("Simple").endswith(ending):
            return task
    if getattr(config, "is_encoder_decoder", False):
        return "seq2seq-lm"
    return "causal-lm" if fits(config, "causal-lm") else "sequence-classification"


def planned_task(config: Any, pictures: bool) -> str:
    """As `task_of`, for plans: that of recordings, too, and of rows with pictures, which models that see have for text
    alone as well.

    Raises:
        UserError: of CTC's loss nothing is known without values.
    """
    if (getattr(config, "architectures", None) or [""])[0].endswith("ForCTC"):
        raise UserError("task: expected another than CTC's, whose loss needs values; try audio-classification")
    usual = task_of(config)
    for task in MEDIA:
        if fits(config, task) and ((pictures and task not in SOUND) or not fits(config, usual)):
            return task
    return usual
